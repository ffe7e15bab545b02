"""Settings of the active set, its index and the row updates, which a training run and a head of one's own share.

This module imports neither torch nor numpy: ``slidex --help`` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from slidex.errors import ConfigError
from slidex.settings import check_settings, setting

DEFAULT_INDEX = "simhash"


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSettings:
    """What `slidex.TrainConfig` and `SamplingOptions` have in common; every field says itself what it means.

    Raises:
        ConfigError: if a value has the wrong type or is out of range; the message names the setting.
    """

    # Active classes
    mode: str = setting(
        "shared",
        "How classes are scored in training: one pool a batch (shared), a set for each row (per_sample), or all of "
        "them (exact).",
        choices=("shared", "per_sample", "exact"),
    )
    pool_size: int = setting(
        4096, "Shared mode: negative classes in a batch's pool, beside its true classes.", low=1
    )
    active_size: int = setting(512, "Per-sample mode: negative classes for each row.", low=1)
    random_share: float = setting(
        0.5, "Share of the negative classes drawn at random rather than from the index.", low=0.0, high=1.0
    )
    batch_share: float | None = setting(
        None,
        "Per-sample mode: share of the negative classes taken from the other rows' true classes (a shared pool has "
        "them all); default: a quarter, if there is no correction.",
        low=0.0,
        high=1.0,
    )
    random_power: float = setting(
        0.0, "Random classes are drawn by training frequency to this power; 0 is uniform.", low=0.0, high=1.0
    )
    correction: str = setting(
        "auto",
        "Weights of sampled classes in the softmax: all 1 (none), random classes standing for those not drawn "
        "(stratified), or all by inverse inclusion probability (logq); auto is none for the index's candidates in "
        "per_sample mode, else stratified.",
        choices=("auto", "none", "logq", "stratified"),
    )
    precision: str = setting(
        "auto",
        "Matrix products of exact and shared mode; auto is bfloat16 where the CPU or GPU has instructions for it.",
        choices=("auto", "float32", "bfloat16"),
    )

    # Index over the classes
    index: str = setting(
        DEFAULT_INDEX,
        "Index that proposes classes, by name: docs/indexes.md and slidex doctor list them; none leaves only random "
        "ones.",
    )
    index_options: dict[str, int | float | bool | str] = field(
        default_factory=dict,
        metadata={"help": "The index's own settings, as NAME=VALUE; docs/indexes.md has them."},
    )
    index_sample: int = setting(
        8192,
        "Training rows whose hidden vectors are given to the index at a rehash, if it learns from them.",
        low=1,
    )
    rehash: str = setting(
        "exponential",
        "When the index is brought up to date: every n steps (fixed), with growing gaps (exponential), or when the "
        "rows have moved (drift).",
        choices=("fixed", "exponential", "drift"),
    )
    rehash_every: int = setting(
        50, "Steps between rehashes; the first gap of exponential; how often drift looks.", low=1
    )
    rehash_growth: float = setting(1.5, "Exponential: each gap is this many times the last.", low=1.0)
    rehash_max_gap: int = setting(2000, "Exponential and drift: longest gap in steps.", low=1)
    rehash_drift: float = setting(
        0.2, "Drift: share of changed codes that triggers a rehash.", low=0.0, high=1.0
    )

    # Row updates
    optimizer: str | None = setting(
        None,
        "Rule of the row updates that backward makes by itself (fused); none leaves gradients to your own optimizer.",
        choices=("adam", "rowwise_adam", "rowwise_adagrad"),
    )
    learning_rate: float = setting(1e-3, "Step size of the fused row updates.", low=0.0, high=10.0)
    beta1: float = setting(0.9, "Decay of the first moment (adam, rowwise_adam).", low=0.0, below=1.0)
    beta2: float = setting(0.999, "Decay of the second moment (adam, rowwise_adam).", low=0.0, below=1.0)
    epsilon: float = setting(1e-8, "Offset of the denominator.", low=1e-16, high=1.0)
    weight_decay: float = setting(
        0.0, "Decoupled weight decay of the rows that a step touches.", low=0.0, high=1.0
    )

    seed: int = setting(0, "Seed of every random choice.", low=0, high=2**31 - 1)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.batch_share is not None and self.random_share + self.batch_share > 1:
            raise ConfigError(
                f"The 'batch_share' setting must be at most 1 - 'random_share' ({self.random_share:g}). "
                f"Got {self.batch_share!r} instead."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingOptions(SamplingSettings):
    """How `slidex.nn.LSHSoftmaxLoss` samples its classes, and who updates its rows: `SamplingSettings` and two more.

    Args:
        sparse_grad: See the field.
        class_counts: Tensor or array (C,), non-negative, training samples of each class: needed where `random_power` is
            above 0 and for correction ``logq`` in shared mode.

    Raises:
        ConfigError: if a value has the wrong type or is out of range; the message names the setting.
    """

    sparse_grad: bool = setting(
        True,
        "Without a fused optimizer: gradients of the touched rows alone, for optimizers that take them (SGD, Adagrad, "
        "SparseAdam), or of all rows, for all others.",
    )
    class_counts: Any = field(default=None, compare=False, repr=False)
