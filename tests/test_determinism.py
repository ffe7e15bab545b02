"""Same seed, same bits: in the process that compiles the kernels, in those that load them, in one that resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from slidex.data import Dataset

MODES = ("shared", "per_sample", "exact")
CHILD = """
import hashlib, json, pathlib, sys
import slidex

data, out, *modes = sys.argv[1:]
compiled = []
def notify(event, facts):
    if event == "compiling":
        compiled.append(facts["kernel"])

sums = {}
for mode in modes:
    config = slidex.TrainConfig(
        mode=mode, hidden_width=21, dense_widths=(19,), batch_size=50, max_steps=12, seed=5, threads=2, valid_every=5,
        **({} if mode == "exact" else {"index_options": {"bits": 4, "tables": 4}}),
        **({"pool_size": 77} if mode == "shared" else {}),
    )
    run = slidex.fit(slidex.Dataset.open(data), pathlib.Path(out) / mode, config, notify=notify)
    folder = run.checkpoint().path
    sums[mode] = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.safetensors"))
    }
print(json.dumps({"sums": sums, "compiled": compiled}))
"""


def trained(data: Path, out: Path, cache: Path, modes: tuple[str, ...] = MODES) -> dict[str, Any]:
    """Checksums of every file of weights, moments and index by mode, and the names of the kernels compiled."""
    ended = subprocess.run(
        [sys.executable, "-c", CHILD, data, out, *modes],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"NUMBA_CACHE_DIR": str(cache)},
    )
    return json.loads(ended.stdout)


def test_compiled_or_loaded_the_weights_are_equal(easy_data: Dataset, tmp_path: Path) -> None:
    cold = trained(easy_data.path, tmp_path / "cold", tmp_path / "cache")
    warm = trained(easy_data.path, tmp_path / "warm", tmp_path / "cache")
    assert cold["compiled"]
    assert not warm["compiled"]
    for mode in MODES:
        assert {"encoder.safetensors", "head.safetensors"} <= cold["sums"][mode].keys()
        assert cold["sums"][mode] == warm["sums"][mode], mode
    turned = trained(easy_data.path, tmp_path / "turned", tmp_path / "cache", MODES[::-1])
    assert turned["sums"] == warm["sums"], "the order in which kernels are loaded shows"
