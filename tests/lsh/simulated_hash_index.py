"""The hash index for weights on a GPU, in the simulator: the contract, and equality with the CPU's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slidex import late
from slidex.errors import ConfigError, DivergedError
from slidex.lsh import hash_index
from slidex.lsh.cuda import dwta, tables
from slidex.lsh.cuda import voting as device_voting
from slidex.lsh.tables import TableSettings
from tests.lsh.contract import (
    Contract,
    ask_and_wait,
    built,
    check_values_not_finite_are_refused,
    empty,
    one_thread,  # noqa: F401  (a fixture)
    problem,
)
from tests.lsh.parity import PARITY, VARIANTS, assert_equal, made, random_problem
from tests.waiting import NoWaiting


class _Switch:
    on = True


@pytest.fixture(autouse=True)
def switch(monkeypatch: pytest.MonkeyPatch) -> type[_Switch]:
    """Weights count as being on a GPU while it is on."""
    monkeypatch.setattr(_Switch, "on", True)
    monkeypatch.setattr(hash_index, "is_cuda", lambda _: _Switch.on)
    return _Switch


@pytest.mark.parametrize(("variant", "device"), [(variant, "cpu") for variant in VARIANTS])
class TestContract(Contract):
    most_classes = 200
    most_rows = 3


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[-1]])
def test_values_not_finite_are_refused_by_row(variant) -> None:
    check_values_not_finite_are_refused(variant, "cpu", float("nan"))
    check_values_not_finite_are_refused(variant, "cpu", float("-inf"))


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[-1]])
def test_another_seed_is_another_index(variant) -> None:
    weight_CD, bias_C, hidden_ND = problem(200, 3)
    answers = [built(variant, weight_CD, bias_C, seed).query(hidden_ND, 30) for seed in (3, 4)]
    assert not torch.equal(*answers)


def assert_equals_the_cpu(variant, dtype: torch.dtype = torch.float32, width: int = 17) -> None:
    weight_CD, bias_C, hidden_ND = random_problem(150, 4, width, dtype)
    _Switch.on = False
    cpu = made(variant, weight_CD, bias_C)
    _Switch.on = True
    assert_equal(made(variant, weight_CD, bias_C), cpu, hidden_ND)


@pytest.mark.parametrize("variant", PARITY)
def test_the_cpu_has_the_same_codes_buckets_votes_and_pools(variant) -> None:
    assert_equals_the_cpu(variant)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", [PARITY[3], PARITY[-1]])
def test_weights_of_16_bits(variant, dtype: torch.dtype) -> None:
    assert_equals_the_cpu(variant, dtype, width=40)


def _one_further(table, bucket, size, limit, overflow, seed, begin, i):
    return (i + begin + 1) % size


def _no_digit(digits_B, lender):
    return np.int64(0)


@pytest.mark.parametrize(
    ("module", "name", "broken", "variant"),
    [
        (device_voting, "place", _one_further, PARITY[5]),
        (device_voting, "turn", lambda *_: np.int64(0), PARITY[3]),
        (device_voting, "_rank", lambda c, *_: np.int64(c), PARITY[0]),
        (dwta, "_digit", _no_digit, PARITY[-1]),
        (dwta, "_nearest", lambda *_: 0, PARITY[-2]),
        (tables, "_sortable", lambda codes: codes, PARITY[1]),
        (device_voting, "mix", lambda key: key, PARITY[0]),
    ],
)
def test_what_is_broken_is_noticed(monkeypatch, module, name: str, broken, variant) -> None:
    monkeypatch.setattr(module, name, broken)
    with pytest.raises(AssertionError):
        assert_equals_the_cpu(variant)


def test_rows_share_blocks_and_their_hash_tables(monkeypatch) -> None:
    weight_CD, bias_C, hidden_ND = problem(120, 5)
    index = built(VARIANTS[0], weight_CD, bias_C)
    answer = index.query(hidden_ND, 25)
    monkeypatch.setattr(tables, "_WORKSPACE_BYTES", 1)
    assert torch.equal(index.query(hidden_ND, 25), answer)


def test_more_than_255_votes_are_counted() -> None:
    made = tables.DeviceTables(4, 300, 1, TableSettings(min_votes=40), torch.device("cpu"))
    codes_LC = torch.zeros((300, 4), dtype=torch.int32)
    codes_LC[:44, 1] = codes_LC[:10, 3] = codes_LC[:270, 2] = 1
    made.build(codes_LC)
    found = made.query(torch.zeros((1, 300, 1), dtype=torch.int32), 5, step=0)[0]
    assert found.tolist() == [0, 3, 1, -1, -1]


class _NotYet:
    """An event of a device that has not come so far; waiting for it helps."""

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        pass


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_query_waits_for_nothing_and_tells_of_bad_rows_later(monkeypatch, variant) -> None:
    weight_CD, bias_C, hidden_ND = problem(120, 3)
    index, send = built(variant, weight_CD, bias_C), late.send
    monkeypatch.setattr(late, "send", lambda number: send(number)._replace(arrived=_NotYet()))
    hidden_ND[1, 2] = float("nan")
    with NoWaiting():
        index.query(hidden_ND, 5)
        index.padded_pool(hidden_ND[:1], 5)
    with pytest.raises(DivergedError, match="Row 1 "):
        index.update(weight_CD, bias_C, torch.arange(2))
    ask_and_wait(index, hidden_ND[:1])
    with pytest.raises(DivergedError, match="Row 1 "):
        index.pool(hidden_ND, 5)


def test_an_index_goes_where_the_weights_are(switch) -> None:
    weight_CD, bias_C, hidden_ND = problem(120, 3)
    index = built(VARIANTS[0], weight_CD, bias_C)
    on_device = index.pool(hidden_ND, 40), index.stats()
    switch.on = False
    for call in (index.update, index.drift):
        with pytest.raises(ConfigError, match=r"'weight_CD'.* build the index again"):
            call(weight_CD, bias_C, torch.arange(3))
    other = empty(VARIANTS[0], 120)
    other.load_state(index.state(), weight_CD, bias_C)
    assert torch.equal(other.pool(hidden_ND, 40), on_device[0])
    index.build(weight_CD, bias_C)
    assert index._on_device is None
    assert torch.equal(index.pool(hidden_ND, 40), on_device[0])
    for name in ("rows", "tables", "mean_bucket_load", "max_bucket_load", "empty_bucket_share"):
        assert getattr(index.stats(), name) == getattr(on_device[1], name)
    switch.on = True
    index.load_state(other.state(), weight_CD, bias_C)
    assert index._on_device is not None
    assert torch.equal(index.pool(hidden_ND, 40), on_device[0])


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        (("learned", {}), ["LearnedSimHash", "'simhash' or 'dwta'"]),
        (("simhash", {"insert": 3}), ["'insert'", "0 ", "3 instead"]),
        (("simhash", {"budget": "first_come"}), ["'budget'", "'votes'", "'first_come' instead"]),
    ],
)
def test_what_does_not_work_on_a_gpu_is_refused(switch, variant, words) -> None:
    weight_CD, bias_C, hidden_ND = problem(60, 3)
    index = empty(variant, 60)
    switch.on = False
    index.build(weight_CD, bias_C)
    state = index.state()
    switch.on = True
    for call in (
        lambda: index.build(weight_CD, bias_C),
        lambda: empty(variant, 60).load_state(state, weight_CD, bias_C),
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        assert all(word in str(caught.value) for word in [*words, "on the CPU"]), str(caught.value)
    with pytest.raises(ConfigError, match="before build"):
        index.query(hidden_ND, 3)
