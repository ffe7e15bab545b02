"""What the loss on sampled classes is of: its rows and their labels, where the layer is.

Legend: N rows in a batch, D hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from slidex.nn.functional import label_mass
from slidex.nn.smoothing import LabelMass
from slidex.nn.targets import as_device_labels, as_labels

if TYPE_CHECKING:
    from slidex.data.csr import CsrArrays
    from slidex.nn.device_labels import DeviceLabels
    from slidex.nn.sampling import Sampling


class Asked(NamedTuple):
    """Arguments of a loss; those of `slidex.nn.functional.lsh_softmax`."""

    target: Any
    class_weights: torch.Tensor | None
    ignore_index: int | None
    reduction: str
    label_smoothing: float


@dataclass(frozen=True, slots=True)
class Batch:
    """What a loss is of, beside the layer.

    Args:
        hidden_ND: The rows that are scored, of all processes.
        labels: Their true classes, as far as they are classes of this process.
        mass: Of the labels.
        scale: What the reduction makes of the loss of each row of this process; on a device a number there.
        reduction: ``mean``, ``sum`` or ``none``.
        counts: Rows of each process.
        total: What all labels of this process count.
        wrong: As `slidex.nn.targets.as_device_labels` gives it.
    """

    hidden_ND: torch.Tensor
    labels: CsrArrays | DeviceLabels
    mass: LabelMass | None
    scale: float | torch.Tensor
    reduction: str
    counts: list[int]
    total: float | torch.Tensor
    wrong: torch.Tensor | None = None


def host_batch(sampling: Sampling, hidden_ND: torch.Tensor, input_: torch.Tensor, asked: Asked) -> Batch:
    """The batch of a layer on the CPU, with the rows of all processes where it is sharded.

    Args:
        sampling: Of the layer.
        hidden_ND: The input's rows.
        input_: As it was given.
        asked: All else that was given.

    Raises:
        ConfigError: The target does not fit.
    """
    labels = as_labels(input_, asked.target, sampling.total_classes, asked.ignore_index)
    shard, class_weights, mass = sampling.shard, asked.class_weights, None
    mass_P = label_mass(labels, class_weights)
    total = float(mass_P.sum())
    scale = 1 / total if asked.reduction == "mean" and total > 0 else 1.0
    scored_ND, counts = hidden_ND.detach(), [len(hidden_ND)]
    if shard is not None:
        scored_ND, counts = shard.gather_rows(scored_ND)
        labels = shard.gather_labels(labels)
        mass_P = label_mass(labels, class_weights)
        labels = shard.local(replace(labels, values=mass_P.numpy()))
        mass_P = torch.from_numpy(labels.values)
        if class_weights is not None:
            class_weights = class_weights[shard.begin : shard.end]
    if shard is not None or class_weights is not None or asked.label_smoothing > 0:
        mass = LabelMass(mass_P, asked.label_smoothing, class_weights)
    return Batch(scored_ND, labels, mass, scale, asked.reduction, counts, total)


def device_batch(sampling: Sampling, hidden_ND: torch.Tensor, input_: torch.Tensor, asked: Asked) -> Batch:
    """The batch of a layer on a device, which is not waited for; arguments and errors as in `host_batch`.

    What is wrong with class ids there stands in `Batch.wrong`.
    """
    labels, wrong = as_device_labels(
        input_, asked.target, sampling.total_classes, asked.ignore_index, sampling.placement
    )
    mass_P, mass = labels.mass(asked.class_weights), None
    total = mass_P.sum()
    # Without any label it is infinite, and loss and gradient are NaN.
    scale = total.reciprocal().to(hidden_ND.dtype) if asked.reduction == "mean" else 1.0
    if asked.class_weights is not None or asked.label_smoothing > 0:
        mass = LabelMass(mass_P, asked.label_smoothing, asked.class_weights)
    counts = [len(hidden_ND)]
    return Batch(hidden_ND.detach(), labels, mass, scale, asked.reduction, counts, total, wrong)
