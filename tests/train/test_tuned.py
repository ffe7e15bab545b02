"""The stored choice of an index: what was written is read, damage is refused, a failure leaves the old one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from slidex.errors import CheckpointError
from slidex.lsh import QuerySample, make_index
from slidex.train import records as module
from slidex.train.tuned import TunedIndex, learned_state, load_tuned, save_tuned

C, D = 400, 12


def weights() -> tuple[torch.Tensor, torch.Tensor, QuerySample]:
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(300, D, generator=generator)
    labels = torch.randint(C, (300,), generator=generator)
    queries = QuerySample(hidden_ND, torch.arange(301), labels)
    return torch.randn(C, D, generator=generator), torch.randn(C, generator=generator), queries


def choice(index: str, options: dict) -> TunedIndex:
    return TunedIndex(
        index=index,
        options=options,
        seed=5,
        candidates=32,
        partition_classes=64,
        step=7,
        rows={"source": "the valid split", "chosen_on": 3},
        report={"hits": 0.1 + 0.2, "partition": None},
        trials=[{"index": index, "hits": 1.0}],
    )


KINDS = [
    ("simhash", {"bits": 4, "tables": 6, "insert": 4}),
    ("simhash", {"bits": 4, "tables": 6, "center": True, "norm_augmentation": True, "insert": 4}),
    ("simhash", {"bits": 4, "tables": 6}),
    ("learned", {"bits": 4, "tables": 6, "steps": 3}),
    ("learned", {"bits": 18, "tables": 3, "steps": 3, "insert": 2}),
    ("dwta", {"tables": 6, "insert": 4}),
    ("exact", {}),
]


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_a_stored_index_answers_as_the_tuned_one(tmp_path, name, options):
    weight_CD, bias_C, queries = weights()
    index = make_index(name, D, C, seed=5, **options)
    index.build(weight_CD, bias_C, queries=queries if index.uses_queries else None)
    saved = choice(name, options)
    save_tuned(tmp_path, saved, learned_state(index))
    loaded = load_tuned(tmp_path)
    assert loaded == saved
    again = loaded.build(weight_CD, bias_C)
    assert torch.equal(again.query(queries.hidden_ND, 40), index.query(queries.hidden_ND, 40))
    assert bool(list((tmp_path / "prediction").glob("state_*"))) == index.uses_queries


def stored(tmp_path, kind=0, seed=5):
    weight_CD, bias_C, queries = weights()
    name, options = KINDS[kind]
    index = make_index(name, D, C, seed=seed, **options)
    index.build(weight_CD, bias_C, queries=queries)
    save_tuned(tmp_path, replace(choice(name, options), seed=seed), learned_state(index))
    return tmp_path / "prediction"


def test_there_may_be_none(tmp_path):
    assert load_tuned(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda text: text.replace('"candidates": 32', '"candidates": 33'),
            "its checksum is not the one recorded",
        ),
        (lambda text: text.replace('"version": 1', '"version": 2'), "is of version 2; this slidex"),
        (lambda text: text.replace("slidex-tuned-index", "other"), "its 'format' must be"),
        (lambda text: text[: len(text) // 2], "cannot be read"),
        (lambda _: "[]", "its 'format' must be"),
    ],
)
def test_a_damaged_choice_is_refused(tmp_path, change, message):
    file = stored(tmp_path) / "index.json"
    file.write_text(change(file.read_text()))
    with pytest.raises(CheckpointError, match=message):
        load_tuned(tmp_path)


def resealed(file, **changes):
    """The JSON file with other values and a checksum that fits."""
    body = json.loads(file.read_text()) | changes
    del body["checksum"]
    file.write_text(json.dumps(body | {"checksum": module._digest(body)}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": "many"}, "its 'candidates' is missing or damaged"),
        ({"files": {"../run.json": {"bytes": 1, "blake2b": ""}}}, "its 'files' must lie beside it"),
        (
            {"files": {"state_0.safetensors": {"bytes": 1, "blake2b": ""}}},
            "is missing; it should have 1 bytes",
        ),
    ],
)
def test_values_are_checked_behind_the_checksum(tmp_path, changes, message):
    file = stored(tmp_path) / "index.json"
    resealed(file, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_tuned(tmp_path)


def test_a_state_that_does_not_fit_its_settings_is_refused(tmp_path):
    file = stored(tmp_path) / "index.json"
    resealed(file, options={"bits": 5, "tables": 6, "insert": 4})
    with pytest.raises(CheckpointError, match="does not fit"):
        load_tuned(tmp_path).build(*weights()[:2])
    resealed(file, index="exact", options={})
    with pytest.raises(CheckpointError, match="has a state for an index that keeps none: 'exact'"):
        load_tuned(tmp_path).build(*weights()[:2])


def test_an_altered_state_is_refused(tmp_path):
    (state,) = stored(tmp_path).glob("state_*")
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    with pytest.raises(CheckpointError, match="its checksum is not the one recorded"):
        load_tuned(tmp_path)


def test_a_new_choice_takes_the_place_of_the_old(tmp_path):
    (old,) = stored(tmp_path).glob("state_*")
    folder = stored(tmp_path, kind=3)
    assert load_tuned(tmp_path).index == "learned"
    assert not old.exists()
    assert len(list(folder.iterdir())) == 2
    stored(tmp_path, kind=2)
    assert sorted(path.name for path in folder.iterdir()) == ["index.json"]


@pytest.mark.parametrize("call", ["sync", "write_atomically", "save_file"])
def test_a_failure_leaves_the_old_choice(tmp_path, monkeypatch, call):
    folder = stored(tmp_path)
    before = load_tuned(tmp_path)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, call, fail)
    with pytest.raises(CheckpointError, match="cannot be written"):
        stored(tmp_path, kind=3)
    assert load_tuned(tmp_path) == before
    assert not list(folder.glob(".tmp*"))
    before.build(*weights()[:2])
