"""What the encoder computes on: a batch's features and dropout masks as tensors, made by the host.

Masks are drawn by the host's counter generators on every device, so that a run on a GPU drops what one on a CPU drops.

Legend: N rows in a batch, M stored features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from slidex.data.csr import CsrArrays
    from slidex.nn.placement import Placement


@dataclass(frozen=True, slots=True)
class BagInputs:
    """A batch of features.

    Args:
        indptr: int64 (N + 1,).
        indices: int32 (M,), feature ids.
        values: float32 (M,), or None where each is 1.
        keep: For each layer with dropout, bool (N, width), the units that are kept; none without dropout.
        num_columns: Number of features.
    """

    indptr: torch.Tensor
    indices: torch.Tensor
    values: torch.Tensor | None
    keep: tuple[torch.Tensor, ...]
    num_columns: int

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.indptr) - 1

    def rows(self, rows: slice) -> BagInputs:
        """Consecutive rows; itself where these are all. Others are cut out by the host."""
        if rows == slice(0, self.num_rows):
            return self
        first, last = int(self.indptr[rows.start]), int(self.indptr[rows.stop])
        return replace(
            self,
            indptr=self.indptr[rows.start : rows.stop + 1] - first,
            indices=self.indices[first:last],
            values=None if self.values is None else self.values[first:last],
            keep=tuple(mask[rows] for mask in self.keep),
        )

    def to(self, placement: Placement) -> BagInputs:
        """A copy where a model is; itself where that is the CPU."""
        if placement.waits:
            return self
        send = placement.send
        return BagInputs(
            send(self.indptr),
            send(self.indices),
            None if self.values is None else send(self.values),
            tuple(send(mask) for mask in self.keep),
            self.num_columns,
        )

    def tensors(self) -> Iterator[torch.Tensor]:
        """All its tensors."""
        yield from (self.indptr, self.indices, *self.keep)
        if self.values is not None:
            yield self.values


@dataclass(frozen=True, slots=True)
class InputRules:
    """How `BagInputs` are made of features.

    Args:
        normalize: Scale every row to unit L2 norm first.
        input_dropout: Share of a row's stored features dropped in training; the rest are scaled up.
        hidden_dropout: Share of hidden units dropped after every layer in training.
        widths: Of the layers.
        seed: With the step number it keys the masks.
    """

    normalize: bool
    input_dropout: float
    hidden_dropout: float
    widths: Sequence[int]
    seed: int

    def apply(self, x: CsrArrays, step: int | None) -> BagInputs:
        """Features of a batch; `step` keys the masks of a training step, None means no dropout."""
        x = x.unit_rows() if self.normalize else x
        values, keep = x.values, ()
        if step is not None and self.input_dropout > 0:
            rng = np.random.Generator(np.random.Philox(key=[self.seed, step]))
            kept = rng.random(len(x.indices), dtype=np.float32) >= self.input_dropout
            scale = np.float32(1 / (1 - self.input_dropout))
            values = kept * scale if values is None else values * (kept * scale)
        if step is not None and self.hidden_dropout > 0:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            shapes = ((x.num_rows, width) for width in self.widths)
            keep = tuple(torch.rand(shape, generator=generator) >= self.hidden_dropout for shape in shapes)
        indptr, indices = torch.from_numpy(x.indptr), torch.from_numpy(x.indices)
        return BagInputs(
            indptr, indices, None if values is None else torch.from_numpy(values), keep, x.num_columns
        )
