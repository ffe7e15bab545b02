"""The operators of `slidex.ops` on a GPU: registered as torch wants them there, and equal to the kernels.

pytest does not collect this file by itself: `make gpu-check` runs it, and there must be a GPU.
"""

from __future__ import annotations

import pytest
import torch

from slidex import kernels, ops
from slidex.kernels import RowState, StepSettings
from tests.kernels.cases import Problem, Shape, cast, moved, outcome
from tests.test_ops import UPDATES, problem, registered

DEVICE = "cuda"
SMALL = Shape(rows=4, classes=9, width=6, slots=5)
names = pytest.mark.parametrize("name", ops.__all__)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def arguments(name: str, dtype: torch.dtype) -> list[object]:
    made = Problem(SMALL).arguments(name, dtype)
    return [moved(cast(a, torch.float32) if isinstance(a, RowState) else a, DEVICE) for a in made]


@dtypes
@names
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_torch_finds_nothing_wrong_with_an_operator(name: str, dtype: torch.dtype) -> None:
    given = registered(name, arguments(name, dtype))
    if name not in UPDATES:
        floats = [isinstance(a, torch.Tensor) and a.is_floating_point() for a in given]
        given = [a.requires_grad_() if is_float else a for a, is_float in zip(given, floats, strict=True)]
    torch.library.opcheck(getattr(torch.ops.slidex, name).default, tuple(given))


@dtypes
@pytest.mark.parametrize("name", [name for name in ops.__all__ if not name.startswith("shared")])
def test_an_operator_gives_what_its_kernel_gives(name: str, dtype: torch.dtype) -> None:
    given = arguments(name, dtype)
    want = outcome(getattr(kernels.get(DEVICE), name), given)
    got = outcome(getattr(ops, name), given)
    assert torch.equal(got[0], want[0])
    if name in UPDATES:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, want, strict=True))


@dtypes
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_model_with_operators_compiles_into_one_graph(dtype: torch.dtype) -> None:
    """Scores, loss, gradients and an update, as `tests.test_ops` has them on the CPU; no compiler of C is needed."""
    hidden_ND, weight_CD, bias_C, active_NA, target_NA = (part.to(DEVICE) for part in problem())
    weight_CD, settings = weight_CD.to(dtype), StepSettings(learning_rate=0.1, step=1)

    def step(encoder_DD, updated_CD, state):
        encoded_ND = torch.relu(hidden_ND @ encoder_DD)
        loss = ops.softmax_loss(ops.pair_logits(encoded_ND, weight_CD, bias_C, active_NA), target_NA).mean()
        grad_NA = torch.where(active_NA < 0, 0, 0.1 * target_NA)
        ops.pair_update(grad_NA, encoded_ND.detach(), active_NA, updated_CD, None, state, None, settings)
        return loss

    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        encoder_DD, parameter = torch.eye(8, device=DEVICE).requires_grad_(), weight_CD.clone()
        state = RowState.zeros_like(parameter)
        loss = function(encoder_DD, parameter, state)
        loss.backward()
        results.append([loss.detach(), encoder_DD.grad, parameter, *state])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert not torch.equal(results[0][2], weight_CD)
