"""The autograd node of a loss on sampled classes: gradients of its rows for torch, or their optimiser step at once.

Legend: N rows in a batch, C classes of this process, D hidden width, U classes that were scored.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from slidex.nn.scoring import Rows, Scored

if TYPE_CHECKING:
    from slidex.nn.loss_batch import Batch
    from slidex.nn.sampling import Sampling


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
        with torch.autocast(weight_CD.device.type, enabled=False):  # `precision` says how products are made
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
        with torch.autocast(weight_CD.device.type, enabled=False):
            scored = _upstreamed(sampling, ctx.batch, ctx.scored, upstream)
            updates = sampling.fused and any(ctx.needs_input_grad[1:3])
            keep = sampling.check(scored, ctx.batch.wrong) if updates and not ctx.updated else None
            hidden_grad_ND = weight_grad = bias_grad = None
            if ctx.needs_input_grad[0]:
                hidden_grad_ND = sampling.scorer.hidden_grad(scored)
                if keep is not None:
                    hidden_grad_ND = hidden_grad_ND.masked_fill(~keep, 0)
                if sampling.shard is not None:
                    hidden_grad_ND = sampling.shard.reduce(hidden_grad_ND)
                    hidden_grad_ND = sampling.shard.take_own(hidden_grad_ND, ctx.batch.counts)
            if not any(ctx.needs_input_grad[1:3]):
                return hidden_grad_ND, None, None, None, None
            if sampling.shard is not None:
                scored.grad.div_(sampling.shard.size)
            if not sampling.fused:
                ids_U, grad_UD, grad_U = sampling.scorer.rows_grad(scored)
                kind = {"sparse": sampling.options.sparse_grad, "distinct": not sampling.scorer.pads}
                if ctx.needs_input_grad[1]:
                    weight_grad = _row_gradient(ids_U, grad_UD, weight_CD, **kind)
                if ctx.needs_input_grad[2]:
                    bias_grad = _row_gradient(ids_U, grad_U, bias_C, **kind)
            elif ctx.updated:
                raise RuntimeError("backward has updated the layer's rows already: run forward again first")
            else:
                sampling.update(scored if keep is None else scored.masked(keep), weight_CD, bias_C)
                ctx.updated = True
        return hidden_grad_ND, weight_grad, bias_grad, None, None


def _upstreamed(sampling: Sampling, batch: Batch, scored: Scored, upstream: torch.Tensor) -> Scored:
    """What was scored, its gradient times that of the loss."""
    shard = sampling.shard
    if shard is None:
        if sampling.placement.waits and not upstream.dim() and upstream == 1:
            return scored
        return replace(scored, grad=scored.grad * (upstream[:, None] if upstream.dim() else upstream))
    own_N = (upstream * batch.scale).expand(batch.counts[shard.rank])
    factor_N, _ = shard.gather_rows(own_N, batch.counts)
    return replace(scored, grad=scored.grad * factor_N[:, None])


def _row_gradient(
    ids_U: torch.Tensor, grad: torch.Tensor, parameter: torch.Tensor, *, sparse: bool, distinct: bool
) -> torch.Tensor:
    """The gradient of a parameter of which only the rows `ids_U`, ascending, have one; repeated ones add up."""
    grad = grad.to(parameter.dtype)
    if sparse:
        return torch.sparse_coo_tensor(
            ids_U[None], grad, parameter.shape, is_coalesced=distinct, check_invariants=False
        )
    whole = torch.zeros_like(parameter)
    return whole.index_copy_(0, ids_U, grad) if distinct else whole.index_add_(0, ids_U, grad)
