"""Brings a training run's model to its device, if that has the memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slidex.kernels.optimizer import state_size
from slidex.nn.memory import index_bytes, layer_advice, optimizer_bytes, require_memory, step_bytes

if TYPE_CHECKING:
    import torch

    from slidex.data import Dataset
    from slidex.nn.class_record import ClassRecord
    from slidex.nn.classifier import Classifier
    from slidex.nn.placement import Placement
    from slidex.train.config import TrainConfig


def place_model(
    model: Classifier, record: ClassRecord, placement: Placement, config: TrainConfig, dataset: Dataset
) -> None:
    """Moves a model and the record of its classes to a GPU; one that has no weights yet draws them there.

    Raises:
        ConfigError: Something of the model works on the CPU alone.
        DeviceError: The GPU has too little memory.
    """
    if not placement.waits:
        _require_memory(model, config, dataset, placement.device)
        model.place(placement, config.index)
        record.place(placement)


def _require_memory(model: Classifier, config: TrainConfig, dataset: Dataset, device: torch.device) -> None:
    """Raises DeviceError unless a GPU has room for a model that is not there yet, and for what trains it.

    A step's labels are taken to be twice as many as the training rows have on average.
    """
    encoder, head, train = model.encoder, model.head, dataset.split("train")
    num_features, width = encoder.bag.shape
    labels = round(2 * config.batch_size * train.y.nnz / max(1, train.num_rows))
    features = round(2 * config.batch_size * train.x.nnz / max(1, train.num_rows))
    dense = sum(parameter.numel() for parameter in encoder.parameters()) - encoder.bag.numel()
    classes = head.in_features, head.num_classes
    needed = {
        "input weights": encoder.bag.nbytes,
        "their optimizer state": 4 * num_features * state_size(config.optimizer, width) + 16 * dense,
        "output weights": head.weight.nbytes + head.bias.nbytes,
        "their state": optimizer_bytes(config.optimizer, *classes[::-1], bias=True),
        "index": index_bytes(model.index),
        "a step": step_bytes(config, *classes, config.batch_size, labels, head.weight.dtype) + 64 * features,
    }
    advice = layer_advice(config, head.weight.dtype, "set 'weight_dtype' to bfloat16")
    require_memory(needed, device, advice)
