"""One process of tests/nn/test_sharded_head.py: ``head_worker.py RANK SIZE FILE``. Fails by an assertion.

Every process computes the one-process answer for itself, from all processes' rows and classes.
"""

from __future__ import annotations

import sys
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel

from slidex.errors import ConfigError
from slidex.nn import LSHSoftmaxLoss, SamplingOptions

D, C, ROWS = 6, 42, 8
F64 = torch.float64
EXACT = {"mode": "exact", "precision": "float32"}
ALL_ACTIVE = {"pool_size": 8 * C, "active_size": 8 * C, "precision": "float32", "correction": "stratified"}
PER_SAMPLE = ALL_ACTIVE | {"mode": "per_sample", "batch_share": 0.0}
LOGQ = ALL_ACTIVE | {"correction": "logq", "class_counts": torch.arange(1, C + 1)}


def close(got: torch.Tensor, want: torch.Tensor, what: object) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11, msg=lambda text: f"{what}: {text}")


def layer(classes: int = C) -> torch.nn.Linear:
    torch.manual_seed(1)
    return torch.nn.Linear(D, classes, dtype=F64)


def rows(rank: int, count: int, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    hidden_ND = torch.randn(count, D, dtype=F64, generator=generator)
    target_N = torch.randint(0, C, (count,), generator=generator)
    if count:
        target_N[0] = -100
    return hidden_ND, target_N


def own_part(head: LSHSoftmaxLoss, whole: torch.Tensor) -> torch.Tensor:
    shard = head._shard
    return whole[shard.begin : shard.end]


def check_loss_and_gradients(rank: int, size: int) -> None:
    """Processes with different numbers of rows: each has its own rows' loss; the layer, the mean of the gradients."""
    counts = [ROWS - 3 * r for r in range(size)]
    for reduction in ("mean", "none"):
        for smoothing, weight_C in (
            (0.0, None),
            (0.1, torch.rand(C, generator=torch.Generator().manual_seed(2)) + 0.1),
        ):
            for options in (None, EXACT, ALL_ACTIVE, LOGQ, PER_SAMPLE):
                linear, losses, inputs, upstreams = layer(), [], [], []
                for r in range(size):
                    hidden_ND, target_N = rows(r, counts[r])
                    inputs.append(hidden_ND.requires_grad_())
                    weight = None if weight_C is None else weight_C.double()
                    losses.append(
                        F.cross_entropy(
                            linear(hidden_ND),
                            target_N,
                            weight,
                            reduction=reduction,
                            label_smoothing=smoothing,
                        )
                    )
                    upstreams.append(torch.rand_like(losses[-1].detach()) + 0.5)
                want = torch.autograd.grad(losses, [inputs[rank], *linear.parameters()], upstreams)
                head = LSHSoftmaxLoss.from_linear(
                    linear,
                    reduction=reduction,
                    weight=weight_C,
                    label_smoothing=smoothing,
                    options=options and SamplingOptions(**options, sparse_grad=False),
                ).shard()
                hidden_ND, target_N = rows(rank, counts[rank])
                loss = head(hidden_ND.requires_grad_(), target_N)
                what = rank, reduction, smoothing, options and options.get("mode")
                close(loss, losses[rank].detach(), what)
                got = torch.autograd.grad(loss, [hidden_ND, head.weight, head.bias], upstreams[rank])
                close(got[0], want[0], what)
                close(got[1], own_part(head, want[1]) / size, what)
                close(got[2], own_part(head, want[2]) / size, what)


def check_training(rank: int, size: int) -> None:
    """An encoder in DDP and a sharded head with fused Adam become what one process makes of all rows."""
    for settings in (EXACT, ALL_ACTIVE, PER_SAMPLE):
        options = SamplingOptions(**settings, optimizer="adam", learning_rate=0.05, rehash_every=2)
        torch.manual_seed(3)
        encoder, alone = torch.nn.Linear(D, D, dtype=F64), torch.nn.Linear(D, D, dtype=F64)
        alone.load_state_dict(encoder.state_dict())
        whole = LSHSoftmaxLoss.from_linear(layer(), options=options)
        mesh = init_device_mesh("cpu", (size,))
        head = LSHSoftmaxLoss.from_linear(layer(), options=options).shard(mesh)
        wrapped = DistributedDataParallel(encoder)
        optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (encoder, alone)]
        no_group, dist_size = whole._sampling, dist.get_world_size
        for step in range(4):
            parts = [rows(r, ROWS, step) for r in range(size)]
            hidden_ND, target_N = (torch.cat(part) for part in zip(*parts, strict=True))
            dist.get_world_size = lambda *_: 1  # the reference is one process's
            whole(alone(hidden_ND), target_N).backward()
            dist.get_world_size = dist_size
            head(wrapped(parts[rank][0]), parts[rank][1]).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        close(head.weight, own_part(head, whole.weight), ("weight", options.mode))
        close(head.bias, own_part(head, whole.bias), ("bias", options.mode))
        close(encoder.weight, alone.weight, ("encoder", options.mode))
        assert no_group.updates == head.stats().updates == 4
        hidden_ND = parts[rank][0][: ROWS - 2 * rank]
        ids, scores = head.topk(hidden_ND, 5)
        want = whole.topk(hidden_ND, 5)
        assert torch.equal(ids, want.ids)
        close(scores, want.scores, "topk")
        if options.mode != "exact":
            found = head.topk(hidden_ND, 5, indexed=True, candidates=C)
            logits = torch.nn.functional.linear(hidden_ND, whole.weight, whole.bias)
            close(found.scores, logits.gather(1, found.ids), "indexed topk")
        full = head.full_state_dict()
        close(full["weight"], whole.weight, "full state")
        other = LSHSoftmaxLoss.from_linear(layer(), options=options).shard()
        other.load_full_state_dict(full)
        assert torch.equal(other.weight, head.weight)
        head.eval()
        close(
            head(hidden_ND, parts[rank][1][: len(hidden_ND)]),
            whole.eval()(hidden_ND, parts[rank][1][: len(hidden_ND)]),
            "eval",
        )


def check_sampling_differs(rank: int, size: int) -> None:
    """Really sampled: the processes draw different classes, and all see one loss for the same row."""
    options = SamplingOptions(pool_size=6 * size, precision="float32", optimizer="adam")
    head = LSHSoftmaxLoss.from_linear(layer(), reduction="none", options=options).shard()
    hidden_ND, target_N = rows(0, ROWS)
    loss = head(hidden_ND.requires_grad_(), target_N)
    everyone = head._shard.gather(loss.detach())
    for one in everyone:
        close(one, everyone[0], "loss of one row")
    loss.sum().backward()
    assert 6 <= head.stats().active_classes < len(head.weight)
    ranks = LSHSoftmaxLoss(D, C, device="meta", dtype=F64, options=options).shard()
    assert len(ranks.weight) == len(head.weight)
    assert ranks.weight.device.type == "cpu"
    assert ranks.weight.any()


def check_replicas(rank: int, size: int) -> None:
    """In DDP a replicated head is any layer, but for a fused one, which is refused."""
    linear, want = layer(), layer()
    head = LSHSoftmaxLoss.from_linear(linear, options=SamplingOptions(**ALL_ACTIVE, sparse_grad=False))
    wrapped = DistributedDataParallel(head)
    wrapped(*rows(rank, ROWS)).backward()
    losses = [
        F.cross_entropy(want(hidden_ND), target_N)
        for hidden_ND, target_N in (rows(r, ROWS) for r in range(size))
    ]
    (sum(losses) / size).backward()
    close(linear.weight.grad, want.weight.grad, "replica")
    fused = LSHSoftmaxLoss.from_linear(layer(), options=SamplingOptions(optimizer="adam"))
    loss = fused(*rows(rank, ROWS))
    refuses(loss.backward, "processes have copies of one head")
    sharded = LSHSoftmaxLoss.from_linear(layer(), options=SamplingOptions(optimizer="adam")).shard()
    refuses(sharded.shard, "must be called once")
    refuses(
        lambda: sharded.load_full_state_dict({"weight": torch.zeros(3, D)}), "must have 42 rows of 'weight'"
    )
    refuses(LSHSoftmaxLoss(D, 1).shard, "no more processes than classes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its buckets
        DistributedDataParallel(sharded)
    refuses(
        lambda: sharded(*rows(rank, ROWS)),
        "hold the same rows. DistributedDataParallel makes parameters equal",
    )


def refuses(call: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def main(rank: int, size: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=size, timeout=timedelta(seconds=120)
    )
    for check in (check_loss_and_gradients, check_training, check_sampling_differs, check_replicas):
        check(rank, size)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
