"""The head against torch's own linear layer and cross-entropy: values, gradients, targets, reductions, errors."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import scipy.sparse
import torch
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode

from slidex.data import CsrArrays
from slidex.errors import ConfigError
from slidex.nn import LSHSoftmaxLoss, SamplingOptions, functional

C, D, N = 50, 8, 6
EVERYTHING = {
    "none": None,
    "exact": SamplingOptions(mode="exact", precision="float32"),
    "shared": SamplingOptions(mode="shared", pool_size=4 * C, precision="float32"),
    "per_sample": SamplingOptions(
        mode="per_sample", active_size=4 * C, batch_share=0.0, correction="stratified"
    ),
}
"""Options under which every class is active, so that the loss is that of all classes."""
LABELS = [[3, 5], [5], [], [0, 7, 49], [39], [3, 9]]
pytestmark = pytest.mark.usefixtures("one_thread")
reductions = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
everything = pytest.mark.parametrize("options", EVERYTHING.values(), ids=EVERYTHING.keys())


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(seed=0, dtype=torch.float64, bias=True):
    """A linear layer, a batch for it, and a class for each row; the third row has none."""
    linear = torch.nn.Linear(D, C, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.normal_(generator=generator(seed))
    hidden_ND = torch.randn(N, D, dtype=dtype, generator=generator(seed + 1)).requires_grad_()
    target_N = torch.randint(0, C, (N,), generator=generator(seed + 2))
    target_N[2] = -100
    return linear, hidden_ND, target_N


def gradients(loss, inputs, upstream):
    return [g.to_dense() if g.is_sparse else g for g in torch.autograd.grad(loss, inputs, upstream)]


def padded():
    return torch.tensor([row + [-1] * (3 - len(row)) for row in LABELS])


def dense_targets(dtype=torch.float64):
    target_NC = torch.zeros(N, C, dtype=dtype)
    for n, row in enumerate(LABELS):
        target_NC[n, row] = 1 / max(1, len(row))
    return target_NC


class Shapes(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        parts = made if isinstance(made, tuple | list) else (made,)
        sizes = [p.numel() for p in parts if isinstance(p, torch.Tensor) and p.layout == torch.strided]
        self.largest = max([self.largest, *sizes])
        return made


@everything
@reductions
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_with_every_class_active_it_is_cross_entropy(options, reduction, smoothing, weighted, bias):
    linear, hidden_ND, target_N = problem(bias=bias)
    weight_C = torch.rand(C, dtype=torch.float64, generator=generator(4)) + 0.1 if weighted else None
    want = F.cross_entropy(
        linear(hidden_ND), target_N, weight=weight_C, reduction=reduction, label_smoothing=smoothing
    )
    head = LSHSoftmaxLoss.from_linear(
        linear, reduction=reduction, weight=weight_C, label_smoothing=smoothing, options=options
    )
    got = head(hidden_ND, target_N)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    inputs = [hidden_ND, *linear.parameters()]
    upstream = torch.rand(want.shape, dtype=torch.float64, generator=generator(5)) + 0.5
    for mine, torchs in zip(gradients(got, inputs, upstream), gradients(want, inputs, upstream), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="came with torch 2.13")
@reductions
def test_the_exact_loss_is_torchs_own(reduction):
    linear, hidden_ND, target_N = problem()
    want = F.linear_cross_entropy(
        hidden_ND, linear.weight, target_N, linear_bias=linear.bias, reduction=reduction, label_smoothing=0.2
    )
    got = functional.lsh_softmax(
        hidden_ND, linear.weight, target_N, linear_bias=linear.bias, reduction=reduction, label_smoothing=0.2
    )
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@everything
@reductions
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_rows_of_labels_share_their_mass(options, reduction, smoothing):
    linear, hidden_ND, _ = problem()
    head = LSHSoftmaxLoss.from_linear(linear, reduction=reduction, label_smoothing=smoothing, options=options)
    target_NC = dense_targets()
    labelled_N = torch.tensor([bool(row) for row in LABELS])
    want_N = (
        F.cross_entropy(linear(hidden_ND), target_NC, reduction="none", label_smoothing=smoothing)
        * labelled_N
    )
    want = {"none": want_N, "sum": want_N.sum(), "mean": want_N.sum() / labelled_N.sum()}[reduction]
    got = head(hidden_ND, padded())
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    upstream = torch.rand(want.shape, dtype=torch.float64, generator=generator(5))
    inputs = [hidden_ND, *linear.parameters()]
    for mine, torchs in zip(gradients(got, inputs, upstream), gradients(want, inputs, upstream), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-9, atol=1e-12)


@everything
def test_weights_of_classes_count_for_each_label(options):
    linear, hidden_ND, _ = problem()
    weight_C = torch.rand(C, dtype=torch.float64, generator=generator(4)) + 0.1
    mass_NC = dense_targets() * weight_C
    want = -(mass_NC * linear(hidden_ND).log_softmax(1)).sum() / mass_NC.sum()
    head = LSHSoftmaxLoss.from_linear(linear, weight=weight_C, options=options)
    torch.testing.assert_close(head(hidden_ND, padded()), want, rtol=1e-9, atol=1e-12)


@everything
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_all_forms_of_one_target_are_one(options):
    linear, hidden_ND, _ = problem()
    indptr = np.cumsum([0, *map(len, LABELS)])
    ids = np.concatenate(LABELS)
    ones = np.ones(len(ids))
    forms = [
        padded(),
        padded().flip(1).int(),
        torch.sparse_csr_tensor(
            torch.from_numpy(indptr),
            torch.from_numpy(ids).long(),
            torch.from_numpy(ones),
            (N, C),
            check_invariants=True,
        ),
        scipy.sparse.csr_matrix((ones, ids.astype(int), indptr), (N, C)),
        scipy.sparse.csr_matrix((ones, ids.astype(int), indptr), (N, C)).tocoo(),
        CsrArrays(indptr, ids.astype(np.int32), None, C),
    ]
    losses = [LSHSoftmaxLoss.from_linear(linear, options=options)(hidden_ND, form) for form in forms]
    assert all(torch.equal(loss, losses[0]) for loss in losses)


@everything
def test_leading_dimensions_flatten(options):
    linear, hidden_ND, target_N = problem()
    head = LSHSoftmaxLoss.from_linear(linear, reduction="none", options=options)
    flat, flat_padded = head(hidden_ND, target_N), head(hidden_ND, padded())
    torch.testing.assert_close(head(hidden_ND.view(2, 3, D), target_N.view(2, 3)).flatten(), flat)
    torch.testing.assert_close(head(hidden_ND.view(2, 3, D), padded().view(2, 3, 3)).flatten(), flat_padded)
    ids, scores = head.topk(hidden_ND.view(2, 3, D), 4)
    assert ids.shape == scores.shape == (2, 3, 4)


@everything
def test_ignored_rows_and_pads(options):
    linear, hidden_ND, target_N = problem()
    head = LSHSoftmaxLoss.from_linear(linear, options=options)
    other = LSHSoftmaxLoss.from_linear(linear, ignore_index=7, options=options)
    moved_N = target_N.where(target_N != -100, 7)
    assert 7 not in target_N
    assert torch.equal(head(hidden_ND, target_N), other(hidden_ND, moved_N))
    many = padded()
    assert not torch.equal(head(hidden_ND, many), other(hidden_ND, many))
    assert torch.equal(head(hidden_ND, many.where(many != 7, -1)), other(hidden_ND, many))


@everything
def test_nothing_but_ignored_rows_is_nan_in_the_mean_and_no_gradient(options):
    linear, hidden_ND, target_N = problem()
    nothing = torch.full_like(target_N, -100)
    want = F.cross_entropy(linear(hidden_ND), nothing)
    loss = LSHSoftmaxLoss.from_linear(linear, options=options)(hidden_ND, nothing)
    assert want.isnan()
    assert loss.isnan()
    total = LSHSoftmaxLoss.from_linear(linear, reduction="sum", options=options)(hidden_ND, nothing)
    assert total == 0
    assert all(
        not g.any() for g in gradients(total, [hidden_ND, *linear.parameters()], torch.ones_like(total))
    )


@pytest.mark.parametrize("mode", ["shared", "per_sample"])
@pytest.mark.parametrize("correction", ["none", "stratified"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradcheck_on_sampled_classes(mode, correction, smoothing):
    linear, hidden_ND, target_N = problem()
    options = SamplingOptions(
        mode=mode, pool_size=10, active_size=10, correction=correction, precision="float32", sparse_grad=False
    )
    head = LSHSoftmaxLoss.from_linear(linear, reduction="none", label_smoothing=smoothing, options=options)
    head(hidden_ND, target_N)

    def loss(hidden_ND, weight_CD, bias_C):
        head._sampling.step = 3  # the same classes every time
        return functional.lsh_softmax(
            hidden_ND,
            weight_CD,
            target_N,
            linear_bias=bias_C,
            reduction="none",
            label_smoothing=smoothing,
            sampling=head._sampling,
        )

    assert torch.autograd.gradcheck(loss, (hidden_ND, linear.weight, linear.bias))


@pytest.mark.parametrize(
    "options", [None, SamplingOptions(mode="exact", precision="float32", sparse_grad=False)]
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradcheck_on_all_classes(options, smoothing):
    linear, hidden_ND, _ = problem()
    head = LSHSoftmaxLoss.from_linear(linear, reduction="none", label_smoothing=smoothing, options=options)

    def loss(hidden_ND, weight_CD, bias_C):
        return functional.lsh_softmax(
            hidden_ND,
            weight_CD,
            padded(),
            linear_bias=bias_C,
            reduction="none",
            label_smoothing=smoothing,
            sampling=head._sampling,
        )

    assert torch.autograd.gradcheck(loss, (hidden_ND, linear.weight, linear.bias))


@pytest.mark.parametrize("mode", ["shared", "per_sample"])
@pytest.mark.parametrize("index", ["simhash", "none"])
def test_the_corrected_loss_estimates_the_sum_over_all_classes(mode, index):
    """exp(loss + true score) is the softmax's denominator: its mean over many draws is that of all classes."""
    linear, hidden_ND, target_N = problem()
    options = SamplingOptions(
        mode=mode,
        index=index,
        pool_size=8,
        active_size=8,
        correction="stratified",
        batch_share=0.0,
        rehash_every=10_000,
    )
    head = LSHSoftmaxLoss.from_linear(linear, reduction="none", options=options)
    kept_N = target_N >= 0
    with torch.no_grad():
        logits_NC = linear(hidden_ND)
        true_N = logits_NC[kept_N, target_N[kept_N]]
        exact_N = logits_NC[kept_N].exp().sum(1)
        draws_SN = torch.stack([(head(hidden_ND, target_N)[kept_N] + true_N).exp() for _ in range(1500)])
    error_N = draws_SN.std(0) / len(draws_SN) ** 0.5
    assert (error_N > 0).all()
    assert ((draws_SN.mean(0) - exact_N).abs() < 3 * error_N).all()


@pytest.mark.parametrize("mode", ["shared", "per_sample"])
@pytest.mark.parametrize("optimizer", [None, "adam"])
def test_a_training_step_makes_nothing_of_rows_by_classes(mode, optimizer):
    classes, rows = 5000, 256
    options = SamplingOptions(
        mode=mode, pool_size=40, active_size=40, optimizer=optimizer, precision="float32"
    )
    head = LSHSoftmaxLoss(D, classes, bias=True, options=options)
    hidden_ND = torch.randn(rows, D, generator=generator()).requires_grad_()
    target_N = torch.randint(0, classes, (rows,), generator=generator())
    head(hidden_ND, target_N).backward()
    with Shapes() as shapes:
        head(hidden_ND, target_N).backward()
        head.topk(hidden_ND, 3, indexed=True, candidates=8)
    assert 0 < shapes.largest < rows * classes / 2


def test_exact_topk_holds_a_part_of_the_scores_at_a_time(monkeypatch):
    monkeypatch.setattr("slidex.lsh.exact._CHUNK_SCORES", 1 << 12)
    head = LSHSoftmaxLoss(D, 5000)
    hidden_ND = torch.randn(64, D, generator=generator())
    with Shapes() as shapes:
        ids, scores = head.topk(hidden_ND, 3)
    assert shapes.largest < 64 * 5000
    want = (hidden_ND @ head.weight.T).topk(3)
    assert torch.equal(ids, want.indices)
    torch.testing.assert_close(scores, want.values)


@pytest.mark.parametrize("many", [False, True])
def test_the_exact_loss_in_pieces_is_the_same(many, monkeypatch):
    linear, hidden_ND, target_N = problem()
    head = LSHSoftmaxLoss.from_linear(linear)
    target = padded() if many else target_N
    inputs = [hidden_ND, *linear.parameters()]
    whole = head(hidden_ND, target)
    monkeypatch.setattr(functional, "SCORES_AT_ONCE", 2 * C + 1)
    pieces = head(hidden_ND, target)
    torch.testing.assert_close(pieces, whole)
    one = torch.ones_like(whole)
    for mine, other in zip(gradients(pieces, inputs, one), gradients(whole, inputs, one), strict=True):
        torch.testing.assert_close(mine, other)


def test_a_linear_layers_state_loads_and_its_storage_can_be_shared():
    linear, hidden_ND, target_N = problem(dtype=torch.float32)
    head = LSHSoftmaxLoss(D, C, bias=True, options=SamplingOptions(optimizer="adam"))
    assert list(head.state_dict()) == ["weight", "bias"] == list(linear.state_dict())
    head.load_state_dict(linear.state_dict())
    assert torch.equal(head.weight, linear.weight)
    shared = LSHSoftmaxLoss.from_linear(linear, options=SamplingOptions(optimizer="adam"))
    assert shared.weight is linear.weight
    assert shared.bias is linear.bias
    before = linear.weight.detach().clone()
    shared(hidden_ND, target_N).backward()
    assert not torch.equal(linear.weight, before)


def test_weights_begin_as_those_of_a_linear_layer():
    bound = 1 / D**0.5
    head = LSHSoftmaxLoss(D, 4000, bias=True, device="cpu", dtype=torch.float64)
    assert head.weight.dtype == head.bias.dtype == torch.float64
    for parameter in head.parameters():
        assert parameter.abs().max() <= bound
        assert abs(float(parameter.detach().std()) - bound / 3**0.5) < 0.05 * bound
    assert LSHSoftmaxLoss(D, C, device="meta").weight.device.type == "meta"


def test_in_eval_mode_the_loss_is_exact_and_nothing_is_counted():
    linear, hidden_ND, target_N = problem()
    head = LSHSoftmaxLoss.from_linear(linear, options=SamplingOptions(pool_size=4)).eval()
    torch.testing.assert_close(head(hidden_ND, target_N), F.cross_entropy(linear(hidden_ND), target_N))
    assert head.stats().steps == 0


def test_a_copy_goes_its_own_way():
    linear, hidden_ND, target_N = problem()
    head = LSHSoftmaxLoss.from_linear(linear, options=SamplingOptions(pool_size=4, optimizer="adam"))
    head(hidden_ND, target_N).backward()
    other = copy.deepcopy(head)
    other(hidden_ND, target_N).backward()
    assert other.stats().updates == 2
    assert head.stats().updates == 1
    assert not torch.equal(other.weight, head.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"in_features": 0},
            "'in_features' parameter of LSHSoftmaxLoss must be an integer of at least 1. Got 0",
        ),
        ({"num_classes": 2.0}, "'num_classes' parameter of LSHSoftmaxLoss must be an integer"),
        ({"reduction": "average"}, "'reduction' parameter of lsh_softmax must be one of mean, sum, none"),
        ({"label_smoothing": 1.5}, "'label_smoothing' parameter of lsh_softmax must be from 0 to 1. Got 1.5"),
        ({"weight": torch.ones(3)}, r"'weight' parameter of lsh_softmax must be floating of shape \(50,\)"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        LSHSoftmaxLoss(**{"in_features": D, "num_classes": C, **arguments})


@everything
@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.zeros(N + 1, dtype=torch.long), r"must be int64 class ids of shape \(6,\)"),
        (torch.zeros(N, C), "must be int64 class ids"),
        (torch.zeros(N, 2, 2, dtype=torch.long), "must be int64 class ids"),
        (torch.tensor([[0, 1]] * 3 + [[4, C]] + [[2, -1]] * 2), "class ids from 0 to 49. Got 50 in row 3"),
        (torch.tensor([[0, 1]] * 3 + [[-2, 4]] + [[2, -1]] * 2), "class ids from 0 to 49. Got -2 in row 3"),
        (
            torch.tensor([[0, 1]] * 4 + [[4, 4]] + [[2, -1]]),
            "distinct classes in each row. Got class 4 twice in row 4",
        ),
        (scipy.sparse.csr_matrix((N, C + 1)), r"of shape \(6, 50\) where it is sparse rows. Got \(6, 51\)"),
        (scipy.sparse.csr_matrix(2 * np.eye(N, C)), "stored values are all 1. Got 2.0"),
        ([[0], [1]], "a tensor, a scipy sparse matrix, or CsrArrays. Got list"),
    ],
)
def test_bad_targets_are_named(options, target, message):
    linear, hidden_ND, _ = problem()
    with pytest.raises(ConfigError, match=message):
        LSHSoftmaxLoss.from_linear(linear, options=options)(hidden_ND, target)


def test_bad_inputs_are_named():
    linear, hidden_ND, target_N = problem()
    head = LSHSoftmaxLoss.from_linear(linear)
    for wrong in (hidden_ND[:, 1:], hidden_ND.long()):
        with pytest.raises(
            ConfigError, match=r"'input' parameter of lsh_softmax must be floating of shape \(..., 8\)"
        ):
            head(wrong, target_N)
    for arguments in ({"k": 0}, {"k": 1, "candidates": 0}):
        with pytest.raises(ConfigError, match="parameter of topk must be an integer of at least 1"):
            head.topk(hidden_ND, **arguments)
    with pytest.raises(ConfigError, match="'indexed' parameter of topk must be False"):
        head.topk(hidden_ND, 1, indexed=True)
    for call in (head.rehash, head.stats, head.optimizer_state_dict, lambda: head.learning_rate):
        with pytest.raises(ConfigError, match="needs 'options'"):
            call()


def test_a_layer_that_kernels_do_not_know_is_refused_by_name():
    hidden_ND, target_N = torch.randn(N, D), torch.zeros(N, dtype=torch.long)
    half = LSHSoftmaxLoss(D, C, dtype=torch.bfloat16, options=SamplingOptions())
    with pytest.raises(ConfigError, match="'linear_weight' parameter must be float32 or float64"):
        half(hidden_ND.bfloat16(), target_N)
    nowhere = LSHSoftmaxLoss(D, C, device="meta", options=SamplingOptions())
    with pytest.raises(ConfigError, match="must be on the CPU or a CUDA device where classes are sampled"):
        nowhere(hidden_ND, target_N)
    normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(D, C))
    with pytest.raises(ConfigError, match="must own its weight and bias as parameters"):
        LSHSoftmaxLoss.from_linear(normed)
