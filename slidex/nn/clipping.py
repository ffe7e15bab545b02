"""Clipping gradients of which some are sparse, which torch's own function does not take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scales gradients, dense and sparse alike, so that their joint 2-norm is at most `max_norm`.

    It is `torch.nn.utils.clip_grad_norm_` with its default norm, for gradients that `LSHSoftmaxLoss` makes with
    ``sparse_grad=True`` as well.

    Args:
        parameters: Those whose `.grad` is clipped, in place; those without one are left alone.
        max_norm: Above 0.

    Returns:
        The norm before clipping, a number.
    """
    gradients = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
        if parameter.grad is not None:
            gradients.append(parameter.grad.values() if parameter.grad.is_sparse else parameter.grad)
    if not gradients:
        return torch.tensor(0.0)
    norm = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients])
    )
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor)
    return norm
