"""`LSHSoftmaxLoss`: a large output layer and its loss as one torch module.

Legend: N rows in a batch (leading dimensions flattened), C classes, D hidden width, P labels of a row.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from slidex.errors import ConfigError
from slidex.lsh import exact_topk
from slidex.nn import placement as placements
from slidex.nn.best_candidates import best_candidates
from slidex.nn.functional import check_arguments, check_class_weights, lsh_softmax
from slidex.nn.memory import layer_advice, require_memory
from slidex.nn.options import SamplingOptions
from slidex.nn.placement import compute_dtype
from slidex.nn.sampling import Sampling
from slidex.nn.scoring import Rows
from slidex.nn.selection import PREDICT_CANDIDATES
from slidex.nn.sharding import Shard

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.distributed.device_mesh import DeviceMesh

    from slidex.nn.sampling import SamplingStats


class TopK(NamedTuple):
    """The best classes of every row, best first.

    Args:
        ids: int64 (..., k), -1 where a row has no further class.
        scores: floating (..., k), logits; -inf where there is no class.
    """

    ids: torch.Tensor
    scores: torch.Tensor


class LSHSoftmaxLoss(nn.Module):
    """A linear layer onto C classes with its softmax cross-entropy, exact or on the classes that matter for the batch.

    ``options=None`` is the exact loss, on every device: that of `torch.nn.functional.cross_entropy` over
    `torch.nn.functional.linear`. With `SamplingOptions` the loss of a training step is computed on the rows' true
    classes, those an index over the weights proposes, and random ones; in eval mode it is exact. The index is built at
    the first training step and brought up to date by its schedule, and it is never part of the state dict.

    Args:
        in_features: D.
        num_classes: C.
        bias: Whether classes have a bias.
        device: Of the parameters.
        dtype: Of the parameters; where classes are sampled float32 or float64 on the CPU, float32, bfloat16 or float16
            on a CUDA device; fused updates round those of 16 bits stochastically (`slidex.kernels.rounding`).
        reduction: ``mean`` (weighted by the rows' label mass, as in torch: rows without a label do not count),
            ``sum`` or ``none``.
        weight: floating (C,), what each class counts in the loss; None means 1.
        ignore_index: Class id that marks a row without a label; None means -100.
        label_smoothing: Share of the label mass that is spread over all classes, in [0, 1].
        options: Settings of sampling and of fused row updates; None is the exact loss.

    Attributes:
        weight: Parameter (C, D), named and shaped as that of `torch.nn.Linear`.
        bias: Parameter (C,), or None.
        class_weight: Buffer (C,), not in the state dict: the argument `weight`, or None.
        learning_rate: With a fused optimizer, its step size; set it as a schedule wants.

    Raises:
        ConfigError: An argument is out of its range, or options do not fit each other or the layer.
        DeviceError: The GPU named by `device` has too little memory for the layer and what trains it, or with options
            cannot be used.
        MissingExtraError: With options, the packages for a GPU named by `device` are not installed.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    class_weight: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: torch.Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: SamplingOptions | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("num_classes", num_classes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(
                    f"The {name!r} parameter of LSHSoftmaxLoss must be an integer of at least 1. Got {value!r} instead."
                )
        self.in_features, self.num_classes = in_features, num_classes
        self.reduction, self.ignore_index, self.label_smoothing = reduction, ignore_index, label_smoothing
        self.options = options
        self._sampling = None if options is None else Sampling(options, in_features, num_classes)
        if device is not None and torch.device(device).type == "cuda":
            if options is not None:
                placements.place(torch.device(device))  # says what is missing
            self._require_memory(torch.device(device), dtype or torch.get_default_dtype(), bias=bias)
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_classes, device=device, dtype=dtype)) if bias else None
        self.register_buffer("class_weight", weight, persistent=False)
        check_arguments(self.weight[:0], self.weight, self.bias, reduction, label_smoothing)
        check_class_weights(weight, num_classes)
        self._exact: Sampling | None = None  # what scores all classes where they are sharded
        self._shard: Shard | None = None
        self.register_load_state_dict_post_hook(_after_loading)
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        reduction: str = "mean",
        weight: torch.Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: SamplingOptions | None = None,
    ) -> LSHSoftmaxLoss:
        """A loss over the very parameters of a linear layer: what changes one changes the other.

        Raises:
            ConfigError: as the constructor, or if the linear layer's weight is no parameter of its own.
        """
        weights, biases = linear.weight, linear.bias
        if not isinstance(weights, nn.Parameter) or not isinstance(biases, nn.Parameter | None):
            raise ConfigError(
                "The 'linear' parameter of from_linear must own its weight and bias as parameters. "
                f"Got {type(weights).__name__} and {type(biases).__name__} instead."
            )
        head = cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            device="meta",
            reduction=reduction,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
        )
        head.weight, head.bias = weights, biases
        return head

    def reset_parameters(self) -> None:
        """Draws new weights as `torch.nn.Linear` does, uniform within 1 / sqrt(D); the index is built anew."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        self._weights_replaced()

    def forward(self, input: torch.Tensor, target: Any) -> torch.Tensor:  # noqa: A002  (torch's name)
        """The loss.

        Args:
            input: floating (..., D).
            target: One of

                * integer tensor (...): a class id for each row, `ignore_index` for a row without a label;
                * integer tensor (..., P): class ids of each row, distinct, padded with -1 (or `ignore_index`);
                * compressed sparse rows (N, C) of ones: a ``torch.sparse_csr_tensor``, a scipy sparse matrix, or
                  `slidex.data.CsrArrays`. A row's labels share its mass alike.

        Returns:
            A number, or (...) where `reduction` is ``none``; rows without a label have 0. The mean over no label at all
            is NaN, as in torch.

        Raises:
            ConfigError: `input` or `target` do not fit the layer.
            DivergedError: in backward, with a fused optimizer, if loss or gradient are not finite; nothing is written.
                On a CUDA device this, and a class id of a target there that does not fit, is raised by a later call of
                the head, since the step does not wait for the device; nothing is written there either.
        """
        return lsh_softmax(
            input,
            self.weight,
            target,
            linear_bias=self.bias,
            weight=self.class_weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            sampling=self._sampling if self.training and self._sampling is not None else self._exact,
        )

    @torch.no_grad()
    def shard(self, group: dist.ProcessGroup | DeviceMesh | None = None) -> LSHSoftmaxLoss:
        """Keeps this process's part of the classes, with their optimizer state and an index of their own.

        The parts are contiguous and differ by at most one class. From then on `forward`, `backward` and `topk` are
        collective: every process of the group calls them with rows of its own, of any number, and gets what belongs to
        these. Gradients of the layer are means over processes, as DistributedDataParallel's are of what it wraps; it
        must not wrap the head. The state dict has this process's rows; `full_state_dict` has all.

        Args:
            group: A process group, a device mesh of one dimension, or None for all processes. All its processes have
                the same weights, or have them on the device ``meta``: then each draws its own rows anew.

        Returns:
            The head itself.

        Raises:
            ConfigError: if the head is sharded already or has been trained, or there are fewer classes than processes.
        """
        if self._shard is not None or (self._sampling is not None and self._sampling.step > 0):
            raise ConfigError("LSHSoftmaxLoss.shard must be called once, before the first training step.")
        if not isinstance(group, dist.ProcessGroup | None):
            group = group.get_group()
        shard = Shard.of(self.num_classes, group)
        if shard.size > self.num_classes:
            raise ConfigError(
                f"The 'group' parameter of shard must have no more processes than classes ({self.num_classes}). "
                f"Got {shard.size} instead."
            )
        own, drawn = slice(shard.begin, shard.end), self.weight.device.type == "meta"
        for name, whole in tuple(self._parameters.items()):
            if whole is not None:
                part = torch.empty_like(whole[own], device="cpu") if drawn else whole.detach()[own].clone()
                self.register_parameter(name, nn.Parameter(part, requires_grad=whole.requires_grad))
        self._shard = shard
        if self.options is not None:
            self._sampling = Sampling(self.options, self.in_features, self.num_classes, shard)
        everything = SamplingOptions(mode="exact", precision="float32", sparse_grad=False)
        self._exact = Sampling(everything, self.in_features, self.num_classes, shard)
        if drawn:
            self.reset_parameters()
        return self

    @torch.no_grad()
    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """Weights and biases of all classes, in every process: collective where the head is sharded, else copies."""
        if self._shard is None:
            return {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}
        return {name: self._shard.gather_rows(tensor)[0] for name, tensor in self.state_dict().items()}

    def load_full_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restores what `full_state_dict` gave, on any number of processes: each takes its own rows."""
        own = slice(0, None) if self._shard is None else slice(self._shard.begin, self._shard.end)
        for name, tensor in state.items():
            if len(tensor) != self.num_classes:
                raise ConfigError(
                    f"The 'state' parameter must have {self.num_classes} rows of {name!r}. Got {len(tensor)} instead."
                )
        self.load_state_dict({name: tensor[own] for name, tensor in state.items()})

    @torch.no_grad()
    def topk(
        self,
        input: torch.Tensor,  # noqa: A002
        k: int,
        *,
        indexed: bool = False,
        candidates: int = PREDICT_CANDIDATES,
    ) -> TopK:
        """The k best classes of every row; never holds an (N, C) matrix.

        Args:
            input: floating (..., D).
            k: Classes per row, at least 1.
            indexed: Score only the classes that the index proposes. It is brought up to date first, if the weights
                have changed.
            candidates: How many it proposes for each row, if `indexed`.

        Raises:
            ConfigError: An argument is out of its range, or `indexed` is asked of a layer without an index.
        """
        for name, value in (("k", k), ("candidates", candidates)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(
                    f"The {name!r} parameter of topk must be an integer of at least 1. Got {value!r} instead."
                )
        check_arguments(input, self.weight, self.bias, self.reduction, self.label_smoothing)
        hidden_ND, counts = input.reshape(-1, self.in_features).to(compute_dtype(self.weight.dtype)), None
        if self._shard is not None:
            hidden_ND, counts = self._shard.gather_rows(hidden_ND)
        if not indexed:
            scores_NK, ids_NK = exact_topk(hidden_ND, self.weight, self.bias, k)
        elif self._sampling is None:
            raise ConfigError(
                "The 'indexed' parameter of topk must be False where options are None. Got True instead."
            )
        else:
            index = self._sampling.prediction_index(self.weight, self.bias)
            candidates_NA = index.query(hidden_ND, max(k, candidates))
            kernels = self._sampling.placement.kernels
            scores_NK, ids_NK = best_candidates(
                Rows(self.weight, self.bias), hidden_ND, candidates_NA, k, kernels
            )
        if self._shard is not None and counts is not None:
            scores_NK, ids_NK = self._shard.merge_topk(scores_NK, ids_NK)
            scores_NK, ids_NK = (self._shard.take_own(x, counts) for x in (scores_NK, ids_NK))
        shape = *input.shape[:-1], k
        return TopK(ids_NK.reshape(shape), scores_NK.reshape(shape))

    def rehash(self) -> None:
        """Builds the index over the weights of now, whatever the schedule says.

        Raises:
            ConfigError: if nothing is sampled (``options=None``), or an index that learns has seen no batch yet.
        """
        self._need_sampling("rehash").rehash(self.weight, self.bias)

    def stats(self) -> SamplingStats:
        """Steps, updates, active classes, coverage, and the state of the index.

        Raises:
            ConfigError: if nothing is sampled (``options=None``).
        """
        return self._need_sampling("stats").stats()

    @property
    def learning_rate(self) -> float:
        """Step size of the fused row updates."""
        return self._need_sampling("learning_rate").learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self._need_sampling("learning_rate").learning_rate = value

    def optimizer_state_dict(self) -> dict[str, torch.Tensor]:
        """Step counts and the fused optimizer's state, which the state dict does not have: a resumed run needs both."""
        return self._need_sampling("optimizer_state_dict").state_dict()

    def load_optimizer_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restores what `optimizer_state_dict` gave.

        Raises:
            ConfigError: if it does not fit this layer and its optimizer.
        """
        self._need_sampling("load_optimizer_state_dict").load_state_dict(state, self.weight, self.bias)

    def extra_repr(self) -> str:
        """The arguments."""
        parts = (
            f"in_features={self.in_features}, num_classes={self.num_classes}, bias={self.bias is not None}"
        )
        return (
            parts
            if self.options is None
            else f"{parts}, mode={self.options.mode}, index={self.options.index}"
        )

    def _require_memory(self, device: torch.device, dtype: torch.dtype, *, bias: bool) -> None:
        """Raises DeviceError unless the device has room for the layer and what trains it."""
        size = self.num_classes * (self.in_features + bias) * dtype.itemsize
        needed, advice = {"weights": size}, "Use another GPU, or the CPU."
        if self._sampling is not None:
            needed |= self._sampling.memory(bias=bias)
            advice = layer_advice(self._sampling.settings, dtype)
        require_memory(needed, device, advice)

    def _weights_replaced(self) -> None:
        if self._sampling is not None:
            self._sampling.invalidate()

    def _need_sampling(self, caller: str) -> Sampling:
        if self._sampling is None:
            raise ConfigError(f"LSHSoftmaxLoss.{caller} needs 'options': without, all classes are scored.")
        return self._sampling


def _after_loading(module: LSHSoftmaxLoss, _keys: object) -> None:
    module._weights_replaced()
