"""``slidex eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slidex.cli.command import Command, echo_json


def parse_ks(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[int, ...]:
    """``1,3,5`` to (1, 3, 5)."""
    try:
        ks = tuple(sorted({int(part) for part in value.split(",")}))
    except ValueError:
        ks = ()
    if not ks or ks[0] < 1:
        raise click.BadParameter(
            f"must be whole numbers of at least 1, such as 1,3,5. Got {value!r} instead."
        )
    return ks


@click.command(
    name="eval",
    cls=Command,
    examples=(
        "slidex eval run data",
        "slidex eval run data --index --k 1,5,10 --by-frequency --errors 3 --json",
    ),
)
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--exact/--index", "exact", default=True, help="Score all classes, or those the index proposes."
)
@click.option("--k", default="1,3,5", callback=parse_ks, help="Cut-offs, comma-separated.")
@click.option("--split", default="test", help="Which split of DATA.")
@click.option(
    "--by-frequency",
    is_flag=True,
    help="Also P and recall by deciles of class frequency (of the label mass).",
)
@click.option(
    "--errors",
    default=0,
    type=click.IntRange(min=0),
    help="Also this many of the worst mistakes, with names: the wrong class scored furthest above the true ones.",
)
@click.option("--device", default="cpu", help="Where to score: cpu, cuda or cuda:N.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: all usable cores.")
@click.option("--json", is_flag=True, help="Print JSON.")
def evaluate(
    run: Path,
    data: Path,
    exact: bool,
    k: tuple[int, ...],
    split: str,
    by_frequency: bool,
    errors: int,
    device: str,
    threads: int | None,
    json: bool,
) -> None:
    """Rank the classes for every row of DATA's test split and print the metrics."""
    from slidex.cli.progress import bar  # noqa: PLC0415
    from slidex.data import Dataset  # noqa: PLC0415
    from slidex.frequency import format_frequency  # noqa: PLC0415
    from slidex.metrics import format_metrics  # noqa: PLC0415
    from slidex.threads import set_threads  # noqa: PLC0415
    from slidex.train.evaluate import evaluate as run_evaluation  # noqa: PLC0415
    from slidex.train.mistakes import format_mistakes  # noqa: PLC0415
    from slidex.train.run import Run  # noqa: PLC0415

    set_threads(threads)
    dataset = Dataset.open(data)
    with bar(None, "row", "eval") as shown:

        def progress(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        result = run_evaluation(
            Run.open(run),
            dataset,
            split=split,
            ks=k,
            indexed=not exact,
            by_frequency=by_frequency,
            errors=errors,
            device=device,
            progress=progress,
        )
    if json:
        echo_json(result, indent=1)
        return
    click.echo(
        f"{run} on {data}, {split} split, {result['scoring']} scoring, "
        f"{result['microseconds_per_row']:.0f} µs per row"
    )
    if result["scoring"] == "index":
        click.echo("\n".join(index_lines(result)))
    click.echo(format_metrics(result))
    if by_frequency:
        click.echo("\nby class frequency (percent; deciles of the training labels)")
        click.echo(format_frequency(result["by_frequency"]))
    if errors:
        click.echo(f"\nworst {len(result['errors'])} mistakes (logits; training rows of each class)")
        click.echo(format_mistakes(result["errors"]))


def index_lines(result: dict[str, Any]) -> list[str]:
    """Which index was used, and what was found of it when it was tuned."""
    from slidex.cli.tune_index import partition_lines, percent  # noqa: PLC0415

    tuned = result.get("tuned_index")
    if tuned is None:
        return ["index: that of training; slidex tune-index chooses one for prediction"]
    lines = [
        f"tuned index: {tuned['index']}",
        f"  tuned on {tuned['chosen_on']:,} rows of {tuned['source']}; on {tuned['reported_on']:,} others it kept "
        f"{percent(tuned['hits'])} of exact scoring's hits at 1 and {percent(tuned['top-k'])} of its best {tuned['k']}",
    ]
    if tuned["source"] == f"the {result['split']} split":
        lines.append(f"  these rows are among those of the {result['split']} split below")
    return lines + partition_lines(tuned)
