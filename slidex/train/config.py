"""All settings of a training run: one frozen record, validated where it is made.

The CLI makes its options from these fields and a TOML file uses the same names, so there is one place to add a
setting and one text that explains it. This module imports neither torch nor numpy: ``--help`` reads it.
"""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from slidex.errors import ConfigError
from slidex.nn.options import DEFAULT_INDEX, SamplingSettings
from slidex.settings import DEVICE, check_table, did_you_mean, setting

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(SamplingSettings):
    """Settings of a training run, those of `SamplingSettings` among them; every field says itself what it means.

    Raises:
        ConfigError: if a value has the wrong type or is out of range; the message names the setting.
    """

    # Network
    hidden_width: int = setting(128, "Width of the embedding bag.", low=1, high=65536)
    dense_widths: tuple[int, ...] = setting(
        (), "Widths of further dense layers, comma-separated.", low=1, high=65536
    )
    input_dropout: float = setting(0.0, "Share of input features dropped in training.", low=0.0, below=1.0)
    hidden_dropout: float = setting(0.0, "Share of hidden units dropped in training.", low=0.0, below=1.0)
    normalize: bool = setting(True, "Scale input rows to unit L2 norm.")

    # Output layer
    mode: str = setting(
        "auto",
        "How classes are scored in training: all of them (exact), one pool a batch (shared), a set for each row "
        "(per_sample), or what the cost model says is fastest (auto).",
        choices=("auto", "exact", "shared", "per_sample"),
    )
    loss: str = setting(
        "softmax", "Softmax over the active classes, or one-vs-all logistic.", choices=("softmax", "logistic")
    )
    weight_dtype: str = setting(
        "float32",
        "Class weights in training: bfloat16 takes half the memory of float32, has its updates rounded stochastically, "
        "and needs a GPU.",
        choices=("float32", "bfloat16"),
    )

    # Ranker
    ranker_candidates: int = setting(
        0,
        "Best classes of a row that a linear classifier for each class, fitted after the network on the input's own "
        "features, ranks anew; 0 for no ranker.",
        low=0,
        high=4096,
    )
    ranker_neighbors: int = setting(
        0,
        "Classes of the training rows most like a row (nearest neighbours by features), which the ranker ranks "
        "beside the network's: they bring classes with few rows; 0 for none.",
        low=0,
        high=4096,
    )
    ranker_min_rows: int = setting(
        10,
        "Where neighbours propose too, the network proposes only classes with at least so many training rows: it knows "
        "next to nothing of the others, and prediction need not score them.",
        low=0,
    )
    ranker_groups: int = setting(
        0,
        "Groups of classes alike, each with a linear classifier that helps to rank the classes in it: for sets where "
        "most classes have a row or two; 0 for none.",
        low=0,
        high=1 << 20,
    )
    ranker_weight: float = setting(
        8.0, "Factor of the ranker's linear score, which is added to the network's.", low=0.0, high=1e6
    )
    ranker_floor: float = setting(
        6.0,
        "Scores of the network that are further below a row's best one count as so far below it.",
        low=0.0,
        high=1e6,
    )
    ranker_tail: float = setting(
        0.0,
        "Factor of the log of a class's inverse propensity, which is added too: the higher, the more rare classes.",
        low=0.0,
        high=1e6,
    )
    ranker_cost: float = setting(
        1.0,
        "Cost of errors against the size of the ranker's weights (C of LIBLINEAR); raised by the root of 30 / n for a "
        "class of n training rows, fewer than 30, and lowered for one row where such classes seldom come again.",
        low=1e-6,
        high=1e6,
    )
    ranker_tolerance: float = setting(
        0.5,
        "How exactly the ranker is fitted: a class is done when the projected gradients of its rows lie within so much "
        "of each other (tolerance of LIBLINEAR).",
        low=1e-6,
        high=1e6,
    )
    ranker_threshold: float = setting(
        0.1, "Weights of the ranker of smaller magnitude are dropped.", low=0.0, high=1e6
    )

    # Optimiser
    batch_size: int = setting(256, "Rows in a step.", low=1)
    epochs: int = setting(5, "Passes over the training rows.", low=1)
    max_steps: int | None = setting(None, "Stop after this many steps, whatever the epochs.", low=1)
    optimizer: str = setting(
        "adam",
        "Rule of the row updates: Adam, or with one number a row for the second moment (rowwise_adam), or no first "
        "moment either (rowwise_adagrad, which wants a higher learning rate); less memory and traffic.",
        choices=("adam", "rowwise_adam", "rowwise_adagrad"),
    )
    learning_rate: float = setting(6e-3, "Step size.", low=0.0, high=10.0)
    lr_schedule: str = setting(
        "linear", "Learning rate after the warm-up.", choices=("constant", "linear", "cosine")
    )
    warmup: float = setting(
        0.0, "Share of all steps over which the learning rate rises from 0.", low=0.0, below=1.0
    )

    # Run
    device: str = setting(
        "cpu",
        "Where to train: cpu, or an NVIDIA GPU, cuda or cuda:N (needs the extra cuda).",
        **DEVICE,
    )
    threads: int | None = setting(
        None, "CPU threads of a process; default: all usable cores, shared out evenly.", low=1, high=1024
    )
    valid_fraction: float = setting(
        0.0,
        "Share of the training rows held out for validation, if the data set has no valid split.",
        low=0.0,
        below=1.0,
    )
    valid_rows: int = setting(
        5000, "Validation looks at no more than this many rows, drawn once at random.", low=1
    )
    valid_every: int | None = setting(None, "Steps between validations; default: every epoch.", low=1)
    patience: int | None = setting(None, "Stop after this many validations without a better P@1.", low=1)
    checkpoint_every: int | None = setting(None, "Steps between checkpoints; default: every epoch.", low=1)
    keep_last: int = setting(2, "Checkpoints kept, beside the best one.", low=1)
    report_every: int = setting(200, "Steps between reports.", low=1)

    def __post_init__(self) -> None:
        SamplingSettings.__post_init__(self)
        if self.weight_dtype != "float32" and self.device == "cpu":
            raise ConfigError(
                "The 'weight_dtype' setting must be float32 where 'device' is cpu. "
                f"Got {self.weight_dtype!r} instead."
            )
        for name in ("ranker_neighbors", "ranker_groups"):
            if getattr(self, name) and not self.ranker_candidates:
                raise ConfigError(
                    f"The 'ranker_candidates' setting must be above 0 where {name!r} is. Got 0 instead."
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


_RANKER: dict[str, Any] = {"ranker_candidates": 40, "ranker_neighbors": 50}
_ACCURATE: dict[str, Any] = {
    "hidden_width": 512,
    "mode": "shared",
    "pool_size": 2048,
    "loss": "logistic",
    "input_dropout": 0.3,
    "batch_size": 256,
    "learning_rate": 7e-3,
    "epochs": 12,
    **_RANKER,
    "ranker_tail": 1.0,
}
_FAST: dict[str, Any] = {
    "pool_size": 8192,
    "random_power": 0.75,
    "epochs": 2,
    "batch_size": 512,
    "learning_rate": 0.012,
    **_RANKER,
    "ranker_tail": 2.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "fast": _FAST,
    "millions": {
        **_FAST,
        "epochs": 3,
        "ranker_neighbors": 200,
        "ranker_groups": 512,
        "ranker_weight": 16.0,
        "ranker_tail": 0.0,
        "ranker_cost": 1.5,
        "ranker_tolerance": 0.03,
    },
    "accurate": _ACCURATE,
    "tail": {**_ACCURATE, "ranker_tail": 4.0},
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
"""Settings by name, over the defaults: what docs/accuracy.md shows to be good for bag-of-words data in little time
(`fast`), for millions of classes (`millions`), in more time (`accurate`), and for rare classes (`tail`); network and
sampling as in the SLIDE paper (`slide`); `make demo`'s own (`demo`)."""


def merge_settings(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `above` over those of `below`; the options of one and the same index are joined by name.

    Raises:
        ConfigError: if `index_options` is not a table.
    """
    merged = {**below, **above}
    for settings in (below, above):
        check_table("index_options", settings.get("index_options", {}))
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
