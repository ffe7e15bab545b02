"""The head in training: optimizers of one's own and fused ones, the index's life, compilation, and every option."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F  # noqa: N812

from slidex.errors import ConfigError, DivergedError
from slidex.kernels import OPTIMIZERS
from slidex.nn import LSHSoftmaxLoss, SamplingOptions, clip_grad_norm_

C, D, N = 200, 8, 16
pytestmark = pytest.mark.usefixtures("one_thread")
sparse_warning = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
"""Of torch's own optimizers, where they make sparse tensors."""


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_head(classes=C, reduction="mean", **options):
    head = LSHSoftmaxLoss(
        D,
        classes,
        bias=True,
        reduction=reduction,
        options=SamplingOptions(**{"pool_size": 24, "active_size": 24, "precision": "float32", **options}),
    )
    with torch.no_grad():
        for parameter in head.parameters():
            if not parameter.is_meta:
                parameter.normal_(generator=generator(1))
    return head


def batch(seed=0):
    hidden_ND = torch.randn(N, D, generator=generator(seed))
    return hidden_ND, torch.randint(0, C, (N,), generator=generator(seed + 100))


def train(head, steps=5, optimizer=None):
    losses = []
    for step in range(steps):
        loss = head(*batch(step))
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("mode", ["shared", "per_sample", "exact"])
@sparse_warning
def test_fused_adam_is_sparse_adam_on_the_gradients_it_does_not_keep(mode):
    fused = make_head(mode=mode, optimizer="adam", learning_rate=0.05, batch_share=0.0)
    plain = make_head(mode=mode, batch_share=0.0)
    losses = train(fused), train(plain, optimizer=torch.optim.SparseAdam(plain.parameters(), lr=0.05))
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(fused.weight, plain.weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fused.bias, plain.bias, rtol=1e-4, atol=1e-6)
    assert fused.weight.grad is None
    assert fused.stats().updates == 5
    assert plain.stats().updates == 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_fused_optimizer_lowers_the_loss(optimizer):
    head = make_head(optimizer=optimizer, learning_rate=0.1)
    losses = [head(*batch()) for _ in range(30) if head(*batch()).backward() is None]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("mode", ["shared", "per_sample"])
@pytest.mark.parametrize(
    ("make", "sparse"),
    [
        (lambda p: torch.optim.SGD(p, lr=1.0), True),
        (lambda p: torch.optim.Adagrad(p, lr=0.5), True),
        (lambda p: torch.optim.SparseAdam(p, lr=0.1), True),
        (lambda p: torch.optim.AdamW(p, lr=0.1), False),
        (lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9), False),
    ],
)
@sparse_warning
def test_optimizers_of_torch_take_the_gradients(mode, make, sparse):
    head = make_head(mode=mode, sparse_grad=sparse)
    optimizer = make(head.parameters())
    losses = []
    for _ in range(30):
        loss = head(*batch())
        loss.backward()
        layout = torch.sparse_coo if sparse else torch.strided
        assert head.weight.grad.layout == head.bias.grad.layout == layout
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("sparse", [True, False])
def test_gradients_accumulate(sparse):
    hidden_ND, target_N = batch()
    whole = make_head(pool_size=4 * C, sparse_grad=sparse, reduction="sum")
    halves = make_head(pool_size=4 * C, sparse_grad=sparse, reduction="sum")
    whole(hidden_ND, target_N).backward()
    for part in (slice(0, N // 2), slice(N // 2, N)):
        halves(hidden_ND[part], target_N[part]).backward()
    got, want = (head.weight.grad.to_dense() for head in (halves, whole))
    torch.testing.assert_close(got, want)


@sparse_warning
def test_clipping_of_sparse_gradients_is_that_of_dense_ones():
    sparse, dense = make_head(sparse_grad=True), make_head(sparse_grad=False)
    for head in (sparse, dense):
        head(*batch()).backward()
        head(*batch()).backward()
    want = torch.nn.utils.clip_grad_norm_(dense.parameters(), 0.1)
    torch.testing.assert_close(clip_grad_norm_(sparse.parameters(), 0.1), want)
    assert want > 0.1
    torch.testing.assert_close(sparse.weight.grad.to_dense(), dense.weight.grad)
    unchanged = dense.weight.grad.clone()
    clip_grad_norm_([*dense.parameters(), torch.nn.Parameter(torch.ones(2))], 100.0)
    assert torch.equal(dense.weight.grad, unchanged)
    assert clip_grad_norm_([torch.nn.Parameter(torch.ones(2))], 1.0) == 0


@pytest.mark.parametrize("optimizer", [None, "adam"])
def test_autocast_changes_what_comes_before_the_head_alone(optimizer):
    hidden_ND, target_N = batch()
    encoder = torch.nn.Linear(D, D)
    head, other = (make_head(sparse_grad=False, optimizer=optimizer) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = encoder(hidden_ND)
        loss = head(cast, target_N)
    assert cast.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert torch.equal(loss, other(cast.detach().float(), target_N))
    loss.backward()
    assert encoder.weight.grad.dtype == torch.float32
    assert encoder.weight.grad.abs().sum() > 0


def test_bfloat16_products_stay_close():
    losses = [make_head(precision=precision)(*batch()) for precision in ("float32", "bfloat16")]
    assert not torch.equal(*losses)
    torch.testing.assert_close(*losses, rtol=0.02, atol=0.02)


def test_backward_of_a_fused_head_runs_once_and_of_another_as_often_as_wanted():
    loss = make_head(optimizer="adam")(*batch())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="has updated the layer's rows already"):
        loss.backward()
    head = make_head(sparse_grad=False)
    loss = head(*batch())
    loss.backward(retain_graph=True)
    once = head.weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(head.weight.grad, 2 * once)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_writes_nothing(bad):
    head = make_head(optimizer="adam", index="none")
    train(head, 1)
    before = [
        head.weight.clone(),
        head.bias.clone(),
        *(t.clone() for t in head.optimizer_state_dict().values()),
    ]
    hidden_ND, target_N = batch()
    hidden_ND[3, 2] = bad
    loss = head(hidden_ND, target_N)
    with pytest.raises(
        DivergedError, match=r"is not finite; its update was not applied\. Lower 'learning_rate'"
    ):
        loss.backward()
    after = [head.weight, head.bias, *head.optimizer_state_dict().values()]
    before[2][0] += 1  # the loss was counted
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_a_head_that_was_made_without_memory_trains_once_it_has_some():
    """Libraries that load large models make them on the device meta."""
    with torch.device("meta"):
        head = make_head(optimizer="adam")
    head = head.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(generator=generator(1))
    assert train(head) == train(make_head(optimizer="adam"))


def test_a_fused_update_is_seen_by_autograd():
    """A graph that needs the old weights must not silently use the new ones."""
    head = make_head(optimizer="adam")
    other = head.weight.sin().sum()
    head(*batch()).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_the_learning_rate_can_be_changed_between_steps():
    head = make_head(optimizer="adam", learning_rate=0.5)
    head.learning_rate = 0.0
    before = head.weight.clone()
    train(head, 2)
    assert torch.equal(head.weight, before)
    head.learning_rate = 0.1
    train(head, 1)
    assert not torch.equal(head.weight, before)


@pytest.mark.parametrize("frozen", ["head", "input", "head and fused"])
def test_what_needs_no_gradient_gets_none(frozen):
    head = make_head(sparse_grad=False, optimizer="adam" if "fused" in frozen else None)
    hidden_ND, target_N = batch()
    if frozen == "input":
        head(hidden_ND, target_N).backward()
        assert hidden_ND.grad is None
        assert head.weight.grad.any()
        return
    head.requires_grad_(requires_grad=False)
    hidden_ND.requires_grad_()
    before = head.weight.clone()
    head(hidden_ND, target_N).backward()
    assert hidden_ND.grad.any()
    assert head.weight.grad is None
    assert torch.equal(head.weight, before)


def test_the_index_is_built_at_the_first_step_and_follows_its_schedule():
    head = make_head(optimizer="adam", rehash="fixed", rehash_every=3)
    assert not head.stats().index.built
    train(head, 1)
    assert head.stats().index.builds == head.stats().rehashes == 1
    train(head, 6)
    assert head.stats().rehashes == 3  # before steps 1, 4 and 7
    assert head.stats().index.updates == 2  # few rows had moved
    head.rehash()
    assert head.stats().index.builds == 2
    assert set(head.state_dict()) == {"weight", "bias"}
    assert 0 < head.stats().classes_seen <= 1
    assert head.stats().active_classes >= 24


def test_an_optimizer_of_ones_own_may_move_any_row_so_the_index_is_built_anew():
    head = make_head(rehash="fixed", rehash_every=3)
    train(head, 7)
    assert (head.stats().index.builds, head.stats().index.updates) == (3, 0)


@pytest.mark.parametrize("how", ["load", "reset"])
def test_new_weights_get_a_new_index(how):
    head = make_head(optimizer="adam", rehash="fixed", rehash_every=1000)
    train(head, 2)
    if how == "load":
        head.load_state_dict(make_head().state_dict())
    else:
        head.reset_parameters()
    train(head, 2)
    assert head.stats().index.builds == 2


def test_indexed_topk_follows_the_weights():
    head = make_head(optimizer="adam", learning_rate=0.5)
    hidden_ND, _ = batch()
    everything = head.topk(hidden_ND, 5)
    within = head.topk(hidden_ND, 5, indexed=True, candidates=C)
    found = within.ids >= 0
    assert found[:, 0].all()
    exact = (hidden_ND @ head.weight.T + head.bias).gather(1, within.ids.clamp(min=0))
    torch.testing.assert_close(within.scores[found], exact[found])
    assert (within.scores <= everything.scores + 1e-5).all()
    few = head.topk(hidden_ND, 5, indexed=True, candidates=8)
    assert (few.scores[:, -1] <= within.scores[:, -1]).all()
    assert not torch.equal(few.ids, within.ids)
    train(head, 3)
    moved = head.topk(hidden_ND, 5, indexed=True, candidates=C)
    exact = (hidden_ND @ head.weight.T + head.bias).gather(1, moved.ids.clamp(min=0))
    torch.testing.assert_close(moved.scores[moved.ids >= 0], exact[moved.ids >= 0])
    fresh = make_head()
    fresh.load_state_dict(head.state_dict())
    assert torch.equal(fresh.topk(hidden_ND, 5, indexed=True, candidates=C).ids, moved.ids)
    with pytest.raises(ConfigError, match="needs an index"):
        make_head(index="none").topk(hidden_ND, 5, indexed=True)


def test_an_index_that_learns_gets_the_recent_batches():
    head = make_head(
        optimizer="adam", index="learned", index_options={"tables": 4}, rehash_every=2, index_sample=3 * N
    )
    seen = []
    build = head._sampling.index.build
    head._sampling.index.build = lambda *a, queries: (seen.append(queries), build(*a, queries=queries))
    train(head, 8)
    assert [len(q.hidden_ND) for q in seen] == [N, 3 * N, 3 * N]
    torch.testing.assert_close(seen[1].hidden_ND, torch.cat([batch(s)[0] for s in range(3)]))
    assert torch.equal(seen[1].label_ids, torch.cat([batch(s)[1] for s in range(3)]))


def test_a_resumed_head_takes_the_steps_of_an_unbroken_one():
    whole = make_head(optimizer="adam", index="none")
    train(whole, 6)
    first = make_head(optimizer="adam", index="none")
    train(first, 3)
    second = make_head(optimizer="adam", index="none")
    second.load_state_dict(first.state_dict())
    second.load_optimizer_state_dict({k: v.clone() for k, v in first.optimizer_state_dict().items()})
    for step in range(3, 6):
        second(*batch(step)).backward()
    assert torch.equal(second.weight, whole.weight)
    assert torch.equal(second.bias, whole.bias)


def test_a_head_that_is_cast_keeps_its_optimizer():
    head, other = make_head(optimizer="adam", index="none"), make_head(optimizer="adam", index="none")
    train(head, 2)
    train(other, 2)
    head.double()
    hidden_ND, target_N = batch(2)
    head(hidden_ND.double(), target_N).backward()
    other(hidden_ND, target_N).backward()
    assert head.optimizer_state_dict()["weight.moment2"].dtype == torch.float64
    torch.testing.assert_close(head.weight.float(), other.weight)


def test_a_state_that_does_not_fit_is_refused():
    head = make_head(optimizer="adam")
    train(head, 1)
    state = head.optimizer_state_dict()
    for wrong in (
        {k: v for k, v in state.items() if k != "counts"},
        state | {"weight.moment2": torch.zeros(3)},
    ):
        with pytest.raises(ConfigError, match="'state' parameter must hold"):
            make_head(optimizer="adam").load_optimizer_state_dict(wrong)
    with pytest.raises(ConfigError, match="'state' parameter must hold"):
        make_head(optimizer="rowwise_adam").load_optimizer_state_dict(state)


def test_one_seed_is_one_training():
    heads = [make_head(optimizer="adam", seed=seed) for seed in (0, 0, 1)]
    losses = [train(head) for head in heads]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(heads[0].weight, heads[1].weight)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor"
)  # the compiler looks at it, and hides this
def test_a_compiled_model_compiles_once_whatever_the_head_samples_and_rehashes():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.ReLU())
            self.head = make_head(optimizer="adam", rehash="fixed", rehash_every=2)

        def forward(self, hidden_ND, target_N):
            return self.head(self.encoder(hidden_ND), target_N)

    model, counter = Model(), CompileCounter()
    compiled = torch.compile(model, backend=counter)
    compiled(*batch()).backward()
    compiled(*batch(1)).backward()
    frames = counter.frame_count
    assert 1 <= frames <= 2
    for step in range(2, 12):
        compiled(*batch(step)).backward()
    assert counter.frame_count == frames
    assert model.head.stats().rehashes >= 5


def test_the_exact_loss_compiles_into_one_graph():
    head, counter = LSHSoftmaxLoss(D, C, label_smoothing=0.1), CompileCounter()
    compiled = torch.compile(head, backend=counter, fullgraph=True)
    for step in range(3):
        hidden_ND, target_N = batch(step)
        want = F.cross_entropy(hidden_ND @ head.weight.T, target_N, label_smoothing=0.1)
        torch.testing.assert_close(compiled(hidden_ND, target_N), want)
    assert counter.frame_count == 1


CHANGES = {
    "mode": ({}, {"mode": "per_sample"}),
    "pool_size": ({}, {"pool_size": 30}),
    "active_size": ({"mode": "per_sample"}, {"active_size": 30}),
    "random_share": ({}, {"random_share": 0.75}),
    "batch_share": ({"mode": "per_sample"}, {"batch_share": 0.5}),
    "random_power": ({"class_counts": range(1, C + 1)}, {"random_power": 0.75}),
    "correction": ({}, {"correction": "none"}),
    "precision": ({}, {"precision": "bfloat16"}),
    "index": ({}, {"index": "none"}),
    "index_options": ({}, {"index_options": {"bits": 4}}),
    "index_sample": ({"index": "learned", "rehash_every": 1}, {"index_sample": 1}),
    "rehash": ({"rehash_every": 2}, {"rehash": "fixed"}),
    "rehash_every": ({}, {"rehash_every": 1}),
    "rehash_growth": ({"rehash_every": 1}, {"rehash_growth": 4.0}),
    "rehash_max_gap": ({"rehash_every": 1}, {"rehash_max_gap": 1}),
    "rehash_drift": ({"rehash": "drift", "rehash_every": 1, "rehash_drift": 1.0}, {"rehash_drift": 1e-6}),
    "optimizer": ({}, {"optimizer": "rowwise_adam"}),
    "learning_rate": ({}, {"learning_rate": 0.2}),
    "beta1": ({}, {"beta1": 0.5}),
    "beta2": ({}, {"beta2": 0.5}),
    "epsilon": ({}, {"epsilon": 0.5}),
    "weight_decay": ({}, {"weight_decay": 0.5}),
    "seed": ({}, {"seed": 1}),
    "sparse_grad": ({"optimizer": None}, {"sparse_grad": False}),
    "class_counts": ({"correction": "logq", "class_counts": range(1, C + 1)}, {"class_counts": [3] * C}),
}
"""Each option with settings under which it matters, and another value of it."""


def trace(options):
    """Weights after some steps, times the index was brought up to date, and the kind of the last gradient."""
    head = make_head(**{"optimizer": "adam", "learning_rate": 0.1, **options})
    train(head, 8)
    kind = None if head.weight.grad is None else head.weight.grad.layout
    return head.weight.detach().clone(), head.stats().rehashes, kind


@pytest.mark.parametrize("option", [item.name for item in dataclasses.fields(SamplingOptions)])
def test_every_option_changes_something(option):
    common, change = CHANGES[option]
    before, after = trace(common), trace(common | change)
    assert not torch.equal(before[0], after[0]) or before[1:] != after[1:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "auto"}, "'mode' setting must be one of shared, per_sample, exact"),
        ({"optimizer": "sgd"}, "'optimizer' setting must be one of adam, rowwise_adam, rowwise_adagrad"),
        ({"pool_size": 0}, "'pool_size' setting must be a whole number at least 1. Got 0"),
        ({"index": "simhas"}, "Did you mean 'simhash'"),
        ({"index_options": {"bits": 99}}, "'bits' parameter"),
        ({"index": "none", "index_options": {"bits": 4}}, "'index_options' setting must be empty"),
        ({"batch_share": 0.25}, "'batch_share' setting must be 0 in shared mode"),
        ({"random_share": 0.9, "batch_share": 0.2}, "'batch_share' setting must be at most"),
        ({"random_power": 0.5}, "'class_counts' parameter of ClassSampler must be given"),
        ({"random_power": 0.5, "class_counts": [1, 2]}, "must hold 200 finite counts"),
        ({"correction": "logq"}, "'class_counts' setting must be given where 'correction' is logq"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(options, message):
    with pytest.raises(ConfigError, match=message):
        make_head(**options)
