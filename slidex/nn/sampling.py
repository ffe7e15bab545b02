"""What a sampled output layer keeps besides its weights: index, rehash schedule, step count, and the rows' optimiser.

One object of it belongs to one layer. Its loss is one autograd node, `slidex.nn.sampled_loss.SampledLoss`.

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

from slidex.errors import ConfigError, DivergedError
from slidex.kernels import RowState, StepSettings
from slidex.lsh.index import QuerySample
from slidex.nn.class_record import SEEN, ClassRecord
from slidex.nn.functional import label_mass
from slidex.nn.rehash import Rehasher
from slidex.nn.sampled_loss import Batch, SampledLoss
from slidex.nn.scoring import LabelMass, Rows, Scored, Scorer
from slidex.nn.selection import SEEDS_APART, make_config_index, make_selector, settle_sampling
from slidex.nn.targets import as_labels

if TYPE_CHECKING:
    from collections.abc import Mapping

    from slidex.data.csr import CsrArrays
    from slidex.lsh import CandidateIndex, IndexStats
    from slidex.nn.options import SamplingOptions
    from slidex.nn.sharding import Shard

DTYPES = (torch.float32, torch.float64)


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
        learning_rate: Of the fused updates; set it before a backward pass, as a schedule wants.

    Raises:
        ConfigError: if settings do not fit each other or the layer.
    """

    def __init__(
        self, options: SamplingOptions, in_features: int, num_classes: int, shard: Shard | None = None
    ) -> None:
        self.options, self.shard, self.total_classes = options, shard, num_classes
        self.settings = settle_sampling(options)
        own = slice(0, num_classes) if shard is None else slice(shard.begin, shard.end)
        counts = _checked_counts(options.class_counts, num_classes)
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
        self.learning_rate = options.learning_rate
        self.step = self.updates = self.rehashes = 0
        self.rows = Rows(torch.empty(0, in_features), None)
        self.states: tuple[RowState, RowState | None] | None = None
        self._record = ClassRecord(num_classes)
        self._active, self._recent = 0.0, list[tuple[torch.Tensor, Any]]()
        self._rehasher, self._stale = None, True
        self._prediction: tuple[object, CandidateIndex] | None = None
        if self.index is not None:
            self._rehasher = Rehasher(
                self.settings, self.index, self, self._record, self._queries, any_row_moves=not self.fused
            )

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
        hidden_ND = input_.reshape(-1, self.in_features).to(weight_CD.dtype)
        labels = as_labels(input_, target, self.total_classes, ignore_index)
        mass_P, mass = label_mass(labels, class_weights), None
        total = float(mass_P.sum())
        scale = 1 / total if reduction == "mean" and total > 0 else 1.0
        scored_ND, counts = hidden_ND.detach(), [len(hidden_ND)]
        if self.shard is not None:
            if self.step == 0:
                self._check_rows_differ(self.shard, weight_CD.detach())
            scored_ND, counts = self.shard.gather_rows(scored_ND)
            labels = self.shard.gather_labels(labels)
            mass_P = label_mass(labels, class_weights)
            labels = self.shard.local(replace(labels, values=mass_P.numpy()))
            mass_P = torch.from_numpy(labels.values)
            if class_weights is not None:
                class_weights = class_weights[self.shard.begin : self.shard.end]
        if self.shard is not None or class_weights is not None or label_smoothing > 0:
            mass = LabelMass(mass_P, label_smoothing, class_weights)
        self._rehash(scored_ND, labels)
        batch = Batch(scored_ND, labels, mass, scale, reduction, counts)
        loss = SampledLoss.apply(hidden_ND, weight_CD, bias_C, self, batch)
        self.step += 1
        if reduction == "none":
            return loss.reshape(input_.shape[:-1])
        return loss if total > 0 or reduction == "sum" else loss * math.nan

    def rehash(self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None) -> None:
        """Builds the index over these rows now, whatever the schedule says."""
        self._bind(weight_CD, bias_C)
        if self._rehasher is not None:
            self._rehasher.build(self.step)
            self.rehashes, self._stale = self.rehashes + 1, False

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
        """What was done so far."""
        return SamplingStats(
            steps=self.step,
            updates=self.updates,
            active_classes=self._active,
            classes_seen=self._record.share(SEEN),
            rehashes=self.rehashes,
            index=None if self.index is None else self.index.stats(),
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Step counts and the fused optimiser's state; the tensors share memory with it."""
        state = {"counts": torch.tensor([self.step, self.updates])}
        for name, rows in zip(("weight", "bias"), self.states or (), strict=False):
            if rows is not None:
                state |= {f"{name}.moment1": rows.moment1, f"{name}.moment2": rows.moment2}
        return state

    def load_state_dict(
        self, state: Mapping[str, torch.Tensor], weight_CD: torch.Tensor, bias_C: torch.Tensor | None
    ) -> None:
        """Restores what `state_dict` gave, for a layer of the same shape and optimizer.

        Raises:
            ConfigError: if a tensor is missing or too much, or has another shape or dtype.
        """
        states = self._fresh_states(weight_CD, bias_C) if self.fused and "weight.moment1" in state else None
        expected = {"counts": torch.empty(2, dtype=torch.int64)}
        for name, rows in zip(("weight", "bias"), states or (), strict=False):
            if rows is not None:
                expected |= {f"{name}.moment1": rows.moment1, f"{name}.moment2": rows.moment2}
        found, wanted = (
            {k: (tuple(v.shape), v.dtype) for k, v in part.items()} for part in (state, expected)
        )
        if found != wanted:
            raise ConfigError(f"The 'state' parameter must hold {wanted}. Got {found} instead.")
        for name, tensor in expected.items():
            tensor.copy_(state[name])
        self.step, self.updates = expected["counts"].tolist()
        self.states = states
        self.invalidate()

    def update(self, scored: Scored, weight_CD: torch.Tensor, bias_C: torch.Tensor | None) -> None:
        """The fused optimiser's step on the rows that were scored.

        Raises:
            ConfigError: if other processes have copies of these rows, which would not get this update.
            DivergedError: if the loss or its gradient is not finite; nothing is written.
        """
        if self.shard is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ConfigError(
                f"The 'optimizer' setting must be None (got {self.settings.optimizer!r}) where "
                f"{dist.get_world_size()} processes have copies of one head: each would update its own. Call "
                "head.shard(group) instead, with a group of this process alone if the head is not shared."
            )
        if not (torch.isfinite(scored.loss_N).all() and torch.isfinite(scored.grad).all()):
            raise DivergedError(
                f"the loss of step {self.step:,}, or its gradient, is not finite; its update was not applied. "
                f"Lower 'learning_rate' (now {self.learning_rate:g})."
            )
        if self.states is None:
            self.states = self._fresh_states(weight_CD, bias_C)
        if self.states[0].moment2.dtype != weight_CD.dtype:  # the layer was cast
            of_weight, of_bias = self.states
            self.states = of_weight.to(weight_CD.dtype), of_bias and of_bias.to(weight_CD.dtype)
        options = self.options
        settings = StepSettings(
            learning_rate=self.learning_rate,
            step=self.updates + 1,
            beta1=options.beta1,
            beta2=options.beta2,
            epsilon=options.epsilon,
            weight_decay=options.weight_decay,
        )
        self.scorer.update(scored, Rows(weight_CD, bias_C), *self.states, settings)
        for parameter in (weight_CD, bias_C):
            if parameter is not None:  # kernels have written it unseen by autograd
                torch.autograd.graph.increment_version(parameter)
        self.updates += 1

    def note(self, scored: Scored, labels: CsrArrays) -> None:
        """Notes the classes of a batch."""
        self._active = scored.active
        if self.settings.mode != "exact":
            self._record.note(scored.ids, labels)
        else:
            self._record.flags_C1 |= SEEN

    def _bind(self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None) -> None:
        for name, tensor, shape in (
            ("linear_weight", weight_CD, (self.num_classes, self.in_features)),
            ("linear_bias", bias_C, (self.num_classes,)),
        ):
            if tensor is None:
                continue
            if tensor.device.type != "cpu":
                raise ConfigError(
                    f"The {name!r} parameter must be on the CPU where classes are sampled; there are no kernels for "
                    f"other devices yet. Got {tensor.device} instead. options=None works on every device."
                )
            if tensor.dtype not in DTYPES or tuple(tensor.shape) != shape:
                raise ConfigError(
                    f"The {name!r} parameter must be float32 or float64 of shape {shape} where classes are sampled "
                    f"(precision='bfloat16' is for the products). Got {tensor.dtype} of {tuple(tensor.shape)} instead."
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

    def _rehash(self, hidden_ND: torch.Tensor, labels: CsrArrays) -> None:
        if self._rehasher is None or self.index is None:
            return
        if self.index.uses_queries:
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

    def _fresh_states(
        self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None
    ) -> tuple[RowState, RowState | None]:
        optimizer = self.settings.optimizer or "adam"
        bias_state = None if bias_C is None else RowState.zeros_like(bias_C, optimizer)
        return RowState.zeros_like(weight_CD, optimizer), bias_state


def _checked_counts(counts: Any, num_classes: int) -> np.ndarray | None:
    """The setting 'class_counts' as float64 (C,), or None."""
    if counts is None:
        return None
    values = np.asarray(counts, dtype=np.float64)
    if values.shape != (num_classes,) or not (np.isfinite(values) & (values >= 0)).all():
        found = f"shape {values.shape}, values from {values.min(initial=0)} to {values.max(initial=0)}"
        raise ConfigError(
            f"The 'class_counts' setting must hold {num_classes} finite counts of at least 0. Got {found} instead."
        )
    return values
