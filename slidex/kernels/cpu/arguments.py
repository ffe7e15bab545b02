"""The border between torch and the kernels in Numba: `slidex.kernels.arguments` with bounds, and numpy views.

All float tensors of a call share one dtype. Ids and offsets are checked before a kernel sees them, at a tenth of a
nanosecond each; the rest costs some microseconds a call.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numba import njit

from slidex.kernels.arguments import Checks

FLOATS = (torch.float32, torch.float64)
_CPU = torch.device("cpu")


class Arguments(Checks[np.ndarray]):
    """Checks the tensors of one kernel call and turns them into numpy views.

    Args:
        caller: Name of the kernel, for messages.
        dtype: Float dtype that all float tensors of the call must share.

    Raises:
        ConfigError: From every method, when a tensor does not fit.
    """

    def __init__(self, caller: str, dtype: torch.dtype) -> None:
        super().__init__(caller, _CPU, dtype)
        if dtype not in FLOATS:
            self.fail("dtype", "torch.float32 or torch.float64", dtype)

    def view(self, tensor: torch.Tensor) -> np.ndarray:
        """The same memory as a numpy array."""
        return tensor.numpy()

    def check_float(self, name: str, dtype: torch.dtype) -> None:
        """Refuse another dtype than the call's."""
        if dtype != self.dtype:
            self.fail(name, f"of dtype {self.dtype}", dtype)

    def check_moment(self, name: str, dtype: torch.dtype) -> None:
        """Refuse another dtype than the call's."""
        self.check_float(name, dtype)

    def floats_or(
        self, default: float, name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]
    ) -> np.ndarray:
        """Like `floats`; None becomes an array of `default`, so that a kernel is compiled once for both."""
        if tensor is None:
            return torch.full(shape, default, dtype=self.dtype).numpy()
        return self.floats(name, tensor, shape)

    def scores(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray:
        """Like `in_place`; where the call is in float32 also bfloat16, as int16 for `intrinsics.widen`."""
        if tensor.dtype == torch.bfloat16 and self.dtype == torch.float32:
            self._check_in_place(name, tensor)
            return self.tensor(name, tensor.detach().view(torch.int16), shape)
        return self.in_place(name, tensor, shape)

    def flags(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray:
        """View of a bool tensor."""
        if tensor.dtype != torch.bool:
            self.fail(name, "of dtype torch.bool", tensor.dtype)
        return self.tensor(name, tensor, shape)

    def ids(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...], low: int, high: int) -> np.ndarray:
        """View of an integer tensor whose entries all lie in ``[low, high)``."""
        view = self.integers(name, tensor, shape)
        least, most = _extremes(view.reshape(-1), low)
        if view.size and (least < low or most >= high):
            self.fail(name, f"made of ids in [{low}, {high})", int(least if least < low else most))
        return view

    def offsets(self, name: str, tensor: torch.Tensor, num_rows: int, nnz: int) -> np.ndarray:
        """View of a CSR ``indptr``: int64 (num_rows + 1,), from 0 up to ``nnz`` and never falling."""
        view = self.long_integers(name, tensor, (num_rows + 1,))
        if view[0] != 0 or view[-1] != nnz or np.any(view[1:] < view[:-1]):
            self.fail(name, f"rising from 0 to {nnz}", view)
        return view


@njit(cache=True, nogil=True)
def _extremes(ids, empty):
    least = most = np.int64(empty)
    for i in range(ids.size):
        least = min(least, ids[i])
        most = max(most, ids[i])
    return least, most


def num_chunks() -> int:
    """Chunks a parallel loop is cut into: a few for each thread, to level uneven work."""
    return 4 * numba.get_num_threads()
