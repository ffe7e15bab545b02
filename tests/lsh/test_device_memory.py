"""Memory that a device takes to hash and to score: chunks are small whatever the width, and told beforehand."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slidex.lsh import exact, exact_topk, family, make_index
from slidex.lsh.cuda.simhash import mean_row

pytest.importorskip("numba_cuda", reason="numba-cuda is installed on Linux x86-64 only (extra dev)")

from tests.kernels.cuda.running import recorded_launches

NUMBERS = 1 << 14


class Held(TorchDispatchMode):
    """Bytes of all tensors that are made within, and still there: the most at any time.

    Args:
        given: Tensors that are there before; views of them take nothing.
    """

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self._given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self._held: dict[int, tuple[int, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        made = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() in self._given:
                    continue
                _, tensors = self._held.get(storage.data_ptr(), (0, 0))
                self._held[storage.data_ptr()] = storage.nbytes(), tensors + 1
                weakref.finalize(tensor, self._release, storage.data_ptr())
        self.most = max(self.most, sum(nbytes for nbytes, _ in self._held.values()))
        return made

    def _release(self, place: int) -> None:
        nbytes, tensors = self._held.pop(place)
        if tensors > 1:
            self._held[place] = nbytes, tensors - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "bits"), [(200, 3), (10, 12)])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("simhash", {}),
        ("simhash", {"center": True, "norm_augmentation": True}),
        ("dwta", {"bin_size": 4}),
    ],
)
def test_rows_are_hashed_in_the_memory_that_is_told(monkeypatch, name, options, width, bits, dtype) -> None:
    """Wide rows, of which few functions make little, and narrow ones, of which many make much."""
    monkeypatch.setattr(family, "DEVICE_NUMBERS", NUMBERS)
    tables, classes = 4, 3000
    index = make_index(name, width, classes, bits=bits, tables=tables, **options)
    weight_CD, bias_C = torch.randn(classes, width).to(dtype), torch.randn(classes).to(dtype)
    index.family.fit(weight_CD, bias_C, None)
    told = family.hashing_bytes(classes, width + 2, tables * bits)
    assert told == 32 * NUMBERS < 4 * classes * width * 5
    with recorded_launches(), Held(weight_CD, bias_C) as held:
        codes_LC = index.family.hash_rows_on_device(weight_CD, bias_C)
    assert codes_LC.nbytes < held.most <= codes_LC.nbytes + told
    assert index.bytes_on_device >= told


def test_the_mean_of_rows_of_16_bits_takes_no_copy_of_them_all(monkeypatch) -> None:
    monkeypatch.setattr(family, "DEVICE_NUMBERS", NUMBERS)
    rows_CD = torch.randn(3000, 40).bfloat16()
    with Held(rows_CD) as held:
        mean_D = mean_row(rows_CD)
    torch.testing.assert_close(mean_D, rows_CD.double().mean(0))
    assert held.most < 100_000


@pytest.mark.parametrize("num_rows", [1, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_are_scored_without_widening_all_classes(monkeypatch, num_rows, dtype) -> None:
    monkeypatch.setattr(exact, "_CHUNK_SCORES", NUMBERS)
    weight_CD, hidden_ND = torch.randn(5000, 64).to(dtype), torch.randn(num_rows, 64)
    index = make_index("exact", 64, 5000)
    index.build(weight_CD)
    scores_NC = hidden_ND @ weight_CD.float().T
    with Held(weight_CD, hidden_ND) as held:
        scores_NK, ids_NK = exact_topk(hidden_ND, weight_CD, None, 10)
        pool = index.pool(hidden_ND, 40)
    assert held.most < 4 * 5 * NUMBERS
    torch.testing.assert_close(scores_NK, scores_NC.topk(10).values)
    assert torch.equal(ids_NK, scores_NC.topk(10).indices)
    assert torch.equal(pool, scores_NC.amax(0).topk(40).indices.sort().values)
