"""Initial weights: those of one draw on the CPU, in whatever blocks, and wherever they go; and what the host holds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from slidex.kernels import cpu
from slidex.nn import initial_weights
from slidex.nn.classifier import Classifier
from slidex.nn.encoder import BagEncoder
from slidex.nn.head import SampledHead
from slidex.nn.initial_weights import BLOCK_BYTES, draw_normal
from slidex.nn.placement import Placement
from slidex.train.config import TrainConfig
from tests.nn.device_path import on_device
from tests.waiting import Largest

META = torch.device("meta")
pytestmark = pytest.mark.usefixtures("one_thread")


def generator():
    return torch.Generator().manual_seed(3)


def whole(rows, width, generator, deviation=0.3):
    return torch.empty(rows, width).normal_(0, deviation, generator=generator)


@pytest.mark.parametrize("width", [1, 3, 16, 17, 257])
@pytest.mark.parametrize("block", [1, 1 << 10, BLOCK_BYTES])
def test_blocks_make_one_matrix(monkeypatch, width, block):
    monkeypatch.setattr(initial_weights, "BLOCK_BYTES", block)
    for rows in (1, 5, 15, 16, 17, 33, 100, 1000):
        mine, theirs = generator(), generator()
        found, want = torch.full((rows, width), torch.nan), whole(rows, width, theirs)
        draw_normal(found, 0.3, mine)
        assert torch.equal(found, want), rows
        assert torch.equal(mine.get_state(), theirs.get_state()), rows


def test_blocks_of_the_real_size_make_one_matrix():
    rows, width = 140_001, 257
    assert rows * width * 4 > 2 * BLOCK_BYTES
    found = torch.empty(rows, width)
    draw_normal(found, 0.3, generator())
    assert torch.equal(found, whole(rows, width, generator()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_part_is_rows_of_the_whole_in_its_dtype(monkeypatch, dtype):
    monkeypatch.setattr(initial_weights, "BLOCK_BYTES", 1 << 12)
    want = whole(1003, 20, generator()).to(dtype)
    for begin, end in ((0, 1003), (0, 10), (333, 700), (1000, 1003)):
        found = torch.full((end - begin, 20), torch.nan, dtype=dtype)
        draw_normal(found, 0.3, generator(), begin=begin, num_rows=1003)
        assert torch.equal(found, want[begin:end])


def config(**changes):
    settings = {"mode": "exact", "hidden_width": 24, "dense_widths": (20, 18), "precision": "float32"}
    return TrainConfig.from_mapping(settings | changes)


def model(where="cpu", num_features=1000, num_classes=900, **changes):
    counts = np.ones(num_classes, dtype=np.int64)
    return Classifier.from_config(config(**changes), num_features, num_classes, counts, device=where)


def parameters(model):
    return {
        f"{type(part).__name__}.{name}": parameter
        for part in (model.encoder, model.head)
        for name, parameter in part.named_parameters()
    }


@pytest.mark.parametrize("loss", ["softmax", "logistic"])
def test_a_seed_gives_the_weights_that_it_always_gave(monkeypatch, loss):
    monkeypatch.setattr(initial_weights, "BLOCK_BYTES", 1 << 12)
    first = torch.Generator().manual_seed(7)
    encoder = BagEncoder(1000, 24, dense_widths=(20, 18), seed=7)
    assert torch.equal(encoder.bag, whole(1000, 24, first, 1 / math.sqrt(24)))
    for layer, fan_in in zip(encoder.dense, (24, 20), strict=True):
        assert torch.equal(layer.weight, whole(len(layer.weight), fan_in, first, math.sqrt(2 / fan_in)))
        assert not layer.bias.any()
    assert not encoder.bias.any()
    head = SampledHead(18, 900, mode="exact", loss=loss, seed=8)
    assert torch.equal(head.weight, whole(900, 18, torch.Generator().manual_seed(8), 1 / math.sqrt(18)))
    assert torch.equal(head.bias, torch.full((900,), -math.log(900) if loss == "logistic" else 0.0))


@pytest.mark.parametrize("optimizer", ["adam", "rowwise_adagrad"])
def test_weights_drawn_on_a_device_are_those_of_the_cpu(monkeypatch, optimizer):
    monkeypatch.setattr(initial_weights, "BLOCK_BYTES", 1 << 12)
    here, there = model(optimizer=optimizer), model("meta", optimizer=optimizer)
    assert {parameter.device for parameter in parameters(there).values()} == {META}
    there.place(on_device(META), "simhash")
    want, found = parameters(here), parameters(there)
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert [p.requires_grad for p in found.values()] == [p.requires_grad for p in want.values()]
    for mine, theirs in (
        (there.encoder.bag_state, here.encoder.bag_state),
        (there.head.weight_state, here.head.weight_state),
        (there.head.bias_state, here.head.bias_state),
    ):
        assert all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("optimizer", ["adam", "rowwise_adagrad"])
@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16"])
def test_the_host_holds_a_block(monkeypatch, optimizer, weight_dtype):
    """Of weights and the optimizer's state, where the model is drawn on another device."""
    monkeypatch.setattr(initial_weights, "BLOCK_BYTES", 1 << 14)
    there = Placement(META, cpu, waits=False, dtypes=(torch.float32, torch.bfloat16))
    with Largest() as largest:
        made = model("meta", 20_000, 10_000, optimizer=optimizer, weight_dtype=weight_dtype, device="cuda")
        made.place(there, "simhash")
    assert {parameter.device for parameter in parameters(made).values()} == {META}
    assert made.head.weight.dtype == getattr(torch, weight_dtype)
    assert 1 << 13 < largest.nbytes <= (1 << 14) + 16 * 24 * 4
