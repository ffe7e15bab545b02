"""Candidate indexes, random class samplers and rehash schedules; importing this registers every index."""

from slidex.lsh.exact import ExactIndex, exact_topk, recall_at_k
from slidex.lsh.hash_index import HashIndex
from slidex.lsh.index import CandidateIndex, IndexStats, index_names, index_settings, make_index
from slidex.lsh.sampler import ClassSampler
from slidex.lsh.schedule import (
    DriftSchedule,
    ExponentialSchedule,
    FixedSchedule,
    RehashSchedule,
)

__all__ = [
    "CandidateIndex",
    "ClassSampler",
    "DriftSchedule",
    "ExactIndex",
    "ExponentialSchedule",
    "FixedSchedule",
    "HashIndex",
    "IndexStats",
    "RehashSchedule",
    "exact_topk",
    "index_names",
    "index_settings",
    "make_index",
    "recall_at_k",
]
