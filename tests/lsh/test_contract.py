"""What every registered index must do, on every device it works on: `tests.lsh.contract`, and its registry.

A new index joins by being registered, with its defaults; settings worth a run of their own are listed here. Tables
on a GPU are also put to the contract in the simulator, by `tests.lsh.test_cuda`.
"""

from __future__ import annotations

import json

import pytest
import torch

from slidex.errors import ConfigError
from slidex.lsh import index_names, index_settings, make_index, recall_at_k
from tests.lsh.contract import (
    FAISS,
    WIDTH,
    Contract,
    built,
    check_values_not_finite_are_refused,
    empty,
    is_faiss,
    one_thread,  # noqa: F401  (a fixture)
    problem,
    sample,
)

VARIANTS = [(name, {}) for name in index_names()] + [
    ("simhash", {"bits": 5, "tables": 9, "probes": 2, "min_votes": 2, "max_bucket": 7}),
    ("simhash", {"bits": 17, "tables": 20, "norm_augmentation": True}),
    ("simhash", {"bits": 4, "tables": 20, "center": True, "projection": "sparse"}),
    ("simhash", {"bits": 3, "tables": 12, "max_bucket": 30, "overflow": "reservoir", "insert": 3}),
    ("simhash", {"bits": 3, "tables": 12, "max_bucket": 30, "overflow": "first", "budget": "first_come"}),
    ("dwta", {"bits": 5, "tables": 30, "probes": 3, "bin_size": 4, "min_votes": 2}),
]
UNSEEDED = ("exact", "faiss", "faiss-flat", "faiss-ivf", "faiss-pq", "faiss-hnsw")
"""They draw nothing, or search so much of a small index that what they draw does not show in the answers."""
SEEDED = [variant for variant in VARIANTS if variant[0] not in UNSEEDED]
TAUGHT = [variant for variant in VARIANTS if variant[0] == "learned" or "insert" in variant[1]]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def works_on(variant, device: str) -> bool:
    """Whether weights may be there; `tests.lsh.test_cuda` has what is said where they may not."""
    name, settings = variant
    on_cuda = name in ("exact", "simhash", "dwta") and not settings.keys() & {"insert", "budget"}
    return device == "cpu" or on_cuda


def parameters(variants) -> list:
    """(variant, device) pairs."""
    missing = "needs the faiss extra, which is not installed"
    return [
        pytest.param(
            variant,
            device,
            id=f"{variant[0]}-{json.dumps(variant[1])}-{device}",
            marks=pytest.mark.skipif(is_faiss(variant) and not FAISS, reason=missing),
        )
        for variant in variants
        for device in DEVICES
        if works_on(variant, device)
    ]


@pytest.mark.parametrize(("variant", "device"), parameters(VARIANTS))
class TestContract(Contract):
    pass


@pytest.mark.parametrize(
    ("variant", "device"), parameters([variant for variant in VARIANTS if variant[0] != "exact"])
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_not_finite_are_refused_by_row(variant, device, value) -> None:
    check_values_not_finite_are_refused(variant, device, value)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"bits": 25}, ["'bits'", "1 to 24", "25"]),
        ({"bits": 0}, ["'bits'", "1 to 24", "0"]),
        ({"bits": True}, ["'bits'", "True"]),
        ({"tables": 0}, ["'tables'", "at least 1", "0"]),
        ({"tables": 70_000}, ["'tables'", "65535", "70000"]),
        ({"bits": 4, "probes": 5}, ["'probes'", "0 to 4", "5"]),
        ({"min_votes": 51}, ["'min_votes'", "1 to 50", "51"]),
        ({"max_bucket": 0}, ["'max_bucket'", "at least 1", "0"]),
        ({"center": 1}, ["'center'", "true or false", "1"]),
        ({"table": 3}, ["'table'", "Did you mean 'tables'?"]),
    ],
)
def test_bad_settings_name_the_setting_its_limits_and_the_value(settings, parts) -> None:
    with pytest.raises(ConfigError) as caught:
        make_index("simhash", WIDTH, 1000, seed=0, **settings)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'simhash'"):
        make_index("simhsh", WIDTH, 10, seed=0)


@pytest.mark.parametrize("arguments", [(0, 5, 0), (5, 0, 0), (5, 5, -1), (5.0, 5, 0), (65_001, 5, 0)])
def test_bad_sizes_are_refused(arguments) -> None:
    in_features, num_classes, seed = arguments
    with pytest.raises(ConfigError, match="must be an integer"):
        make_index("exact", in_features, num_classes, seed=seed)


def test_settings_are_listed_with_defaults() -> None:
    assert index_settings("simhash")["tables"] == 50
    assert index_settings("exact") == {}


def test_every_simhash_setting_changes_the_answer() -> None:
    weight_CD, bias_C, hidden_ND = problem(3_000, num_rows=20)
    weight_CD += 1.0
    base = {"bits": 4, "tables": 12}
    answer = built(("simhash", base), weight_CD, bias_C).query(hidden_ND, 2_000)
    for change in (
        {"bits": 5},
        {"tables": 13},
        {"probes": 1},
        {"min_votes": 3},
        {"max_bucket": 20},
        {"center": True},
        {"norm_augmentation": True},
    ):
        other = built(("simhash", base | change), weight_CD, bias_C).query(hidden_ND, 2_000)
        assert not torch.equal(answer, other), change
    assert not torch.equal(answer, built(("simhash", base), weight_CD, bias_C, 4).query(hidden_ND, 2_000))


def test_state_of_other_codes_is_refused() -> None:
    weight_CD, bias_C, _ = problem(30)
    index = built(("simhash", {"bits": 3}), weight_CD, bias_C)
    state = {name: value.clone() for name, value in index.state().items()}
    state["codes"].view(torch.int16)[1, 2] = 8
    with pytest.raises(ConfigError, match="from 0 to 7"):
        index.load_state(state, weight_CD, bias_C)


def test_exact_is_the_brute_force_answer_across_chunks(monkeypatch) -> None:
    monkeypatch.setattr("slidex.lsh.exact._CHUNK_SCORES", 700)
    weight_CD, bias_C, hidden_ND = problem(500)
    scores = hidden_ND @ weight_CD.T + bias_C
    index = built(("exact", {}), weight_CD, bias_C)
    assert torch.equal(index.query(hidden_ND, 30), scores.topk(30).indices)
    assert torch.equal(index.pool(hidden_ND, 30), scores.amax(dim=0).topk(30).indices.sort().values)


def test_recall_counts_shared_ids() -> None:
    ours = torch.tensor([[3, 1, -1], [5, 9, 2]])
    exact = torch.tensor([[1, 2], [5, -1]])
    assert recall_at_k(ours, exact) == pytest.approx(2 / 3)
    assert recall_at_k(exact, exact) == 1.0
    with pytest.raises(ConfigError, match="as many rows"):
        recall_at_k(ours[:1], exact)


@pytest.mark.parametrize(("variant", "device"), parameters(SEEDED))
def test_another_seed_is_another_index(variant, device) -> None:
    weight_CD, bias_C, hidden_ND = problem(900, device=device)
    answers = [built(variant, weight_CD, bias_C, seed).query(hidden_ND, 30) for seed in (3, 4)]
    assert not torch.equal(*answers)


def test_every_index_that_learns_is_listed() -> None:
    known = [variant for variant in VARIANTS if FAISS or not is_faiss(variant)]
    assert [variant for variant in known if empty(variant, 10).uses_queries] == TAUGHT


@pytest.mark.parametrize(("variant", "device"), parameters(TAUGHT))
def test_update_of_a_taught_index_equals_rebuild_with_what_it_learned(variant, device) -> None:
    assert empty(variant, 400).uses_queries
    weight_CD, bias_C, hidden_ND = problem(400, device=device)
    index = built(variant, weight_CD, bias_C, queries=sample(400, device))
    weight_CD[:20].neg_()
    index.update(weight_CD, bias_C, torch.arange(20, device=device))
    rebuilt = empty(variant, 400)
    rebuilt.load_state(index.state(), weight_CD, bias_C)
    rebuilt.build(weight_CD, bias_C)
    for ours, theirs in zip(index.state().values(), rebuilt.state().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(index.query(hidden_ND, 50, step=2), rebuilt.query(hidden_ND, 50, step=2))
