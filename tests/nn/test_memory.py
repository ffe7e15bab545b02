"""The memory that a layer on a GPU needs, told before it is taken; what the GPU has is made up here."""

from __future__ import annotations

import pytest
import torch

from slidex.errors import DeviceError
from slidex.kernels.cuda import environment
from slidex.lsh import make_index
from slidex.nn import LSHSoftmaxLoss, SamplingOptions, memory
from tests.nn.device_path import take_device_path

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Sets what a GPU has free, of 80 GB, and how much of its cache torch does not use."""

    def has(free, cached=0):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free), int(80e9)))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: int(cached) + 100)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 100)

    return has


def test_too_little_memory_is_told_with_all_numbers(gpu):
    gpu(3e9)
    message = (
        r"The GPU cuda:0 has 3\.00 GB of 80\.00 GB free; about 3\.27 GB are needed: weights 2\.00 GB, index 1\.00 GB, "
        r"and 0\.27 GB in reserve\. Buy one\."
    )
    needed = {"weights": 2_000_000_000, "optimizer state": 0, "index": 1_000_000_000}
    with pytest.raises(DeviceError, match=message):
        memory.require_memory(needed, GPU, "Buy one.")
    gpu(3e9, cached=4e8)
    memory.require_memory(needed, GPU, "")
    memory.require_memory({"weights": 1 << 60}, torch.device("cpu"), "")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (None, ["weights 51.60 GB", "Use another GPU"]),
        (
            SamplingOptions(optimizer="adam"),
            ["optimizer state 103.20 GB", "layer in torch.bfloat16", "rowwise_adagrad", "fewer 'tables'"],
        ),
        (SamplingOptions(optimizer="rowwise_adagrad", index="none"), ["optimizer state 0.80 GB"]),
        (SamplingOptions(sparse_grad=False, mode="exact"), ["gradient 51.60 GB", "use mode shared"]),
    ],
)
def test_a_layer_is_refused_before_it_is_made(gpu, monkeypatch, options, words):
    take_device_path(monkeypatch)
    gpu(20e9)
    with pytest.raises(DeviceError) as caught:
        LSHSoftmaxLoss(128, 100_000_000, bias=True, device="cuda:0", options=options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_layer_that_came_to_the_gpu_asks_at_its_first_step(monkeypatch):
    take_device_path(monkeypatch)
    head = LSHSoftmaxLoss(16, 3000, options=SamplingOptions(optimizer="adam", pool_size=100))
    monkeypatch.setattr(memory, "free_bytes", lambda _: (memory._RESERVE + 300_000, 10**9))
    hidden_ND, target_N = torch.randn(5, 16), torch.zeros(5, dtype=torch.long)
    with pytest.raises(DeviceError, match=r"optimizer state 0\.00 GB, index 0\.\d+ GB, a step 0\.00 GB"):
        head(hidden_ND, target_N)
    assert not head.optimizer_state_dict().keys() - {"counts"}
    assert not head.stats().index.built
    monkeypatch.setattr(memory, "free_bytes", lambda _: (10**10, 10**10))
    head(hidden_ND, target_N).backward()
    monkeypatch.setattr(memory, "free_bytes", lambda _: (0, 10**9))
    head(hidden_ND, target_N)


def test_what_is_estimated_covers_what_is_there(monkeypatch):
    """State and index to the byte or a little above, a step no less than its scores."""
    take_device_path(monkeypatch)
    for optimizer in ("adam", "rowwise_adam", "rowwise_adagrad"):
        head = LSHSoftmaxLoss(16, 3000, bias=True, options=SamplingOptions(optimizer=optimizer))
        want = head._sampling.memory(bias=True)["optimizer state"]
        head(torch.randn(5, 16), torch.zeros(5, dtype=torch.long)).backward()
        state = head.optimizer_state_dict()
        assert want == sum(t.nbytes for name, t in state.items() if name != "counts")
    index = make_index("simhash", 16, 3000, bits=6, tables=5)
    index.build(head.weight)
    held = index.stats().bytes - index.family.bytes
    assert held < index.bytes_on_device < 3 * held + 64 * 3000 + (1 << 29)
    for mode, scores in (("exact", 7 * 3000), ("shared", 7 * 2007), ("per_sample", 7 * 513)):
        settings = SamplingOptions(mode=mode, pool_size=2000)
        assert memory.step_bytes(settings, 16, 3000, 7, 7) > 8 * scores


def test_a_gpu_that_is_not_there_is_a_plain_word(monkeypatch):
    pytest.importorskip("numba_cuda", reason="numba-cuda is installed on Linux x86-64 only (extra dev)")
    monkeypatch.setattr(environment, "_built_for", lambda: None)
    with pytest.raises(DeviceError, match=r"is built without CUDA\. Install a CUDA build of torch"):
        LSHSoftmaxLoss(8, 50, device="cuda", options=SamplingOptions())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert memory.free_bytes(GPU) is None
