"""The hash index for weights on a GPU held against the one for weights on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from slidex.lsh import make_index, voting
from slidex.lsh.reading import scratch_size

if TYPE_CHECKING:
    from slidex.lsh import HashIndex

VARIANTS = [
    ("simhash", {"bits": 4, "tables": 6}),
    ("simhash", {"bits": 3, "tables": 4, "probes": 1, "min_votes": 2, "max_bucket": 20}),
    (
        "simhash",
        {
            "bits": 3,
            "tables": 4,
            "max_bucket": 9,
            "overflow": "reservoir",
            "center": True,
            "norm_augmentation": True,
        },
    ),
    ("dwta", {"bits": 4, "tables": 6, "bin_size": 4}),
]
PARITY = [
    ("simhash", {"bits": 3, "tables": 5, "probes": 2}),
    ("simhash", {"bits": 16, "tables": 3, "probes": 1, "projection": "sparse"}),
    ("simhash", {"bits": 17, "tables": 3, "norm_augmentation": True}),
    ("simhash", {"bits": 2, "tables": 4, "max_bucket": 7, "center": True}),
    ("simhash", {"bits": 2, "tables": 4, "max_bucket": 7, "overflow": "reservoir", "min_votes": 2}),
    ("simhash", {"bits": 2, "tables": 4, "max_bucket": 7, "overflow": "first", "probes": 1}),
    ("dwta", {"bits": 5, "tables": 4, "bin_size": 4, "probes": 3}),
    ("dwta", {"bits": 7, "tables": 4, "bin_size": 8, "max_bucket": 5}),
]


def votes_of(index: HashIndex, codes_NLV: np.ndarray, step: int) -> np.ndarray:
    """Votes of every class of an index on the CPU for every query, (N, C)."""
    buckets, seed = index.tables._buckets(), index.tables._seed
    keys_N = voting.query_keys(codes_NLV, seed, np.uint64(step))
    votes_NC = np.zeros((len(codes_NLV), index.num_classes), dtype=np.uint16)
    scratch = np.empty(scratch_size(buckets), dtype=np.int32)
    for codes_LV, key, votes in zip(codes_NLV, keys_N, votes_NC, strict=True):
        lists = (np.empty(index.num_classes + 1, dtype=np.int32) for _ in range(2))
        voting._vote(buckets, codes_LV, key, scratch, votes, *lists)
    return votes_NC


def made(variant, weight_CD: torch.Tensor, bias_C: torch.Tensor) -> HashIndex:
    name, settings = variant
    index = make_index(name, weight_CD.shape[1], len(weight_CD), seed=5, **settings)
    index.build(weight_CD, bias_C)
    return index


def random_problem(num_classes: int, num_rows: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Weights, bias and hidden vectors, some with nothing to scale by or with empty bins."""
    generator = torch.Generator().manual_seed(1)
    weight_CD = torch.randn(num_classes, width, generator=generator) + 0.5
    weight_CD[3], weight_CD[4, 2:] = 0, 0
    bias_C = torch.randn(num_classes, generator=generator)
    hidden_ND = torch.randn(num_rows, width, generator=generator).clamp(min=0)
    return [tensor.to(dtype) for tensor in (weight_CD, bias_C, hidden_ND)]


def assert_equal(ours: HashIndex, cpu: HashIndex, hidden_ND: torch.Tensor) -> None:
    """Same codes, buckets, votes and pools; of equal votes a query may take others.

    Args:
        ours: Built on a device.
        cpu: Built on the CPU, of the same settings and weights.
        hidden_ND: On that device.
    """
    for name, value in cpu.state().items():
        assert torch.equal(ours.state()[name].cpu(), value), name
    tables = ours._on_device.tables
    assert np.array_equal(tables.ids.cpu().numpy(), cpu.tables.ids)
    assert np.array_equal(tables.offsets.cpu().numpy(), cpu.tables.offsets)
    codes_NLV = cpu.family.hash_queries(hidden_ND)
    assert np.array_equal(ours.family.hash_queries_on_device(hidden_ND).cpu().numpy(), codes_NLV)
    for step, k in ((0, 12), (5, 150)):
        pool = cpu.pool(hidden_ND, k, step=step)
        assert torch.equal(ours.pool(hidden_ND, k, step=step), pool)
        padded = ours.padded_pool(hidden_ND, k, step=step)
        assert padded.shape == (min(k, cpu.num_classes),)
        assert torch.equal(padded[: len(pool)], pool)
        assert (padded[len(pool) :] == -1).all()
        answer, votes_NC = ours.query(hidden_ND, k, step=step).tolist(), votes_of(cpu, codes_NLV, step)
        for row, votes_C in zip(answer, votes_NC, strict=True):
            found = [c for c in row if c >= 0]
            assert len(set(found)) == len(found)
            best = np.sort(votes_C[votes_C >= cpu.tables._min_votes])[::-1]
            assert np.array_equal(votes_C[found], best[:k])
