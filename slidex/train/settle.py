"""What the settings mean on this machine and at this step: modes, learning rates, rehash schedules, random streams."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from slidex import doctor
from slidex.errors import ConfigError
from slidex.lsh import DriftSchedule, ExponentialSchedule, FixedSchedule, RehashSchedule, index_names
from slidex.nn.classifier import make_config_index
from slidex.threads import set_threads
from slidex.train.config import did_you_mean

if TYPE_CHECKING:
    from slidex.data import Dataset
    from slidex.train.config import TrainConfig

DRIFT_ROWS = 2048
"""Rows on which the drift schedule measures how many codes have changed."""
BATCH_SHARE = 0.25
"""`TrainConfig.batch_share` where rows have sets of their own and nothing is corrected."""
STREAM_ORDER, STREAM_VALID, STREAM_PROBE, STREAM_QUERIES = range(4)


def settle(config: TrainConfig, dataset: Dataset) -> TrainConfig:
    """Replaces every ``auto`` by what it means for this data set on this machine, and sets the thread counts.

    Raises:
        ConfigError: if the index or its options do not exist or do not fit, in every mode; or if another setting has
            no meaning in the mode.
    """
    set_threads(config.threads)
    width = config.dense_widths[-1] if config.dense_widths else config.hidden_width
    names = ("none", *index_names())
    if config.index not in names:
        raise ConfigError(
            f"The 'index' setting must be one of {', '.join(names)}. Got {config.index!r} instead."
            f"{did_you_mean(config.index, names)}"
        )
    make_config_index(config, width, dataset.num_classes)
    native_bf16 = doctor.has_native_bf16()
    if config.precision == "auto":
        config = replace(config, precision="bfloat16" if native_bf16 is True else "float32")
    if config.mode == "auto":
        chosen = doctor.plan(
            dataset.num_classes,
            width,
            config.batch_size,
            pool_size=config.pool_size,
            active=config.active_size,
            native_bf16=config.precision == "bfloat16",
        )
        config = replace(config, mode=chosen.mode)
    if config.correction == "auto":  # docs/performance.md has the measurements behind it and BATCH_SHARE
        plain = config.mode == "per_sample" and config.index != "none"
        config = replace(config, correction="none" if plain else "stratified")
    if config.batch_share is None:
        plain = config.mode == "per_sample" and config.correction == "none"
        config = replace(config, batch_share=min(BATCH_SHARE, 1 - config.random_share) if plain else 0.0)
    elif config.batch_share > 0 and config.mode != "per_sample":
        reason = {"shared": "the pool has all true classes of the batch", "exact": "all classes are scored"}
        raise ConfigError(
            f"The 'batch_share' setting must be 0 in {config.mode} mode, where {reason[config.mode]}. "
            f"Got {config.batch_share!r} instead."
        )
    return config


def rehash_schedule(config: TrainConfig) -> RehashSchedule:
    """The schedule that the `rehash` settings ask for."""
    first, longest = config.rehash_every, max(config.rehash_every, config.rehash_max_gap)
    if config.rehash == "fixed":
        return FixedSchedule(first)
    if config.rehash == "exponential":
        return ExponentialSchedule(first, config.rehash_growth, longest)
    return DriftSchedule(config.rehash_drift, first, DRIFT_ROWS, first, longest)


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
