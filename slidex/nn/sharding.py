"""An output layer whose classes are spread over the processes of a group: who has which, and what they exchange.

Every process has a contiguous part of the classes, with their rows, optimiser state and index, and scores the rows of
all processes on it. What the others need of that are a few numbers a row. All transport is by the collectives of
torch.distributed; the group may have any backend that works on the tensors' device. Whatever leaves an all-reduce here
has the same bits in every process.

Legend: N rows of all processes together, C classes, D hidden width, A active classes of this process per row, P labels,
R processes, k classes asked for.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from slidex.data.csr import CsrArrays
from slidex.errors import ConfigError, LostPeerError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

REDUCTIONS = ("sum", "max")


@dataclass(frozen=True, slots=True)
class Peers:
    """The processes of a group, and what they exchange. Make one with `Peers.of_group`.

    Args:
        group: None is the default group of torch.distributed.
        rank: Of this process in the group.
        size: R.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int

    @classmethod
    def of_group(cls, group: dist.ProcessGroup | None = None) -> Peers:
        """The processes of a group that this one is in.

        Raises:
            ConfigError: if torch.distributed is not initialised, or this process is not in the group.
        """
        if not dist.is_initialized():
            raise ConfigError("A process group needs torch.distributed: call init_process_group first.")
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            raise ConfigError("The 'group' parameter must be a group that this process is in.")
        return cls(group, rank, size)

    def reduce(self, x: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Replaces `x` by the sum or the maximum over all processes, in place, and returns it."""
        if op not in REDUCTIONS:
            raise ConfigError(
                f"The 'op' parameter of Peers.reduce must be one of {REDUCTIONS}. Got {op!r} instead."
            )
        if self.size > 1 and x.numel():
            with self._collective():
                dist.all_reduce(x, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op], group=self.group)
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """`x` of all processes, in the order of ranks, (R, ...); it has one shape in all of them."""
        if self.size == 1:
            return x[None]
        all_x = x.new_empty((self.size, *x.shape))
        if x.numel() == 0:
            return all_x
        with self._collective():
            dist.all_gather(list(all_x), x.contiguous(), group=self.group)
        return all_x

    def gather_rows(
        self, x_ND: torch.Tensor, counts: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, list[int]]:
        """The rows of all processes, in the order of ranks, and how many each has.

        Args:
            x_ND: This process's rows, of any shape but for the first dimension.
            counts: Rows of each process, where that is known; asked of the others if it is None.
        """
        if self.size == 1:
            return x_ND, [len(x_ND)]
        if counts is None:
            counts = self.gather(torch.tensor([len(x_ND)], device=x_ND.device))[:, 0].tolist()
        most = max(counts)
        padded = x_ND
        if len(x_ND) < most:  # backends gather equal sizes only
            padded = x_ND.new_zeros((most, *x_ND.shape[1:]))
            padded[: len(x_ND)] = x_ND
        all_x = self.gather(padded)
        if min(counts) == most:
            return all_x.flatten(0, 1), list(counts)
        return torch.cat([part[:count] for part, count in zip(all_x, counts, strict=True)]), list(counts)

    def gather_labels(self, labels: CsrArrays) -> CsrArrays:
        """The labels of the rows of all processes, in the order of ranks; values are not exchanged."""
        if self.size == 1:
            return labels
        lengths_N, _ = self.gather_rows(torch.from_numpy(np.diff(labels.indptr)))
        indices_P, _ = self.gather_rows(torch.from_numpy(np.ascontiguousarray(labels.indices)))
        indptr = np.zeros(len(lengths_N) + 1, dtype=np.int64)
        np.cumsum(lengths_N.numpy(), out=indptr[1:])
        return CsrArrays(indptr, indices_P.numpy(), None, labels.num_columns)

    def take_own(self, x_all: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """This process's rows of what `gather_rows` gave."""
        first = sum(counts[: self.rank])
        return x_all[first : first + counts[self.rank]]

    @contextmanager
    def _collective(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            cause = str(error).strip().splitlines()[0].split(". This is typically")[0]  # gloo's advice
            raise LostPeerError(
                f"process {self.rank} of {self.size} lost its connection to the others: one of them has ended or "
                f"stopped answering ({cause})."
            ) from error


@dataclass(frozen=True, slots=True)
class Shard(Peers):
    """The classes of one process of a group. Make one with `Shard.of`.

    Args:
        group: As in `Peers`, as the next two.
        rank: Of this process.
        size: R.
        num_classes: C.
        begin: First class of this process.
        end: One past its last class; `begin` where there are fewer classes than processes and it has none.
    """

    num_classes: int
    begin: int
    end: int

    @classmethod
    def of(cls, num_classes: int, group: dist.ProcessGroup | None = None) -> Shard:
        """This process's part of `num_classes`; the parts are in the order of ranks and differ by at most one class.

        Raises:
            ConfigError: if torch.distributed is not initialised, or this process is not in the group.
        """
        peers = Peers.of_group(group)
        begin, end = part_of(num_classes, peers.rank, peers.size)
        return cls(group, peers.rank, peers.size, num_classes, begin, end)

    def local(self, labels: CsrArrays) -> CsrArrays:
        """The labels that are classes of this process, counted from its first; stored values go with them.

        To know what a label counts where a row's labels are spread over processes, store it before: with
        `slidex.nn.candidates.label_weights(labels)` as values, those of the result are `LabelMass.weights`.

        Args:
            labels: Rows x C.
        """
        kept = (labels.indices >= self.begin) & (labels.indices < self.end)
        before = np.zeros(len(kept) + 1, dtype=np.int64)
        np.cumsum(kept, out=before[1:])
        return CsrArrays(
            before[labels.indptr],
            labels.indices[kept] - np.int32(self.begin),
            None if labels.values is None else labels.values[kept],
            self.end - self.begin,
        )

    def merge_topk(self, scores_NK: torch.Tensor, ids_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The best classes of all processes' best ones, the same in every process.

        Args:
            scores_NK: (N, k), of this process's classes, padded with -inf.
            ids_NK: int64 (N, k), counted from this process's first class, padded with -1.

        Returns:
            Scores and ids (N, k), best first, ids counted over all classes.
        """
        ids_NK = torch.where(ids_NK >= 0, ids_NK + self.begin, ids_NK)
        all_scores, all_ids = (torch.cat(list(self.gather(x)), dim=1) for x in (scores_NK, ids_NK))
        scores, slots = all_scores.topk(scores_NK.shape[1])
        return scores, all_ids.gather(1, slots)


def part_of(count: int, part: int, parts: int) -> tuple[int, int]:
    """Begin and end of one of so many contiguous parts of ``range(count)``, whose sizes differ by at most one."""
    size, larger = divmod(count, parts)
    begin = part * size + min(part, larger)
    return begin, begin + size + (part < larger)


class Targets(NamedTuple):
    """Target mass of single slots; all others have none.

    Args:
        row_P: int64 (P,).
        slot_P: int64 (P,), no slot of a row twice.
        mass_P: float (P,), dtype of the scores.
    """

    row_P: torch.Tensor
    slot_P: torch.Tensor
    mass_P: torch.Tensor


def sharded_softmax_loss(
    scores_NA: torch.Tensor, targets: Targets | torch.Tensor, shard: Shard
) -> torch.Tensor:
    """`slidex.kernels.cpu.softmax_loss` over all processes' active slots; **overwrites the scores with the gradient**.

    ``loss = -sum_a target[a] * log_softmax(scores)[a]``, ``grad = softmax * sum(target) - target``, where sums are over
    the slots of all processes. Two all-reduces: the maximum (N,), and the sum of (N, 3) numbers: exponentials, aligned
    scores, targets. A row without a target anywhere has loss 0 and gradient 0. NaN or +inf scores in any process give
    a loss of NaN in all.

    Args:
        scores_NA: float (N, A), offsets added; -inf marks a pad, whose target must be 0. A is this process's own
            matter, and may be 0.
        targets: Target mass of this process's slots, at least 0, times the row's scale of loss and gradient, if any;
            a tensor is (N, A).
        shard: The processes.

    Returns:
        loss (N,), the same bits in every process.
    """
    num_rows, width = scores_NA.shape
    most_N = scores_NA.amax(1) if width else scores_NA.new_full((num_rows,), -math.inf)
    shard.reduce(most_N, "max")
    most_N.masked_fill_(most_N == -math.inf, 0)
    scores_NA.sub_(most_N[:, None])
    if isinstance(targets, Targets):
        row_P, slot_P, mass_P = targets
        scores_P = scores_NA[row_P, slot_P]
        aligned_P = torch.where(mass_P != 0, mass_P * scores_P, 0)
        aligned_N, mass_N = (
            scores_NA.new_zeros(num_rows).index_add_(0, row_P, part) for part in (aligned_P, mass_P)
        )
    else:
        aligned_N = torch.where(targets != 0, targets * scores_NA, 0).sum(1)
        mass_N = targets.sum(1)
    sums_N3 = torch.stack([scores_NA.exp_().sum(1), aligned_N, mass_N], 1)
    total_N, aligned_N, mass_N = shard.reduce(sums_N3).unbind(1)
    scores_NA.mul_((mass_N / total_N)[:, None])
    if isinstance(targets, Targets):
        scores_NA.index_put_((targets.row_P, targets.slot_P), -targets.mass_P, accumulate=True)
    else:
        scores_NA.sub_(targets)
    unlabelled_N = mass_N == 0
    scores_NA[unlabelled_N] = 0
    return torch.where(unlabelled_N, 0, mass_N * total_N.log() - aligned_N)
