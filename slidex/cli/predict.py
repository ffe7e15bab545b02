"""``slidex predict``: rows of any kind in, JSON lines out as the rows come."""

from __future__ import annotations

import json
import os
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slidex.cli.command import Command, echo_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from slidex.data import CsrArrays, Vectorizer
    from slidex.train.run import Run
    from slidex.train.tuned import TunedIndex

BLOCK_ROWS = 256
STDIN_BYTES = 1 << 16
JSONL_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.bz2")


@click.command(
    cls=Command,
    examples=(
        "slidex predict run data --k 5 --output predictions.jsonl",
        'echo "import numpy as" | slidex predict run - --k 3',
    ),
)
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("input_", metavar="INPUT", type=click.Path(allow_dash=True))
@click.option("--k", default=5, type=click.IntRange(min=1), help="Classes per row.")
@click.option(
    "--exact/--index", "exact", default=True, help="Score all classes, or those the index proposes."
)
@click.option(
    "--probabilities",
    is_flag=True,
    help="Add probabilities: softmax over all classes (with --index, by an estimate), or sigmoid for logistic loss.",
)
@click.option("--split", default="test", help="Which split, if INPUT is a prepared data set.")
@click.option(
    "--text-field", default="text", help="Field or fields (comma-separated) of the text, if INPUT is .jsonl."
)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write JSON lines here.")
@click.option("--device", default="cpu", help="Where to score: cpu, cuda or cuda:N.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: all usable cores.")
def predict(
    run: Path,
    input_: str,
    k: int,
    exact: bool,
    probabilities: bool,
    split: str,
    text_field: str,
    output: Path | None,
    device: str,
    threads: int | None,
) -> None:
    """Print the K best classes for every row of INPUT, as JSON lines with names and scores.

    INPUT is a prepared data set, a .jsonl file of texts, a file in the Extreme Classification format, or - for lines
    of text on standard input. Texts need a model whose data set was made from text.
    """
    from slidex.cli.progress import bar  # noqa: PLC0415
    from slidex.threads import set_threads  # noqa: PLC0415
    from slidex.train.predict import predict as run_prediction  # noqa: PLC0415
    from slidex.train.run import Run  # noqa: PLC0415

    set_threads(threads)
    opened = Run.open(run)
    blocks, total = input_blocks(opened, input_, split, tuple(text_field.split(",")))
    checkpoint = opened.checkpoint()
    model = opened.model(checkpoint, indexed=not exact, device=device)
    for line in index_lines(opened.tuned(checkpoint), model.head.loss, probabilities) if not exact else ():
        click.echo(line, err=True)
    records = run_prediction(
        model, blocks, k, names=opened.label_names(), indexed=not exact, probabilities=probabilities
    )
    if output is None:
        for record in records:
            echo_json(record)
        return
    with bar(total, "row", "predict") as shown:
        rows = write_whole(output, shown_rows(records, shown))
    click.echo(f"{output}: {rows:,} rows", err=True)


def index_lines(tuned: TunedIndex | None, loss: str, probabilities: bool) -> list[str]:
    """Which index is used, and how far off probabilities are."""
    from slidex.cli.tune_index import partition_lines  # noqa: PLC0415

    lines = ["index: that of training; slidex tune-index chooses one for prediction"]
    if tuned is not None:
        lines = [f"tuned index: {tuned.describe()}"]
    if probabilities and loss == "softmax":
        unknown = ["  partition function             of unknown error: slidex tune-index measures it"]
        lines += unknown if tuned is None else partition_lines(tuned.report)
    return lines


def shown_rows(records: Iterable[dict[str, Any]], shown: Any) -> Iterator[dict[str, Any]]:
    """The records, each counted by a progress bar once it is used."""
    for record in records:
        yield record
        shown.update()


def write_whole(output: Path, records: Iterable[dict[str, Any]]) -> int:
    """Writes JSON lines to a temporary file and renames it, so that a failure leaves no half-written result.

    What is no regular file, such as a pipe or ``/dev/stdout``, cannot be replaced and is written as it is.
    Returns the number of lines.
    """
    rows = 0
    whole = output.is_file() or not output.exists()
    if whole:
        output = output.resolve()  # a link stays a link
    target = output.with_name(f".{output.name}.tmp-{os.getpid()}") if whole else output
    try:
        with target.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as stream:
            for record in records:
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
                rows += 1
        if whole:
            target.replace(output)
    finally:
        if whole:
            target.unlink(missing_ok=True)
    return rows


def input_blocks(
    run: Run, input_: str, split: str, text_fields: tuple[str, ...]
) -> tuple[Iterator[CsrArrays], int | None]:
    """Rows of INPUT as blocks of features, and how many rows there are if that is known beforehand."""
    from slidex.data import Dataset, read_jsonl_texts, read_xmc_rows  # noqa: PLC0415
    from slidex.errors import ConfigError, DataError  # noqa: PLC0415

    path, width = Path(input_), run.meta["num_features"]
    if input_ != "-" and not path.exists():
        raise DataError("does not exist.", path=path)
    if path.is_dir() and input_ != "-":
        dataset = Dataset.open(path)
        if dataset.num_features != width:
            raise DataError(
                f"has {dataset.num_features:,} features; the run {run.path} was trained on {width:,}.",
                path=path,
            )
        rows = dataset.split(split)
        return iter([rows.x]), rows.num_rows
    if input_ != "-" and not path.name.endswith(JSONL_ENDINGS):
        return read_xmc_rows(path, width), None
    vectorizer = run.vectorizer()
    if vectorizer is None:
        raise ConfigError(
            f"{run.path}: its data set was not made from text, so INPUT must be a data set or an XMC file."
        )
    texts = standard_input() if input_ == "-" else in_blocks(read_jsonl_texts(path, text_fields))
    return vectorized(texts, vectorizer), None


def vectorized(blocks: Iterable[list[str]], vectorizer: Vectorizer) -> Iterator[CsrArrays]:
    """Texts as features."""
    for block in blocks:
        yield vectorizer.transform(block)


def in_blocks(texts: Iterator[str]) -> Iterator[list[str]]:
    """Texts some at a time."""
    while block := list(islice(texts, BLOCK_ROWS)):
        yield block


def standard_input() -> Iterator[list[str]]:
    """Lines of standard input, as many at a time as are there: who types a line sees its result at once."""
    from slidex.errors import DataError  # noqa: PLC0415

    def decode(lines: list[bytes], first: int) -> list[str]:
        texts = []
        for number, line in enumerate(lines, start=first):
            try:
                texts.append(line.removesuffix(b"\r").decode("utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(
                    f"expected UTF-8: {error.reason}", path="<stdin>", line=number, column=error.start + 1
                ) from error
        return texts

    rest, done = b"", 0
    while chunk := sys.stdin.buffer.read1(STDIN_BYTES):  # pyrefly: ignore[missing-attribute]  (BufferedReader)
        *lines, rest = (rest + chunk).split(b"\n")
        if lines:
            yield decode(lines, done + 1)
        done += len(lines)
    if rest:
        yield decode([rest], done + 1)
