"""`make demo`: from the Python source on this machine to a model that suggests the next identifier.

Runs the commands a user would type, each shown before it runs, then lets the model complete a few lines of code and
compares it with two baselines on the same test files.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from slidex import Dataset, Run, predict
from slidex.data.baselines import BackoffBaseline, FrequencyBaseline
from slidex.metrics import MetricAccumulator
from slidex.threads import set_threads

LINES = [
    "from collections import",
    "class Stack:\n    def __init__(self):\n        self.items = []\n    def push(self, item):\n        self.items.",
    "import unittest\n\nclass TestStack(unittest.",
    "with open(filename, 'rb') as",
    "if not isinstance(name, str):\n    raise",
    "import os\nfor root, dirs, files in os.",
]


def main() -> None:
    """Prepares, trains, evaluates, predicts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="where everything is written")
    parser.add_argument("--max-files", type=int, help="read fewer source files, for a quick look")
    parser.add_argument("--max-steps", type=int, help="train for fewer steps, for a quick look")
    args = parser.parse_args()
    started = time.perf_counter()
    data, run = args.out / "data", args.out / "run"
    args.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(run, ignore_errors=True)
    slidex("prepare", "python-source", "--out", data, "--overwrite", *optional("--max-files", args.max_files))
    slidex("train", data, "--out", run, "--preset", "demo", *optional("--max-steps", args.max_steps))
    accuracy = json.loads(slidex("eval", run, data, "--json", capture=True))
    show_accuracy(Dataset.open(data), accuracy)
    show_predictions(Run.open(run))
    print(f"\nAll of it took {time.perf_counter() - started:.0f} s. Now try:")
    print(f"  echo 'def main(argv): parser =' | {command_line('predict', run, '-', '--k', 3)}")


def slidex(*words: object, capture: bool = False) -> str:
    """Shows and runs one slidex command; ends the demo with its exit code if it fails."""
    print(f"\n$ {command_line(*words)}", flush=True)
    command = [sys.executable, "-m", "slidex", *map(str, words)]
    done = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE if capture else None)  # noqa: S603
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


def command_line(*words: object) -> str:
    """The command as a person types it."""
    return shlex.join(["slidex", *map(str, words)])


def optional(flag: str, value: int | None) -> list[object]:
    """The flag with its value, or nothing."""
    return [] if value is None else [flag, value]


def show_accuracy(data: Dataset, model: dict[str, float]) -> None:
    """The model beside the baselines, on the same test rows."""
    outside = data.meta["extra"]["test_positions_outside_vocabulary"]
    test = data.split("test")
    print(
        f"\nWhich of {data.num_classes:,} identifiers comes next, in files the model has not seen?\n"
        f"{test.num_rows:,} test positions ({outside:,} more, of identifiers too rare to be classes, are left out)\n"
    )
    rows = {}
    for name, baseline in (("most frequent", FrequencyBaseline()), ("3-gram back-off", BackoffBaseline(3))):
        metrics = MetricAccumulator(data.class_counts(), data.split("train").num_rows)
        metrics.update(baseline.fit(data).topk(data, 5).astype("int64"), test.y)
        rows[name] = metrics.compute()
    rows["slidex"] = model
    print(f"{'':<18}{'P@1':>8}{'P@3':>8}{'P@5':>8}{'among first 5':>16}")
    for name, result in rows.items():
        cells = [result[key] for key in ("P@1", "P@3", "P@5")]
        print(
            f"{name:<18}"
            + "".join(f"{100 * cell:8.1f}" for cell in cells)
            + f"{100 * result['recall@5']:16.1f}"
        )


def show_predictions(run: Run) -> None:
    """What the model expects after a few lines of code."""
    set_threads(None)
    vectorizer, names = run.vectorizer(), run.label_names()
    print("\nThe five identifiers it expects next, with scores:\n")
    for code, record in zip(
        LINES, predict(run.model(), [vectorizer.transform(LINES)], 5, names=names), strict=True
    ):
        guesses = "  ".join(f"{c['name']} {c['score']:.1f}" for c in record["classes"])
        print("\n".join(f"  {line}" for line in code.splitlines()) + " ▁")
        print(f"      → {guesses}\n")


if __name__ == "__main__":
    main()
