"""What a sampled output layer keeps besides its weights: index, rehash schedule, step count, and the rows' optimiser.

One object of it belongs to one layer. Its loss is one autograd node, `slidex.nn.sampled_loss.SampledLoss`.

Where the layer is on a GPU, a step reads nothing back: what a loss or a target has wrong keeps the update from being
written, and is raised by a later call (`slidex.late`).

Where the layer is sharded over processes, each of them scores the rows of all on its own classes. As in
DistributedDataParallel, every process's loss is of its own rows, and gradients of rows of the layer are means over
processes; so those of an encoder wrapped in it and those of the layer belong to one and the same loss.

Legend: N rows in a batch, C classes of this process, D hidden width, U classes that were scored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from slidex.data.csr import CsrArrays
from slidex.errors import ConfigError, DivergedError
from slidex.late import LateErrors
from slidex.lsh.index import QuerySample
from slidex.nn import placement as placements
from slidex.nn.class_record import SEEN, ClassRecord
from slidex.nn.loss_batch import Asked, device_batch, host_batch
from slidex.nn.memory import index_bytes, layer_advice, optimizer_bytes, require_memory, step_bytes
from slidex.nn.rehash import Rehasher
from slidex.nn.row_updates import RowUpdater
from slidex.nn.sampled_loss import SampledLoss
from slidex.nn.scoring import Rows, Scored, Scorer
from slidex.nn.selection import SEEDS_APART, checked_counts, make_config_index, make_selector, settle_sampling
from slidex.nn.targets import wrong_target

if TYPE_CHECKING:
    from collections.abc import Mapping

    from slidex.lsh import CandidateIndex, IndexStats
    from slidex.nn.device_labels import DeviceLabels
    from slidex.nn.options import SamplingOptions
    from slidex.nn.placement import Placement
    from slidex.nn.sharding import Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingStats:
    """What a sampled layer has done so far.

    Args:
        steps: Losses computed in training.
        updates: Optimiser steps that backward has made; 0 where it makes none.
        active_classes: Classes a row of the last batch was scored on, on average.
        classes_seen: Share of all classes that were ever active.
        rehashes: How often the index was built or updated.
        index: Of the index; None without one.
    """

    steps: int
    updates: int
    active_classes: float
    classes_seen: float
    rehashes: int
    index: IndexStats | None


class Sampling:
    """Chooses the classes of every batch of one layer, keeps its index up to date, and may update its rows.

    Everything random is a function of (seed, step); `step` counts the losses computed so far.

    Args:
        options: Settings.
        in_features: D.
        num_classes: Of the whole layer.
        shard: Which of them are this process's; None means all.

    Attributes:
        placement: Where the layer was at the last loss.

    Raises:
        ConfigError: if settings do not fit each other or the layer.
    """

    def __init__(
        self, options: SamplingOptions, in_features: int, num_classes: int, shard: Shard | None = None
    ) -> None:
        self.options, self.shard, self.total_classes = options, shard, num_classes
        self.settings = settle_sampling(options)
        own = slice(0, num_classes) if shard is None else slice(shard.begin, shard.end)
        counts = checked_counts(options.class_counts, num_classes)
        counts, num_classes = None if counts is None else counts[own], own.stop - own.start
        if self.settings.correction == "logq" and self.settings.mode == "shared" and counts is None:
            raise ConfigError(
                "The 'class_counts' setting must be given where 'correction' is logq. Got None instead."
            )
        part, parts = (0, 1) if shard is None else (shard.rank, shard.size)
        selector = make_selector(self.settings, in_features, num_classes, counts, part=part, parts=parts)
        self.scorer = Scorer(
            self.settings.mode, precision=self.settings.precision, selector=selector, shard=shard
        )
        self.in_features, self.num_classes = in_features, num_classes
        self._updater = RowUpdater(options)
        self.step = self.rehashes = 0
        self.rows = Rows(torch.empty(0, in_features), None)
        self._record = ClassRecord(num_classes)
        self._late = LateErrors()
        self._active: float | torch.Tensor = 0.0
        self._recent = list[tuple[torch.Tensor, Any]]()
        self._rehasher, self._stale = None, True
        self._prediction: tuple[object, CandidateIndex] | None = None
        if self.index is not None:
            self._rehasher = Rehasher(
                self.settings, self.index, self, self._record, self._queries, any_row_moves=not self.fused
            )
        self.placement = self._place(torch.device("cpu"))

    @property
    def index(self) -> CandidateIndex | None:
        """Over the layer's rows; None in ``exact`` mode or with random classes only."""
        return None if self.scorer.selector is None else self.scorer.selector.index

    @property
    def weight(self) -> torch.Tensor:
        """The layer's weights at the last loss, (C, D)."""
        return self.rows.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The layer's bias at the last loss, (C,), or None."""
        return self.rows.bias

    @property
    def learning_rate(self) -> float:
        """Of the fused updates; set it before a backward pass, as a schedule wants."""
        return self._updater.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self._updater.learning_rate = value

    @property
    def updates(self) -> int:
        """Steps of the fused optimizer so far."""
        return self._updater.updates

    @property
    def fused(self) -> bool:
        """Whether backward updates the rows itself."""
        return self.settings.optimizer is not None

    def loss(
        self,
        input_: torch.Tensor,
        weight_CD: torch.Tensor,
        bias_C: torch.Tensor | None,
        target: Any,
        *,
        class_weights: torch.Tensor | None,
        ignore_index: int | None,
        reduction: str,
        label_smoothing: float,
    ) -> torch.Tensor:
        """Loss on the active classes of this batch.

        Arguments and errors are those of `slidex.nn.functional.lsh_softmax`.
        """
        self._bind(weight_CD, bias_C)
        self._late.settle(wait=False)
        hidden_ND = input_.reshape(-1, self.in_features).to(placements.compute_dtype(weight_CD.dtype))
        if not self._fits:
            needed = self.memory(bias=bias_C is not None) | {
                "a step": self._step_bytes(len(hidden_ND), target)
            }
            require_memory(needed, self.placement.device, layer_advice(self.settings, weight_CD.dtype))
            self._fits = True
        asked = Asked(target, class_weights, ignore_index, reduction, label_smoothing)
        if self.shard is not None and self.step == 0:
            self._check_rows_differ(self.shard, weight_CD.detach())
        make = host_batch if self.placement.waits else device_batch
        batch = make(self, hidden_ND, input_, asked)
        if batch.wrong is not None:
            step, classes = self.step, self.total_classes
            self._late.expect(batch.wrong, lambda number: wrong_target(number, classes, step))
        self._rehash(batch.hidden_ND, batch.labels)
        loss = SampledLoss.apply(hidden_ND, weight_CD, bias_C, self, batch)
        self.step += 1
        if reduction == "none":
            return loss.reshape(input_.shape[:-1])
        counted = reduction == "sum" or isinstance(batch.total, torch.Tensor) or batch.total > 0
        return loss if counted else loss * math.nan

    def rehash(self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None) -> None:
        """Builds the index over these rows now, whatever the schedule says."""
        self._bind(weight_CD, bias_C)
        self._late.settle(wait=True)
        if self._rehasher is not None:
            self._rehasher.build(self.step)
            self.rehashes, self._stale = self.rehashes + 1, False

    def memory(self, *, bias: bool) -> dict[str, int]:
        """Bytes that the layer needs beside its weights, by what they are for, as far as nothing of it is there yet."""
        size = self.num_classes, self.in_features
        state = optimizer_bytes(self.settings.optimizer, *size, bias=bias)
        dense = not self.fused and not self.options.sparse_grad
        return {
            "optimizer state": state if self._updater.states is None else 0,
            "gradient": 4 * size[0] * (size[1] + bias) if dense else 0,
            "index": index_bytes(self.index),
        }

    def _step_bytes(self, num_rows: int, target: Any) -> int:
        if isinstance(target, torch.Tensor):
            target = target if target.layout == torch.strided else target.values()
        labels = target.numel() if isinstance(target, torch.Tensor) else getattr(target, "nnz", num_rows)
        settings = replace(self.settings, precision=self.scorer.precision)
        size = self.in_features, self.num_classes
        return step_bytes(settings, *size, num_rows, labels, self.weight.dtype)

    def invalidate(self) -> None:
        """Notes that the layer's weights were replaced: the index is built again before the next loss."""
        self._stale, self._prediction = True, None

    def prediction_index(self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None) -> CandidateIndex:
        """An index over these rows with as many tables as single rows need; built again when the rows have changed.

        Raises:
            ConfigError: if the settings ask for no index.
        """
        self._bind(weight_CD, bias_C)
        if self.index is None:
            raise ConfigError("Indexed prediction needs an index: set 'index', in a mode other than exact.")
        now = weight_CD._version, weight_CD.data_ptr(), None if bias_C is None else bias_C._version
        if self._prediction is None or self._prediction[0] != now:
            index = self.index
            if not index.uses_queries:
                seed = self.settings.seed + (0 if self.shard is None else self.shard.rank * SEEDS_APART)
                made = make_config_index(self.settings, self.in_features, self.num_classes, seed=seed)
                index = made or index
            index.build(weight_CD.detach(), None if bias_C is None else bias_C.detach())
            self._prediction = now, index
        return self._prediction[1]

    def stats(self) -> SamplingStats:
        """What was done so far; waits for it on a device, and raises what went wrong there."""
        self._late.settle(wait=True)
        return SamplingStats(
            steps=self.step,
            updates=self.updates,
            active_classes=float(self._active),
            classes_seen=self._record.share(SEEN),
            rehashes=self.rehashes,
            index=None if self.index is None else self.index.stats(),
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Step counts and the fused optimiser's state; the tensors share memory with it."""
        self._late.settle(wait=True)
        return {"counts": torch.tensor([self.step, self.updates]), **self._updater.tensors()}

    def load_state_dict(
        self, state: Mapping[str, torch.Tensor], weight_CD: torch.Tensor, bias_C: torch.Tensor | None
    ) -> None:
        """Restores what `state_dict` gave, for a layer of the same shape and optimizer.

        Raises:
            ConfigError: if a tensor is missing or too much, or has another shape or dtype.
        """
        self._updater.load(state, weight_CD, bias_C)
        self.step = int(state["counts"][0])
        self.invalidate()

    def check(self, scored: Scored, wrong: torch.Tensor | None) -> torch.Tensor | None:
        """Whether an update may be written: bool () on a device, which is told of late; on the CPU None, or an error.

        Args:
            scored: What it is of.
            wrong: As in `slidex.nn.loss_batch.Batch`.

        Raises:
            DivergedError: On the CPU, if the loss or its gradient is not finite.
        """
        step, rate = self.step, self.learning_rate
        if self.placement.waits:
            if not (torch.isfinite(scored.loss_N).all() and torch.isfinite(scored.grad).all()):
                raise _diverged(step, rate)
            return None
        total = scored.loss_N.sum() + scored.grad.sum()
        finite = total - total == 0  # a few operations; what is not finite makes NaN of it
        self._late.expect((~finite).long() - 1, lambda _: _diverged(step, rate))
        return finite if wrong is None else finite & (wrong < 0)

    def update(self, scored: Scored, weight_CD: torch.Tensor, bias_C: torch.Tensor | None) -> None:
        """The fused optimiser's step on the rows that were scored, which `check` has seen.

        Raises:
            ConfigError: if other processes have copies of these rows, which would not get this update.
        """
        if self.shard is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ConfigError(
                f"The 'optimizer' setting must be None (got {self.settings.optimizer!r}) where "
                f"{dist.get_world_size()} processes have copies of one head: each would update its own. Call "
                "head.shard(group) instead, with a group of this process alone if the head is not shared."
            )
        self._updater.apply(self.scorer, scored, weight_CD, bias_C)

    def note(self, scored: Scored, labels: CsrArrays | DeviceLabels) -> None:
        """Notes the classes of a batch."""
        self._active = scored.active
        if self.settings.mode != "exact":
            self._record.note(scored.ids, labels)
        else:
            self._record.note_all()

    def _place(self, device: torch.device) -> Placement:
        """Computes on this device from now on."""
        placement = placements.place(device)
        self.scorer.place(placement, self.settings.index)
        if self.options.precision == "auto":
            self.scorer.precision = self.settings.precision
            if device.type != "cpu":
                self.scorer.precision = "bfloat16" if placement.bfloat16_products else "float32"
        self._record.place(placement)
        self._fits = False
        self.invalidate()
        return placement

    def _bind(self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None) -> None:
        if weight_CD.device != self.placement.device:
            self.placement = self._place(weight_CD.device)
        where, dtypes = self.placement.device, self.placement.dtypes
        for name, tensor, shape in (
            ("linear_weight", weight_CD, (self.num_classes, self.in_features)),
            ("linear_bias", bias_C, (self.num_classes,)),
        ):
            if tensor is None:
                continue
            if tensor.device != where:
                raise ConfigError(f"The {name!r} parameter must be on {where}. Got {tensor.device} instead.")
            if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
                kinds = f"{', '.join(_plain(d) for d in dtypes[:-1])} or {_plain(dtypes[-1])}"
                raise ConfigError(
                    f"The {name!r} parameter must be {kinds} of shape {shape} where classes are sampled on "
                    f"{where.type} (precision='bfloat16' is for the products). Got {_plain(tensor.dtype)} of "
                    f"{tuple(tensor.shape)} instead."
                )
        self.rows = Rows(weight_CD.detach(), None if bias_C is None else bias_C.detach())

    @staticmethod
    def _check_rows_differ(shard: Shard, weight_CD: torch.Tensor) -> None:
        """Raises ConfigError if processes hold the same rows, as where DistributedDataParallel has copied them."""
        first_RD = shard.gather(weight_CD[0])
        if shard.size > 1 and first_RD[0].any() and (first_RD[1:] == first_RD[0]).all(1).any():
            raise ConfigError(
                "The processes of a sharded head hold the same rows. DistributedDataParallel makes parameters equal: "
                "let it wrap the rest of the model, not the head."
            )

    def _rehash(self, hidden_ND: torch.Tensor, labels: CsrArrays | DeviceLabels) -> None:
        if self._rehasher is None or self.index is None:
            return
        if self.index.uses_queries and isinstance(labels, CsrArrays):  # none that learns is on a device
            self._remember(hidden_ND, labels)
        if self._stale:
            self.rehash(*self.rows)
        elif self._rehasher.rehash_if_due(self.step) is not None:
            self.rehashes += 1

    def _remember(self, hidden_ND: torch.Tensor, labels: CsrArrays) -> None:
        """Keeps this batch for the index to learn from, and forgets what is too old."""
        self._recent.append((hidden_ND.float().clone(), labels))
        while sum(len(h) for h, _ in self._recent[1:]) >= self.settings.index_sample:
            self._recent.pop(0)

    def _queries(self, step: int) -> QuerySample:
        """The most recent hidden vectors with their true classes."""
        del step
        most, counts = self.settings.index_sample, [np.diff(labels.indptr) for _, labels in self._recent]
        hidden_ND = torch.cat([hidden for hidden, _ in self._recent])
        indptr = np.concatenate([[0], np.cumsum(np.concatenate(counts))])[: min(most, len(hidden_ND)) + 1]
        ids = np.concatenate([labels.indices for _, labels in self._recent])[: indptr[-1]].astype(np.int64)
        return QuerySample(hidden_ND[:most], torch.from_numpy(indptr), torch.from_numpy(ids))


def _diverged(step: int, rate: float) -> DivergedError:
    return DivergedError(
        f"the loss of step {step:,}, or its gradient, is not finite; its update was not applied. "
        f"Lower 'learning_rate' (now {rate:g})."
    )


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
