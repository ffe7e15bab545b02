"""``slidex tune-index``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slidex.cli.command import Command, echo_json

if TYPE_CHECKING:
    from slidex.train.tuned import TunedIndex


TRAINED_ON = "the train split: rows the model was trained on"
"""`source` of the rows where there are no validation rows."""


def parse_names(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """``simhash,learned`` to its parts."""
    return None if value is None else tuple(part.strip() for part in value.split(",") if part.strip())


@click.command(
    name="tune-index",
    cls=Command,
    examples=(
        "slidex tune-index run data --recall 0.99",
        "slidex tune-index run data --recall 0.95 --measure top-k --k 10 --indexes simhash,learned --json",
    ),
)
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--recall", default=0.99, help="The least share of what exact scoring finds that is to be kept."
)
@click.option(
    "--measure",
    default="hits",
    type=click.Choice(("hits", "top-k")),
    help="Of what: of the rows whose first class exact scoring gets right, or of its K best classes.",
)
@click.option("--k", default=5, type=click.IntRange(min=1), help="Classes per row.")
@click.option(
    "--rows", default=4096, type=click.IntRange(min=2), help="Held-out rows: half choose, half report."
)
@click.option(
    "--split", help="Split the rows are from; default: the run's validation rows, or else training rows."
)
@click.option("--indexes", callback=parse_names, help="Kinds to try, comma-separated; default: all.")
@click.option(
    "--train-rows",
    type=click.IntRange(min=1),
    help="Most training rows an index learns from; default: what fits in 1 GiB.",
)
@click.option(
    "--partition-classes",
    default=4096,
    type=click.IntRange(min=1),
    help="Random classes from which predict --index --probabilities estimates the partition function.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: all usable cores.")
@click.option("--json", is_flag=True, help="Print JSON.")
def tune_index(run: Path, data: Path, threads: int | None, json: bool, **settings: Any) -> None:
    """Choose the fastest index for prediction that keeps what exact scoring finds.

    Kinds and settings are tried on held-out rows of DATA, the data set RUN was trained on. The choice is stored in RUN;
    eval and predict use it with --index.
    """
    from slidex.data import Dataset  # noqa: PLC0415
    from slidex.threads import set_threads  # noqa: PLC0415
    from slidex.train.run import Run  # noqa: PLC0415
    from slidex.train.tuning import TuneSettings, tune  # noqa: PLC0415

    set_threads(threads)
    chosen = TuneSettings(**settings)
    tuned = tune(
        Run.open(run), Dataset.open(data), chosen, lambda trial: click.echo(trial_line(trial), err=True)
    )
    if json:
        facts = {"index": tuned.index, "options": tuned.options, "candidates": tuned.candidates}
        echo_json(facts | {"rows": tuned.rows, "report": tuned.report, "trials": tuned.trials}, indent=1)
        return
    click.echo(f"{run}: {tuned.describe()}")
    click.echo("\n".join(report_lines(tuned)))


def trial_line(trial: dict[str, Any]) -> str:
    """A trial as a line."""
    options = " ".join(f"{name}={value}" for name, value in trial["options"].items())
    shares = ", ".join(f"{name} {percent(trial[name])}" for name in ("hits", "P@1 kept", "top-k"))
    return (
        f"{'+' if trial['meets'] else '-'} {trial['index']:<10} {options:<32} {trial['candidates']:>5} candidates: "
        f"{shares}; {trial['microseconds_per_row']:.0f} µs per row, built in {trial['build_seconds']:.1f} s"
    )


def report_lines(tuned: TunedIndex) -> list[str]:
    """What was found on the rows that did not choose."""
    report, rows = tuned.report, tuned.rows
    error = report["standard error of hits"]
    lines = [
        f"on {report['rows']:,} other rows of {rows['source']}:",
        f"  of exact scoring's hits at 1   {percent(report['hits'])} kept"
        + (f" (standard error {percent(error)})" if error is not None else ""),
        f"  P@1                            {percent(report['index P@1'])}; exact {percent(report['exact P@1'])}",
        f"  of its best {report['k']:<19}{percent(report['top-k'])} kept",
        f"  a row, in batches              {report['microseconds_per_row']:.0f} µs; exact "
        f"{report['exact_microseconds_per_row']:.0f} µs ({report['times_faster']:.3g} times)",
        f"  a row alone                    {report['latency_p50_microseconds']:.0f} µs (p50), "
        f"{report['latency_p99_microseconds']:.0f} µs (p99)",
    ]
    if rows["source"] == TRAINED_ON:
        lines.append("  Rows that were trained on are easier: expect less of new ones. --split takes others.")
    if report["times_faster"] < 1:
        lines.append("  Exact scoring is faster: leave --index away.")
    return lines + partition_lines(report)


def partition_lines(report: dict[str, Any]) -> list[str]:
    """The error of the estimated partition function; nothing for a model without one."""
    part = report["partition"]
    if part is None:
        return []
    return [
        f"  partition function             off by {percent(part['mean_error'])} on average, "
        f"{percent(part['rms_error'])} in root mean square ({part['classes']:,} random classes)"
    ]


def percent(share: float | None) -> str:
    """``99.12 %``."""
    return "-" if share is None else f"{100 * share:.2f} %"
