"""What a family of hash functions offers `slidex.lsh.HashIndex`, and what families share.

Legend: N rows in a batch, C classes, D hidden width, K hash bits, L tables, V codes looked up per table.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from slidex.errors import ConfigError, DivergedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from slidex.lsh.index import QuerySample
    from slidex.lsh.tables import TableSettings

MAX_BITS = 24
"""The largest K: a table then has 2^24 buckets, 64 MiB of offsets."""
TARGET_BUCKET_LOAD = 256
"""Classes per bucket that `automatic_bits` aims at."""
DEVICE_NUMBERS = 1 << 25
"""Of each array that a device makes of rows as it hashes them: 128 MiB in float32."""


class HashFamily(Protocol):
    """What `HashIndex` asks of a family of hash functions; see `SimHash` for shapes and meaning.

    Attributes:
        bits: K; every code lies in ``[0, 2^K)``.
        tables: L.
        probes: V - 1.
        uses_queries: Whether `fit` makes use of its queries.
        query_version: A counter that grows whenever `fit` changes what `hash_queries` gives. What was learned
            about where queries land holds only as long as it stays the same.

    A family for weights on a CUDA device as well is a `DeviceHashFamily`.
    """

    bits: int
    tables: int
    probes: int
    uses_queries: bool
    query_version: int

    @property
    def bytes(self) -> int: ...  # noqa: D102
    def fit(  # noqa: D102
        self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, queries: QuerySample | None
    ) -> None: ...
    def parameters(self) -> dict[str, torch.Tensor]: ...  # noqa: D102
    def load_parameters(self, parameters: Mapping[str, torch.Tensor]) -> None: ...  # noqa: D102
    def hash_rows(  # noqa: D102
        self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, ids: torch.Tensor | None = None
    ) -> np.ndarray: ...
    def hash_queries(self, hidden_ND: torch.Tensor) -> np.ndarray: ...  # noqa: D102


class DeviceHashFamily(HashFamily, Protocol):
    """A family whose functions can also be computed where the weights are; see `SimHash`.

    Both methods give the codes of `HashFamily`'s as int32 tensors. `hash_queries_on_device` takes no notice of
    values that are not finite and does not wait for the device.

    Attributes:
        runs_on_cuda: True; False where a class derived from one that can cannot.
    """

    runs_on_cuda: bool

    def hash_rows_on_device(  # noqa: D102
        self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, ids: torch.Tensor | None = None
    ) -> torch.Tensor: ...
    def hash_queries_on_device(self, hidden_ND: torch.Tensor) -> torch.Tensor: ...  # noqa: D102


def code_dtype(bits: int) -> np.dtype:
    """Type of stored codes of `bits` bits: uint16 up to 16, which halves their memory, int32 beyond."""
    return np.dtype(np.uint16 if bits <= 16 else np.int32)


def row_not_hashable(row: int, ids: torch.Tensor | None) -> DivergedError:
    """The error for a class row that is not finite: row `row` of all, or of those that `ids` name."""
    name = row if ids is None else int(ids[row])
    return DivergedError(
        f"The weight row or bias of class {name} holds a value that is not finite; it cannot be hashed."
    )


def rows_at_once(width: int, functions: int) -> int:
    """How many rows a device hashes at once: neither they nor what is made of them exceed `DEVICE_NUMBERS`.

    Args:
        width: Numbers of a row.
        functions: Numbers that are made of it.
    """
    return max(1, DEVICE_NUMBERS // max(width, functions))


def hashing_bytes(num_rows: int, width: int, functions: int) -> int:
    """What a device takes for a moment to hash so many rows, beside their codes; arguments as for `rows_at_once`.

    That is eight arrays at most: rows as they are widened, squared and scaled, their projections, and these as bits.
    """
    return 8 * 4 * min(DEVICE_NUMBERS, num_rows * max(width, functions))


def automatic_bits(num_classes: int) -> int:
    """K for a mean bucket load near `TARGET_BUCKET_LOAD`: ``round(log2(C / load))``, 1 to 24."""
    return min(MAX_BITS, max(1, round(math.log2(max(1.0, num_classes / TARGET_BUCKET_LOAD)))))


def require_cuda(family: HashFamily, settings: TableSettings) -> DeviceHashFamily:
    """The family, or ConfigError for what has no CUDA implementation, naming what to use instead."""
    instead = "Use {}, or keep the weights on the CPU."
    if not getattr(family, "runs_on_cuda", False):
        raise ConfigError(
            f"The index over {type(family).__name__} has no hash functions for weights on a CUDA device. "
            + instead.format("'simhash' or 'dwta'")
        )
    if settings.insert:
        raise ConfigError(
            "The 'insert' parameter of make_index must be 0 for weights on a CUDA device: labels are inserted on "
            f"the CPU only. Got {settings.insert} instead. " + instead.format("0")
        )
    if settings.first_come:
        raise ConfigError(
            "The 'budget' parameter of make_index must be 'votes' for weights on a CUDA device. "
            "Got 'first_come' instead. " + instead.format("'votes'")
        )
    return cast("DeviceHashFamily", family)
