"""Trains one peer on one prepared set and predicts its test rows; run by the Python of the peer's own environment.

``python peer_worker.py JOB.json``; a job is what `benchmarks.peers.run_peer` writes. The process imports numpy and the
peer with what it needs, nothing of slidex. It writes ``OUT.json``, the measurements, after training and again after
prediction, and ``OUT.npz``: int32 ids and float32 scores (rows, k), best first, -1 where the peer proposes fewer.

CPU seconds are user and system time of the process and its children, from the data in memory to the saved model;
omikuji reads its own text file, so for omikuji they include reading it. Prediction is timed without putting what the
package returns into arrays.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Ranking = list[tuple[int, float]]


PARTS = ("indptr", "indices", "values")
REVISION = 1
"""To be raised with a change to what is measured here: results of another revision are not taken from the cache."""


@dataclass(frozen=True)
class Rows:
    """Compressed sparse rows: int64 indptr, int32 indices, float32 values."""

    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    num_columns: int

    def scipy(self) -> Any:
        """As a scipy matrix."""
        from scipy.sparse import csr_matrix  # noqa: PLC0415  (omikuji's environment has no scipy)

        shape = (len(self.indptr) - 1, self.num_columns)
        return csr_matrix((self.values, self.indices, self.indptr), shape=shape)


def read_rows(folder: Path, side: str, num_columns: int) -> Rows:
    """One side (``x`` or ``y``) of a split, in memory."""
    parts = (np.load(folder / f"{side}_{part}.npy", allow_pickle=False) for part in PARTS)
    return Rows(*parts, num_columns)


def used() -> float:
    """CPU seconds of this process and its finished children so far."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_mb() -> float:
    """Most memory this process has had at once, MB; not `ru_maxrss`, which a process takes over from its parent."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("/proc/self/status has no VmHWM")


def tree_bytes(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def best_of(lists: Iterator[Ranking], num_rows: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 and scores float32 (num_rows, k) from (class, score) lists, a list a row, best first."""
    ids, scores = np.full((num_rows, k), -1, np.int32), np.full((num_rows, k), -np.inf, np.float32)
    for row, ranking in enumerate(lists):
        for place, (label, score) in enumerate(ranking[:k]):
            ids[row, place], scores[row, place] = label, score
    return ids, scores


class Omikuji:
    """Partitioned label trees (Parabel, Bonsai and the like), Rust.

    Args:
        job: See the module.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        import omikuji  # noqa: PLC0415

        self._package, self._job = omikuji, job

    def train(self, model: Path) -> None:
        """Reads the text file, trains and saves."""
        settings = self._package.Model.default_hyper_param()
        for name, value in self._job["settings"].items():
            setattr(settings, name, value)
        threads = self._job["threads"]
        trained = self._package.Model.train_on_data(self._job["text"], settings, n_threads=threads)
        trained.save(str(model))

    def load(self, model: Path) -> None:
        """What predicts."""
        self._model = self._package.Model.load(str(model))
        self._model.init_prediction_thread_pool(self._job["threads"])

    def predict(self, x: Rows, k: int) -> list[Ranking]:
        """One call a row: the package has no other."""
        found = []
        for start, stop in zip(x.indptr[:-1], x.indptr[1:], strict=True):
            pairs = zip(x.indices[start:stop].tolist(), x.values[start:stop].tolist(), strict=True)
            found.append(self._model.predict(list(pairs), top_k=k))
        return found

    def rankings(self, found: list[Ranking]) -> Iterator[Ranking]:
        """What `predict` found, row by row."""
        return iter(found)


class Pecos:
    """XR-Linear, or one-vs-all where the setting ``nr_splits`` is 0, C++.

    Args:
        job: See the module.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        from pecos.xmc import Indexer, LabelEmbeddingFactory  # noqa: PLC0415
        from pecos.xmc.xlinear.model import XLinearModel  # noqa: PLC0415

        self._indexer, self._embedding, self._class = Indexer, LabelEmbeddingFactory, XLinearModel
        self._job = job
        self._x, self._y = job["train"][0].scipy(), job["train"][1].scipy()

    def train(self, model: Path) -> None:
        """Label features, their clusters, the rankers; what pecos.xmc.xlinear.train does by default."""
        splits, threads = self._job["settings"]["nr_splits"], self._job["threads"]
        y = self._y.tocsc()
        chain = None
        if splits:
            embedding = self._embedding.create(y, self._x, method="pifa", threads=threads)
            chain = self._indexer.gen(
                embedding, nr_splits=splits, max_leaf_size=100, seed=self._job["seed"], threads=threads
            )
        trained = self._class.train(
            self._x,
            y,
            C=chain,
            threshold=0.1,
            bias=1.0,
            threads=threads,
            pred_kwargs={"beam_size": 10, "only_topk": self._job["k"]},
        )
        trained.save(str(model))

    def load(self, model: Path) -> None:
        """What predicts: the package's form for prediction only."""
        self._model = self._class.load(str(model), is_predict_only=True)

    def predict(self, x: Rows, k: int) -> Any:
        """All rows in one call: a scipy matrix."""
        return self._model.predict(x.scipy(), only_topk=k, threads=self._job["threads"])

    def rankings(self, found: Any) -> Iterator[Ranking]:
        """What `predict` found, row by row."""
        rows = found.tocsr()
        for start, stop in zip(rows.indptr[:-1], rows.indptr[1:], strict=True):
            order = start + np.argsort(-rows.data[start:stop], kind="stable")
            yield list(zip(rows.indices[order].tolist(), rows.data[order].tolist(), strict=True))


class NapkinXC:
    """Probabilistic label trees, C++.

    Args:
        job: See the module.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        from napkinxc import models  # noqa: PLC0415

        self._models, self._job = models, job
        self._x, self._y = job["train"][0].scipy(), job["train"][1].scipy()

    def _plt(self, model: Path) -> Any:
        job = self._job
        return self._models.PLT(str(model), seed=job["seed"], threads=job["threads"], **job["settings"])

    def train(self, model: Path) -> None:
        """Trains; the package writes the model as it goes."""
        self._plt(model).fit(self._x, self._y)

    def load(self, model: Path) -> None:
        """What predicts."""
        self._model = self._plt(model)
        self._model.load()

    def predict(self, x: Rows, k: int) -> list[Ranking]:
        """All rows in one call."""
        return self._model.predict_proba(x.scipy(), top_k=k)

    def rankings(self, found: list[Ranking]) -> Iterator[Ranking]:
        """What `predict` found, row by row."""
        return iter(found)


PACKAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "omikuji": Omikuji,
    "libpecos": Pecos,
    "napkinxc": NapkinXC,
}


def measure(job: dict[str, Any]) -> None:
    """Trains, predicts, and writes what came out."""
    data, out, model = Path(job["data"]), Path(job["out"]), Path(job["model"])

    def rows(split: str, side: str) -> Rows:
        return read_rows(data / split, side, job["widths"][side])

    if job["package"] != "omikuji":
        job["train"] = rows("train", "x"), rows("train", "y")
    peer = PACKAGES[job["package"]](job)
    wall, cpu = time.perf_counter(), used()
    peer.train(model)
    result = {
        "version": version(job["package"]),
        "train_wall_s": time.perf_counter() - wall,
        "train_cpu_s": used() - cpu,
        "peak_mb": peak_mb(),
        "model_mb": tree_bytes(model) / 1e6,
    }
    out.write_text(json.dumps(result), encoding="utf-8")
    test, k = rows("test", "x"), job["k"]
    peer.load(model)
    wall, cpu = time.perf_counter(), used()
    found = peer.predict(test, k)
    count = len(test.indptr) - 1
    result["predict_wall_us"] = 1e6 * (time.perf_counter() - wall) / count
    result["predict_cpu_us"] = 1e6 * (used() - cpu) / count
    ids, scores = best_of(peer.rankings(found), count, k)
    np.savez(out.with_suffix(".npz"), ids=ids, scores=scores)
    out.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    measure(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
