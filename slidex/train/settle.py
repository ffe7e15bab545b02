"""What the settings mean on this machine and at this step: modes, learning rates, random streams."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from slidex import doctor
from slidex.errors import ConfigError
from slidex.nn import placement as placements
from slidex.nn.device_candidates import require_device_index
from slidex.nn.selection import make_config_index, settle_sampling
from slidex.threads import set_threads
from slidex.train.distributed import Solo

if TYPE_CHECKING:
    from slidex.data import Dataset
    from slidex.train.config import TrainConfig

GPU_EXACT_WEIGHTS = 1 << 27
"""Up to so many weights of the output layer, `mode` auto is exact on a GPU: a million classes of width 128, where one
pass over weights and state is some 2 ms by data sheets. Not measured yet."""
STREAM_ORDER, STREAM_VALID, STREAM_PROBE, STREAM_QUERIES = range(4)


def settle(config: TrainConfig, dataset: Dataset, processes: Solo | None = None) -> TrainConfig:
    """Replaces every ``auto`` by what it means for this data set on this machine, and sets the thread counts.

    Args:
        config: As the user gave it.
        dataset: What it is for.
        processes: Of the job, which share the cores; None is this one alone.

    Raises:
        ConfigError: if the index or its options do not exist or do not fit, in every mode; or if another setting has
            no meaning in the mode, or works on the CPU alone.
        DeviceError: if the GPU that is asked for cannot be used.
        MissingExtraError: if packages for it are not installed.
    """
    ranks = processes or Solo()
    set_threads(config.threads, ranks.local_size)
    if config.device != "cpu":
        return _settle_on_gpu(config, dataset, ranks)
    width = _width(config)
    if config.mode == "auto":
        native = config.precision == "auto" and doctor.has_native_bf16() is True
        chosen = doctor.plan(
            dataset.num_classes,
            width,
            config.batch_size,
            pool_size=config.pool_size,
            active=config.active_size,
            native_bf16=native or config.precision == "bfloat16",
        )
        config = replace(config, mode=chosen.mode)
    config = settle_sampling(config)
    make_config_index(config, width, dataset.num_classes)
    return config


def _settle_on_gpu(config: TrainConfig, dataset: Dataset, ranks: Solo) -> TrainConfig:
    placement = placements.place(torch.device(config.device))
    if ranks.size > 1:
        raise ConfigError(
            f"The 'device' setting must be cpu where {ranks.size} processes train one model. "
            f"Got {config.device!r} instead."
        )
    if config.mode == "auto":
        exact = dataset.num_classes * _width(config) <= GPU_EXACT_WEIGHTS
        config = replace(config, mode="exact" if exact else "shared")
    if config.precision == "auto":
        config = replace(config, precision="bfloat16" if placement.bfloat16_products else "float32")
    config = settle_sampling(config)
    index = make_config_index(config, _width(config), dataset.num_classes)
    require_device_index(index, config.index)
    return config


def _width(config: TrainConfig) -> int:
    return config.dense_widths[-1] if config.dense_widths else config.hidden_width


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Learning rate of a step, 1-based: warm-up from 0, then constant, or to 0 along a line or a cosine."""
    warmup_steps = int(config.warmup * total_steps)
    if step <= warmup_steps:
        return config.learning_rate * step / warmup_steps
    progress = (step - 1 - warmup_steps) / max(1, total_steps - warmup_steps)
    factor = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return config.learning_rate * factor[config.lr_schedule]


def counter_rng(seed: int, stream: int, counter: int) -> np.random.Generator:
    """A generator that is a function of its three arguments (Philox, Salmon et al. 2011)."""
    return np.random.Generator(np.random.Philox(key=[seed, stream << 48 | counter]))
