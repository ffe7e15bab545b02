"""The autograd node of a loss on sampled classes: gradients of its rows for torch, or their optimiser step at once.

Legend: N rows in a batch, C classes of this process, D hidden width, U classes that were scored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from slidex.nn.scoring import LabelMass, Rows, Scored

if TYPE_CHECKING:
    from slidex.data.csr import CsrArrays
    from slidex.nn.sampling import Sampling
    from slidex.nn.sharding import Shard


@dataclass(frozen=True, slots=True)
class Batch:
    """What a loss is of, beside the layer.

    Args:
        hidden_ND: The rows that are scored, of all processes.
        labels: Their true classes, as far as they are classes of this process.
        mass: Of the labels.
        scale: What the reduction makes of the loss of each row of this process.
        reduction: ``mean``, ``sum`` or ``none``.
        counts: Rows of each process.
    """

    hidden_ND: torch.Tensor
    labels: CsrArrays
    mass: LabelMass | None
    scale: float
    reduction: str
    counts: list[int]


class SampledLoss(torch.autograd.Function):
    """Loss of a batch on its active classes."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_CD: torch.Tensor,
        bias_C: torch.Tensor | None,
        sampling: Sampling,
        batch: Batch,
    ) -> torch.Tensor:
        """The loss, as `batch.reduction` says, of this process's rows."""
        del hidden_ND  # in `batch`, with those of other processes
        shard = sampling.shard
        with torch.autocast("cpu", enabled=False):  # `precision` says how products are made
            scored = sampling.scorer.score(
                Rows(weight_CD, bias_C),
                batch.hidden_ND,
                batch.labels,
                sampling.step,
                row_scale=batch.scale if shard is None else 1.0,
                mass=batch.mass,
            )
        sampling.note(scored, batch.labels)
        ctx.sampling, ctx.batch, ctx.scored, ctx.layer = sampling, batch, scored, (weight_CD, bias_C)
        ctx.updated = False
        ctx.set_materialize_grads(False)
        loss_N = scored.loss_N if shard is None else shard.take_own(scored.loss_N, batch.counts)
        return loss_N.clone() if batch.reduction == "none" else loss_N.sum() * batch.scale

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  (the decorator hides the names of the arguments)
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[Any, ...]:
        """Gradients of what came before the layer and of its rows; or an optimiser step of these."""
        (upstream,) = grad_outputs
        if upstream is None:
            return (None,) * 5
        sampling, (weight_CD, bias_C) = ctx.sampling, ctx.layer
        with torch.autocast("cpu", enabled=False):
            scored = _upstreamed(sampling.shard, ctx.batch, ctx.scored, upstream)
            hidden_grad_ND = weight_grad = bias_grad = None
            if ctx.needs_input_grad[0]:
                hidden_grad_ND = sampling.scorer.hidden_grad(scored)
                if sampling.shard is not None:
                    hidden_grad_ND = sampling.shard.reduce(hidden_grad_ND)
                    hidden_grad_ND = sampling.shard.take_own(hidden_grad_ND, ctx.batch.counts)
            if not any(ctx.needs_input_grad[1:3]):
                return hidden_grad_ND, None, None, None, None
            if sampling.shard is not None:
                scored.grad.div_(sampling.shard.size)
            if not sampling.fused:
                ids_U, grad_UD, grad_U = sampling.scorer.rows_grad(scored)
                sparse = sampling.options.sparse_grad
                if ctx.needs_input_grad[1]:
                    weight_grad = _row_gradient(ids_U, grad_UD, weight_CD, sparse)
                if ctx.needs_input_grad[2]:
                    bias_grad = _row_gradient(ids_U, grad_U, bias_C, sparse)
            elif ctx.updated:
                raise RuntimeError("backward has updated the layer's rows already: run forward again first")
            else:
                sampling.update(scored, weight_CD, bias_C)
                ctx.updated = True
        return hidden_grad_ND, weight_grad, bias_grad, None, None


def _upstreamed(shard: Shard | None, batch: Batch, scored: Scored, upstream: torch.Tensor) -> Scored:
    """What was scored, its gradient times that of the loss."""
    if shard is None:
        if not upstream.dim() and upstream == 1:
            return scored
        return replace(scored, grad=scored.grad * (upstream[:, None] if upstream.dim() else upstream))
    own_N = (upstream * batch.scale).expand(batch.counts[shard.rank])
    factor_N, _ = shard.gather_rows(own_N, batch.counts)
    return replace(scored, grad=scored.grad * factor_N[:, None])


def _row_gradient(
    ids_U: torch.Tensor, grad: torch.Tensor, parameter: torch.Tensor, sparse: bool
) -> torch.Tensor:
    """The gradient of a parameter of which only the rows `ids_U`, ascending, have one."""
    if sparse:
        return torch.sparse_coo_tensor(
            ids_U[None], grad, parameter.shape, is_coalesced=True, check_invariants=False
        )
    return torch.zeros_like(parameter).index_copy_(0, ids_U, grad)
