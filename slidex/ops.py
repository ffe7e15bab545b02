"""The kernels as operators of torch: for models of one's own that `torch.compile` is to see as a whole.

They have the names and arguments of `slidex.kernels.cpu`, whose docstrings give shapes and dtypes, and take tensors on
the CPU (float32, float64) or a CUDA device (float32, bfloat16, float16; results are float32 there). Each is registered
with ``torch.library`` as ``slidex::NAME``, with a fake kernel, so that ``torch.compile(fullgraph=True)`` works across
them; scores, sums and losses have gradients, updates change their arguments in place:

    from slidex import ops

    logits_NA = ops.pair_logits(hidden_ND, weight_CD, bias_C, active_NA)
    loss = ops.softmax_loss(logits_NA, target_NA).mean()

`slidex.nn.LSHSoftmaxLoss` and the trainer do not go through them: torch's dispatch would come on top of every kernel.

Legend: N rows in a batch, C classes, F features, D width, A slots per row, U classes of a pool, M stored pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from slidex import kernels
from slidex.kernels import RowState, StepSettings
from slidex.nn.placement import compute_dtype

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from torch import Tensor

__all__ = [
    "embedding_bag",
    "embedding_bag_update",
    "logistic_loss",
    "pair_logits",
    "pair_update",
    "rows_update",
    "shared_logistic_loss",
    "shared_softmax_loss",
    "softmax_loss",
]

_SETTINGS = (
    "float learning_rate, int step, float beta1, float beta2, float epsilon, float weight_decay, int seed"
)
_modules: dict[str, ModuleType] = {}


def pair_logits(hidden_ND: Tensor, weight_CD: Tensor, bias_C: Tensor | None, active_NA: Tensor) -> Tensor:
    """Scores of each row's active classes, (N, A), -inf at pads.

    The gradients of weight and bias are dense; on their way that of the weight takes N A D numbers. `pair_update` makes
    a step without them.
    """
    return _pair_logits(hidden_ND, weight_CD, bias_C, active_NA)


def softmax_loss(logits_NA: Tensor, target_NA: Tensor, offset_NA: Tensor | None = None) -> Tensor:
    """Softmax cross-entropy of every row, (N,), with a gradient by `logits_NA`."""
    return _softmax_loss(logits_NA, target_NA, offset_NA)[0]


def logistic_loss(logits_NA: Tensor, target_NA: Tensor, weight_NA: Tensor | None = None) -> Tensor:
    """One-vs-all logistic loss of every row, (N,), with a gradient by `logits_NA`."""
    return _logistic_loss(logits_NA, target_NA, weight_NA)[0]


def shared_softmax_loss(
    logits_NU: Tensor,
    target_indptr: Tensor,
    target_positions: Tensor,
    target_weights: Tensor,
    offset_U: Tensor | None = None,
) -> Tensor:
    """`softmax_loss` over a shared pool, with a gradient by `logits_NU`, which it leaves as they are."""
    return _shared_softmax_loss(logits_NU, target_indptr, target_positions, target_weights, offset_U)[0]


def shared_logistic_loss(
    logits_NU: Tensor,
    target_indptr: Tensor,
    target_positions: Tensor,
    target_weights: Tensor,
    weight_U: Tensor | None = None,
) -> Tensor:
    """`logistic_loss` over a shared pool, with a gradient by `logits_NU`, which it leaves as they are."""
    return _shared_logistic_loss(logits_NU, target_indptr, target_positions, target_weights, weight_U)[0]


def embedding_bag(
    indptr: Tensor, indices: Tensor, values: Tensor | None, weight_FD: Tensor, bias_D: Tensor | None
) -> Tensor:
    """Weighted sums of feature rows, (N, D), with dense gradients by `weight_FD` and `bias_D`."""
    return _embedding_bag(indptr, indices, values, weight_FD, bias_D)


def pair_update(
    grad_NA: Tensor,
    hidden_ND: Tensor,
    active_NA: Tensor,
    weight_CD: Tensor,
    bias_C: Tensor | None,
    weight_state: RowState,
    bias_state: RowState | None,
    settings: StepSettings,
) -> None:
    """Optimiser step of the active rows, in place."""
    parameters = _flat(weight_CD, bias_C, weight_state, bias_state)
    _pair_update(grad_NA, hidden_ND, active_NA, *parameters, *_numbers(settings))


def rows_update(
    ids_U: Tensor,
    grad_UD: Tensor,
    grad_bias_U: Tensor | None,
    weight_CD: Tensor,
    bias_C: Tensor | None,
    weight_state: RowState,
    bias_state: RowState | None,
    settings: StepSettings,
) -> None:
    """Optimiser step of a pool's rows, in place."""
    parameters = _flat(weight_CD, bias_C, weight_state, bias_state)
    _rows_update(ids_U, grad_UD, grad_bias_U, *parameters, *_numbers(settings))


def embedding_bag_update(
    indptr: Tensor,
    indices: Tensor,
    values: Tensor | None,
    grad_ND: Tensor,
    weight_FD: Tensor,
    state: RowState,
    settings: StepSettings,
) -> None:
    """Optimiser step of the touched feature rows, in place."""
    parameters = weight_FD.detach(), state.moment1, state.moment2
    _embedding_bag_update(indptr, indices, values, grad_ND, *parameters, *_numbers(settings))


def _kernels(tensor: Tensor) -> ModuleType:
    """Those for its device, which are asked for once."""
    kind = tensor.device.type
    if kind not in _modules:
        _modules[kind] = kernels.get(tensor.device)
    return _modules[kind]


def _flat(
    weight: Tensor, bias: Tensor | None, weight_state: RowState, bias_state: RowState | None
) -> tuple[Tensor | None, ...]:
    of_bias = (None, None) if bias_state is None else (bias_state.moment1, bias_state.moment2)
    kept = None if bias is None else bias.detach()
    return weight.detach(), kept, weight_state.moment1, weight_state.moment2, *of_bias


def _numbers(settings: StepSettings) -> tuple[float | int, ...]:
    return (
        settings.learning_rate,
        settings.step,
        settings.beta1,
        settings.beta2,
        settings.epsilon,
        settings.weight_decay,
        settings.seed,
    )


def _settings(numbers: tuple[Any, ...]) -> StepSettings:
    learning_rate, step, beta1, beta2, epsilon, weight_decay, seed = numbers
    return StepSettings(
        learning_rate=learning_rate,
        step=step,
        beta1=beta1,
        beta2=beta2,
        epsilon=epsilon,
        weight_decay=weight_decay,
        seed=seed,
    )


def _layer(
    weight_CD: Tensor,
    bias_C: Tensor | None,
    weight_moment1: Tensor,
    weight_moment2: Tensor,
    bias_moment1: Tensor | None,
    bias_moment2: Tensor | None,
    *numbers: Any,
) -> tuple[Any, ...]:
    """What `_flat` and `_numbers` took apart, as kernels take it."""
    bias_state = None
    if bias_moment1 is not None and bias_moment2 is not None:
        bias_state = RowState(bias_moment1, bias_moment2)
    return weight_CD, bias_C, RowState(weight_moment1, weight_moment2), bias_state, _settings(numbers)


def _operator(schema: str, mutated: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function as ``slidex::NAME``, its name without the underscore."""

    def register(function: Callable[..., Any]) -> Any:
        name = f"slidex::{function.__name__.strip('_')}"
        return torch.library.custom_op(name, function, mutates_args=mutated, schema=schema)

    return register


@_operator("(Tensor hidden_ND, Tensor weight_CD, Tensor? bias_C, Tensor active_NA) -> Tensor")
def _pair_logits(hidden_ND: Tensor, weight_CD: Tensor, bias_C: Tensor | None, active_NA: Tensor) -> Tensor:
    return _kernels(hidden_ND).pair_logits(hidden_ND, weight_CD, bias_C, active_NA)


@_pair_logits.register_fake
def _(hidden_ND: Tensor, weight_CD: Tensor, bias_C: Tensor | None, active_NA: Tensor) -> Tensor:
    del weight_CD, bias_C
    return hidden_ND.new_empty(active_NA.shape, dtype=compute_dtype(hidden_ND.dtype))


@_operator("(Tensor grad_NA, Tensor weight_CD, Tensor active_NA) -> Tensor")
def _pair_hidden_grad(grad_NA: Tensor, weight_CD: Tensor, active_NA: Tensor) -> Tensor:
    return _kernels(grad_NA).pair_hidden_grad(grad_NA, weight_CD, active_NA)


@_pair_hidden_grad.register_fake
def _(grad_NA: Tensor, weight_CD: Tensor, active_NA: Tensor) -> Tensor:
    del active_NA
    shape = grad_NA.shape[0], weight_CD.shape[1]
    return grad_NA.new_empty(shape, dtype=compute_dtype(grad_NA.dtype))


def _keep_pairs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    hidden_ND, weight_CD, bias_C, active_NA = inputs
    ctx.save_for_backward(hidden_ND, weight_CD, active_NA)
    ctx.bias_dtype = None if bias_C is None else bias_C.dtype


def _pair_gradients(ctx: Any, grad_NA: Tensor) -> tuple[Tensor | None, ...]:
    hidden_ND, weight_CD, active_NA = ctx.saved_tensors
    grad_NA = grad_NA.masked_fill(active_NA < 0, 0)
    hidden_grad = weight_grad = bias_grad = None
    if ctx.needs_input_grad[0]:
        hidden_grad = _pair_hidden_grad(grad_NA, weight_CD, active_NA).to(hidden_ND.dtype)
    ids_P = active_NA.clamp(min=0).flatten().long()
    if ctx.needs_input_grad[1]:
        rows_PD = (grad_NA[:, :, None] * hidden_ND[:, None]).flatten(0, 1).to(weight_CD.dtype)
        weight_grad = torch.zeros_like(weight_CD).index_put((ids_P,), rows_PD, accumulate=True)
    if ctx.needs_input_grad[2]:
        of_bias = grad_NA.flatten().to(ctx.bias_dtype)
        bias_grad = of_bias.new_zeros(len(weight_CD)).index_put((ids_P,), of_bias, accumulate=True)
    return hidden_grad, weight_grad, bias_grad, None


_pair_logits.register_autograd(_pair_gradients, setup_context=_keep_pairs)


@_operator("(Tensor logits_NA, Tensor target_NA, Tensor? offset_NA) -> (Tensor, Tensor)")
def _softmax_loss(logits_NA: Tensor, target_NA: Tensor, offset_NA: Tensor | None) -> tuple[Tensor, Tensor]:
    return _kernels(logits_NA).softmax_loss(logits_NA, target_NA, offset_NA)


@_operator("(Tensor logits_NA, Tensor target_NA, Tensor? weight_NA) -> (Tensor, Tensor)")
def _logistic_loss(logits_NA: Tensor, target_NA: Tensor, weight_NA: Tensor | None) -> tuple[Tensor, Tensor]:
    return _kernels(logits_NA).logistic_loss(logits_NA, target_NA, weight_NA)


_SHARED = (
    "(Tensor logits_NU, Tensor target_indptr, Tensor target_positions, Tensor target_weights, Tensor? {}_U)"
)


@_operator(_SHARED.format("offset") + " -> (Tensor, Tensor)")
def _shared_softmax_loss(logits_NU: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    grad_NU = logits_NU.to(compute_dtype(logits_NU.dtype), copy=True)
    return _kernels(logits_NU).shared_softmax_loss(grad_NU, *rest), grad_NU


@_operator(_SHARED.format("weight") + " -> (Tensor, Tensor)")
def _shared_logistic_loss(logits_NU: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    grad_NU = logits_NU.to(compute_dtype(logits_NU.dtype), copy=True)
    return _kernels(logits_NU).shared_logistic_loss(grad_NU, *rest), grad_NU


def _fake_loss(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    del rest
    dtype = compute_dtype(logits.dtype)
    return logits.new_empty(logits.shape[0], dtype=dtype), logits.new_empty(logits.shape, dtype=dtype)


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.others, ctx.dtype = len(inputs) - 1, inputs[0].dtype
    ctx.set_materialize_grads(False)


def _loss_gradients(ctx: Any, grad_N: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (grad,) = ctx.saved_tensors
    by_logits = None if grad_N is None else (grad * grad_N[:, None]).to(ctx.dtype)
    return by_logits, *[None] * ctx.others


for _loss in (_softmax_loss, _logistic_loss, _shared_softmax_loss, _shared_logistic_loss):
    _loss.register_fake(_fake_loss)
    _loss.register_autograd(_loss_gradients, setup_context=_keep_gradient)


@_operator("(Tensor indptr, Tensor indices, Tensor? values, Tensor weight_FD, Tensor? bias_D) -> Tensor")
def _embedding_bag(*arguments: Any) -> Tensor:
    return _kernels(arguments[3]).embedding_bag(*arguments)


@_embedding_bag.register_fake
def _(
    indptr: Tensor, indices: Tensor, values: Tensor | None, weight_FD: Tensor, bias_D: Tensor | None
) -> Tensor:
    del indices, values, bias_D
    shape = indptr.shape[0] - 1, weight_FD.shape[1]
    return weight_FD.new_empty(shape, dtype=compute_dtype(weight_FD.dtype))


def _keep_bag(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    indptr, indices, values, weight_FD, bias_D = inputs
    ctx.save_for_backward(indptr, indices, values, weight_FD)
    ctx.bias_dtype = None if bias_D is None else bias_D.dtype


def _bag_gradients(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
    indptr, indices, values, weight_FD = ctx.saved_tensors
    weight_grad = bias_grad = None
    if ctx.needs_input_grad[3]:
        position_M = torch.arange(indices.shape[0], device=indices.device)
        rows_MD = grad_ND[torch.searchsorted(indptr[1:].contiguous(), position_M, right=True)]
        rows_MD = (rows_MD if values is None else rows_MD * values[:, None]).to(weight_FD.dtype)
        weight_grad = torch.zeros_like(weight_FD).index_put((indices.long(),), rows_MD, accumulate=True)
    if ctx.needs_input_grad[4]:
        bias_grad = grad_ND.sum(0).to(ctx.bias_dtype)
    return None, None, None, weight_grad, bias_grad


_embedding_bag.register_autograd(_bag_gradients, setup_context=_keep_bag)

_LAYER = (
    "Tensor(a!) weight_CD, Tensor(b!)? bias_C, Tensor(c!) weight_moment1, Tensor(d!) weight_moment2, "
    f"Tensor(e!)? bias_moment1, Tensor(f!)? bias_moment2, {_SETTINGS}) -> ()"
)
_MUTATED = ("weight_CD", "bias_C", "weight_moment1", "weight_moment2", "bias_moment1", "bias_moment2")


@_operator(f"(Tensor grad_NA, Tensor hidden_ND, Tensor active_NA, {_LAYER}", _MUTATED)
def _pair_update(*arguments: Any) -> None:
    _kernels(arguments[3]).pair_update(*arguments[:3], *_layer(*arguments[3:]))


@_operator(f"(Tensor ids_U, Tensor grad_UD, Tensor? grad_bias_U, {_LAYER}", _MUTATED)
def _rows_update(*arguments: Any) -> None:
    _kernels(arguments[3]).rows_update(*arguments[:3], *_layer(*arguments[3:]))


@_operator(
    "(Tensor indptr, Tensor indices, Tensor? values, Tensor grad_ND, Tensor(a!) weight_FD, Tensor(b!) moment1, "
    f"Tensor(c!) moment2, {_SETTINGS}) -> ()",
    ("weight_FD", "moment1", "moment2"),
)
def _embedding_bag_update(*arguments: Any) -> None:
    bags, (weight, moment1, moment2) = arguments[:4], arguments[4:7]
    state = RowState(moment1, moment2)
    _kernels(weight).embedding_bag_update(*bags, weight, state, _settings(arguments[7:]))


for _update in (_pair_update, _rows_update, _embedding_bag_update):
    _update.register_fake(lambda *_: None)
