"""`slidex.nn.candidates` on a device, in torch operations that wait for nothing: the same classes in other places.

Sets have the size of all that is proposed, and a class that is proposed twice leaves a -1 in the later place, which
kernels leave out. So a step computes on a few places for nothing (as many as there are repeats) and never asks the
device for a number. Random classes are drawn on the host, whose draw no result of the device changes.

Legend: N rows in a batch, C classes, D hidden width, P entries of the labels, K retrieved classes per row, A places per
row, U places of a shared pool, M ids of any kind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from slidex.errors import ConfigError
from slidex.lsh.mixing import mix_ids
from slidex.nn.candidates import ActiveSets, CandidateSelector, Pool, no_batch_in_a_pool

if TYPE_CHECKING:
    from slidex.lsh import CandidateIndex
    from slidex.lsh.index import DeviceCandidateIndex
    from slidex.nn.device_labels import DeviceLabels
    from slidex.nn.placement import Placement

_LAST = torch.iinfo(torch.int64).max


class DeviceSelector:
    """Mixes true, retrieved and random classes as the `CandidateSelector` does that it is made from.

    Args:
        selector: Its settings, index and random classes.
        placement: Where the layer is.
        index_name: For the message.

    Raises:
        ConfigError: The index does not work there.
    """

    def __init__(self, selector: CandidateSelector, placement: Placement, index_name: str = "index") -> None:
        self._index = require_device_index(selector.index, index_name)
        self._chosen, self._placement = selector, placement
        self._label_share_C = None
        if selector.label_share is not None:
            self._label_share_C = torch.as_tensor(selector.label_share).to(placement.device)

    def pool(self, hidden_ND: torch.Tensor, labels: DeviceLabels, step: int) -> Pool:
        """As `CandidateSelector.pool`; `Pool.ids_U` has -1 where nothing is, with -inf in `Pool.offset_U`."""
        chosen = self._chosen
        no_batch_in_a_pool(chosen)
        parts = [labels.ids_P, labels.ids_P[:0], self._random(step)]
        if self._index is not None and chosen.retrieved:
            parts[1] = self._index.padded_pool(hidden_ND, chosen.retrieved, step=step)
        ids_M = torch.cat(parts)
        sorted_M, order_M = ids_M.sort(stable=True)
        void_M = _not_first(sorted_M, order_M)
        ids_U = ids_M.masked_fill(void_M, -1)
        positions_P = labels.ids_P
        if len(ids_M):
            positions_P = order_M[torch.searchsorted(sorted_M, labels.ids_P)]
        sizes = [len(part) for part in parts]
        true, retrieved, random = (
            size - part.sum() for size, part in zip(sizes, void_M.split(sizes), strict=True)
        )
        offset_U = self._pool_offset(ids_U, labels, true + retrieved, random, sizes[2])
        offset_U = offset_U.to(hidden_ND.dtype).masked_fill_(void_M, -torch.inf)
        targets = labels.indptr, positions_P, labels.share_P
        return Pool(ids_U, offset_U, *targets, retrieved, random, labels.row_P)

    def active_sets(self, hidden_ND: torch.Tensor, labels: DeviceLabels, step: int) -> ActiveSets:
        """As `CandidateSelector.active_sets`, with a -1 wherever nothing is."""
        num_rows, chosen = len(hidden_ND), self._chosen
        parts = [labels.padded_ids()]
        if self._index is not None and chosen.retrieved:
            parts.append(self._index.query(hidden_ND, chosen.retrieved, step=step))
        if chosen.batch:
            parts.append(
                batch_classes(labels.ids_P, chosen.batch, chosen.batch_key(step)).expand(num_rows, -1)
            )
        random = self._random(step)
        ids_NA = torch.cat([*parts, random.expand(num_rows, -1)], 1)
        void_NA = _not_first(*ids_NA.sort(dim=1, stable=True))
        active_NA = ids_NA.masked_fill(void_NA, -1)
        target_NA = torch.zeros(active_NA.shape, dtype=hidden_ND.dtype, device=ids_NA.device)
        target_NA.index_put_((labels.row_P, labels.slot_P), labels.share_P.to(target_NA.dtype))
        offset_NA = None
        if chosen.correction != "none":
            first = ids_NA.shape[1] - len(random)
            exact_N, tail_N = (
                part.shape[1] - part.sum(1, keepdim=True) for part in void_NA.tensor_split([first], 1)
            )
            weight_NA = self._tail_log_weight(active_NA[:, first:], exact_N, tail_N)
            weight_NA = weight_NA.expand(num_rows, len(random)).masked_fill(void_NA[:, first:], 0)
            offset_NA = torch.nn.functional.pad(weight_NA, (first, 0)).to(hidden_ND.dtype)
        return ActiveSets(active_NA, target_NA, offset_NA, void_NA.numel() - void_NA.sum())

    def _random(self, step: int) -> torch.Tensor:
        return self._placement.send(self._chosen.sampler.sample(self._chosen.random, step))

    def _tail_log_weight(self, ids: torch.Tensor, exact: torch.Tensor, tail: torch.Tensor) -> torch.Tensor:
        """As `CandidateSelector` has it, float64; see there."""
        if self._chosen.sampler.power == 0:
            others = (self._chosen.num_classes - exact).clamp(min=1)
            return (others / tail.clamp(min=1).double()).log()
        return -self._inclusion(ids).log()

    def _inclusion(self, ids: torch.Tensor) -> torch.Tensor:
        return self._chosen.sampler.inclusion_within(ids.clamp(min=0), self._chosen.random)

    def _pool_offset(
        self, ids_U: torch.Tensor, labels: DeviceLabels, exact: torch.Tensor, tail: torch.Tensor, last: int
    ) -> torch.Tensor:
        """Log weights float64 (U,) of the pool; random classes have its `last` places, labels the first."""
        offset_U = torch.zeros(len(ids_U), dtype=torch.float64, device=ids_U.device)
        if self._chosen.correction == "none":
            return offset_U
        if self._chosen.correction == "logq" and self._label_share_C is not None:
            true_P = ids_U[: len(labels.ids_P)].clamp(min=0)
            missed_P = (1 - self._label_share_C[true_P]) ** labels.count
            missed_P *= 1 - self._inclusion(true_P)
            offset_U[: len(true_P)] = -torch.log1p(-missed_P.clamp(max=1 - 1e-9))
        first = len(ids_U) - last
        offset_U[first:] = self._tail_log_weight(ids_U[first:], exact, tail)
        return offset_U


def require_device_index(index: CandidateIndex | None, name: str) -> DeviceCandidateIndex | None:
    """The index; ConfigError, naming the setting, unless it works on a CUDA device."""
    if index is None:
        return None
    if not getattr(index, "runs_on_cuda", False):
        raise ConfigError(
            "The 'index' setting must be simhash, dwta, exact or none for a layer on a CUDA device. "
            f"Got {name!r} instead. Use one of these, or keep the layer on the CPU."
        )
    there = cast("DeviceCandidateIndex", index)
    there.require_cuda()
    return there


def batch_classes(ids_P: torch.Tensor, most: int, key: int) -> torch.Tensor:
    """Distinct ones of the ids, a uniform draw where there are more than `most`: int64 (min(most, P),), then -1.

    Args:
        ids_P: int64, -1 for none.
        most: How many are wanted.
        key: Settles the draw.
    """
    sorted_P = ids_P.sort().values
    first_P = torch.ones_like(sorted_P, dtype=torch.bool)
    first_P[1:] = sorted_P[1:] != sorted_P[:-1]
    hash_P = mix_ids(sorted_P, key).clamp(max=_LAST - 1)
    hash_P.masked_fill_(~(first_P & (sorted_P >= 0)), _LAST)
    hashes, places = hash_P.topk(min(most, len(ids_P)), largest=False)
    return sorted_P[places].masked_fill_(hashes == _LAST, -1)


def _not_first(sorted_M: torch.Tensor, order_M: torch.Tensor) -> torch.Tensor:
    """Whether an id is a pad, or not the first of its kind along the last dimension, from a stable sort of the ids."""
    void_M = sorted_M < 0
    void_M[..., 1:] |= sorted_M[..., 1:] == sorted_M[..., :-1]
    return torch.empty_like(void_M).scatter_(-1, order_M, void_M)
