"""What the settings mean on this machine and at this step: modes, learning rates, random streams."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from slidex import doctor
from slidex.nn.selection import make_config_index, settle_sampling
from slidex.threads import set_threads
from slidex.train.distributed import Solo

if TYPE_CHECKING:
    from slidex.data import Dataset
    from slidex.train.config import TrainConfig

STREAM_ORDER, STREAM_VALID, STREAM_PROBE, STREAM_QUERIES = range(4)


def settle(config: TrainConfig, dataset: Dataset, processes: Solo | None = None) -> TrainConfig:
    """Replaces every ``auto`` by what it means for this data set on this machine, and sets the thread counts.

    Args:
        config: As the user gave it.
        dataset: What it is for.
        processes: Of the job, which share the cores; None is this one alone.

    Raises:
        ConfigError: if the index or its options do not exist or do not fit, in every mode; or if another setting has
            no meaning in the mode.
    """
    set_threads(config.threads, (processes or Solo()).local_size)
    width = config.dense_widths[-1] if config.dense_widths else config.hidden_width
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
