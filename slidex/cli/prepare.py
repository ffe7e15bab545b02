"""``slidex prepare FORMAT SOURCE... --out DIR``: one subcommand for each format."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slidex.cli.command import Group

if TYPE_CHECKING:
    from collections.abc import Callable

    from slidex.data import Dataset

FILE = click.Path(path_type=Path)


def shared_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that every format has."""
    for option in (
        click.option(
            "--overwrite", is_flag=True, help="Replace the data set in --out, once the new one is complete."
        ),
        click.option("--seed", default=0, type=click.IntRange(min=0), help="Seed of the random split."),
        click.option("--valid-fraction", default=0.0, help="Share of rows drawn for validation."),
        click.option("--out", required=True, type=FILE, help="Directory to make."),
    ):
        command = option(command)
    return command


def numeric_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of the formats that hold numbers, not text."""
    for option in (
        click.option("--feature-names", type=FILE, help="File of feature names, one a line."),
        click.option("--label-names", type=FILE, help="File of label names, one a line."),
        click.option(
            "--test-fraction", default=0.0, help="Share of rows drawn for the test, if no test is given."
        ),
    ):
        command = option(command)
    return command


def lines_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of the formats parsed from lines of numbers."""
    for option in (
        click.option(
            "--threads", type=click.IntRange(min=1), help="Parser threads; default: all usable cores."
        ),
        click.option(
            "--merge-duplicates", is_flag=True, help="Sum a feature that a row has twice; else an error."
        ),
        click.option("--test", type=FILE, help="File of test rows."),
    ):
        command = option(command)
    return numeric_options(command)


def text_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of the formats that hold text."""
    for option in (
        click.option("--min-label-count", default=1, help="Labels on fewer training rows are no classes."),
        click.option(
            "--ngrams", default=1, type=click.IntRange(min=1, max=5), help="Longest n-gram of words."
        ),
        click.option("--min-df", default=2, help="tf-idf: drop words in fewer training rows."),
        click.option("--max-features", type=click.IntRange(min=1), help="Words kept, or width of the hash."),
        click.option(
            "--vectorizer",
            default="tfidf",
            type=click.Choice(["tfidf", "hashing"]),
            help="Words to features, fitted on the training rows only.",
        ),
        click.option("--label-separator", default=";", help="Separates labels where they are one string."),
        click.option(
            "--test-fraction", default=0.2, help="Share of rows drawn for the test, if no --test is given."
        ),
        click.option("--test", multiple=True, type=FILE, help="File of test rows; may be repeated."),
    ):
        command = option(command)
    return command


def run_preparation(function: str, *arguments: Any, **settings: Any) -> None:
    """Calls `slidex.data.<function>` under a progress bar and prints what came out."""
    from slidex import data  # noqa: PLC0415
    from slidex.cli.progress import reading_bar  # noqa: PLC0415

    started = time.perf_counter()
    with reading_bar("prepare") as progress:
        dataset: Dataset = getattr(data, function)(*arguments, progress=progress, **settings)
    seconds = time.perf_counter() - started
    rows = sum(split["rows"] for split in dataset.meta["splits"].values())
    parts = ", ".join(f"{split['rows']:,} {name}" for name, split in dataset.meta["splits"].items())
    click.echo(
        f"{dataset.path}: {parts} rows, {dataset.num_features:,} features, {dataset.num_classes:,} classes; "
        f"{seconds:.1f} s, {rows / max(seconds, 1e-9):,.0f} rows/s",
        err=True,
    )


@click.group(
    cls=Group,
    examples=(
        "slidex prepare xmc train.txt --test test.txt --out data",
        "slidex prepare python-source --out data",
    ),
)
def prepare() -> None:
    """Turn a source into a data set: a directory of memory-mapped arrays."""


@prepare.command(
    examples=(
        "slidex prepare xmc train.txt --test test.txt --out data",
        "slidex prepare xmc all.txt.xz --split-file tst_split.txt --out data",
    )
)
@click.argument("source", type=FILE)
@click.option("--split-file", type=FILE, help="File of the 1-based numbers of the test rows (first column).")
@lines_options
@shared_options
def xmc(source: Path, out: Path, **settings: Any) -> None:
    """Text format of the Extreme Classification Repository.

    A header `rows features labels`, then `label,label feature:value ...` per row; also .gz, .bz2, .xz.
    """
    run_preparation("prepare_xmc", source, out, **settings)


@prepare.command(
    examples=(
        "slidex prepare svmlight train.svm --test test.svm --out data",
        "slidex prepare svmlight all.svm --test-fraction 0.1 --one-based --out data",
    )
)
@click.argument("source", type=FILE)
@click.option(
    "--zero-based/--one-based",
    default=None,
    help="Feature ids from 0 or 1.  [default: 1, unless the files have an id 0]",
)
@click.option("--num-features", type=click.IntRange(min=1), help="Features; default: the largest id seen.")
@click.option("--num-classes", type=click.IntRange(min=1), help="Classes; default: the largest label seen.")
@lines_options
@shared_options
def svmlight(source: Path, out: Path, zero_based: bool | None, **settings: Any) -> None:
    """Multilabel svmlight (LIBSVM) format: `label,label feature:value ...` per row, no header."""
    chosen = "auto" if zero_based is None else zero_based
    run_preparation("prepare_svmlight", source, out, zero_based=chosen, **settings)


@prepare.command(
    examples=(
        "slidex prepare npz x.npz y.npz --test-x tx.npz --test-y ty.npz --out data",
        "slidex prepare npz x.npz y.npz --test-fraction 0.1 --out data",
    )
)
@click.argument("x", type=FILE)
@click.argument("y", type=FILE)
@click.option("--test-x", type=FILE, help="Features of the test rows.")
@click.option("--test-y", type=FILE, help="Labels of the test rows.")
@numeric_options
@shared_options
def npz(x: Path, y: Path, out: Path, **settings: Any) -> None:
    """A pair of scipy sparse matrices (`scipy.sparse.save_npz`): features X and labels Y."""
    run_preparation("prepare_npz", x, y, out, **settings)


@prepare.command(
    examples=(
        "slidex prepare jsonl items.jsonl --text-field title,text --out data",
        "slidex prepare jsonl train.jsonl --test test.jsonl --vectorizer hashing --out data",
    )
)
@click.argument("source", nargs=-1, required=True, type=FILE)
@click.option("--text-field", default="text", help="Field or fields (comma-separated) with the text.")
@click.option("--label-field", default="labels", help="Field with the labels: a list, or one string.")
@text_options
@shared_options
def jsonl(source: tuple[Path, ...], out: Path, test: tuple[Path, ...], ngrams: int, **settings: Any) -> None:
    """JSON lines: one object a line with text and labels."""
    run_preparation("prepare_jsonl", source, out, test=test or None, ngram_range=(1, ngrams), **settings)


@prepare.command(
    examples=(
        "slidex prepare csv items.csv --text-columns title,text --out data",
        "slidex prepare csv train.csv --test test.csv --label-separator '|' --out data",
    )
)
@click.argument("source", nargs=-1, required=True, type=FILE)
@click.option("--text-columns", default="text", help="Column or columns (comma-separated) with the text.")
@click.option("--label-column", default="labels", help="Column with the labels.")
@click.option("--delimiter", default=",", help=r"Separates columns; \t is a tab.")
@text_options
@shared_options
def csv(
    source: tuple[Path, ...],
    out: Path,
    test: tuple[Path, ...],
    ngrams: int,
    text_columns: str,
    delimiter: str,
    **settings: Any,
) -> None:
    """Delimited text whose first row names the columns."""
    columns = text_columns.split(",")
    run_preparation(
        "prepare_csv",
        source,
        out,
        test=test or None,
        ngram_range=(1, ngrams),
        text_columns=columns,
        delimiter=delimiter.replace(r"\t", "\t"),
        **settings,
    )


@prepare.command(
    name="python-source",
    examples=(
        "slidex prepare python-source --out data",
        "slidex prepare python-source src venv/lib/python3.11/site-packages --out data",
    ),
)
@click.argument("source", nargs=-1, type=FILE)
@click.option(
    "--min-count", default=3, help="Identifiers seen less often in the training files are no classes."
)
@click.option("--test-fraction", default=0.1, help="Share of files drawn for the test.")
@click.option("--max-files", type=click.IntRange(min=1), help="Read no more files than this.")
@shared_options
def python_source(source: tuple[Path, ...], out: Path, **settings: Any) -> None:
    """Python files: which identifier comes next? SOURCE are directories; default: the standard library."""
    from slidex.data import standard_library_directory  # noqa: PLC0415

    run_preparation("prepare_python_source", source or (standard_library_directory(),), out, **settings)
