"""The one table: what slidex needs against what its rivals need, each line measured by turns in one process.

``python -m benchmarks`` (``make bench``) runs all of it; ``--quick`` a part, meant for five minutes. Every line's
ratio is the median over its repeats. Data sets are prepared on first use, before anything is timed; what needs one
whose files are not there is skipped and named at the end.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmarks import cost, heads, kernels, language_model, prepare, scaling, steps, versus_dense
from benchmarks.datasets import SHARED, MissingDataError
from benchmarks.report import HEADINGS, in_child, machine, markdown, write_results
from slidex.threads import set_threads

if TYPE_CHECKING:
    from benchmarks.report import Comparison

PARTS = ("steps", "scaling", "cost", "race", "heads", "language", "kernels", "prepare")
QUICK_PARTS = tuple(part for part in PARTS if part != "language")


def jobs(part: str, data: Path, *, quick: bool) -> list[tuple[Any, ...]]:
    """What a part runs: functions and their arguments, each for a process of its own."""
    if part == "steps":
        return [(steps.run_case, case, data) for case in steps.CASES if case.quick or not quick]
    if part == "scaling":
        if quick:
            return [(scaling.step_times, scaling.LARGE[0], data)]
        return [*((scaling.step_times, size, data) for size in scaling.LARGE), (scaling.peaks, data)]
    if part == "cost":
        return [(cost.per_batch, data)]
    if part == "race":
        races = versus_dense.RACES
        if quick:
            races = [replace(race, repeats=1) for race in races if race.quick]
        return [(versus_dense.run_race, race, data) for race in races]
    if part == "heads":
        return [(heads.run_case, case) for case in heads.CASES if case.quick or not quick]
    if part == "language":
        return [(language_model.compare, data, language_model.SHORTEST if quick else language_model.SHORT)]
    return [(kernels.compare,) if part == "kernels" else (prepare.compare, 20.0 if quick else 60.0)]


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="A part of it, meant for five minutes.")
@click.option(
    "--only", type=click.Choice(PARTS), multiple=True, help="Parts; default: all, but language if --quick."
)
@click.option("--data", type=click.Path(path_type=Path), default=SHARED, help="Directory of the raw sets.")
@click.option("--threads", type=int, help="Default: all cores.")
def main(quick: bool, only: tuple[str, ...], data: Path, threads: int | None) -> None:
    """Print the table and write it as JSON."""
    set_threads(threads)
    started, facts = time.monotonic(), machine()
    click.echo(", ".join(f"{name} {value}" for name, value in facts.items()))
    lines: list[Comparison] = []
    skipped: list[str] = []
    for part in only or (QUICK_PARTS if quick else PARTS):
        for job in jobs(part, data, quick=quick):
            try:
                found = in_child(*job)
            except MissingDataError as error:
                skipped.append(f"skipped, part {part}: {error.format_message()}")
                click.echo(f"  {skipped[-1]}", err=True)
                continue
            for line in found:
                click.echo("  " + "  ".join(line.cells()), err=True)
            lines += found
    click.echo(markdown([HEADINGS, *(line.cells() for line in lines)]))
    click.echo("".join(f"{line}\n" for line in skipped), nl=False)
    name = "bench" + ("-quick" if quick else "") + "".join(f"-{part}" for part in only)
    write_results(name, facts, [line.facts() for line in lines])
    click.echo(f"{time.monotonic() - started:.0f} s in all; benchmarks/results/{name}.json")


if __name__ == "__main__":
    main()
