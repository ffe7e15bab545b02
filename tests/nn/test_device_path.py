"""A head on a GPU's path against one on the CPU's: the same classes, losses, gradients and rows, without waiting."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import scipy.sparse
import torch

from slidex.data import CsrArrays
from slidex.errors import ConfigError, DivergedError
from slidex.kernels import OPTIMIZERS
from slidex.nn import LSHSoftmaxLoss, SamplingOptions
from slidex.nn.device_labels import DeviceLabels
from slidex.nn.scoring import Rows, Scorer
from slidex.nn.sharding import Shard
from tests.nn.device_path import on_device, take_device_path
from tests.waiting import NoWaiting

C, D, N = 120, 8, 10
COUNTS = list(range(1, C + 1))
pytestmark = pytest.mark.usefixtures("one_thread")
CASES = {
    "shared": {},
    "shared-dwta": {"index": "dwta", "index_options": {"bits": 4, "tables": 6}},
    "shared-exact-index": {"index": "exact"},
    "shared-random": {"index": "none", "correction": "none"},
    "shared-logq": {"correction": "logq", "class_counts": COUNTS, "random_power": 0.5},
    "shared-all": {"pool_size": 4 * C},
    "per_sample": {"mode": "per_sample"},
    "per_sample-corrected": {"mode": "per_sample", "correction": "stratified", "batch_share": 0.2},
    "per_sample-power": {
        "mode": "per_sample",
        "correction": "logq",
        "random_power": 0.5,
        "class_counts": COUNTS,
    },
    "per_sample-few-of-the-batch": {"mode": "per_sample", "active_size": 8, "batch_share": 0.5},
    "per_sample-random": {"mode": "per_sample", "index": "none"},
    "exact": {"mode": "exact"},
}
cases = pytest.mark.parametrize("case", CASES)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_head(case, dtype=torch.float64, reduction="mean", smoothing=0.0, weight=None, **options):
    defaults = {"pool_size": 24, "active_size": 16, "precision": "float32", "rehash_every": 2}
    head = LSHSoftmaxLoss(
        D,
        C,
        bias=True,
        dtype=dtype,
        reduction=reduction,
        label_smoothing=smoothing,
        weight=weight,
        options=SamplingOptions(**{**defaults, **CASES[case], **options}),
    )
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(generator=generator(1))
    return head


def class_ids(step):
    target_N = torch.randint(C, (N,), generator=generator(step + 50))
    target_N[3] = target_N[4]
    target_N[5] = -100
    return target_N


def padded(step):
    """Up to three labels a row, pads anywhere, some rows without any."""
    target_NP = torch.rand(N, C, generator=generator(step + 50)).topk(3).indices
    return target_NP.masked_fill(torch.rand(N, 3, generator=generator(step)) < 0.4, -1)


def sparse(step):
    target_NP = padded(step)
    row, _ = (target_NP >= 0).nonzero(as_tuple=True)
    ids = target_NP[target_NP >= 0]
    return scipy.sparse.csr_matrix((np.ones(len(ids)), (row.numpy(), ids.numpy())), (N, C))


def arrays(step):
    rows = sparse(step)
    return CsrArrays(rows.indptr.astype(np.int64), rows.indices, None, C)


TARGETS = {"ids": class_ids, "padded": padded, "sparse": sparse, "arrays": arrays}


def run(head, targets, steps=4, upstream=None, optimizer=None, mode=contextlib.nullcontext):
    """Losses, hidden gradients, gradients of the rows and active classes of some steps, then all rows and states."""
    seen = []
    for step in range(steps):
        hidden_ND = torch.randn(N, D, dtype=torch.float64, generator=generator(step)).requires_grad_()
        target = targets(step)
        with mode():
            loss = head(hidden_ND, target)
            loss.backward(torch.linspace(0.5, 1.5, N).double() if loss.dim() else upstream)
        seen += [loss.detach(), hidden_ND.grad]
        if optimizer is not None:
            seen += [p.grad.to_dense().clone() for p in head.parameters()]
            optimizer.step()
            optimizer.zero_grad()
        seen.append(torch.tensor(head.stats().active_classes))
        seen.append(torch.tensor(head.stats().classes_seen))
    states = [t for name, t in head.optimizer_state_dict().items()]
    return seen + [p.detach().clone() for p in head.parameters()] + states


def assert_same(monkeypatch, make, targets, **options):
    """`make` gives a head; it is run on either path."""
    take_device_path(monkeypatch, taken=False)
    want = run(make(), targets, **options)
    take_device_path(monkeypatch)
    got = run(make(), targets, **options, mode=NoWaiting)
    assert len(got) == len(want)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@cases
@pytest.mark.parametrize("target", TARGETS)
def test_fused_steps_are_those_of_the_cpu(monkeypatch, case, target):
    assert_same(monkeypatch, lambda: make_head(case, optimizer="adam", learning_rate=0.05), TARGETS[target])


@pytest.mark.parametrize("case", ["shared", "per_sample", "exact"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer(monkeypatch, case, optimizer):
    assert_same(
        monkeypatch,
        lambda: make_head(case, optimizer=optimizer, learning_rate=0.05, weight_decay=0.1),
        padded,
    )


@pytest.mark.parametrize("case", ["shared", "per_sample", "per_sample-corrected", "exact"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_every_argument_of_the_loss(monkeypatch, case, reduction, smoothing, weighted):
    weight_C = torch.rand(C, dtype=torch.float64, generator=generator(4)) + 0.1 if weighted else None

    def make():
        return make_head(case, optimizer="adam", reduction=reduction, smoothing=smoothing, weight=weight_C)

    assert_same(monkeypatch, make, padded, upstream=torch.tensor(0.7).double())


@pytest.mark.parametrize("case", ["shared", "shared-logq", "per_sample", "exact"])
@pytest.mark.parametrize("sparse_grad", [True, False])
def test_gradients_of_the_rows_are_those_of_the_cpu(monkeypatch, case, sparse_grad):
    """Rows with classes of their own have as many touched rows as they have: the one size that is waited for."""

    results = []
    for taken in (False, True):
        take_device_path(monkeypatch, taken=taken)
        head = make_head(case, sparse_grad=sparse_grad)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
        mode = NoWaiting if taken and not case.startswith("per_sample") else contextlib.nullcontext
        results.append(run(head, padded, optimizer=optimizer, mode=mode))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


def test_pads_touch_no_row_of_a_sparse_gradient(monkeypatch):
    take_device_path(monkeypatch)
    head = make_head("shared")
    hidden_ND = torch.randn(N, D, dtype=torch.float64, generator=generator())
    head(hidden_ND, torch.full((N,), 7)).backward()
    touched = head.weight.grad.coalesce().indices()[0]
    assert len(touched) == head.stats().active_classes < head.weight.grad._nnz()
    assert head.weight.grad._values().shape == (N + 24, D)


@pytest.mark.parametrize("case", ["shared", "per_sample", "exact"])
def test_no_label_at_all_is_nan_as_on_the_cpu(monkeypatch, case):
    take_device_path(monkeypatch)
    hidden_ND = torch.randn(N, D, dtype=torch.float64, generator=generator())
    nothing = torch.full((N,), -100)
    assert make_head(case, reduction="sum")(hidden_ND, nothing) == 0
    assert (make_head(case, reduction="none")(hidden_ND, nothing) == 0).all()
    head = make_head(case, optimizer="adam")
    before, loss = head.weight.clone(), head(hidden_ND, nothing)
    assert loss.isnan()
    loss.backward()
    assert torch.equal(head.weight, before)
    with pytest.raises(DivergedError, match="is not finite; its update was not applied"):
        head.stats()


@pytest.mark.parametrize("case", ["shared", "per_sample", "exact"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_writes_nothing_and_is_told_by_the_next_call(monkeypatch, case, bad):
    take_device_path(monkeypatch)
    head = make_head(case, index="none", optimizer="adam", learning_rate=0.1)
    run(head, class_ids, steps=1)
    before = [p.clone() for p in head.parameters()]
    moments = [t.clone() for n, t in head.optimizer_state_dict().items() if n != "counts"]
    hidden_ND = torch.randn(N, D, dtype=torch.float64, generator=generator())
    hidden_ND[2, 3] = bad
    hidden_ND.requires_grad_()
    with NoWaiting():
        head(hidden_ND, class_ids(1)).backward()
    assert (hidden_ND.grad == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), before, strict=True))
    after = [t for n, t in head._sampling._updater.tensors().items()]
    assert all(torch.equal(a, b) for a, b in zip(after, moments, strict=True))
    message = (
        r"loss of step 2, or its gradient, is not finite; its update was not applied\. Lower 'learning_rate'"
    )
    with pytest.raises(DivergedError, match=message):
        head(hidden_ND, class_ids(1))
    head.stats()


WRONG = [
    (torch.tensor([C] + [0] * (N - 1)), "class ids from 0 to 119. Got another id in row 0 of step 1"),
    (torch.tensor([0] * (N - 1) + [-1]), "class ids from 0 to 119. Got another id in row 9 of step 1"),
    (
        torch.tensor([[4, -1, 4]] + [[1, 2, -1]] * (N - 1)),
        "distinct classes in each row. Got a class twice in row 0",
    ),
    (torch.tensor([[1, 2, -1]] * (N - 1) + [[0, -2, 1]]), "Got another id in row 9"),
]


@pytest.mark.parametrize("case", ["shared", "per_sample", "exact"])
@pytest.mark.parametrize(("target", "message"), WRONG)
def test_wrong_class_ids_write_nothing_and_are_told_by_the_next_call(monkeypatch, case, target, message):
    take_device_path(monkeypatch)
    head = make_head(case, optimizer="adam")
    run(head, class_ids, steps=1)
    before = head.weight.clone()
    hidden_ND = torch.randn(N, D, dtype=torch.float64, generator=generator())
    with NoWaiting():
        head(hidden_ND, target).backward()
    assert torch.equal(head.weight, before)
    with pytest.raises(ConfigError, match=message):
        head.stats()


def test_wrong_forms_of_a_target_are_refused_at_once(monkeypatch):
    take_device_path(monkeypatch)
    hidden_ND = torch.randn(N, D, dtype=torch.float64)
    for target in (torch.zeros(N), torch.zeros(N + 1, dtype=torch.long)):
        with pytest.raises(ConfigError, match="'target' parameter of LSHSoftmaxLoss must be int64 class ids"):
            make_head("shared")(hidden_ND, target)
    with pytest.raises(ConfigError, match=r"of shape \(10, 120\)"):
        make_head("shared")(hidden_ND, scipy.sparse.csr_matrix(([1], ([0], [0])), (N, C + 1)))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_rows_on_the_device_are_read_by_the_host(monkeypatch):
    take_device_path(monkeypatch)
    rows = sparse(0)
    parts = (torch.from_numpy(part.astype(np.int64)) for part in (rows.indptr, rows.indices))
    target = torch.sparse_csr_tensor(*parts, torch.ones(rows.nnz), (N, C), check_invariants=True)
    hidden_ND = torch.randn(N, D, dtype=torch.float64, generator=generator())
    assert torch.equal(make_head("shared")(hidden_ND, target), make_head("shared")(hidden_ND, rows))


def test_an_index_that_only_the_cpu_has_is_refused_by_name(monkeypatch):
    take_device_path(monkeypatch)
    for options in ({"index": "learned"}, {"index": "faiss-flat"}):
        with pytest.raises(ConfigError, match="'index' setting must be simhash, dwta, exact or none"):
            make_head("shared", **options)


def test_a_sharded_head_is_refused():
    scorer = Scorer("exact", shard=Shard(None, 0, 2, C, 0, C // 2))
    with pytest.raises(ConfigError, match=r"LSHSoftmaxLoss.shard has spread .* must be on the CPU"):
        scorer.place(on_device(torch.device("cpu")), "none")


@pytest.mark.parametrize("case", ["shared", "per_sample", "exact"])
def test_bfloat16_weights_train_in_float32(monkeypatch, case):
    take_device_path(monkeypatch)
    head, other = (make_head(case, dtype, optimizer="adam") for dtype in (torch.bfloat16, torch.float64))
    hidden_ND = torch.randn(N, D, generator=generator()).bfloat16()
    with torch.no_grad():
        for mine, theirs in zip(head.parameters(), other.parameters(), strict=True):
            theirs.copy_(mine)
    loss, before = head(hidden_ND, class_ids(0)), head.weight.clone()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), other(hidden_ND.double(), class_ids(0)), rtol=1e-5, atol=1e-5)
    loss.backward()
    assert head.weight.dtype == torch.bfloat16
    assert not torch.equal(head.weight, before)
    assert head.optimizer_state_dict()["weight.moment2"].dtype == torch.float32
    for sparse_grad in (True, False):
        plain = make_head(case, torch.bfloat16, sparse_grad=sparse_grad)
        plain(hidden_ND, class_ids(0)).backward()
        assert plain.weight.grad.dtype == torch.bfloat16
    assert head.topk(hidden_ND, 3).scores.dtype == torch.float32


def test_a_head_that_moves_builds_its_index_anew_and_keeps_its_optimizer(monkeypatch):
    take_device_path(monkeypatch, taken=False)
    head, other = (make_head("shared", optimizer="adam", rehash_every=1000) for _ in range(2))
    run(head, class_ids, steps=2)
    run(other, class_ids, steps=2)
    take_device_path(monkeypatch)
    head._sampling.placement = head._sampling._place(torch.device("cpu"))
    run(head, class_ids, steps=1)
    other.rehash()
    run(other, class_ids, steps=1)
    assert head.stats().index.builds == other.stats().index.builds == 2
    torch.testing.assert_close(head.weight, other.weight, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", ["shared", "per_sample"])
def test_topk_is_that_of_the_cpu(monkeypatch, case):
    hidden_ND = torch.randn(N, D, dtype=torch.float64, generator=generator())
    best = []
    for taken in (False, True):
        take_device_path(monkeypatch, taken=taken)
        head = make_head(case)
        best.append([*head.topk(hidden_ND, 4), *head.topk(hidden_ND, 4, indexed=True, candidates=30)])
    for mine, theirs in zip(*best, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("case", ["shared", "per_sample", "exact"])
@pytest.mark.parametrize(("rows", "labels"), [(0, 2), (3, 0), (1, 1)])
def test_small_batches(monkeypatch, case, rows, labels):
    def steps(head):
        hidden_ND = torch.randn(rows, D, dtype=torch.float64, generator=generator()).requires_grad_()
        target_NP = torch.arange(rows * labels).reshape(rows, labels)
        loss = head(hidden_ND, target_NP)
        loss.backward()
        return loss.detach(), hidden_ND.grad, head.weight.detach(), torch.tensor(head.stats().classes_seen)

    results = []
    for taken in (False, True):
        take_device_path(monkeypatch, taken=taken)
        results.append(steps(make_head(case, reduction="sum", optimizer="adam", index="none")))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("loss", ["softmax", "logistic"])
@pytest.mark.parametrize("padded_NP", [[[3], [-1], [0]], [[3, -1], [-1, -1], [-1, 0]]])
def test_pads_are_no_labels(loss, padded_NP):
    """Wherever they stand, and in whatever loss."""
    rows = Rows(torch.randn(5, D, dtype=torch.float64, generator=generator()), None)
    hidden_ND = torch.randn(3, D, dtype=torch.float64, generator=generator(1))
    here, there = Scorer("exact", loss=loss), Scorer("exact", loss=loss)
    there.place(on_device(torch.device("cpu")), "none")
    labels = CsrArrays(np.array([0, 1, 1, 2]), np.array([3, 0], dtype=np.int32), None, 5)
    want = here.score(rows, hidden_ND, labels, 0)
    got = there.score(rows, hidden_ND, DeviceLabels.from_padded(torch.tensor(padded_NP), 5), 0)
    torch.testing.assert_close(got.loss_N, want.loss_N, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.grad, want.grad, rtol=1e-9, atol=1e-12)


def test_scores_of_bfloat16_products_are_float32_on_a_device():
    """Those of the CPU's kernels stay in bfloat16."""
    rows = Rows(torch.randn(5, D, generator=generator()), None)
    here, there = (Scorer("exact", precision="bfloat16") for _ in range(2))
    there.place(on_device(torch.device("cpu")), "none")
    hidden_ND = torch.randn(3, D, generator=generator(1))
    labels = CsrArrays(np.arange(4), np.array([3, 0, 4], dtype=np.int32), None, 5)
    assert here.score(rows, hidden_ND, labels, 0).grad.dtype == torch.bfloat16
    padded = DeviceLabels.from_padded(torch.tensor([[3], [0], [4]]), 5)
    assert there.score(rows, hidden_ND, padded, 0).grad.dtype == torch.float32
