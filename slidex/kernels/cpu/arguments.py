"""The border between torch and the compiled kernels: checks once a call, then zero-copy numpy views.

A compiled kernel does not check bounds, so a wrong shape or id would read or overwrite foreign memory. Every
array passes through here first; the cost is some microseconds a call, and a tenth of a nanosecond for each
id.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import numba
import numpy as np
import torch
from numba import njit

from slidex.errors import ConfigError

if TYPE_CHECKING:
    from slidex.kernels.optimizer import RowState

FLOATS = (torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


class Arguments:
    """Checks the tensors of one kernel call and turns them into numpy views.

    Args:
        caller: Name of the kernel, for messages.
        dtype: Float dtype that all float tensors of the call must share.

    Raises:
        ConfigError: From every method, when a tensor does not fit.
    """

    def __init__(self, caller: str, dtype: torch.dtype) -> None:
        self.caller, self.dtype = caller, dtype
        if dtype not in FLOATS:
            self.fail("dtype", "torch.float32 or torch.float64", dtype)

    def fail(self, name: str, constraint: str, value: object) -> NoReturn:
        """Raises the error of a parameter that does not fit."""
        raise ConfigError(
            f"The {name!r} parameter of {self.caller} must be {constraint}. Got {value!r} instead."
        )

    def _view(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray:
        if tensor.device.type != "cpu":
            self.fail(name, "on the CPU", str(tensor.device))
        if tuple(tensor.shape) != shape:
            self.fail(name, f"of shape {shape}", tuple(tensor.shape))
        if tensor.requires_grad:
            tensor = tensor.detach()
        return tensor.numpy() if tensor.is_contiguous() else tensor.contiguous().numpy()

    def floats(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray:
        """View of an input of the call's dtype; a strided input is copied."""
        if tensor.dtype != self.dtype:
            self.fail(name, f"of dtype {self.dtype}", tensor.dtype)
        return self._view(name, tensor, shape)

    def floats_or(
        self, default: float, name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]
    ) -> np.ndarray:
        """Like `floats`; None becomes an array of `default`, so that a kernel is compiled once for both."""
        if tensor is None:
            return torch.full(shape, default, dtype=self.dtype).numpy()
        return self.floats(name, tensor, shape)

    def in_place(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray:
        """View of a tensor that the kernel overwrites; it must be contiguous."""
        if not tensor.is_contiguous():
            self.fail(name, "contiguous, as it is changed in place", tuple(tensor.stride()))
        return self.floats(name, tensor, shape)

    def floats_or_none(self, name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> np.ndarray:
        """Like `floats`; None becomes an empty array of as many dimensions, which kernels take for "there is none"."""
        if tensor is None:
            return torch.empty((0, *shape[1:]), dtype=self.dtype).numpy()
        return self.floats(name, tensor, shape)

    def parameter_or_none(
        self, name: str, tensor: torch.Tensor | None, state: RowState | None, shape: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Like `parameter`; None, which has no state, becomes three empty arrays."""
        if tensor is None:
            none = self.floats_or_none(name, None, shape)
            return none, none, none
        if state is None:
            self.fail(f"state of {name}", "given with it", None)
        return self.parameter(name, tensor, state, shape)

    def parameter(
        self, name: str, tensor: torch.Tensor, state: RowState, shape: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Views of a parameter and its state, in one of the shapes of `RowState`; all overwritten by the kernel."""
        per_row = (shape[0], *(1 for _ in shape[1:]))
        full = not state.sums and tuple(state.moment2.shape) != per_row
        return (
            self.in_place(name, tensor, shape),
            self.in_place(f"moment1 of {name}", state.moment1, (0, *shape[1:]) if state.sums else shape),
            self.in_place(f"moment2 of {name}", state.moment2, shape if full else per_row),
        )

    def ids(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...], low: int, high: int) -> np.ndarray:
        """View of an integer tensor whose entries all lie in ``[low, high)``."""
        if tensor.dtype not in INTEGERS:
            self.fail(name, "of dtype torch.int64 or torch.int32", tensor.dtype)
        view = self._view(name, tensor, shape)
        least, most = _extremes(view.reshape(-1), low)
        if view.size and (least < low or most >= high):
            self.fail(name, f"made of ids in [{low}, {high})", int(least if least < low else most))
        return view

    def flags(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray:
        """View of a bool tensor."""
        if tensor.dtype != torch.bool:
            self.fail(name, "of dtype torch.bool", tensor.dtype)
        return self._view(name, tensor, shape)

    def offsets(self, name: str, tensor: torch.Tensor, num_rows: int, nnz: int) -> np.ndarray:
        """View of a CSR ``indptr``: int64 (num_rows + 1,), from 0 up to ``nnz`` and never falling."""
        if tensor.dtype != torch.int64:
            self.fail(name, "of dtype torch.int64", tensor.dtype)
        view = self._view(name, tensor, (num_rows + 1,))
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
