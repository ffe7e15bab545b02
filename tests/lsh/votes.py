"""Votes counted by the CPU's kernel, which `tests.lsh.test_tables` holds against plain Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from slidex.lsh import voting
from slidex.lsh.reading import scratch_size

if TYPE_CHECKING:
    from slidex.lsh import HashIndex


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
