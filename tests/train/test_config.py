"""Settings: every field is checked, unknown names are refused, presets and files merge in order."""

from __future__ import annotations

import dataclasses

import pytest

from slidex.errors import ConfigError
from slidex.kernels import OPTIMIZERS
from slidex.train.config import PRESETS, TrainConfig, read_toml
from slidex.train.settle import settle

FIELDS = dataclasses.fields(TrainConfig)


def bad_values(item):
    limits = item.metadata
    if "choices" in limits:
        yield "no such choice"
    if "low" in limits:
        yield type(limits["low"])(limits["low"] - 1)
    if "high" in limits:
        yield type(limits["high"])(limits["high"] + 1)
    if "below" in limits:
        yield limits["below"]
    yield [object()]


@pytest.mark.parametrize("item", FIELDS, ids=lambda item: item.name)
def test_every_setting_refuses_bad_values_by_name(item):
    for value in bad_values(item):
        given = (value,) if item.name == "dense_widths" else value
        with pytest.raises(ConfigError, match=item.name):
            TrainConfig(**{item.name: given})


@pytest.mark.parametrize("item", FIELDS, ids=lambda item: item.name)
def test_every_setting_has_a_help_text(item):
    assert item.metadata["help"].endswith((".", ")"))


def test_unknown_names_get_the_nearest_known_one():
    with pytest.raises(ConfigError, match="Did you mean 'learning_rate'"):
        TrainConfig.from_mapping({"learning_rat": 1e-3})
    with pytest.raises(ConfigError, match="Did you mean 'fast'"):
        TrainConfig.from_mapping({}, preset="fest")


def test_every_optimizer_of_the_kernels_can_be_chosen():
    choices = next(item.metadata["choices"] for item in FIELDS if item.name == "optimizer")
    assert choices == OPTIMIZERS


def test_booleans_are_no_numbers():
    with pytest.raises(ConfigError, match="'epochs' setting must be a whole number"):
        TrainConfig(epochs=True)


def test_settings_override_the_preset_and_round_trip():
    config = TrainConfig.from_mapping(
        {"index_options": {"bits": 7}, "dense_widths": [64, 32]}, preset="slide"
    )
    assert (config.index_options, config.active_size) == (
        {"bits": 7, "tables": 50},
        PRESETS["slide"]["active_size"],
    )
    assert config.dense_widths == (64, 32)
    assert TrainConfig.from_mapping(config.to_mapping()) == config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name):
    TrainConfig.from_mapping({}, preset=name)


def test_toml_errors_name_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.toml: cannot be read"):
        read_toml(tmp_path / "absent.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("epochs = ")
    with pytest.raises(ConfigError, match=r"broken\.toml: is not valid TOML"):
        read_toml(broken)
    broken.write_text("epochs = 3\n")
    assert read_toml(broken) == {"epochs": 3}


def test_shares_of_the_mixture_add_up_to_one_at_most():
    TrainConfig(random_share=0.75, batch_share=0.25)
    with pytest.raises(
        ConfigError, match=r"'batch_share' setting must be at most 1 - 'random_share' \(0\.75\)"
    ):
        TrainConfig(random_share=0.75, batch_share=0.5)


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({"mode": "per_sample"}, 0.25),
        ({"mode": "per_sample", "random_share": 0.9}, 0.1),
        ({"mode": "per_sample", "correction": "stratified"}, 0.0),
        ({"mode": "per_sample", "correction": "stratified", "batch_share": 0.2}, 0.2),
        ({"mode": "shared"}, 0.0),
        ({"mode": "exact"}, 0.0),
    ],
)
def test_the_batch_has_a_share_where_nothing_is_corrected(easy_data, settings, share):
    assert settle(TrainConfig(**settings), easy_data).batch_share == pytest.approx(share)
