"""Python source to a prepared data set: predict the identifier that comes next.

Real classes by the ten thousand from any machine, without a download: the standard library of the running
interpreter, or any folder of Python. Whole files go to one split, by a hash of their path, so the test asks for
files never seen. Tokens are spooled to disk between counting the identifiers and writing the rows, so that the
source is read once and memory does not grow with it.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
import tokenize
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from slidex.data.csr import CsrArrays
from slidex.data.python_tokens import TokenTable, UntokenisableError, context_features, is_name, tokenise
from slidex.data.splitting import SPLIT_NAMES, Progress, check_fractions
from slidex.data.vectorizers import PythonSourceVectorizer
from slidex.data.writer import DatasetWriter
from slidex.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from slidex.data.dataset import Dataset

CONTEXT_FILE = "context.npy"
"""In each split's folder: int32 (rows, 2), ids of the tokens two and one before each position, 0 for none."""

_INSTALLED = {"site-packages", "dist-packages"}
_NAMED_SKIPPED_FILES = 100  # listed in meta.json


def standard_library_directory() -> Path:
    """Folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def prepare_python_source(
    directories: Sequence[str | Path],
    out: str | Path,
    *,
    min_count: int = 3,
    test_fraction: float = 0.1,
    valid_fraction: float = 0.0,
    max_files: int | None = None,
    seed: int = 0,
    num_features: int = 2**17,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Dataset:
    """Prepare every ``*.py`` file under some folders.

    A row is a place where an identifier stands that is a class; its input is described at
    `slidex.data.python_tokens.context_features`, its one label is the identifier. Folders named
    ``site-packages`` or ``dist-packages`` below the given ones are left out (give them themselves to read them).
    Each split's folder also gets `CONTEXT_FILE`, which `BackoffBaseline` reads.

    Args:
        directories: Folders, at least one.
        out: Directory to create.
        min_count: Identifiers seen at least this often in training files are classes.
        test_fraction: Expected share of files for testing.
        valid_fraction: Expected share of files for validation.
        max_files: Read at most this many files, chosen by a hash of their paths; None reads all.
        seed: Changes which files are chosen and which split they go to.
        num_features: Width of the hashed input.
        overwrite: Replace an existing data set.
        progress: Called with the work done so far.

    Returns:
        The data set. ``meta["extra"]`` counts files by split, skipped files by reason, and the positions left
        out because their identifier is no class.

    Raises:
        ConfigError: A setting is out of range, or `out` cannot be used.
        DataError: There is no such folder, no Python file in it, or no identifier occurs often enough.
    """
    _check(directories, min_count, max_files)
    check_fractions(valid_fraction, test_fraction)
    vectorizer = PythonSourceVectorizer(num_features)
    files = [file for folder in directories for file in _find(Path(folder))]
    if max_files is not None:
        chosen = set(sorted(files, key=lambda file: _draw(f"choose:{seed}", file))[:max_files])
        files = [file for file in files if file in chosen]
    if not files:
        raise DataError("expected at least one .py file, found none", path=directories[0])
    with DatasetWriter(out, overwrite=overwrite) as writer:
        spool_path = writer.path / "tokens.spool"
        with spool_path.open("w+b") as spool:
            corpus = _Corpus(spool, progress, 2 * sum(file.size for file in files))
            for file in files:
                draw = _draw(f"split:{seed}", file)
                corpus.read(file, 2 if draw < test_fraction else int(draw < test_fraction + valid_fraction))
            labels, classes = _classes(corpus, min_count)
            rows = _write(
                corpus, writer, classes, num_features, (True, valid_fraction > 0, test_fraction > 0)
            )
        spool_path.unlink()
        writer.write_names("labels", labels)
        vectorizer.save(writer.path / "vectorizer")
        return writer.finish(
            num_features=num_features,
            num_classes=len(labels),
            source={
                "format": "python-source",
                "files": [str(folder) for folder in directories],
                "options": {
                    "min_count": min_count,
                    "test_fraction": test_fraction,
                    "valid_fraction": valid_fraction,
                    "max_files": max_files,
                    "seed": seed,
                },
            },
            vectorizer=vectorizer.kind,
            extra=corpus.summary(rows),
        )


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    name: str  # relative to its folder, with slashes: the same on every machine
    size: int


@dataclass(slots=True)
class _Corpus:
    """Tokens of all files, on disk, with what has been counted in them."""

    spool: BinaryIO
    progress: Progress | None
    bytes_total: int
    table: TokenTable = field(default_factory=TokenTable)
    entries: list[tuple[int, int, int]] = field(default_factory=list)  # split, tokens, bytes of source
    counts: list[Counter[int]] = field(default_factory=lambda: [Counter() for _ in SPLIT_NAMES])
    skipped: Counter[str] = field(default_factory=Counter)
    skipped_names: list[str] = field(default_factory=list)
    bytes_done: int = 0

    def read(self, file: _File, split: int) -> None:
        """Tokenise a file, or count why not."""
        self.report(0, file.size)
        try:
            with tokenize.open(file.path) as source:
                tokens = tokenise(source.read(), self.table)
        except (OSError, SyntaxError, UnicodeDecodeError, UntokenisableError) as error:
            reason = "undecodable"
            if isinstance(error, OSError):
                reason = "unreadable"
            elif isinstance(error, UntokenisableError):
                reason = "untokenisable"
            self.skipped[reason] += 1
            self.skipped_names.append(file.name)
            self.bytes_done += file.size  # there will be no second pass over it
            return
        self.spool.write(tokens.data)
        self.entries.append((split, len(tokens), file.size))
        names, counts = np.unique(tokens[is_name(tokens)], return_counts=True)
        self.counts[split].update(dict(zip(names.tolist(), counts.tolist(), strict=True)))

    def files(self) -> Iterator[tuple[int, np.ndarray, int]]:
        """Yield split, tokens and bytes of source of every file read."""
        self.spool.seek(0)
        for split, length, size in self.entries:
            yield split, np.frombuffer(self.spool.read(8 * length), dtype=np.uint64), size

    def report(self, rows: int, more_bytes: int) -> None:
        self.bytes_done += more_bytes
        if self.progress is not None:
            self.progress(rows=rows, bytes_done=self.bytes_done, bytes_total=self.bytes_total)

    def summary(self, rows: Sequence[int]) -> dict[str, Any]:
        """What ``meta.json`` says about it, given the rows written by split."""
        outside = [counts.total() - rows[i] for i, counts in enumerate(self.counts)]
        return {
            "files": {name: sum(e[0] == i for e in self.entries) for i, name in enumerate(SPLIT_NAMES)},
            "skipped_files": dict(self.skipped),
            "skipped_file_names": self.skipped_names[:_NAMED_SKIPPED_FILES],
            **{
                f"{name}_positions_outside_vocabulary": n
                for name, n in zip(SPLIT_NAMES, outside, strict=True)
            },
        }


@dataclass(frozen=True, slots=True)
class _Classes:
    tokens: np.ndarray  # uint64 (C,), ascending
    ids: np.ndarray  # int32 (C,), class of each

    def of(self, tokens: np.ndarray) -> np.ndarray:
        """Class of every token, -1 where it is none."""
        at = np.minimum(np.searchsorted(self.tokens, tokens), len(self.tokens) - 1)
        return np.where(self.tokens[at] == tokens, self.ids[at], -1).astype(np.int32)


def _classes(corpus: _Corpus, min_count: int) -> tuple[list[str], _Classes]:
    """Names of the classes in the order of their ids, and the way from tokens to ids."""
    text = corpus.table.names()
    found = sorted((text[token], token) for token, count in corpus.counts[0].items() if count >= min_count)
    if not found:
        raise DataError(
            f"expected an identifier seen {min_count} or more times in training files, found none "
            f"in {sum(split == 0 for split, _, _ in corpus.entries)} files"
        )
    tokens = np.array([token for _, token in found], dtype=np.uint64)
    order = np.argsort(tokens)
    return [name for name, _ in found], _Classes(tokens[order], order.astype(np.int32))


def _write(
    corpus: _Corpus,
    writer: DatasetWriter,
    classes: _Classes,
    num_features: int,
    wanted: tuple[bool, bool, bool],
) -> list[int]:
    """Write every row and its context; returns the rows of each split."""
    known = set(classes.tokens.tolist())
    rows = [sum(count for token, count in counts.items() if token in known) for counts in corpus.counts]
    contexts = {}
    for split in np.flatnonzero(wanted):
        name = SPLIT_NAMES[split]
        writer.append(name, _no_rows(num_features), _no_rows(len(classes.ids)))
        contexts[int(split)] = np.lib.format.open_memmap(
            writer.path / name / CONTEXT_FILE, mode="w+", dtype=np.int32, shape=(rows[split], 2)
        )
    done = [0, 0, 0]
    for split, tokens, size in corpus.files():
        positions = np.flatnonzero(is_name(tokens))
        labels = classes.of(tokens[positions])
        positions, labels = positions[labels >= 0], labels[labels >= 0]
        indptr, indices = context_features(tokens, positions, num_features)
        writer.append(
            SPLIT_NAMES[split],
            CsrArrays(indptr, indices, None, num_features),
            CsrArrays(np.arange(len(labels) + 1), labels, None, len(classes.ids)),
        )
        contexts[split][done[split] : done[split] + len(labels)] = _context(tokens, positions)
        done[split] += len(labels)
        corpus.report(sum(done), size)
    for context in contexts.values():
        context.flush()
    return rows


def _context(tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Upper halves of the two tokens before each position, 0 before the start of the file: int32 (rows, 2)."""
    upper = np.zeros(len(tokens) + 2, dtype=np.uint32)
    upper[2:] = tokens >> np.uint64(32)
    return np.stack([upper[positions], upper[positions + 1]], axis=1).view(np.int32)


def _no_rows(num_columns: int) -> CsrArrays:
    return CsrArrays(np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int32), None, num_columns)


def _find(folder: Path) -> list[_File]:
    """Python files under a folder, in the order of their relative names."""
    if not folder.is_dir():
        raise DataError("expected a directory, found none", path=folder)
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _INSTALLED]
        for name in names:
            path = Path(parent, name)
            if path.suffix == ".py":
                size = path.stat().st_size if path.exists() else 0
                files.append(_File(path, path.relative_to(folder).as_posix(), size))
    return sorted(files, key=lambda file: file.name)


def _draw(salt: str, file: _File) -> float:
    """A number in [0, 1) that depends on nothing but the salt and the file's relative name."""
    text = f"{salt}:{file.name}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=6).digest(), "big") / 2**48


def _check(directories: Sequence[str | Path], min_count: int, max_files: int | None) -> None:
    for name, constraint, value, good in (
        ("directories", "at least one folder", directories, len(directories) > 0),
        ("min_count", "1 or more", min_count, min_count >= 1),
        ("max_files", "None or 1 or more", max_files, max_files is None or max_files >= 1),
    ):
        if not good:
            raise ConfigError(
                f"The {name!r} parameter of prepare_python_source must be {constraint}. Got {value!r} instead."
            )
