"""One process of tests/nn/test_sharding.py: ``sharding_worker.py RANK SIZE FILE``. Fails by an assertion.

Every process computes the one-process answer for itself, from all processes' classes.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from itertools import product

import numpy as np
import torch
import torch.distributed as dist

from slidex.data import CsrArrays
from slidex.kernels import cpu as kernels
from slidex.nn.candidates import label_weights
from slidex.nn.options import SamplingOptions
from slidex.nn.scoring import Rows, Scorer
from slidex.nn.selection import make_selector, settle_sampling
from slidex.nn.sharding import Shard, part_of
from slidex.nn.smoothing import LabelMass

N, C, D, STEP = 24, 37, 8, 5


def random_labels(rng: np.random.Generator, classes: int) -> CsrArrays:
    """No, one or more labels a row."""
    rows = [np.sort(rng.choice(classes, min(n % 4, classes), replace=False)) for n in range(N)]
    indptr = np.cumsum([0, *map(len, rows)])
    return CsrArrays(indptr, np.concatenate(rows).astype(np.int32), None, classes)


def problem(dtype: torch.dtype, classes: int = C) -> tuple[Rows, torch.Tensor, CsrArrays]:
    """Weights and biases, hidden vectors of all processes' rows, and their labels."""
    torch.manual_seed(1)
    rows = Rows(torch.randn(classes, D, dtype=dtype), torch.randn(classes, dtype=dtype))
    return rows, torch.randn(N, D, dtype=dtype), random_labels(np.random.default_rng(1), classes)


def of_shard(rows: Rows, begin: int, end: int) -> Rows:
    return Rows(rows.weight[begin:end], None if rows.bias is None else rows.bias[begin:end])


def with_mass(labels: CsrArrays, weights: torch.Tensor | None = None) -> CsrArrays:
    mass = label_weights(labels) if weights is None else weights
    return CsrArrays(labels.indptr, labels.indices, mass.numpy(), labels.num_columns)


def close(got: torch.Tensor, expected: torch.Tensor, what: object) -> None:
    assert got.shape == expected.shape, what
    assert got.dtype == expected.dtype, what
    worst = float(((got - expected).abs() / expected.abs().clamp(min=1)).max()) if got.numel() else 0.0
    assert worst <= (1e-12 if got.dtype == torch.float64 else 1e-6), (what, worst)


def same_everywhere(shard: Shard, x: torch.Tensor) -> None:
    assert all(torch.equal(x, other) for other in shard.gather(x))


def check_pieces(group: dist.ProcessGroup) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    for classes in (C, size, 1):
        parts = [part_of(classes, part, size) for part in range(size)]
        assert [c for begin, end in parts for c in range(begin, end)] == list(range(classes))
        assert max(e - b for b, e in parts) - min(e - b for b, e in parts) <= 1
        shard = Shard.of(classes, group)
        assert (shard.rank, shard.size, shard.begin, shard.end) == (rank, size, *parts[rank])
    shard = Shard.of(C)
    own = torch.full((rank * 2, 3), float(rank))  # process 0 has none
    expected = torch.cat([torch.full((r * 2, 3), float(r)) for r in range(size)])
    for counts in (None, [2 * r for r in range(size)]):
        gathered, found = shard.gather_rows(own, counts)
        assert torch.equal(gathered, expected)
        assert found == [2 * r for r in range(size)]
        assert torch.equal(shard.take_own(gathered, found), own)
    whole = random_labels(np.random.default_rng(2), C)
    first, last = part_of(N, rank, size)
    labels = shard.gather_labels(whole.slice(first, last))
    assert np.array_equal(labels.indptr, whole.indptr)
    assert np.array_equal(labels.indices, whole.indices)
    local = shard.local(with_mass(whole))
    assert local.num_columns == shard.end - shard.begin
    for n in range(N):
        ids = whole.indices[whole.indptr[n] : whole.indptr[n + 1]]
        mine = ids[(ids >= shard.begin) & (ids < shard.end)]
        here = slice(local.indptr[n], local.indptr[n + 1])
        assert np.array_equal(local.indices[here] + shard.begin, mine)
        assert np.allclose(local.values[here], 1 / max(1, len(ids)))
    assert shard.reduce(torch.tensor([rank, -rank]), "max").tolist() == [size - 1, 0]
    assert shard.reduce(torch.tensor([rank, 1])).tolist() == [size * (size - 1) // 2, size]


def check_exact(dtype: torch.dtype, classes: int, loss: str, smoothing: float, bias: bool) -> None:
    what = (dtype, classes, loss, smoothing, bias)
    rows, hidden_ND, labels = problem(dtype, classes)
    rows = rows if bias else Rows(rows.weight, None)
    torch.manual_seed(2)
    mass = None
    if loss == "softmax":
        class_weights = torch.rand(classes, dtype=dtype) if smoothing else None
        mass = LabelMass(label_weights(labels) * torch.rand(labels.nnz), smoothing, class_weights)
    expected = Scorer("exact", loss=loss).score(rows, hidden_ND, labels, STEP, row_scale=1 / N, mass=mass)
    expected_hidden_ND = Scorer("exact", loss=loss).hidden_grad(expected)

    shard = Shard.of(classes)
    part = slice(shard.begin, shard.end)
    local = shard.local(labels if mass is None else with_mass(labels, mass.weights))
    if mass is not None:
        weights_C = None if mass.class_weights is None else mass.class_weights[part]
        mass = LabelMass(torch.from_numpy(local.values), smoothing, weights_C)
    scorer = Scorer("exact", loss=loss, shard=shard)
    own = of_shard(rows, shard.begin, shard.end)
    scored = scorer.score(own, hidden_ND, local, STEP, row_scale=1 / N, mass=mass)
    close(scored.loss_N, expected.loss_N, what)
    same_everywhere(shard, scored.loss_N)
    close(scored.grad, expected.grad[:, part], what)
    close(shard.reduce(scorer.hidden_grad(scored)), expected_hidden_ND, what)
    ids_U, weight_UD, bias_U = scorer.rows_grad(scored)
    _, all_weight_CD, all_bias_C = Scorer("exact", loss=loss).rows_grad(expected)
    assert ids_U.tolist() == list(range(shard.end - shard.begin))
    close(weight_UD, all_weight_CD[part], what)
    close(bias_U, all_bias_C[part], what)


def check_sampled(mode: str, loss: str, correction: str) -> None:
    """Against one process that scores the union of what the processes' selectors choose, with their offsets."""
    what = (mode, loss, correction)
    rows, hidden_ND, labels = problem(torch.float64)
    size = dist.get_world_size()
    settings = settle_sampling(
        SamplingOptions(mode=mode, pool_size=10, active_size=9, index="none", correction=correction, seed=4)
    )
    parts = [part_of(C, part, size) for part in range(size)]
    selectors = [
        make_selector(settings, D, end - begin, np.ones(end - begin, dtype=np.int64), part=part, parts=size)
        for part, (begin, end) in enumerate(parts)
    ]
    assert sum(selector.random + selector.batch for selector in selectors) == (10 if mode == "shared" else 9)
    shard = Shard.of(C)
    local = shard.local(with_mass(labels))
    scorer = Scorer(mode, loss=loss, selector=selectors[shard.rank], shard=shard)
    scored = scorer.score(
        of_shard(rows, shard.begin, shard.end),
        hidden_ND,
        local,
        STEP,
        mass=LabelMass(torch.from_numpy(local.values)),
    )
    ids, offsets = [], []
    for selector, (begin, end) in zip(selectors, parts, strict=True):
        kept = Shard(None, 0, 1, C, begin, end).local(labels)
        if mode == "shared":
            chosen = selector.pool(hidden_ND, kept, STEP)
            ids_NA, offset = chosen.ids_U.expand(N, -1), chosen.offset_U
        else:
            chosen = selector.active_sets(hidden_ND, kept, STEP)
            ids_NA, offset = chosen.active_NA, chosen.offset_NA
        ids.append(torch.where(ids_NA >= 0, ids_NA + begin, -1))
        offsets.append(
            torch.zeros(ids_NA.shape, dtype=torch.float64) if offset is None else offset.expand(N, -1)
        )
    first = sum(part.shape[1] for part in ids[: shard.rank])
    mine = slice(first, first + ids[shard.rank].shape[1])
    active_NA, offset_NA = torch.cat(ids, 1), torch.cat(offsets, 1)
    logits_NA = kernels.pair_logits(hidden_ND, rows.weight, rows.bias, active_NA)
    truth_NC = torch.zeros(N, C, dtype=torch.float64)
    truth_NC[labels.row_ids(), labels.indices] = label_weights(labels).double()
    target_NA = torch.where(active_NA >= 0, truth_NC.gather(1, active_NA.clamp(min=0)), 0)
    if loss == "softmax":
        loss_N, grad_NA = kernels.softmax_loss(logits_NA, target_NA, offset_NA)
    else:
        loss_N, grad_NA = kernels.logistic_loss(logits_NA, (target_NA > 0).double(), offset_NA.exp())
    close(scored.loss_N, loss_N, what)
    same_everywhere(shard, scored.loss_N)
    close(scored.grad, grad_NA[:, mine].contiguous(), what)
    expected_hidden_ND = kernels.pair_hidden_grad(grad_NA, rows.weight, active_NA)
    close(shard.reduce(scorer.hidden_grad(scored)), expected_hidden_ND, what)


def check_smoothed_samples(mode: str) -> None:
    """What is spread over the classes is normalised over all processes' active ones: a row's gradient adds up to 0."""
    rows, hidden_ND, labels = problem(torch.float64)
    shard = Shard.of(C)
    settings = settle_sampling(SamplingOptions(mode=mode, pool_size=10, active_size=9, index="none"))
    selector = make_selector(settings, D, shard.end - shard.begin, None, part=shard.rank, parts=shard.size)
    local = shard.local(with_mass(labels))
    mass = LabelMass(torch.from_numpy(local.values), 0.25)
    scored = Scorer(mode, selector=selector, shard=shard).score(
        of_shard(rows, shard.begin, shard.end), hidden_ND, local, STEP, mass=mass
    )
    same_everywhere(shard, scored.loss_N)
    sums_N = shard.reduce(scored.grad.sum(1))
    close(sums_N, torch.zeros(N, dtype=torch.float64), mode)
    assert scored.loss_N[np.diff(labels.indptr) == 0].eq(0).all()
    assert scored.loss_N[np.diff(labels.indptr) > 0].gt(0).all()


def check_not_finite() -> None:
    """One process's scores are not finite: all have a loss of NaN for the row, and a row without labels has none."""
    rows, hidden_ND, labels = problem(torch.float32)
    shard = Shard.of(C)
    own = Rows(rows.weight[shard.begin : shard.end].clone(), None)
    for value in (torch.nan, torch.inf):
        if shard.rank == shard.size - 1:
            own.weight[0, 0] = value
        scored = Scorer("exact", shard=shard).score(own, hidden_ND.abs(), shard.local(labels), STEP)
        labelled_N = torch.from_numpy(np.diff(labels.indptr) > 0)
        assert scored.loss_N[labelled_N].isnan().all()
        assert scored.loss_N[~labelled_N].eq(0).all()
        assert scored.grad[~labelled_N].eq(0).all()


def check_topk() -> None:
    rows, hidden_ND, _ = problem(torch.float32)
    shard = Shard.of(C)
    for k in (1, 5, C + 3):
        scores_NK, ids_NK = shard.merge_topk(
            *kernels_topk(of_shard(rows, shard.begin, shard.end), hidden_ND, k)
        )
        expected_scores, expected_ids = kernels_topk(rows, hidden_ND, k)
        assert torch.equal(ids_NK, expected_ids)
        finite = expected_scores.isfinite()
        assert torch.equal(finite, scores_NK.isfinite())
        close(scores_NK[finite], expected_scores[finite], k)


def kernels_topk(rows: Rows, hidden_ND: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    from slidex.lsh import exact_topk

    return exact_topk(hidden_ND, rows.weight, rows.bias, k)


def main(rank: int, size: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    check_pieces(dist.new_group(list(range(size))))
    for dtype, classes, bias in product((torch.float32, torch.float64), (C, size - 1), (True, False)):
        for loss, smoothing in (("softmax", 0.0), ("softmax", 0.3), ("logistic", 0.0)):
            check_exact(dtype, classes, loss, smoothing, bias)
    for mode, loss, correction in product(
        ("shared", "per_sample"), ("softmax", "logistic"), ("none", "stratified")
    ):
        check_sampled(mode, loss, correction)
    for mode in ("shared", "per_sample"):
        check_smoothed_samples(mode)
    check_not_finite()
    check_topk()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
