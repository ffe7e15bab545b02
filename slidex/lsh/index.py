"""One protocol for everything that proposes candidate classes, and the registry that makes one from its name.

An index is a function of (seed, settings, weights): the same three give the same tables and the same answers,
whatever the number of threads. Tie-breaking draws on an explicit ``step`` and never on a hidden counter, so
that a resumed run continues bit for bit. Legend: N rows in a batch, C classes, D hidden width, L tables.
"""

from __future__ import annotations

import difflib
import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from slidex.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexStats:
    """What an index looks like now. Times are wall-clock seconds; loads are classes per bucket."""

    built: bool = False
    rows: int = 0
    tables: int = 0
    mean_bucket_load: float = 0.0
    max_bucket_load: int = 0
    empty_bucket_share: float = 0.0
    last_build_seconds: float = 0.0
    last_update_seconds: float = 0.0
    rows_rehashed: int = 0
    bytes: int = 0
    builds: int = 0
    updates: int = 0


@dataclass(frozen=True, slots=True)
class QuerySample:
    """Hidden vectors of training rows with their true classes, for indexes that learn where queries lie.

    Args:
        hidden_ND: float32 (N, D).
        label_indptr: int64 (N + 1,), row n's true classes are ``label_ids[label_indptr[n]:label_indptr[n + 1]]``.
        label_ids: int64 (P_total,).
    """

    hidden_ND: torch.Tensor
    label_indptr: torch.Tensor
    label_ids: torch.Tensor


class CandidateIndex(Protocol):
    """Proposes classes whose weight rows have a large inner product with a hidden vector.

    Every method that takes weights raises ConfigError for a wrong shape and DivergedError for a value that is
    not finite. `query`, `pool`, `update`, `drift` and `state` before the first `build` raise ConfigError. One
    index is not to be used from two threads at once.
    """

    in_features: int
    num_classes: int
    uses_queries: bool
    """Whether `build` makes use of its `queries`; where False, callers need not gather them."""

    def build(
        self,
        weight_CD: torch.Tensor,
        bias_C: torch.Tensor | None = None,
        *,
        queries: QuerySample | None = None,
    ) -> None:
        """Index all rows, forgetting whatever was there but what was learned from earlier `queries`.

        Args:
            weight_CD: floating (C, D), one row per class.
            bias_C: floating (C,), or None for no bias.
            queries: Recent hidden vectors to learn from. None keeps what was learned before; an index that has
                learned nothing yet then works as it does without learning.
        """
        ...

    def update(self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, changed_ids: torch.Tensor) -> None:
        """Bring the given rows up to date; the result equals a rebuild with the same hash functions.

        Args:
            weight_CD: floating (C, D), the current rows of all classes.
            bias_C: floating (C,), or None.
            changed_ids: int64 (M,), the classes whose rows moved; repeats are allowed.
        """
        ...

    def query(self, hidden_ND: torch.Tensor, k: int, *, step: int = 0) -> torch.Tensor:
        """The k most promising classes of each row.

        Args:
            hidden_ND: floating (N, D).
            k: Candidates per row, at least 1; may exceed C.
            step: Keys the breaking of ties. The answer for a row depends on the row and the step alone, never
                on the rest of the batch.

        Returns:
            int64 (N, k): class ids, best first, no id twice in a row, -1 where there is no further candidate.
        """
        ...

    def pool(self, hidden_ND: torch.Tensor, budget: int, *, step: int = 0) -> torch.Tensor:
        """The most promising classes of the batch as a whole.

        Args:
            hidden_ND: floating (N, D).
            budget: The most ids to return, at least 1.
            step: Keys the breaking of ties.

        Returns:
            int64 (at most budget,): distinct class ids, ascending (memory order suits the gather that
            follows).
        """
        ...

    def drift(self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, sample_ids: torch.Tensor) -> float:
        """Share, in [0, 1], of the given rows' index entries that no longer fit their current weights."""
        ...

    def stats(self) -> IndexStats:
        """Fill, load, sizes and the times of the last build and update."""
        ...

    def state(self) -> dict[str, torch.Tensor]:
        """What `load_state` needs to restore the index as built from weights that have moved on since.

        The tensors share memory with the index. A run need not save them unless it must resume bit for bit.
        """
        ...

    def load_state(
        self,
        state: Mapping[str, torch.Tensor],
        weight_CD: torch.Tensor,
        bias_C: torch.Tensor | None = None,
    ) -> None:
        """Restore the index that `state` was taken from.

        Args:
            state: What `state` gave on an index of the same seed and settings.
            weight_CD: The current rows, for indexes that read them live; tables are restored from `state`
                alone.
            bias_C: The current bias, or None.

        Raises:
            ConfigError: A tensor is missing, or its shape or type is not this index's.
        """
        ...


class DeviceCandidateIndex(CandidateIndex, Protocol):
    """A `CandidateIndex` that can answer where the weights are, on a CUDA device, without waiting for it.

    Attributes:
        runs_on_cuda: Whether it does; a class may have instances that do and others that do not.
        bytes_on_device: Memory that it needs there at most, which is while it is built or asked.
    """

    @property
    def runs_on_cuda(self) -> bool: ...  # noqa: D102
    @property
    def bytes_on_device(self) -> int: ...  # noqa: D102

    def require_cuda(self) -> None:
        """Raises ConfigError, naming it, for a setting that has no CUDA implementation."""
        ...

    def padded_pool(self, hidden_ND: torch.Tensor, budget: int, *, step: int = 0) -> torch.Tensor:
        """As `pool`, of a size that does not depend on the answer: int64 (min(budget, C),), -1 after the last class.

        Nor does `query` wait for the device. A hidden vector that is not finite is told of by a later call.
        """
        ...


_FACTORIES: dict[str, Callable[..., CandidateIndex]] = {}
_SETTINGS: dict[str, dict[str, Any]] = {}
_Factory = TypeVar("_Factory", bound="Callable[..., Any]")


def register_index(name: str, settings: dict[str, Any] | None = None) -> Callable[[_Factory], _Factory]:
    """Register a factory ``(in_features, num_classes, *, seed, **settings)`` with `make_index` by `name`.

    Args:
        name: What `make_index` is asked for.
        settings: The index's settings with their defaults; None to read them from the factory's signature.
    """

    def register(factory: _Factory) -> _Factory:
        _FACTORIES[name] = factory
        _SETTINGS[name] = keyword_settings(factory) if settings is None else settings
        return factory

    return register


def keyword_settings(made: Callable[..., Any]) -> dict[str, Any]:
    """Keyword-only parameters of a callable, but for `seed`, with their defaults."""
    parameters = inspect.signature(made).parameters.values()
    return {
        p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name != "seed"
    }


def index_names() -> tuple[str, ...]:
    """Names that `make_index` knows, sorted."""
    return tuple(sorted(_FACTORIES))


def index_settings(name: str) -> dict[str, Any]:
    """Settings of one index with their defaults.

    Raises:
        ConfigError: The name is unknown.
    """
    if name not in _FACTORIES:
        raise ConfigError(
            f"The 'name' parameter of make_index must be one of {', '.join(index_names())}. "
            f"Got {name!r} instead.{_did_you_mean(name, index_names())}"
        )
    return dict(_SETTINGS[name])


def make_index(
    name: str, in_features: int, num_classes: int, *, seed: int = 0, **settings: object
) -> CandidateIndex:
    """Make an empty index by name.

    Args:
        name: One of `index_names`.
        in_features: Hidden width D.
        num_classes: Number of classes C.
        seed: Non-negative; fixes hash functions and tie-breaking.
        settings: The index's own settings, see `index_settings`.

    Raises:
        ConfigError: An unknown name or setting, or a value out of range.
    """
    known = index_settings(name)
    for setting in settings:
        if setting not in known:
            raise ConfigError(
                f"The {setting!r} setting is unknown to the {name!r} index; it has "
                f"{', '.join(known) or 'none'}.{_did_you_mean(setting, known)}"
            )
    check_integer("in_features", "make_index", in_features, 1, 65_000)
    check_integer("num_classes", "make_index", num_classes, 1, 2**31 - 2)
    check_integer("seed", "make_index", seed, 0, 2**63 - 1)
    return _FACTORIES[name](in_features, num_classes, seed=seed, **settings)


def padded(ids: torch.Tensor, size: int) -> torch.Tensor:
    """The ids with -1 after them, up to `size`."""
    return torch.nn.functional.pad(ids, (0, size - len(ids)), value=-1)


def is_cuda(device: torch.device) -> bool:
    """Whether weights on this device are indexed on a GPU."""
    return device.type == "cuda"


def check_integer(name: str, caller: str, value: object, low: int, high: int | None = None) -> None:
    """Raise ConfigError unless `value` is an integer in ``[low, high]``; None for no upper limit."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ConfigError(
            f"The {name!r} parameter of {caller} must be an integer {limits}. Got {value!r} instead."
        )


def check_number(name: str, caller: str, value: object, low: float, high: float = math.inf) -> None:
    """Raise ConfigError unless `value` is a finite number in ``[low, high]``."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (low <= value <= high) or math.isinf(value):
        limits = f"of at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
        raise ConfigError(
            f"The {name!r} parameter of {caller} must be a number {limits}. Got {value!r} instead."
        )


def check_weights(
    caller: str, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, num_classes: int, in_features: int
) -> None:
    """Raise ConfigError unless weights and bias have the shapes of this index."""
    _check_shape("weight_CD", caller, weight_CD, (num_classes, in_features))
    if bias_C is not None:
        _check_shape("bias_C", caller, bias_C, (num_classes,))


def check_queries(caller: str, queries: QuerySample | None, num_classes: int, in_features: int) -> None:
    """Raise ConfigError unless `queries` is None or a sample that fits this index."""
    if queries is None:
        return
    check_hidden(caller, queries.hidden_ND, in_features)
    check_class_ids("queries.label_ids", caller, queries.label_ids, num_classes)
    indptr, rows = queries.label_indptr, len(queries.hidden_ND)
    fits = indptr.dtype == torch.int64 and indptr.shape == (rows + 1,)
    if (
        not fits
        or int(indptr[0]) != 0
        or int(indptr[-1]) != len(queries.label_ids)
        or bool((indptr.diff() < 0).any())
    ):
        raise ConfigError(
            f"The 'queries.label_indptr' parameter of {caller} must be int64 ({rows + 1},), ascending from 0 to "
            f"{len(queries.label_ids)}. Got {tuple(indptr.shape)} of {indptr.dtype} instead."
        )


def check_hidden(caller: str, hidden_ND: torch.Tensor, in_features: int) -> None:
    """Raise ConfigError unless `hidden_ND` is a floating (N, in_features) tensor."""
    rows = hidden_ND.shape[0] if hidden_ND.ndim else 0
    _check_shape("hidden_ND", caller, hidden_ND, (rows, in_features))


def check_class_ids(name: str, caller: str, ids: torch.Tensor, num_classes: int) -> None:
    """Raise ConfigError unless `ids` is an int64 vector with values in ``[0, num_classes)``."""
    if ids.ndim != 1 or ids.dtype != torch.int64:
        found = f"{tuple(ids.shape)} of {ids.dtype}"
        raise ConfigError(f"The {name!r} parameter of {caller} must be an int64 vector. Got {found} instead.")
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < num_classes):
        found = f"ids from {int(ids.min())} to {int(ids.max())}"
        raise ConfigError(
            f"The {name!r} parameter of {caller} must hold ids from 0 to {num_classes - 1}. "
            f"Got {found} instead."
        )


def _check_shape(name: str, caller: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise ConfigError(
            f"The {name!r} parameter of {caller} must be a floating-point tensor of shape {shape}. "
            f"Got {tuple(tensor.shape)} of {tensor.dtype} instead."
        )


def _did_you_mean(word: str, known: Mapping[str, object] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
