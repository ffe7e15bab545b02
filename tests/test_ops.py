"""The operators: registered as torch wants them, equal to the kernels, differentiable, and one graph when compiled."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from slidex import ops
from slidex.kernels import OPTIMIZERS, RowState, StepSettings, cpu
from tests.kernels.cases import Problem, Shape, outcome

SMALL = Shape(rows=4, classes=9, width=6, slots=5)
SHAPES = {"plain": SMALL, "nothing optional": Shape(rows=4, classes=9, width=6, slots=5, optional=False)}
UPDATES = ("pair_update", "rows_update", "embedding_bag_update")
pytestmark = pytest.mark.usefixtures("one_thread")
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
names = pytest.mark.parametrize("name", ops.__all__)


def flat(argument):
    """Arguments of a public function as those of the operator behind it."""
    if isinstance(argument, RowState):
        return list(argument)
    if isinstance(argument, StepSettings):
        return list(ops._numbers(argument))
    return [argument]


def registered(name, arguments):
    """Arguments of the operator; states come after both parameters and are two Nones where there is none."""
    if name in ("pair_update", "rows_update"):
        *before, weight_state, bias_state, settings = arguments
        bias = [None, None] if bias_state is None else list(bias_state)
        return [*before, *weight_state, *bias, *flat(settings)]
    return [part for argument in arguments for part in flat(argument)]


@shapes
@names
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_torch_finds_nothing_wrong_with_an_operator(name, shape):
    for dtype in (torch.float32, torch.float64):
        arguments = registered(name, Problem(shape).arguments(name, dtype))
        if name not in UPDATES:
            arguments = [
                a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
                for a in arguments
            ]
        torch.library.opcheck(getattr(torch.ops.slidex, name).default, tuple(arguments))


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@names
def test_an_operator_gives_what_its_kernel_gives(name, shape, dtype):
    arguments = Problem(shape).arguments(name, dtype)
    want = outcome(getattr(cpu, name), arguments)
    got = outcome(getattr(ops, name), arguments)
    if name.endswith("_loss"):  # which keeps the scores as they are, and returns the loss alone
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], arguments[0])
        return
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)


@shapes
@pytest.mark.parametrize("name", [name for name in ops.__all__ if name not in UPDATES])
def test_gradients_are_those_of_finite_differences(name, shape):
    arguments = Problem(shape).arguments(name, torch.float64)
    if name.endswith("_loss"):
        arguments[0] = arguments[0].masked_fill(arguments[0].isinf(), -3.0)
        if name.startswith("shared"):
            arguments[3] = arguments[3].clamp(max=1)
    wanted = {"pair_logits": (0, 1, 2), "embedding_bag": (3, 4)}.get(name, (0,))
    inputs = [
        argument.requires_grad_() if place in wanted and argument is not None else argument
        for place, argument in enumerate(arguments)
    ]

    def function(*given):
        made = getattr(ops, name)(*given)
        return made.masked_fill(made.isinf(), 0)

    assert torch.autograd.gradcheck(function, inputs)


def problem():
    generator = torch.Generator().manual_seed(0)
    weight_CD, bias_C = torch.randn(40, 8, generator=generator), torch.randn(40, generator=generator)
    active_NA = torch.rand(6, 40, generator=generator).topk(10).indices
    active_NA[2, 4:] = -1
    target_NA = torch.zeros(6, 10)
    target_NA[:, 0] = 1
    return torch.randn(6, 8, generator=generator), weight_CD, bias_C, active_NA, target_NA


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_model_with_operators_compiles_into_one_graph():
    hidden_ND, weight_CD, bias_C, active_NA, target_NA = problem()

    def loss(encoder_DD, weight_CD, bias_C):
        logits_NA = ops.pair_logits(torch.relu(hidden_ND @ encoder_DD), weight_CD, bias_C, active_NA)
        return ops.softmax_loss(logits_NA, target_NA).mean()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    parameters = [torch.eye(8).requires_grad_(), weight_CD.requires_grad_(), bias_C.requires_grad_()]
    for function in (loss, compiled, compiled):
        function(*parameters).backward()
    assert counter.frame_count == 1
    want = torch.autograd.grad(loss(*parameters), parameters)
    for parameter, gradient in zip(parameters, want, strict=True):
        torch.testing.assert_close(parameter.grad, 3 * gradient)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_whole_step_with_its_update_compiles_into_one_graph(optimizer):
    hidden_ND, _, _, active_NA, target_NA = problem()
    ids_U, indptr, positions = torch.arange(0, 40, 2), torch.arange(7), torch.arange(6)

    def step(weight_CD, bias_C, state, bias_state, settings):
        grad_NA = torch.where(active_NA < 0, 0, 0.1 * target_NA)
        ops.pair_update(grad_NA, hidden_ND, active_NA, weight_CD, bias_C, state, bias_state, settings)
        logits_NU = hidden_ND @ weight_CD[ids_U].T
        loss_N = ops.shared_softmax_loss(logits_NU, indptr, positions, torch.ones(6))
        grad_UD = 0.1 * (weight_CD[ids_U] + loss_N.sum())
        ops.rows_update(ids_U, grad_UD, None, weight_CD, None, state, None, settings)
        return loss_N

    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        _, weight_CD, bias_C, _, _ = problem()
        states = RowState.zeros_like(weight_CD, optimizer), RowState.zeros_like(bias_C, optimizer)
        for number in (1, 2):
            settings = StepSettings(learning_rate=0.1, step=number)
            loss_N = function(weight_CD, bias_C, *states, settings)
        results.append([loss_N, weight_CD, bias_C, *states[0], *states[1]])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert not torch.equal(results[0][1], problem()[1])


def test_an_argument_that_does_not_fit_is_named():
    hidden_ND, weight_CD, bias_C, active_NA, _ = problem()
    with pytest.raises(ValueError, match="'weight_CD' parameter of pair_logits"):
        ops.pair_logits(hidden_ND, weight_CD[:, 1:], bias_C, active_NA)
