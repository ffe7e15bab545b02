"""From settings to the parts that choose a batch's classes: index, sampler, selector, and the schedule of rehashes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from slidex import doctor
from slidex.errors import ConfigError
from slidex.lsh import (
    ClassSampler,
    DriftSchedule,
    ExponentialSchedule,
    FixedSchedule,
    RehashSchedule,
    index_names,
    index_settings,
    make_index,
)
from slidex.nn.candidates import CandidateSelector
from slidex.nn.options import SamplingSettings
from slidex.settings import did_you_mean

if TYPE_CHECKING:
    from slidex.lsh import CandidateIndex

SHARED_TABLES = 8
"""Hash tables in training where the whole batch votes, unless `index_options` say otherwise (docs/performance.md)."""
DRIFT_ROWS = 2048
"""Rows on which the drift schedule measures how many codes have changed."""
PREDICT_CANDIDATES = 1024
"""Classes asked of the index for each row in indexed prediction, unless it was tuned or you say otherwise."""
SEEDS_APART = 1 << 20
"""From the seed of one part of a sharded layer to the next."""
BATCH_SHARE = 0.25
"""`SamplingSettings.batch_share` where rows have sets of their own and nothing is corrected."""

_Settings = TypeVar("_Settings", bound=SamplingSettings)


def settle_sampling(settings: _Settings) -> _Settings:
    """Replaces every ``auto`` but that of `mode`, which must be decided, by what it means in the mode on this machine.

    Raises:
        ConfigError: if there is no such index, or a setting has no meaning in the mode.
    """
    names = ("none", *index_names())
    if settings.index not in names:
        raise ConfigError(
            f"The 'index' setting must be one of {', '.join(names)}. Got {settings.index!r} instead."
            f"{did_you_mean(settings.index, names)}"
        )
    if settings.precision == "auto":
        native = doctor.has_native_bf16() is True
        settings = replace(settings, precision="bfloat16" if native else "float32")
    if settings.correction == "auto":  # docs/performance.md has the measurements behind it and BATCH_SHARE
        plain = settings.mode == "per_sample" and settings.index != "none"
        settings = replace(settings, correction="none" if plain else "stratified")
    if settings.batch_share is None:
        plain = settings.mode == "per_sample" and settings.correction == "none"
        share = min(BATCH_SHARE, 1 - settings.random_share) if plain else 0.0
        return replace(settings, batch_share=share)
    if settings.batch_share > 0 and settings.mode != "per_sample":
        reason = {"shared": "the pool has all true classes of the batch", "exact": "all classes are scored"}
        raise ConfigError(
            f"The 'batch_share' setting must be 0 in {settings.mode} mode, where {reason[settings.mode]}. "
            f"Got {settings.batch_share!r} instead."
        )
    return settings


def make_config_index(
    settings: SamplingSettings, in_features: int, num_classes: int, *, seed: int | None = None
) -> CandidateIndex | None:
    """The index that the settings ask for, not built yet; None for ``none``. A `seed` takes the place of theirs.

    Raises:
        ConfigError: for an unknown name, or options that the index does not have or take.
    """
    if settings.index != "none":
        seed = settings.seed if seed is None else seed
        return make_index(settings.index, in_features, num_classes, seed=seed + 2, **settings.index_options)
    if settings.index_options:
        raise ConfigError(
            "The 'index_options' setting must be empty where 'index' is none. "
            f"Got {settings.index_options!r} instead."
        )
    return None


def make_selector(
    settings: SamplingSettings,
    in_features: int,
    num_classes: int,
    class_counts: np.ndarray | None,
    *,
    part: int = 0,
    parts: int = 1,
) -> CandidateSelector | None:
    """What chooses the active classes of a batch, with an index that is not built yet; None in ``exact`` mode.

    Args:
        settings: From `settle_sampling`.
        in_features: D.
        num_classes: C.
        class_counts: Integer or float (C,), training frequency of every class; None where no setting needs it.
        part: Which part of a sharded layer the C classes are: it has its own share of the negatives, and other random
            numbers than the others.
        parts: How many parts there are.

    Raises:
        ConfigError: as `make_config_index`, or if nothing but true classes would be active.
    """
    if settings.mode == "exact":
        return None
    name = "pool_size" if settings.mode == "shared" else "active_size"
    negatives = getattr(settings, name)
    if negatives < parts:
        raise ConfigError(
            f"The {name!r} setting must be at least {parts}, one negative class for each part of the layer. "
            f"Got {negatives} instead."
        )
    seed = settings.seed + part * SEEDS_APART
    index = make_config_index(_for_training(settings), in_features, num_classes, seed=seed)
    negatives = len(range(part, negatives, parts))
    batch = round(negatives * (settings.batch_share or 0.0))
    random = negatives - batch if index is None else round(negatives * settings.random_share)
    return CandidateSelector(
        num_classes,
        index=index,
        sampler=ClassSampler(num_classes, class_counts, settings.random_power, seed=seed + 3),
        retrieved=max(0, negatives - random - batch),
        random=random,
        batch=batch,
        correction=settings.correction,
        class_counts=class_counts,
        seed=seed + 4,
    )


def rehash_schedule(settings: SamplingSettings) -> RehashSchedule:
    """The schedule that the `rehash` settings ask for."""
    first, longest = settings.rehash_every, max(settings.rehash_every, settings.rehash_max_gap)
    if settings.rehash == "fixed":
        return FixedSchedule(first)
    if settings.rehash == "exponential":
        return ExponentialSchedule(first, settings.rehash_growth, longest)
    return DriftSchedule(settings.rehash_drift, first, DRIFT_ROWS, first, longest)


def _for_training(settings: SamplingSettings) -> SamplingSettings:
    """The settings with the number of hash tables that suits the mode; prediction asks row by row and needs more."""
    name = settings.index
    if settings.mode != "shared" or name == "none" or "tables" not in index_settings(name):
        return settings
    return replace(settings, index_options={"tables": SHARED_TABLES, **settings.index_options})


def checked_counts(counts: Any, num_classes: int) -> np.ndarray | None:
    """The setting 'class_counts' as float64 (C,), or None."""
    if counts is None:
        return None
    if isinstance(counts, torch.Tensor):
        counts = counts.cpu()
    values = np.asarray(counts, dtype=np.float64)
    if values.shape != (num_classes,) or not (np.isfinite(values) & (values >= 0)).all():
        found = f"shape {values.shape}, values from {values.min(initial=0)} to {values.max(initial=0)}"
        raise ConfigError(
            f"The 'class_counts' setting must hold {num_classes} finite counts of at least 0. Got {found} instead."
        )
    return values
