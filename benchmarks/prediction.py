"""Prediction through an index: what each kind costs and keeps, against exact scoring of all classes.

For every set a model is trained once and kept in the cache. Half of 4,096 random test rows choose for every kind of
index the setting and the fewest candidates that keep the goal, by time; the other half are what is shown: time to ask
and to score (batches of 512, hidden vectors given), share of exact scoring's hits at 1 kept, P@1 over exact's, share
of its best 5 kept, memory and seconds to build. Where no setting keeps the goal, the one that keeps most is shown. An
index that learns, or has labels inserted, gets the hidden vectors of all training rows. Below, whole predictions with
the fastest (encoder included) and the latency of one row at a time. Run it as ``python -m benchmarks.prediction``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from benchmarks.datasets import CACHE, SHARED, load
from benchmarks.report import machine, print_row, write_results
from slidex.lsh.family import automatic_bits
from slidex.threads import set_threads
from slidex.train.config import TrainConfig
from slidex.train.held_out import held_out, training_queries
from slidex.train.loop import fit
from slidex.train.run import Run
from slidex.train.tuning import Exact, TuneSettings, fewest_candidates, report, try_index

if TYPE_CHECKING:
    from slidex.data import Dataset
    from slidex.lsh import CandidateIndex

MODELS: dict[str, dict[str, Any]] = {
    "deb-files-283k": {"max_steps": 1100},
    "deb-files-3m": {
        "mode": "shared",
        "index": "none",
        "pool_size": 8192,
        "optimizer": "rowwise_adam",
        "max_steps": 2000,
    },
}
"""How each model is trained: about an epoch."""
GOALS = (("hits", 0.99), ("top-k", 0.95))
COLUMNS = ("candidates", "us a row", "hits", "P@1 kept", "best 5", "MB", "build s")


def families(num_classes: int) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Settings to choose from for every line of the table."""
    bits = automatic_bits(num_classes)
    plain = [{"bits": bits - 1, "tables": 32, "probes": 2}, {"bits": bits, "tables": 16, "probes": 2}]
    random = [{"bits": bits + more, "tables": tables, "insert": 16} for more in (2, 4) for tables in (16, 32)]
    learned = [{"bits": bits + more, "tables": tables, "insert": 16} for more in (0, 2) for tables in (8, 16)]
    return {
        "random hash functions": [("simhash", options) for options in plain],
        "learned hash functions": [("learned", options) for options in plain],
        "random, labels inserted": [("simhash", options) for options in random],
        "learned, labels inserted": [("learned", options) for options in learned],
        "faiss-ivf": [("faiss-ivf", {"nprobe": cells}) for cells in (16, 64)],
        "faiss-pq": [("faiss-pq", {"nprobe": cells}) for cells in (16, 64)],
        "faiss-hnsw": [("faiss-hnsw", {"ef_search": 256})] if num_classes < 300_000 else [],
    }


def trained(name: str, dataset: Dataset) -> Run:
    """The run of the set `name`, from the cache or made now."""
    path = CACHE / "runs" / name
    if not (path / "run.json").exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        fit(dataset, path, TrainConfig(**MODELS[name]))
    return Run.open(path)


def better(trial: dict[str, Any], best: dict[str, Any] | None, measure: str) -> bool:
    """Whether a trial is preferred: one that meets the goal sooner, or else one that keeps more."""
    if best is None or trial["meets"] != best["meets"]:
        return best is None or trial["meets"]
    if trial["meets"]:
        return trial["microseconds_per_row"] < best["microseconds_per_row"]
    return trial[measure] > best[measure]


def measure_set(name: str, data: Path, rows: int) -> list[dict[str, Any]]:
    """All lines of one set."""
    dataset = load(name, data)
    run = trained(name, dataset)
    model = run.model()
    held = held_out(run, dataset, "test", rows)
    (x, y), k = held.half(True), 5
    chooses, reports = Exact.of(model, *held.half(False), k), Exact.of(model, x, y, k)
    queries = training_queries(model, dataset, held.excluded, None)
    goals = [TuneSettings(measure=measure, recall=recall, k=k) for measure, recall in GOALS]
    best: dict[tuple[str, int], dict[str, Any]] = {}
    indexes: dict[int, CandidateIndex] = {}
    for family, choices in families(dataset.num_classes).items():
        for kind, options in choices:
            first, index = try_index(model, kind, options, chooses, queries, goals[0], run.config.seed)
            click.echo(f"  {family}: {kind} {options}", err=True)
            for g, goal in enumerate(goals):
                trial = first | (fewest_candidates(model, index, chooses, goal) if g else {})
                if not better(trial, best.get((family, g)), goal.measure):
                    continue
                shown = fewest_candidates(
                    model, index, reports, replace(goal, recall=1e-9), [trial["candidates"]]
                )
                best[family, g] = trial | {"shown": shown | {"MB": index.stats().bytes / 1e6}}
                rivals = [line for (_, at), line in best.items() if at == g]
                if all(line is best[family, g] or better(trial, line, goal.measure) for line in rivals):
                    indexes[g] = index
    lines = []
    for g, (measure, recall) in enumerate(GOALS):
        print_row(f"{name}: {recall:g} of {measure}", COLUMNS)
        for family in dict.fromkeys(family for family, _ in best):
            trial = best[family, g]
            lines.append({"set": name, "goal": recall, "measure": measure, "family": family, **trial})
            print_line(family, trial)
        fastest = min(
            (line for (_, at), line in best.items() if at == g),
            key=lambda line: (not line["meets"], line["microseconds_per_row"]),
        )
        whole = report(replace(model, index=indexes[g], candidates=fastest["candidates"]), x, y, k)
        lines.append({"set": name, "goal": recall, "measure": measure, "family": "whole prediction", **whole})
        print_whole(fastest, whole)
    return lines


def print_line(family: str, trial: dict[str, Any]) -> None:
    """A line of the table, and below it the setting."""
    shown = trial["shown"]
    cells = [f"{trial['candidates']}{'' if trial['meets'] else ' (misses)'}"]
    cells += [
        f"{shown[column]:.4g}" for column in ("microseconds_per_row", "hits", "P@1 kept", "top-k", "MB")
    ]
    print_row(family, [*cells, f"{trial['build_seconds']:.2g}"])
    print(f"    {trial['index']} {trial['options']}")


def print_whole(fastest: dict[str, Any], whole: dict[str, Any]) -> None:
    """The fastest index in prediction from features."""
    print(
        f"  fastest: {fastest['index']} {fastest['options']}, {fastest['candidates']} candidates; a prediction:"
    )
    for name, value in whole.items():
        print(
            f"    {name:<30} {value if not isinstance(value, float) else np.format_float_positional(value, 4)}"
        )


@click.command(help=__doc__)
@click.option("--sets", default=",".join(MODELS), show_default=True, help="Sets, comma-separated.")
@click.option("--data", type=click.Path(path_type=Path), default=SHARED, help="Directory of the raw sets.")
@click.option("--rows", default=4096, show_default=True, help="Test rows: half choose, half are shown.")
@click.option("--threads", type=int, help="Default: all cores.")
def main(sets: str, data: Path, rows: int, threads: int | None) -> None:
    """Print the tables and write them as JSON."""
    set_threads(threads)
    facts = machine()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    results: list[dict[str, Any]] = []
    for name in sets.split(","):
        if name not in MODELS:
            raise click.UsageError(f"{name}: the sets are {', '.join(MODELS)}.")
        results += measure_set(name, data, rows)
        write_results("prediction", facts, results)


if __name__ == "__main__":
    main()
