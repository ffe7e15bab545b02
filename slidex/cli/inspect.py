"""``slidex inspect`` and ``slidex doctor``."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from slidex.cli.command import Command, echo_json
from slidex.train.config import TrainConfig

_OPTIMIZERS = next(item.metadata["choices"] for item in fields(TrainConfig) if item.name == "optimizer")


@click.command(
    cls=Command,
    examples=(
        "slidex inspect data",
        "slidex inspect run --json",
    ),
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Also read everything and compare checksums.")
@click.option("--json", is_flag=True, help="Print JSON.")
def inspect(path: Path, verify: bool, json: bool) -> None:
    """Describe a prepared data set or a run directory."""
    from slidex.errors import DataError  # noqa: PLC0415

    if not path.exists():
        raise DataError("does not exist.", path=path)
    if (path / "meta.json").is_file():
        facts = data_facts(path, verify)
    elif (path / "run.json").is_file():
        facts = run_facts(path, verify)
    else:
        raise DataError(
            "is neither a data set (it has no meta.json) nor a run (it has no run.json).", path=path
        )
    if json:
        echo_json(facts, indent=1)
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            click.echo(f"{name}:")
            for inner, detail in value.items():
                click.echo(f"  {inner:<22} {readable(detail)}")
        else:
            click.echo(f"{name:<24} {readable(value)}")


def readable(value: Any) -> str:
    """A value as a person writes it."""
    if isinstance(value, dict | list | tuple) and not value:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{name} {readable(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(readable(inner) for inner in value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def data_facts(path: Path, verify: bool) -> dict[str, Any]:
    """What there is to say of a data set."""
    import numpy as np  # noqa: PLC0415

    from slidex.data import Dataset  # noqa: PLC0415

    dataset = Dataset.open(path)
    if verify:
        dataset.verify()
    counts = dataset.class_counts()
    names = dataset.label_names()
    most = [int(c) for c in np.argsort(-counts, kind="stable")[:5]]
    return {
        "data set": str(path),
        "made from": dataset.meta["source"].get("format", "unknown"),
        "classes": dataset.num_classes,
        "features": dataset.num_features,
        "vectorizer": dataset.meta["vectorizer"],
        "bytes": sum(file["bytes"] for file in dataset.meta["files"].values()),
        "checksums": "verified" if verify else "not read (use --verify)",
        "splits": dataset.meta["splits"],
        "training classes": {
            "without rows": int((counts == 0).sum()),
            "with one row": int((counts == 1).sum()),
            "most frequent": {names[c] if names else str(c): int(counts[c]) for c in most},
        },
        "notes": dataset.meta["extra"],
    }


def run_facts(path: Path, verify: bool) -> dict[str, Any]:
    """What there is to say of a run."""
    from slidex.train.checkpoint import list_checkpoints  # noqa: PLC0415
    from slidex.train.kept_ranker import load_ranker  # noqa: PLC0415
    from slidex.train.run import Run  # noqa: PLC0415
    from slidex.train.tuned import load_tuned  # noqa: PLC0415

    run = Run.open(path)
    tuned, ranker = load_tuned(path), load_ranker(path)
    checkpoints = list_checkpoints(run.checkpoints)
    if verify:
        for checkpoint in checkpoints:
            checkpoint.verify()
    log = run.log()
    latest = {
        kind: next((e for e in reversed(log) if e["event"] == kind), None)
        for kind in ("report", "validation")
    }
    return {
        "run": str(path),
        "data set": run.meta["data"]["path"],
        "classes": run.meta["num_classes"],
        "features": run.meta["num_features"],
        "made with": f"slidex {run.meta['slidex']}, torch {run.meta['torch']}",
        "checkpoints": [checkpoint.path.name for checkpoint in checkpoints],
        "best validation": run.best(),
        "ranker": None if ranker is None else ranker.describe(),
        "index of prediction": None if tuned is None else f"{tuned.describe()}; step {tuned.step}",
        "checksums": "verified" if verify else "not read (use --verify)",
        "last report": latest["report"],
        "last validation": latest["validation"],
        "settings": run.meta["config"],
    }


@click.command(
    cls=Command,
    examples=(
        "slidex doctor",
        "slidex doctor --classes 1000000 --width 128 --optimizer rowwise_adam",
    ),
)
@click.option("--classes", type=click.IntRange(min=1), help="Classes to plan for.")
@click.option("--width", default=128, type=click.IntRange(min=1), help="Width of the hidden vector.")
@click.option("--batch", default=256, type=click.IntRange(min=1), help="Rows in a step.")
@click.option(
    "--optimizer",
    default="adam",
    type=click.Choice(_OPTIMIZERS),
    help="Rule of the row updates, for the memory of its state.",
)
@click.option("--json", is_flag=True, help="Print JSON.")
def doctor(classes: int | None, width: int, batch: int, optimizer: str, json: bool) -> None:
    """Report versions, threads and hardware, and which way of training fits a model of the given size."""
    from slidex.doctor import format_report, report  # noqa: PLC0415

    facts = report(num_classes=classes, hidden_width=width, batch_size=batch, optimizer=optimizer)
    if json:
        echo_json(facts, indent=1)
    else:
        click.echo(format_report(facts))
