"""`--weight-dtype`: refused on a CPU, shown by `inspect`, and a run that every command works with on a CPU."""

from __future__ import annotations

import json

import pytest

import slidex
from tests.nn.device_path import take_both_paths
from tests.train.test_device import config

REFUSAL = "Error: The 'weight_dtype' setting must be float32 where 'device' is cpu. Got 'bfloat16' instead.\n"


@pytest.fixture
def run(easy_data, tmp_path, monkeypatch):
    """A run in bfloat16, of a GPU's path."""
    take_both_paths(monkeypatch)
    settings = config(mode="shared", device="cuda", weight_dtype="bfloat16", max_steps=16)
    return slidex.fit(easy_data, tmp_path / "run", settings)


def test_a_cpu_refuses_it_and_nothing_is_written(invoke, easy_data, tmp_path):
    words = ("train", easy_data.path, "--out", tmp_path / "run", "--weight-dtype", "bfloat16")
    assert invoke(*words, code=2).stderr == REFUSAL
    assert not (tmp_path / "run").exists()
    shown = invoke(*words, "--device", "cuda", "--print-config").stdout
    assert json.loads(shown)["weight_dtype"] == "bfloat16"


def test_a_run_is_not_resumed_on_a_cpu(invoke, easy_data, run):
    words = ("train", easy_data.path, "--out", run.path, "--resume", "--device", "cpu")
    assert invoke(*words, code=2).stderr == REFUSAL


def test_inspect_shows_it(invoke, run):
    assert "weight_dtype           bfloat16" in invoke("inspect", run.path, "--verify").stdout


def test_a_run_is_evaluated_tuned_and_predicted_with_on_a_cpu(invoke, easy_data, run):
    exact = json.loads(invoke("eval", run.path, easy_data.path, "--json").stdout)
    there = json.loads(invoke("eval", run.path, easy_data.path, "--json", "--device", "cuda").stdout)
    assert exact["P@1"] == pytest.approx(there["P@1"], abs=0.01)
    tuned = ("--recall", "0.5", "--measure", "top-k", "--indexes", "exact", "--rows", "50")
    invoke("tune-index", run.path, easy_data.path, *tuned)
    lines = invoke("predict", run.path, easy_data.path, "--index", "--probabilities").stdout.splitlines()
    assert len(lines) == easy_data.split("test").num_rows
