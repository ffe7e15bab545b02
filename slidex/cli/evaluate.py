"""``slidex eval`` and ``slidex predict``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

    from slidex.data import CsrArrays
    from slidex.train.run import Run

STDIN_LINES = 256


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


@click.command(name="eval")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--exact/--index", "exact", default=True, help="Score all classes, or those the index proposes."
)
@click.option("--k", "ks", default="1,3,5", callback=parse_ks, help="Cut-offs, comma-separated.")
@click.option("--split", default="test", help="Which split of DATA.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: all usable cores.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(
    run: Path, data: Path, exact: bool, ks: tuple[int, ...], split: str, threads: int | None, as_json: bool
) -> None:
    r"""Rank the classes for every row of DATA's test split and print the metrics.

    \b
    Examples:
      slidex eval run data
      slidex eval run data --index --k 1,5,10 --json
    """
    from slidex.cli.progress import bar  # noqa: PLC0415
    from slidex.data import Dataset  # noqa: PLC0415
    from slidex.metrics import format_metrics  # noqa: PLC0415
    from slidex.threads import set_threads  # noqa: PLC0415
    from slidex.train.evaluate import evaluate as run_evaluation  # noqa: PLC0415
    from slidex.train.run import Run  # noqa: PLC0415

    set_threads(threads)
    dataset = Dataset.open(data)
    with bar(None, "row", "eval") as shown:

        def progress(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        result = run_evaluation(
            Run.open(run), dataset, split=split, ks=ks, indexed=not exact, progress=progress
        )
    if as_json:
        click.echo(json.dumps(result, indent=1))
        return
    click.echo(
        f"{run} on {data}, {split} split, {result['scoring']} scoring, "
        f"{result['microseconds_per_row']:.0f} µs per row"
    )
    click.echo(format_metrics(result))


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("input_", metavar="INPUT", type=click.Path(allow_dash=True))
@click.option("--k", default=5, type=click.IntRange(min=1), help="Classes per row.")
@click.option(
    "--exact/--index", "exact", default=True, help="Score all classes, or those the index proposes."
)
@click.option("--split", default="test", help="Which split, if INPUT is a prepared data set.")
@click.option(
    "--text-field", default="text", help="Field or fields (comma-separated) of the text, if INPUT is .jsonl."
)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write JSON lines here.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: all usable cores.")
def predict(
    run: Path,
    input_: str,
    k: int,
    exact: bool,
    split: str,
    text_field: str,
    output: Path | None,
    threads: int | None,
) -> None:
    r"""Print the K best classes for every row of INPUT, as JSON lines with names and scores.

    INPUT is a prepared data set, a .jsonl file of texts, a file in the Extreme Classification format, or - for lines
    of text on standard input. Texts need a model whose data set was made from text.

    \b
    Examples:
      slidex predict run data --k 5 --output predictions.jsonl
      echo "import numpy as" | slidex predict run - --k 3
    """
    from slidex.threads import set_threads  # noqa: PLC0415
    from slidex.train.predict import predict as run_prediction  # noqa: PLC0415
    from slidex.train.run import Run  # noqa: PLC0415

    set_threads(threads)
    opened = Run.open(run)
    blocks = input_blocks(opened, input_, split, tuple(text_field.split(",")))
    records = run_prediction(
        opened.model(indexed=not exact), blocks, k, names=opened.label_names(), indexed=not exact
    )
    if output is None:
        for record in records:
            click.echo(json.dumps(record, ensure_ascii=False))
        return
    write_whole(output, records)


def write_whole(output: Path, records: Iterator[dict[str, Any]]) -> None:
    """Writes JSON lines to a temporary file and renames it, so that a failure leaves no half-written result."""
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            for record in records:
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)


def input_blocks(run: Run, input_: str, split: str, text_fields: tuple[str, ...]) -> Iterator[CsrArrays]:
    """Rows of INPUT as blocks of features."""
    from slidex.data import Dataset, read_jsonl_texts, read_xmc_rows  # noqa: PLC0415
    from slidex.errors import ConfigError, DataError  # noqa: PLC0415

    path = Path(input_)
    if input_ != "-" and not path.exists():
        raise DataError("does not exist.", path=path)
    if path.is_dir():
        yield Dataset.open(path).split(split).x
        return
    if input_ != "-" and not path.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.bz2")):
        yield from read_xmc_rows(path, run.meta["num_features"])
        return
    vectorizer = run.vectorizer()
    if vectorizer is None:
        raise ConfigError(
            f"{run.path}: its data set was not made from text, so INPUT must be a data set or an XMC file."
        )
    lines = sys.stdin if input_ == "-" else read_jsonl_texts(path, text_fields)
    block: list[str] = []
    for line in lines:
        block.append(line.rstrip("\n"))
        if len(block) == STDIN_LINES or (input_ == "-" and sys.stdin.isatty()):
            yield vectorizer.transform(block)
            block = []
    if block:
        yield vectorizer.transform(block)
