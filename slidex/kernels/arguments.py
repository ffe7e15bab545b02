"""The border between torch and the kernels: checks of dtype, shape, device and layout, once a call.

A compiled kernel does not check bounds, so a wrong shape would read or overwrite foreign memory. Every tensor passes
through here first; the kernels of each kind of device add what only they can check or need.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Generic, NoReturn, TypeVar

import torch

from slidex.errors import ConfigError

if TYPE_CHECKING:
    from slidex.kernels.optimizer import RowState

INTEGERS = (torch.int32, torch.int64)
View = TypeVar("View")


class Checks(ABC, Generic[View]):
    """Checks the tensors of one kernel call and turns them into what the kernel takes, a `View`.

    Args:
        caller: Name of the kernel, for messages.
        device: Where all tensors of the call must be.
        dtype: Of the empty arrays that stand for None.

    Raises:
        ConfigError: From every method, when a tensor does not fit.
    """

    def __init__(self, caller: str, device: torch.device, dtype: torch.dtype) -> None:
        self.caller, self.device, self.dtype = caller, device, dtype

    @abstractmethod
    def view(self, tensor: torch.Tensor) -> View:
        """What the kernel takes for a contiguous tensor without gradient."""

    @abstractmethod
    def check_float(self, name: str, dtype: torch.dtype) -> None:
        """Refuse a float dtype that the call does not take."""

    @abstractmethod
    def check_moment(self, name: str, dtype: torch.dtype) -> None:
        """Refuse a dtype for a part of a `RowState`."""

    def fail(self, name: str, constraint: str, value: object) -> NoReturn:
        """Raise with the one wording of all these messages."""
        raise ConfigError(
            f"The {name!r} parameter of {self.caller} must be {constraint}. Got {value!r} instead."
        )

    def tensor(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> View:
        """View of a tensor of this shape on the call's device; a strided one is copied."""
        if tensor.device != self.device:
            place = "on the CPU" if self.device.type == "cpu" else f"on {self.device}"
            self.fail(name, place, str(tensor.device))
        if tuple(tensor.shape) != shape:
            self.fail(name, f"of shape {shape}", tuple(tensor.shape))
        if tensor.requires_grad:
            tensor = tensor.detach()
        return self.view(tensor if tensor.is_contiguous() else tensor.contiguous())

    def floats(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> View:
        """View of a float input; a strided input is copied."""
        self.check_float(name, tensor.dtype)
        return self.tensor(name, tensor, shape)

    def none(self, shape: tuple[int, ...]) -> View:
        """An empty array of as many dimensions as `shape`, which kernels take for "there is none"."""
        return self.view(torch.empty((0, *shape[1:]), dtype=self.dtype, device=self.device))

    def floats_or_none(self, name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> View:
        """Like `floats`; None becomes `none`."""
        return self.none(shape) if tensor is None else self.floats(name, tensor, shape)

    def in_place(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> View:
        """View of a tensor that the kernel overwrites; it must be contiguous."""
        self._check_in_place(name, tensor)
        return self.floats(name, tensor, shape)

    def _check_in_place(self, name: str, tensor: torch.Tensor) -> None:
        if not tensor.is_contiguous():
            self.fail(name, "contiguous, as it is changed in place", tuple(tensor.stride()))

    def moment(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> View:
        """View of a part of a `RowState`, which the kernel overwrites."""
        self._check_in_place(name, tensor)
        self.check_moment(name, tensor.dtype)
        return self.tensor(name, tensor, shape)

    def parameter(
        self, name: str, tensor: torch.Tensor, state: RowState, shape: tuple[int, ...]
    ) -> tuple[View, View, View]:
        """Views of a parameter and its state, in one of the shapes of `RowState`; all overwritten by the kernel."""
        per_row = (shape[0], *(1 for _ in shape[1:]))
        full = not state.sums and tuple(state.moment2.shape) != per_row
        return (
            self.in_place(name, tensor, shape),
            self.moment(f"moment1 of {name}", state.moment1, (0, *shape[1:]) if state.sums else shape),
            self.moment(f"moment2 of {name}", state.moment2, shape if full else per_row),
        )

    def parameter_or_none(
        self, name: str, tensor: torch.Tensor | None, state: RowState | None, shape: tuple[int, ...]
    ) -> tuple[View, View, View]:
        """Like `parameter`; None, which has no state, becomes three empty arrays."""
        if tensor is None:
            none = self.none(shape)
            return none, none, none
        if state is None:
            self.fail(f"state of {name}", "given with it", None)
        return self.parameter(name, tensor, state, shape)

    def integers(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> View:
        """View of an integer tensor."""
        if tensor.dtype not in INTEGERS:
            self.fail(name, "of dtype torch.int64 or torch.int32", tensor.dtype)
        return self.tensor(name, tensor, shape)

    def long_integers(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> View:
        """View of an int64 tensor."""
        if tensor.dtype != torch.int64:
            self.fail(name, "of dtype torch.int64", tensor.dtype)
        return self.tensor(name, tensor, shape)


def refuse_part(owner: str, name: str, constraint: str, found: object) -> NoReturn:
    """Raises ConfigError for a part of a record of tensors."""
    raise ConfigError(f"The {name!r} parameter of {owner} must be {constraint}. Got {found} instead.")


def check_part(
    owner: str, name: str, tensor: torch.Tensor, kinds: tuple[torch.dtype, ...], shape: tuple[int, ...]
) -> None:
    """Refuses a part of a record that is not contiguous, or has another dtype or shape."""
    if tensor.dtype not in kinds or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        refuse_part(
            owner, name, f"contiguous, of dtype {kinds[0]} and shape {shape}", (tensor.dtype, *tensor.shape)
        )


def check_lists(owner: str, indptr: torch.Tensor, name: str, ids: torch.Tensor, bound: int) -> None:
    """Refuses offsets that do not rise from 0 to the number of ids, and ids that are not below a bound."""
    if indptr[0] != 0 or indptr[-1] != len(ids) or bool((indptr[1:] < indptr[:-1]).any()):
        refuse_part(owner, "indptr", f"rising from 0 to {len(ids)}", indptr)
    low, high = (int(i) for i in torch.aminmax(ids)) if len(ids) else (0, 0)
    if low < 0 or high >= max(bound, 1):
        refuse_part(owner, name, f"ids in [0, {bound})", (low, high))
