"""Time the candidate indexes: build, update of 2 % of the rows, query, pool, and recall of the exact top k.

Weights here are random Gaussian rows and queries are rows with noise added, which shows what an index costs
but says little of how well it finds classes in a trained model. Times are the best of a few runs; `threads`
is what Numba and torch use. Run it as ``python benchmarks/indexes.py [--classes 16000,145000,500000] [--set
bits=9 ...]``.
"""

from __future__ import annotations

import argparse
import ast
import time
from typing import TYPE_CHECKING

import numba
import torch

from slidex.lsh import exact_topk, make_index, recall_at_k

if TYPE_CHECKING:
    from collections.abc import Callable

_COLUMNS = ("classes", "bits", "build_s", "update_s", "ratio", "query_us", "pool_us", "recall@64", "MB")


def best_seconds(run: Callable[[], object], repeats: int) -> float:
    """Wall-clock seconds of the fastest of `repeats` runs, after one run that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def measure(name: str, num_classes: int, width: int, batch: int, settings: dict[str, object]) -> list[str]:
    """One line of the table."""
    generator = torch.Generator().manual_seed(0)
    weight_CD = torch.randn(num_classes, width, generator=generator)
    bias_C = 0.1 * torch.randn(num_classes, generator=generator)
    targets = torch.randint(num_classes, (batch,), generator=generator)
    hidden_ND = weight_CD[targets] + torch.randn(batch, width, generator=generator)
    index = make_index(name, width, num_classes, seed=0, **settings)
    build = best_seconds(lambda: index.build(weight_CD, bias_C), 3)
    # Fresh random values: every code of the changed rows changes, which is the dearest case.
    changed = torch.randperm(num_classes, generator=generator)[: num_classes // 50]
    other_CD = weight_CD.clone()
    other_CD[changed] = torch.randn(len(changed), width, generator=generator)
    versions = [weight_CD, other_CD]

    def update() -> None:
        versions.reverse()
        index.update(versions[0], bias_C, changed)

    update_seconds = best_seconds(update, 5)
    index.build(weight_CD, bias_C)
    query = best_seconds(lambda: index.query(hidden_ND, 512), 5) / batch
    pool = best_seconds(lambda: index.pool(hidden_ND, 16_384), 5) / batch
    recall = recall_at_k(index.query(hidden_ND, 512), exact_topk(hidden_ND, weight_CD, bias_C, 64)[1])
    bits = getattr(getattr(index, "family", None), "bits", "-")
    return [
        f"{num_classes}",
        f"{bits}",
        f"{build:.3f}",
        f"{update_seconds:.4f}",
        f"{update_seconds / max(build, 1e-9):.2f}",
        f"{query * 1e6:.1f}",
        f"{pool * 1e6:.1f}",
        f"{recall:.3f}",
        f"{index.stats().bytes / 1e6:.0f}",
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--index", default="simhash")
    parser.add_argument("--classes", default="16000,145000,500000")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the index")
    arguments = parser.parse_args()
    pairs = (setting.partition("=") for setting in arguments.set)
    settings = {name: ast.literal_eval(value) for name, _, value in pairs}
    print(
        f"{arguments.index} {settings or 'defaults'}; RANDOM weights, width {arguments.width}, batch "
        f"{arguments.batch}, k 512, pool 16384, recall of the exact top 64 in 512; "
        f"threads {numba.get_num_threads()}/{torch.get_num_threads()}; update = 2 % of rows, wholly new"
    )
    print(" ".join(f"{column:>9}" for column in _COLUMNS))
    for num_classes in map(int, arguments.classes.split(",")):
        row = measure(arguments.index, num_classes, arguments.width, arguments.batch, settings)
        print(" ".join(f"{cell:>9}" for cell in row), flush=True)


if __name__ == "__main__":
    main()
