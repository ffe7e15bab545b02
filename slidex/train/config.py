"""All settings of a training run: one frozen record, validated where it is made.

The CLI makes its options from these fields and a TOML file uses the same names, so there is one place to add a
setting and one text that explains it. This module imports neither torch nor numpy: ``--help`` reads it.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, get_origin, get_type_hints

from slidex.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path


def _setting(default: Any, text: str, **limits: Any) -> Any:
    """A field with its help text and its limits: `low`, `high` (inclusive), `below` (exclusive) or `choices`."""
    return field(default=default, metadata={"help": text, **limits})


DEFAULT_INDEX = "simhash"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Settings of a training run; every field says itself what it means.

    Raises:
        ConfigError: if a value has the wrong type or is out of range; the message names the setting.
    """

    # Network
    hidden_width: int = _setting(128, "Width of the embedding bag.", low=1, high=65536)
    dense_widths: tuple[int, ...] = _setting(
        (), "Widths of further dense layers, comma-separated.", low=1, high=65536
    )
    input_dropout: float = _setting(0.0, "Share of input features dropped in training.", low=0.0, below=1.0)
    hidden_dropout: float = _setting(0.0, "Share of hidden units dropped in training.", low=0.0, below=1.0)
    normalize: bool = _setting(True, "Scale input rows to unit L2 norm.")

    # Output layer
    mode: str = _setting(
        "auto",
        "How classes are scored in training: all of them (exact), one pool a batch (shared), a set for each row "
        "(per_sample), or what the cost model says is fastest (auto).",
        choices=("auto", "exact", "shared", "per_sample"),
    )
    loss: str = _setting(
        "softmax", "Softmax over the active classes, or one-vs-all logistic.", choices=("softmax", "logistic")
    )
    pool_size: int = _setting(
        4096, "Shared mode: negative classes in a batch's pool, beside its true classes.", low=1
    )
    active_size: int = _setting(512, "Per-sample mode: negative classes for each row.", low=1)
    random_share: float = _setting(
        0.5, "Share of the negative classes drawn at random rather than from the index.", low=0.0, high=1.0
    )
    batch_share: float | None = _setting(
        None,
        "Per-sample mode: share of the negative classes taken from the other rows' true classes (a shared pool has "
        "them all); default: a quarter, if there is no correction.",
        low=0.0,
        high=1.0,
    )
    random_power: float = _setting(
        0.0, "Random classes are drawn by training frequency to this power; 0 is uniform.", low=0.0, high=1.0
    )
    correction: str = _setting(
        "auto",
        "Weights of sampled classes in the softmax: all 1 (none), random classes standing for those not drawn "
        "(stratified), or all by inverse inclusion probability (logq); auto is none for the index's candidates in "
        "per_sample mode, else stratified.",
        choices=("auto", "none", "logq", "stratified"),
    )
    precision: str = _setting(
        "auto",
        "Matrix products of exact and shared mode; auto is bfloat16 where the CPU has instructions for it.",
        choices=("auto", "float32", "bfloat16"),
    )

    # Index over the classes
    index: str = _setting(
        DEFAULT_INDEX,
        "Index that proposes classes, by name: docs/indexes.md and slidex doctor list them; none leaves only random "
        "ones.",
    )
    index_options: dict[str, int | float | bool | str] = field(
        default_factory=dict,
        metadata={"help": "The index's own settings, as NAME=VALUE; docs/indexes.md has them."},
    )
    index_sample: int = _setting(
        8192,
        "Training rows whose hidden vectors are given to the index at a rehash, if it learns from them.",
        low=1,
    )
    rehash: str = _setting(
        "exponential",
        "When the index is brought up to date: every n steps (fixed), with growing gaps (exponential), or when the "
        "rows have moved (drift).",
        choices=("fixed", "exponential", "drift"),
    )
    rehash_every: int = _setting(
        50, "Steps between rehashes; the first gap of exponential; how often drift looks.", low=1
    )
    rehash_growth: float = _setting(1.5, "Exponential: each gap is this many times the last.", low=1.0)
    rehash_max_gap: int = _setting(2000, "Exponential and drift: longest gap in steps.", low=1)
    rehash_drift: float = _setting(
        0.2, "Drift: share of changed codes that triggers a rehash.", low=0.0, high=1.0
    )

    # Optimiser
    batch_size: int = _setting(256, "Rows in a step.", low=1)
    epochs: int = _setting(5, "Passes over the training rows.", low=1)
    max_steps: int | None = _setting(None, "Stop after this many steps, whatever the epochs.", low=1)
    optimizer: str = _setting(
        "adam",
        "Rule of the row updates: Adam, or with one number a row for the second moment (rowwise_adam), or no first "
        "moment either (rowwise_adagrad, which wants a higher learning rate); less memory and traffic.",
        choices=("adam", "rowwise_adam", "rowwise_adagrad"),
    )
    learning_rate: float = _setting(6e-3, "Step size.", low=0.0, high=10.0)
    lr_schedule: str = _setting(
        "linear", "Learning rate after the warm-up.", choices=("constant", "linear", "cosine")
    )
    warmup: float = _setting(
        0.0, "Share of all steps over which the learning rate rises from 0.", low=0.0, below=1.0
    )
    beta1: float = _setting(0.9, "Decay of the first moment (adam, rowwise_adam).", low=0.0, below=1.0)
    beta2: float = _setting(0.999, "Decay of the second moment (adam, rowwise_adam).", low=0.0, below=1.0)
    epsilon: float = _setting(1e-8, "Offset of the denominator.", low=1e-16, high=1.0)
    weight_decay: float = _setting(
        0.0, "Decoupled weight decay of the rows that a step touches.", low=0.0, high=1.0
    )

    # Run
    seed: int = _setting(0, "Seed of every random choice.", low=0, high=2**31 - 1)
    threads: int | None = _setting(None, "CPU threads; default: all usable cores.", low=1, high=1024)
    valid_fraction: float = _setting(
        0.0,
        "Share of the training rows held out for validation, if the data set has no valid split.",
        low=0.0,
        below=1.0,
    )
    valid_rows: int = _setting(
        5000, "Validation looks at no more than this many rows, drawn once at random.", low=1
    )
    valid_every: int | None = _setting(None, "Steps between validations; default: every epoch.", low=1)
    patience: int | None = _setting(None, "Stop after this many validations without a better P@1.", low=1)
    checkpoint_every: int | None = _setting(None, "Steps between checkpoints; default: every epoch.", low=1)
    keep_last: int = _setting(2, "Checkpoints kept, beside the best one.", low=1)
    report_every: int = _setting(200, "Steps between reports.", low=1)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):
            _check(item.name, getattr(self, item.name), hints[item.name], item.metadata)
        if self.batch_share is not None and self.random_share + self.batch_share > 1:
            raise ConfigError(
                f"The 'batch_share' setting must be at most 1 - 'random_share' ({self.random_share:g}). "
                f"Got {self.batch_share!r} instead."
            )

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any], *, preset: str | None = None) -> TrainConfig:
        """A config from names and values, over a preset's, over the defaults.

        Raises:
            ConfigError: for an unknown name or preset (with the nearest known one), or a bad value.
        """
        merged = merge_settings(preset_settings(preset), settings) if preset else dict(settings)
        known = [item.name for item in fields(cls)]
        for name in merged:
            if name not in known:
                raise ConfigError(f"There is no setting {name!r}.{did_you_mean(name, known)}")
        if isinstance(merged.get("dense_widths"), list):
            merged["dense_widths"] = tuple(merged["dense_widths"])
        return cls(**merged)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values by name, as `from_mapping` takes them and JSON can hold them."""
        return {**dataclasses.asdict(self), "dense_widths": list(self.dense_widths)}


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {},
    "accurate": {
        "hidden_width": 512,
        "loss": "logistic",
        "input_dropout": 0.3,
        "batch_size": 128,
        "learning_rate": 5e-3,
        "epochs": 12,
    },
    "slide": {
        "mode": "per_sample",
        "active_size": 1000,
        "batch_share": 0.0,
        "index_options": {"bits": 9, "tables": 50},
        "correction": "none",
        "learning_rate": 1e-3,
        "lr_schedule": "constant",
    },
    "demo": {
        "mode": "shared",
        "pool_size": 1024,
        "batch_size": 512,
        "epochs": 2,
        "learning_rate": 5e-3,
        "normalize": False,
        "input_dropout": 0.1,
        "hidden_dropout": 0.3,
        "report_every": 500,
    },
}
"""Settings by name, over the defaults: what docs/performance.md shows to be good for bag-of-words data in little time
(`fast`) or in more (`accurate`); network and sampling as in the SLIDE paper (`slide`); `make demo`'s own (`demo`)."""


def merge_settings(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `above` over those of `below`; the options of one and the same index are joined by name.

    Raises:
        ConfigError: if `index_options` is not a table.
    """
    merged = {**below, **above}
    for settings in (below, above):
        _check_options("index_options", settings.get("index_options", {}))
    if above.get("index", below.get("index", DEFAULT_INDEX)) == below.get("index", DEFAULT_INDEX):
        merged["index_options"] = {**below.get("index_options", {}), **above.get("index_options", {})}
    elif "index_options" not in above:
        merged["index_options"] = {}
    return merged


def preset_settings(name: str) -> dict[str, Any]:
    """What the preset changes of the defaults; ConfigError if there is no such preset."""
    if name not in PRESETS:
        raise ConfigError(
            f"There is no preset {name!r}.{did_you_mean(name, PRESETS)} Presets: {', '.join(PRESETS)}."
        )
    return PRESETS[name]


def read_toml(path: Path) -> dict[str, Any]:
    """Settings in a TOML file; ConfigError names the file and what is wrong with it."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}.") from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest of the known names as a question with a space before it, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _check(name: str, value: Any, hint: Any, limits: Mapping[str, Any]) -> None:
    optional = value is None and type(None) in getattr(hint, "__args__", ())
    if optional:
        return
    if get_origin(hint) is dict:
        _check_options(name, value)
        return
    items = value if hint == tuple[int, ...] and isinstance(value, tuple) else (value,)
    kind = next(
        kind for kind in (bool, int, float, str) if kind is hint or kind in getattr(hint, "__args__", ())
    )
    for item in items:
        right_type = isinstance(item, int | float if kind is float else kind)
        if not right_type or (isinstance(item, bool) and kind is not bool):
            raise ConfigError(
                f"The {name!r} setting must be {_in_words(kind, limits)}. Got {value!r} instead."
            )
        in_range = (
            item in limits.get("choices", (item,))
            and ("low" not in limits or item >= limits["low"])
            and ("high" not in limits or item <= limits["high"])
            and ("below" not in limits or item < limits["below"])
        )
        if not in_range:
            raise ConfigError(
                f"The {name!r} setting must be {_in_words(kind, limits)}. Got {value!r} instead."
            )


def _check_options(name: str, value: Any) -> None:
    plain = isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(item, bool | int | float | str) for key, item in value.items()
    )
    if not plain:
        raise ConfigError(
            f"The {name!r} setting must be a table of names and plain values. Got {value!r} instead."
        )


def _in_words(kind: type, limits: Mapping[str, Any]) -> str:
    if "choices" in limits:
        return "one of " + ", ".join(limits["choices"])
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
    bounds = [
        f"{sign} {limits[key]}"
        for key, sign in (("low", "at least"), ("high", "at most"), ("below", "below"))
        if key in limits
    ]
    return f"{words} {' and '.join(bounds)}".strip()
