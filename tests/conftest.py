"""Data sets that several test files share."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import numpy as np
import pytest

from slidex.data import CsrArrays, Dataset, DatasetWriter
from slidex.threads import set_threads

if TYPE_CHECKING:
    from collections.abc import Iterator


def pytest_configure() -> None:
    """Lets Ctrl-C reach the processes that tests start: those of a background job would inherit that it is ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def checkerboard(rows: int, classes: int, seed: int, labels_per_row: int = 1) -> tuple[CsrArrays, CsrArrays]:
    """Rows whose features name their classes: feature c always goes with class c, beside two noise features."""
    rng = np.random.default_rng(seed)
    y = np.sort(rng.permuted(np.tile(np.arange(classes), (rows, 1)), axis=1)[:, :labels_per_row], axis=1)
    noise = classes + np.sort(rng.permuted(np.tile(np.arange(20), (rows, 1)), axis=1)[:, :2], axis=1)
    x = np.concatenate([y, noise], axis=1)
    return (
        CsrArrays(np.arange(rows + 1) * x.shape[1], x.ravel().astype(np.int32), None, classes + 20),
        CsrArrays(np.arange(rows + 1) * labels_per_row, y.ravel().astype(np.int32), None, classes),
    )


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For thousands of tiny calls: waking a second thread for each takes longer than the work."""
    set_threads(1)
    yield
    set_threads(None)


@pytest.fixture(scope="session")
def easy_data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """1,200 training rows over 300 classes that a working model learns to perfection."""
    path = tmp_path_factory.mktemp("easy") / "data"
    with DatasetWriter(path) as writer:
        for split, rows, seed in (("train", 1200, 1), ("test", 200, 2), ("valid", 100, 3)):
            writer.append(split, *checkerboard(rows, 300, seed, labels_per_row=2))
        writer.write_names("labels", (f"class {c}" for c in range(300)))
        return writer.finish(
            num_features=320, num_classes=300, source={"format": "test", "files": [], "options": {}}
        )
