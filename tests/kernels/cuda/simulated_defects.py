"""Kernels broken on purpose, one line of their source each: the comparison must notice every one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from slidex.kernels import cuda, reference
from slidex.kernels.cuda import device, embedding, losses, pairs, shared, sums, update
from tests.kernels.cases import Shape, assert_as_exact_as_torch, assert_rounds_as_the_reference

SMALL = Shape(rows=2, slots=7, classes=11, width=24)
WIDE = replace(SMALL, slots=3, classes=4, width=130)
LONG = replace(SMALL, slots=140, classes=150, width=3)
MANY = replace(SMALL, slots=70, classes=80, width=3, most_targets=60)
EMPTY_ROW = replace(SMALL, rows=4, width=3)

# module, what its source says, what it says when broken, the kernel that must fail, on which problem
DEFECTS = {
    "a lane's last columns are not summed": (
        pairs,
        "np.uint64(weight_CD.shape[1])",
        "np.uint64(weight_CD.shape[1] - 1)",
        "pair_logits",
        SMALL,
    ),
    "the bias is left out": (pairs, "if bias_C.size else", "if bias_C.size > 99 else", "pair_logits", SMALL),
    "a pad scores 0": (pairs, "-np.inf if c == -1", "0 if c == -1", "pair_logits", EMPTY_ROW),
    "the fourth slot has the score of the third": (
        pairs,
        "score2 if lane == 2 else score3",
        "score2",
        "pair_logits",
        SMALL,
    ),
    "columns from 32 on are not summed": (
        pairs,
        "                score1 += wide(g) * wide(v1)\n",
        "",
        "pair_logits",
        WIDE,
    ),
    "a lane's second row is lost": (
        sums,
        "            if has_other:\n",
        "            if False:\n",
        "embedding_bag",
        MANY,
    ),
    "beside a pad another row counts twice": (
        sums,
        "            if has_row:\n",
        "            if True:\n",
        "pair_hidden_grad",
        LONG,
    ),
    "columns from 32 on are lost": (
        sums,
        "column + STRIDE] = sum1 + fault",
        "column + STRIDE] = fault",
        "pair_hidden_grad",
        WIDE,
    ),
    "the last warp's pairs are lost": (
        sums,
        "range(_WARPS):",
        "range(_WARPS - 1):",
        "pair_hidden_grad",
        LONG,
    ),
    "pairs are taken twice": (
        sums,
        "np.uint64(start + warp)",
        "np.uint64(start)",
        "embedding_bag",
        SMALL,
    ),
    "a bag's values are ignored": (sums, "wide(factors[j]) if", "np.float32(1) if", "embedding_bag", SMALL),
    "a group ends one pair early": (
        update,
        "return low\n",
        "return max(low - 1, first + 1)\n",
        "pair_update",
        SMALL,
    ),
    "a group takes a pair too many": (
        update,
        "return low\n",
        "return min(low + 1, sorted_M.size)\n",
        "pair_update",
        SMALL,
    ),
    "every pair is a group": (
        update,
        "and sorted_M[first - 1] == row",
        "and sorted_M[first - 1] < 0",
        "embedding_bag_update",
        SMALL,
    ),
    "the third block of columns is lost": (update, "sum2 += scale", "sum2 = scale", "pair_update", WIDE),
    "every block of columns updates the bias": (
        update,
        "cuda.laneid == 0 and cuda.blockIdx.y == 0",
        "cuda.laneid == 0",
        "pair_update",
        WIDE,
    ),
    "a block of columns writes its gradient elsewhere": (
        update,
        "gradient = gradient_D[d - begin]",
        "gradient = gradient_D[0]",
        "rows_update",
        WIDE,
    ),
    "the order of the sort is ignored": (update, "np.uint64(order_M[j])", "j", "pair_update", SMALL),
    "the first moment is not kept": (
        update,
        "        moment1_RD[row, d] = moment1\n",
        "",
        "pair_update",
        SMALL,
    ),
    "the second moment is not kept": (
        update,
        "        moment2_RD[row, d] = moment2\n",
        "",
        "rows_update",
        SMALL,
    ),
    "a row's moment is not kept": (
        update,
        "        moment2_R1[row, 0] = moment2\n",
        "        pass\n",
        "rows_update",
        replace(SMALL, optimizer="rowwise_adam"),
    ),
    "the mean square is a sum": (
        update,
        "warp_sum(total) / np.float32(width)",
        "warp_sum(total)",
        "pair_update",
        replace(SMALL, optimizer="rowwise_adagrad"),
    ),
    "the decay is left out": (
        update,
        "weight = wide(weight_RD[row, d]) * shrink",
        "weight = wide(weight_RD[row, d])",
        "rows_update",
        SMALL,
    ),
    "the bias keeps its moment": (update, "        moment1_R[i] = moment1\n", "", "pair_update", SMALL),
    "the offset is left out": (losses, "+ wide(offset_NA[n, a])", "", "softmax_loss", LONG),
    "the pool's offset is left out": (losses, "+ wide(offset_U[u])", "", "shared_softmax_loss", SMALL),
    "a second target counts once": (
        losses,
        "            mass += target\n",
        "            mass = target\n",
        "softmax_loss",
        MANY,
    ),
    "a pool's second target counts once": (
        losses,
        "            mass += weight\n",
        "            mass = weight\n",
        "shared_softmax_loss",
        MANY,
    ),
    "targets keep the gradient of others": (
        losses,
        "            store(scores_NU, (n, u), kept[j])",
        "            pass",
        "shared_softmax_loss",
        SMALL,
    ),
    "a row without targets has a gradient": (
        losses,
        "        if mass != grad:\n            grad = math.exp(score) * scale\n",
        "        grad = math.exp(score)\n",
        "shared_softmax_loss",
        SMALL,
    ),
    "a thread's second score is not summed": (
        losses,
        "        total += math.exp(x1 - most)\n",
        "",
        "shared_softmax_loss",
        MANY,
    ),
    "a thread's fourth score has no gradient": (
        losses,
        "base + first + step * np.uint64(3), x3 - most",
        "base + first + step * np.uint64(3), np.float32(-np.inf)",
        "shared_softmax_loss",
        replace(MANY, slots=120, classes=130),
    ),
    "the weight is left out": (
        losses,
        "grad_NA[n, a] = weight * slope",
        "grad_NA[n, a] = slope",
        "logistic_loss",
        SMALL,
    ),
    "targets are swept too": (
        losses,
        "            store(scores_NU, (n, u), np.float32(-np.inf))\n",
        "",
        "shared_logistic_loss",
        SMALL,
    ),
    "another warp's maximum is ignored": (
        device,
        "most = max(most, scratch[i])",
        "most = scratch[0]",
        "softmax_loss",
        replace(LONG, scale=1e3),
    ),
    "another warp's sum is ignored": (
        device,
        "total += scratch[i]",
        "total = scratch[0]",
        "softmax_loss",
        LONG,
    ),
    "a warp sums 16 lanes": (
        device,
        "(16, 8, 4, 2, 1):\n        x +=",
        "(8, 4, 2, 1):\n        x +=",
        "pair_logits",
        SMALL,
    ),
}

# of the same, where weights have 16 bits
ROUNDING_DEFECTS = {
    "weights are rounded to nearest": (
        device,
        "elif not np.isfinite(x):",
        "elif True:",
        "pair_update",
        SMALL,
    ),
    "the bits do not depend on the column": (
        update,
        "np.uint32(first + np.uint32(d))",
        "first",
        "rows_update",
        SMALL,
    ),
    "the bits do not depend on the row": (
        device,
        "np.uint32(key) ^ np.uint32(row)",
        "np.uint32(key)",
        "rows_update",
        SMALL,
    ),
    "the bits do not depend on the step": (
        device,
        "np.uint32(key) ^ np.uint32(row)",
        "np.uint32(row)",
        "embedding_bag_update",
        SMALL,
    ),
    "a bias is rounded as the first weight of its row": (
        update,
        "row_key(key, i) + OF_BIAS",
        "row_key(key, i)",
        "pair_update",
        replace(LONG, width=1),
    ),
}


def _broken(module: ModuleType, old: str, new: str) -> ModuleType:
    path = Path(str(module.__file__))
    source = path.read_text()
    assert old in source, "the defect no longer fits the source"
    broken = ModuleType(module.__name__)
    broken.__file__ = str(path)
    exec(compile(source.replace(old, new), str(path), "exec"), broken.__dict__)  # noqa: S102  (our own source)
    return broken


def _linked(monkeypatch: pytest.MonkeyPatch, module: ModuleType, broken: ModuleType) -> None:
    """Every module that took something from `module` takes it from `broken`."""
    for user in (pairs, embedding, shared, losses, sums, update, cuda):
        for name, value in vars(user).items():
            if getattr(value, "__module__", None) == module.__name__ and hasattr(broken, name):
                monkeypatch.setattr(user, name, getattr(broken, name))


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_comparison_notices_a_broken_kernel(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, old, new, name, shape = DEFECTS[defect]
    _linked(monkeypatch, module, _broken(module, old, new))
    with pytest.raises(AssertionError):
        assert_as_exact_as_torch(getattr(cuda, name), getattr(reference, name), name, shape, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("defect", ROUNDING_DEFECTS)
def test_a_kernel_that_rounds_otherwise_is_noticed(
    defect: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, old, new, name, shape = ROUNDING_DEFECTS[defect]
    assert_rounds_as_the_reference(getattr(cuda, name), getattr(reference, name), name, shape, dtype)
    _linked(monkeypatch, module, _broken(module, old, new))
    with pytest.raises(AssertionError):
        assert_rounds_as_the_reference(getattr(cuda, name), getattr(reference, name), name, shape, dtype)


def test_the_same_surgery_without_a_defect_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (device, sums, update, losses, pairs):
        _linked(monkeypatch, module, _broken(module, "import", "import"))
    for name in ("pair_logits", "pair_update", "softmax_loss", "embedding_bag"):
        assert_as_exact_as_torch(getattr(cuda, name), getattr(reference, name), name, SMALL, torch.float32)
