"""What FAISS indexes are filled with: class rows as float vectors or as SimHash codes, and the module itself.

`faiss` is an extra and takes a quarter of a second to import, so it is loaded when an index is made and never
before. Legend: M rows, C classes, D hidden width, E indexed width (D + 1 and padding), B bits of a code.
"""

from __future__ import annotations

import contextlib
import importlib
import re
from typing import TYPE_CHECKING, Protocol

import numba
import numpy as np
import torch

from slidex.errors import DivergedError, MissingExtraError
from slidex.lsh.simhash import SimHash

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import ModuleType

_CODE_BITS = 16
_OLDEST_FAISS = (1, 14, 2)
"""With versions before, IVF fast-scan scores rows wrongly after an update (tests/lsh/test_faiss.py fails)."""


def load_faiss() -> ModuleType:
    """The module `faiss`.

    Raises:
        MissingExtraError: It is not installed, too old, or only an empty folder is left of it, as happens where
            two of its packages were installed and one was removed.
    """
    try:
        faiss = importlib.import_module("faiss")
    except ImportError as error:
        raise MissingExtraError(
            "The FAISS indexes need the package faiss, which the extra slidex[faiss] brings. "
            "Install it with: pip install 'slidex[faiss]'"
        ) from error
    if not hasattr(faiss, "index_factory"):
        raise MissingExtraError(
            "The FAISS indexes need the package faiss; what is installed under that name is empty. Uninstall "
            "every faiss package, then install one with: pip install 'slidex[faiss]'"
        )
    if tuple(int(part) for part in re.findall(r"\d+", faiss.__version__)[:3]) < _OLDEST_FAISS:
        raise MissingExtraError(
            f"The FAISS indexes need faiss {'.'.join(map(str, _OLDEST_FAISS))} or newer: older ones score updated "
            f"rows wrongly. Found {faiss.__version__}. Install it with: pip install 'slidex[faiss]'"
        )
    return faiss


@contextlib.contextmanager
def faiss_call(faiss: ModuleType, threads: int | None = None) -> Iterator[None]:
    """Set FAISS's globals for a call and put them back.

    Threads: as many as Numba has (and so, by `slidex.threads`, torch), or as given; where FAISS and torch
    share one OpenMP library they share that number too. Products: always by BLAS, where FAISS 1.15 by itself
    takes a loop five times slower for batches of fewer than about a thousand rows.
    """
    before = faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold
    faiss.omp_set_num_threads(numba.get_num_threads() if threads is None else threads)
    faiss.cvar.distance_compute_blas_threshold = 1
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before[0])
        faiss.cvar.distance_compute_blas_threshold = before[1]


class RowEncoder(Protocol):
    """Turns class rows and hidden vectors into what FAISS stores and compares.

    Attributes:
        width: Floats or bits of an encoded row, as FAISS counts them.
        binary: Whether rows are codes, uint8 (M, width / 8), rather than float32 (M, width).
    """

    width: int
    binary: bool

    def fit(self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None) -> None: ...  # noqa: D102
    def rows(  # noqa: D102
        self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, ids: torch.Tensor
    ) -> np.ndarray: ...
    def queries(self, hidden_ND: torch.Tensor) -> np.ndarray: ...  # noqa: D102
    def parameters(self) -> dict[str, torch.Tensor]: ...  # noqa: D102
    def load_parameters(self, parameters: Mapping[str, torch.Tensor]) -> None: ...  # noqa: D102


class FloatRows:
    """Rows ``[w_c, b_c, 0...]`` and queries ``[h, 1, 0...]`` in float32, so that the bias takes part.

    Args:
        in_features: Hidden width D.
        multiple: The width is D + 1, padded with zeros to a multiple of this; product quantisers cut a vector
            into parts of equal width.
    """

    binary = False

    def __init__(self, in_features: int, multiple: int = 1) -> None:
        self._in_features = in_features
        self.width = -(-(in_features + 1) // multiple) * multiple

    def fit(self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None) -> None:
        """Nothing to fit."""

    def rows(self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, ids: torch.Tensor) -> np.ndarray:
        """Class rows, float32 (M, E).

        Args:
            weight_CD: floating (C, D).
            bias_C: floating (C,), or None for zeros.
            ids: int64 (M,).

        Raises:
            DivergedError: A row holds a value that is not finite.
        """
        rows_ME = torch.zeros((len(ids), self.width))
        rows_ME[:, : self._in_features] = weight_CD.detach()[ids]
        if bias_C is not None:
            rows_ME[:, self._in_features] = bias_C.detach()[ids]
        finite = torch.isfinite(rows_ME)
        if not bool(finite.all()):
            bad = int(ids[(~finite.all(dim=1)).nonzero()[0]])
            raise DivergedError(
                f"The weight row or bias of class {bad} holds a value that is not finite; it cannot be indexed."
            )
        return rows_ME.numpy()

    def queries(self, hidden_ND: torch.Tensor) -> np.ndarray:
        """Queries, float32 (N, E).

        Raises:
            DivergedError: A row holds a value that is not finite.
        """
        queries_NE = torch.zeros((len(hidden_ND), self.width))
        queries_NE[:, : self._in_features] = hidden_ND.detach()
        queries_NE[:, self._in_features] = 1.0
        finite_N = torch.isfinite(queries_NE).all(dim=1)
        if not bool(finite_N.all()):
            bad = int((~finite_N).nonzero()[0])
            raise DivergedError(f"Row {bad} of the hidden vectors holds a value that is not finite.")
        return queries_NE.numpy()

    def parameters(self) -> dict[str, torch.Tensor]:
        """None."""
        return {}

    def load_parameters(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Nothing to restore."""


class SignRows:
    """Codes of B signed random projections, compared by Hamming distance; see `SimHash`.

    Args:
        in_features: Hidden width D.
        bits: B, a multiple of 16.
        seed: Fixes the projections.
        center: See `SimHash`.
    """

    binary = True

    def __init__(self, in_features: int, *, bits: int, seed: int, center: bool) -> None:
        self.width = bits
        self._family = SimHash(
            in_features, bits=_CODE_BITS, tables=bits // _CODE_BITS, seed=seed, center=center
        )

    def fit(self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None) -> None:
        """Set the mean row."""
        self._family.fit(weight_CD, bias_C)

    def rows(self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, ids: torch.Tensor) -> np.ndarray:
        """Codes of class rows, uint8 (M, B / 8); arguments as in `FloatRows.rows`."""
        codes_LM = self._family.hash_rows(weight_CD, bias_C, ids)
        return np.ascontiguousarray(codes_LM.T).view(np.uint8)

    def queries(self, hidden_ND: torch.Tensor) -> np.ndarray:
        """Codes of hidden vectors, uint8 (N, B / 8)."""
        return self._family.hash_queries(hidden_ND)[:, :, 0].astype(np.uint16).view(np.uint8)

    def parameters(self) -> dict[str, torch.Tensor]:
        """What `fit` set."""
        return self._family.parameters()

    def load_parameters(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Restore what `fit` set."""
        self._family.load_parameters(parameters)
