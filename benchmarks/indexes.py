"""Candidate indexes over the rows of trained models: what they cost and what they find.

For every set and index: seconds of the first build (learning and training of quantisers included) and of a later one,
seconds to update 2 % of the rows, microseconds for a query (batches of 256,
512 candidates), recall of the exact 64 and 512 largest inner products by as many candidates, share of the softmax's
mass on 512 candidates, recall of the true classes of unseen rows by 512 candidates, and memory. Medians of `--repeats`
runs; an index that learns gets hidden vectors of training rows, and is queried with those of test rows. Run it as
``python -m benchmarks.indexes``; `benchmarks.time_to_accuracy` has the figure that decides.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch

from benchmarks.datasets import SHARED
from benchmarks.models import SETTINGS, TrainedModel, trained
from benchmarks.report import machine, print_row, write_results
from slidex.lsh import exact_topk, make_index, recall_at_k
from slidex.threads import set_threads

if TYPE_CHECKING:
    from collections.abc import Callable

    from slidex.lsh import CandidateIndex

INDEXES: dict[str, tuple[str, dict[str, Any]]] = {
    "exact": ("exact", {}),
    "simhash": ("simhash", {}),
    "simhash, 9 bits": ("simhash", {"bits": 9}),
    "simhash, 16 tables": ("simhash", {"tables": 16}),
    "simhash, 2 probes": ("simhash", {"probes": 2}),
    "simhash, sparse": ("simhash", {"projection": "sparse"}),
    "simhash, centred, augmented": ("simhash", {"center": True, "norm_augmentation": True}),
    "simhash, labels inserted": ("simhash", {"insert": 32}),
    "dwta": ("dwta", {}),
    "learned": ("learned", {}),
    "learned, 16 tables": ("learned", {"tables": 16}),
    "faiss-flat": ("faiss-flat", {}),
    "faiss-ivf": ("faiss-ivf", {}),
    "faiss-pq": ("faiss-pq", {}),
    "faiss-hnsw": ("faiss-hnsw", {}),
    "faiss-binary": ("faiss-binary", {}),
}
TOO_SLOW = {"faiss-hnsw": 200_000}
"""Indexes left out above so many classes: an update rebuilds the graph, which takes minutes."""
BATCH, WIDE, NARROW = 256, 512, 64
COLUMNS = ("first s", "build s", "update s", "us/query", "rec@64", "rec@512", "mass@512", "labels@512", "MB")


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall-clock seconds of `repeats` runs."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


class Oracle:
    """Exact answers for some test rows of a model, computed once."""

    def __init__(self, model: TrainedModel) -> None:
        self.hidden_ND = model.test.hidden_ND[:BATCH]
        rows = model.test.label_ids.tensor_split(model.test.label_indptr[1:-1])[:BATCH]
        self.labels_NP = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=-1)
        self.ids_NK = exact_topk(self.hidden_ND, model.weight_CD, model.bias_C, WIDE)[1]
        self.log_total_N = torch.cat(
            [
                torch.logsumexp(rows @ model.weight_CD.T + model.bias_C, dim=1)
                for rows in self.hidden_ND.split(16)
            ]
        )

    def mass(self, model: TrainedModel, ids_NK: torch.Tensor) -> float:
        """Share of the softmax's mass on the candidates, averaged over rows."""
        safe = ids_NK.clamp(min=0)
        logits_NK = torch.einsum("nd,nkd->nk", self.hidden_ND, model.weight_CD[safe]) + model.bias_C[safe]
        logits_NK = logits_NK.masked_fill(ids_NK < 0, -torch.inf)
        return float((torch.logsumexp(logits_NK, dim=1) - self.log_total_N).exp().mean())


def measure(
    kind: str, options: dict[str, Any], model: TrainedModel, oracle: Oracle, repeats: int
) -> dict[str, float]:
    """One line of the table."""
    weight_CD, bias_C = model.weight_CD, model.bias_C

    def make() -> CandidateIndex:
        return make_index(kind, weight_CD.shape[1], len(weight_CD), seed=0, **options)

    index = make()
    queries = model.train if index.uses_queries else None
    if repeats > 1:
        index.build(weight_CD, bias_C, queries=queries)  # compiles
        index = make()
    first = median_seconds(lambda: index.build(weight_CD, bias_C, queries=queries), 1)
    build = median_seconds(lambda: index.build(weight_CD, bias_C), repeats)
    generator = torch.Generator().manual_seed(0)
    changed = torch.randperm(len(weight_CD), generator=generator)[: max(1, len(weight_CD) // 50)]
    moved_CD = weight_CD.clone()
    moved_CD[changed] = moved_CD[changed.roll(1)]  # rows of other classes: all of a row's codes change
    versions = [weight_CD, moved_CD]

    def update() -> None:
        versions.reverse()
        index.update(versions[0], bias_C, changed)

    update_seconds = median_seconds(update, 2 * repeats)
    index.build(weight_CD, bias_C)
    index.query(oracle.hidden_ND, WIDE)
    query = median_seconds(lambda: index.query(oracle.hidden_ND, WIDE), 2 * repeats + 1) / BATCH
    wide_NK, narrow_NK = index.query(oracle.hidden_ND, WIDE), index.query(oracle.hidden_ND, NARROW)
    return {
        "first s": first,
        "build s": build,
        "update s": update_seconds,
        "us/query": 1e6 * query,
        "rec@64": recall_at_k(narrow_NK, oracle.ids_NK[:, :NARROW]),
        "rec@512": recall_at_k(wide_NK, oracle.ids_NK),
        "mass@512": oracle.mass(model, wide_NK),
        "labels@512": recall_at_k(wide_NK, oracle.labels_NP),
        "MB": index.stats().bytes / 1e6,
    }


@click.command(help=__doc__)
@click.option("--sets", default=",".join(SETTINGS), show_default=True, help="Also random-N: N Gaussian rows.")
@click.option(
    "--indexes", default=";".join(INDEXES), help="Lines of the table, separated by semicolons; default: all."
)
@click.option("--data", type=click.Path(path_type=Path), default=SHARED, help="Directory of the raw sets.")
@click.option("--threads", type=int, help="Default: all cores.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--quick", is_flag=True, help="The two smallest sets.")
def main(sets: str, indexes: str, data: Path, threads: int | None, repeats: int, quick: bool) -> None:
    """Print the table and write it as JSON."""
    set_threads(threads)
    facts = machine()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    results: list[dict[str, Any]] = []
    for name in list(SETTINGS)[:2] if quick else sets.split(","):
        model = trained(name, data)
        num_classes, width = model.weight_CD.shape
        oracle = Oracle(model)
        print_row(f"{name}, C = {num_classes:,}, D = {width}", COLUMNS)
        for label in (item for item in INDEXES if item in indexes.split(";")):
            kind, options = INDEXES[label]
            if num_classes > TOO_SLOW.get(label, num_classes):
                continue
            line = measure(kind, options, model, oracle, repeats if num_classes < 1_000_000 else 1)
            results.append({"set": name, "classes": num_classes, "index": label, **line})
            print_row(label, [f"{line[column]:.3g}" for column in COLUMNS])
    write_results("indexes", facts, results)


if __name__ == "__main__":
    main()
