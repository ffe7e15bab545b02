"""Other packages for very many classes, on slidex's splits: omikuji, PECOS's XR-Linear, napkinXC.

Each is installed in a virtual environment of its own under ``.benchmark-cache/peers``, as their requirements exclude
each other's and slidex's, and run there by ``peer_worker.py`` on the same rows as slidex, scaled to unit L2 norm. What
comes back are predictions, judged by `slidex.metrics` like slidex's own, and what training and prediction took.

Results are kept in the cache for each set and peer, and taken from there if nothing that they depend on has changed.
A package that does not install, or a run that fails or takes too long, is a result with a reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import peer_worker
from benchmarks.datasets import CACHE
from slidex.train.run import fingerprint

if TYPE_CHECKING:
    from slidex.data import CsrArrays, Dataset

FOLDER = CACHE / "peers"
K = 10
"""Classes predicted for a row."""
MINUTES = 25.0
"""Wall time that a run may take, prediction included."""
REQUIREMENTS = {
    "omikuji": (("omikuji>=0.5,<0.6", "numpy"),),
    "napkinxc": (("napkinxc>=0.7,<0.8", "numpy", "scipy"),),
    # Its own requirements bring torch and transformers, gigabytes that XR-Linear does not use.
    "libpecos": (("--no-deps", "libpecos>=1.2,<1.3"), ("numpy<2", "scipy<1.14", "scikit-learn")),
}
"""What pip installs for each package, one call after the other."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A package and its settings.

    Args:
        name: For options and files.
        label: For tables.
        package: One of `REQUIREMENTS`.
        settings: What differs from the package's defaults; ``nr_splits`` of 0 is PECOS's one-vs-all.
        only: Sets that it runs on; empty for all.
    """

    name: str
    label: str
    package: str
    settings: dict[str, Any] = field(default_factory=dict)
    only: tuple[str, ...] = ()


_BONSAI = {"cluster_balanced": False, "cluster_k": 100, "max_depth": 3}
PEERS = (
    Peer("xr-linear", "PECOS XR-Linear, 32 splits", "libpecos", {"nr_splits": 32}),
    Peer("pecos-ova", "PECOS one-vs-all", "libpecos", {"nr_splits": 0}, only=("eurlex-4k",)),
    Peer("omikuji-1", "omikuji, 1 tree", "omikuji", {"n_trees": 1}),
    Peer("omikuji-3", "omikuji, 3 trees (Parabel)", "omikuji"),
    Peer("omikuji-flat", "omikuji, collapsed every 5 layers", "omikuji", {"collapse_every_n_layers": 5}),
    Peer("omikuji-bonsai", "omikuji, Bonsai-like", "omikuji", _BONSAI),
    Peer("napkinxc-plt", "napkinXC PLT", "napkinxc"),
)
BY_NAME = {peer.name: peer for peer in PEERS}


class PeerError(Exception):
    """A peer cannot be installed or run; the text is the reason."""


def environment(package: str, folder: Path = FOLDER) -> Path:
    """The Python of the package's environment, made on first use.

    Raises:
        PeerError: with the last line of pip's, if it does not install.
    """
    home = folder / "environments" / package
    python, stamp = home / "bin" / "python", home / "installed.json"
    wanted = json.dumps(REQUIREMENTS[package])
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    shutil.rmtree(home, ignore_errors=True)
    home.parent.mkdir(parents=True, exist_ok=True)
    _call([sys.executable, "-m", "venv", "--without-pip", str(home)], "no virtual environment")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--quiet", "--disable-pip-version-check"]
    for arguments in REQUIREMENTS[package]:
        _call([*pip, "install", *arguments], "does not install")
    stamp.write_text(wanted)
    return python


def _call(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PeerError(f"{what}: {_last_line(done.stderr) or f'exit status {done.returncode}'}")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or [""])[-1]


def hand_over(dataset: Dataset, folder: Path) -> dict[str, str]:
    """Writes the splits as plain arrays, inputs scaled to unit L2 norm, and the training rows as text too, once.

    Returns:
        The ``data`` and ``text`` of a job.
    """
    done = folder / "done"
    if not (done.is_file() and done.read_text() == fingerprint(dataset)):
        for name in ("train", "test"):
            split = dataset.split(name)
            x, y = _rows(split.x.unit_rows()), _rows(split.y)
            (folder / name).mkdir(parents=True, exist_ok=True)
            for side, rows in (("x", x), ("y", y)):
                for part in peer_worker.PARTS:
                    np.save(folder / name / f"{side}_{part}.npy", getattr(rows, part))
            if name == "train":
                write_text(folder / "train.txt", x, y)
        done.write_text(fingerprint(dataset))
    return {"data": str(folder), "text": str(folder / "train.txt")}


def _rows(csr: CsrArrays) -> peer_worker.Rows:
    values = np.ones(csr.nnz, dtype=np.float32) if csr.values is None else np.asarray(csr.values)
    return peer_worker.Rows(np.asarray(csr.indptr), np.asarray(csr.indices), values, csr.num_columns)


def write_text(path: Path, x: peer_worker.Rows, y: peer_worker.Rows) -> None:
    """Rows in the text format of the Extreme Classification Repository, seven digits a value."""
    with path.open("w", encoding="ascii") as file:
        file.write(f"{len(x.indptr) - 1} {x.num_columns} {y.num_columns}\n")
        bounds = zip(pairwise(x.indptr.tolist()), pairwise(y.indptr.tolist()), strict=True)
        for (first, last), (first_label, last_label) in bounds:
            pairs = zip(x.indices[first:last].tolist(), x.values[first:last].tolist(), strict=True)
            names = ",".join(map(str, y.indices[first_label:last_label].tolist()))
            file.write(f"{names} {' '.join(f'{i}:{value:.7g}' for i, value in pairs)}\n")


def peer_key(peer: Peer, dataset: Dataset, threads: int) -> str:
    """Changes with everything that a result depends on but the machine."""
    settings = [peer.settings, REQUIREMENTS[peer.package], threads, K, peer_worker.REVISION]
    return digest([peer.package, *settings, fingerprint(dataset)])


def digest(value: Any) -> str:
    """A short hash of a value that JSON can hold."""
    text = json.dumps(value, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def run_peer(
    peer: Peer,
    name: str,
    dataset: Dataset,
    *,
    threads: int,
    minutes: float = MINUTES,
    again: bool = False,
    folder: Path = FOLDER,
) -> tuple[dict[str, Any], np.ndarray]:
    """What the peer took, and its predictions int32 (test rows, K); from the cache if they are there.

    Args:
        peer: What to run.
        name: Of the set.
        dataset: The set, with splits ``train`` and ``test``.
        threads: Of training and prediction.
        minutes: Wall time of both together.
        again: Runs it, whatever is in the cache.
        folder: The cache.

    Raises:
        PeerError: if it does not install, fails, or takes longer.
    """
    place = folder / "results" / name / peer.name
    out, predicted, stamp = (place.with_suffix(suffix) for suffix in (".json", ".npz", ".key"))
    wanted = peer_key(peer, dataset, threads)
    if again or not (stamp.is_file() and stamp.read_text() == wanted):
        python = environment(peer.package, folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        for left in (out, predicted, stamp):
            left.unlink(missing_ok=True)
        job = {
            "package": peer.package,
            "settings": peer.settings,
            "threads": threads,
            "seed": 0,
            "k": K,
            "widths": {"x": dataset.num_features, "y": dataset.num_classes},
            "out": str(out),
            "model": str(folder / "model"),
            **hand_over(dataset, folder / "data" / name),
        }
        _work(python, job, minutes)
        stamp.write_text(wanted)
    measured = json.loads(out.read_text())
    measured["day"] = datetime.fromtimestamp(out.stat().st_mtime, UTC).date().isoformat()
    return measured, np.load(predicted, allow_pickle=False)["ids"]


def _work(python: Path, job: dict[str, Any], minutes: float) -> None:
    out, model = Path(job["out"]), Path(job["model"])
    job_file, log = out.with_suffix(".job"), out.with_suffix(".log")
    job_file.write_text(json.dumps(job))
    shutil.rmtree(model, ignore_errors=True)
    # Threads that wait for work sleep: else they count as CPU time where cores are shared.
    environ = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    environ.pop("PYTHONPATH", None)
    command = [str(python), peer_worker.__file__, str(job_file)]
    try:
        with log.open("w") as file:
            done = subprocess.run(
                command, stdout=file, stderr=file, env=environ, timeout=60 * minutes, check=False
            )
    except subprocess.TimeoutExpired:
        doing = "predicting" if out.is_file() else "training"
        raise PeerError(f"stopped after {minutes:g} minutes, {doing}") from None
    finally:
        shutil.rmtree(model, ignore_errors=True)
    if done.returncode:
        cause = _last_line(log.read_text(errors="replace"))
        raise PeerError(f"failed with exit status {done.returncode}: {cause}")
