"""Candidate indexes, random class samplers and rehash schedules; importing this registers every index."""

import slidex.lsh.faiss_factories  # noqa: F401  (registers its indexes)
from slidex.lsh.dwta import Dwta
from slidex.lsh.exact import ExactIndex, exact_topk, exact_topk_and_total, recall_at_k
from slidex.lsh.faiss_index import FaissIndex
from slidex.lsh.family import DeviceHashFamily, HashFamily
from slidex.lsh.hash_index import HashIndex, register_hash_family
from slidex.lsh.index import (
    CandidateIndex,
    IndexStats,
    QuerySample,
    index_names,
    index_settings,
    make_index,
    register_index,
)
from slidex.lsh.learned import LearnedSimHash
from slidex.lsh.sampler import ClassSampler
from slidex.lsh.schedule import (
    DriftSchedule,
    ExponentialSchedule,
    FixedSchedule,
    RehashSchedule,
)
from slidex.lsh.simhash import SimHash

__all__ = [
    "CandidateIndex",
    "ClassSampler",
    "DeviceHashFamily",
    "DriftSchedule",
    "Dwta",
    "ExactIndex",
    "ExponentialSchedule",
    "FaissIndex",
    "FixedSchedule",
    "HashFamily",
    "HashIndex",
    "IndexStats",
    "LearnedSimHash",
    "QuerySample",
    "RehashSchedule",
    "SimHash",
    "exact_topk",
    "exact_topk_and_total",
    "index_names",
    "index_settings",
    "make_index",
    "recall_at_k",
    "register_hash_family",
    "register_index",
]
