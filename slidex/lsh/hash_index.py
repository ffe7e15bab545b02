"""The candidate index over hash tables, for any hash family, and the registry that joins the two.

A family turns rows and queries into codes; the tables below neither know nor care how. A further family needs
the members of `HashFamily` and `register_hash_family`, nothing else. Legend: N rows in a batch, C classes, D
hidden width, K hash bits, L tables, V codes looked up per table.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch

from slidex.errors import ConfigError
from slidex.lsh.index import (
    IndexStats,
    QuerySample,
    check_class_ids,
    check_hidden,
    check_integer,
    check_queries,
    check_weights,
    keyword_settings,
    register_index,
)
from slidex.lsh.tables import BucketTables

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAX_BITS = 24
"""The largest K: a table then has 2^24 buckets, 64 MiB of offsets."""
TARGET_BUCKET_LOAD = 256
"""Classes per bucket that `automatic_bits` aims at."""


class HashFamily(Protocol):
    """What `HashIndex` asks of a family of hash functions; see `SimHash` for shapes and meaning.

    Attributes:
        bits: K; every code lies in ``[0, 2^K)``.
        tables: L.
        probes: V - 1.
        uses_queries: Whether `fit` makes use of its queries.
        query_version: A counter that grows whenever `fit` changes what `hash_queries` gives. What was learned
            about where queries land holds only as long as it stays the same.
    """

    bits: int
    tables: int
    probes: int
    uses_queries: bool
    query_version: int

    @property
    def code_dtype(self) -> np.dtype: ...  # noqa: D102
    @property
    def bytes(self) -> int: ...  # noqa: D102
    def fit(  # noqa: D102
        self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, queries: QuerySample | None
    ) -> None: ...
    def parameters(self) -> dict[str, torch.Tensor]: ...  # noqa: D102
    def load_parameters(self, parameters: Mapping[str, torch.Tensor]) -> None: ...  # noqa: D102
    def hash_rows(  # noqa: D102
        self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, ids: torch.Tensor | None = None
    ) -> np.ndarray: ...
    def hash_queries(self, hidden_ND: torch.Tensor) -> np.ndarray: ...  # noqa: D102


def automatic_bits(num_classes: int) -> int:
    """K for a mean bucket load near `TARGET_BUCKET_LOAD`: ``round(log2(C / load))``, 1 to 24."""
    return min(MAX_BITS, max(1, round(math.log2(max(1.0, num_classes / TARGET_BUCKET_LOAD)))))


class HashIndex:
    """A `CandidateIndex` of bucket tables over a hash family.

    Memory is that of `BucketTables`: with 3.4 M classes and 50 tables, 680 MB of ids and 340 MB of codes.

    Args:
        in_features: Hidden width D.
        num_classes: C.
        family: Its hash functions.
        seed: Keys tie-breaking and bucket windows.
        min_votes: Leave out classes found in fewer buckets than this; 1 to ``L * (1 + probes)``.
        max_bucket: The most classes read from one bucket per query, a window at a random place; None for all.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        family: HashFamily,
        *,
        seed: int,
        min_votes: int = 1,
        max_bucket: int | None = None,
    ) -> None:
        check_integer("min_votes", "make_index", min_votes, 1, family.tables * (1 + family.probes))
        if max_bucket is not None:
            check_integer("max_bucket", "make_index", max_bucket, 1)
        if family.tables * (1 + family.probes) > np.iinfo(np.uint16).max:
            raise ConfigError(
                "The 'tables' parameter of make_index must keep tables * (1 + probes) to at most 65535. "
                f"Got {family.tables} tables and {family.probes} probes instead."
            )
        self.in_features = in_features
        self.num_classes = num_classes
        self.family = family
        self.tables = BucketTables(num_classes, family.tables, family.bits)
        self._vote_settings = {
            "seed": seed,
            "min_votes": min_votes,
            "max_bucket": num_classes if max_bucket is None else max_bucket,
        }
        self.uses_queries = family.uses_queries
        self._built = False
        self._builds = self._updates = self._rows_rehashed = 0
        self._build_seconds = self._update_seconds = 0.0

    def build(
        self,
        weight_CD: torch.Tensor,
        bias_C: torch.Tensor | None = None,
        *,
        queries: QuerySample | None = None,
    ) -> None:
        """Fit the family, hash every row, fill the tables; see `CandidateIndex.build`."""
        started = time.perf_counter()
        check_weights("HashIndex.build", weight_CD, bias_C, self.num_classes, self.in_features)
        check_queries("HashIndex.build", queries, self.num_classes, self.in_features)
        self._built = False  # a build that fails leaves nothing to be queried
        self.family.fit(weight_CD, bias_C, queries)
        self.tables.build(self.family.hash_rows(weight_CD, bias_C))
        self._built = True
        self._builds += 1
        self._build_seconds = time.perf_counter() - started

    def update(self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, changed_ids: torch.Tensor) -> None:
        """Rehash the given rows with the functions of the last build and move those whose code changed.

        See `CandidateIndex.update`. The cost is that of hashing the rows plus, for each table in which any
        row moved, one pass over its ids.
        """
        self._require_built("update")
        started = time.perf_counter()
        check_weights("HashIndex.update", weight_CD, bias_C, self.num_classes, self.in_features)
        check_class_ids("changed_ids", "HashIndex.update", changed_ids, self.num_classes)
        ids = torch.unique(changed_ids)
        self.tables.update(ids.cpu().numpy(), self.family.hash_rows(weight_CD, bias_C, ids))
        self._updates += 1
        self._rows_rehashed = len(ids)
        self._update_seconds = time.perf_counter() - started

    def query(self, hidden_ND: torch.Tensor, k: int, *, step: int = 0) -> torch.Tensor:
        """The k classes with most votes for each row; see `CandidateIndex.query`.

        Equal votes are ordered at random, keyed by (seed, step, the row's codes).
        """
        self._require_built("query")
        check_hidden("HashIndex.query", hidden_ND, self.in_features)
        check_integer("k", "HashIndex.query", k, 1)
        check_integer("step", "HashIndex.query", step, 0)
        codes_NLV = self.family.hash_queries(hidden_ND)
        ids_NK = self.tables.query(codes_NLV, k, step=step, **self._vote_settings)
        return torch.from_numpy(ids_NK).to(hidden_ND.device)

    def pool(self, hidden_ND: torch.Tensor, budget: int, *, step: int = 0) -> torch.Tensor:
        """The `budget` classes with most votes summed over the rows; see `CandidateIndex.pool`."""
        self._require_built("pool")
        check_hidden("HashIndex.pool", hidden_ND, self.in_features)
        check_integer("budget", "HashIndex.pool", budget, 1)
        check_integer("step", "HashIndex.pool", step, 0)
        codes_NLV = self.family.hash_queries(hidden_ND)
        ids = self.tables.pool(codes_NLV, budget, step=step, **self._vote_settings)
        return torch.from_numpy(ids).to(hidden_ND.device)

    def drift(self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, sample_ids: torch.Tensor) -> float:
        """Share of the sampled rows' codes, over all tables, that differ from those in the tables."""
        self._require_built("drift")
        check_weights("HashIndex.drift", weight_CD, bias_C, self.num_classes, self.in_features)
        check_class_ids("sample_ids", "HashIndex.drift", sample_ids, self.num_classes)
        if len(sample_ids) == 0:
            return 0.0
        codes_LM = self.family.hash_rows(weight_CD, bias_C, sample_ids)
        return float(np.mean(codes_LM != self.tables.codes[:, sample_ids.cpu().numpy()]))

    def stats(self) -> IndexStats:
        """See `CandidateIndex.stats`."""
        loads = np.diff(self.tables.offsets, axis=1)
        return IndexStats(
            built=self._built,
            rows=self.num_classes if self._built else 0,
            tables=self.family.tables,
            mean_bucket_load=float(loads.mean()),
            max_bucket_load=int(loads.max()),
            empty_bucket_share=float(np.mean(loads == 0)),
            last_build_seconds=self._build_seconds,
            last_update_seconds=self._update_seconds,
            rows_rehashed=self._rows_rehashed,
            bytes=self.tables.bytes + self.family.bytes,
            builds=self._builds,
            updates=self._updates,
        )

    def state(self) -> dict[str, torch.Tensor]:
        """Codes (L, C), uint16 or int32, and the family's fitted parameters; see `CandidateIndex.state`."""
        self._require_built("state")
        return {"codes": torch.from_numpy(self.tables.codes), **self.family.parameters()}

    def load_state(
        self,
        state: Mapping[str, torch.Tensor],
        weight_CD: torch.Tensor,
        bias_C: torch.Tensor | None = None,
    ) -> None:
        """Fill the tables from codes alone; see `CandidateIndex.load_state`."""
        check_weights("HashIndex.load_state", weight_CD, bias_C, self.num_classes, self.in_features)
        expected = {
            "codes": ((self.family.tables, self.num_classes), str(self.family.code_dtype)),
            **{
                name: (tuple(value.shape), str(value.dtype).removeprefix("torch."))
                for name, value in self.family.parameters().items()
            },
        }
        found = {
            name: (tuple(value.shape), str(value.dtype).removeprefix("torch."))
            for name, value in state.items()
        }
        if found != expected:
            raise ConfigError(
                f"The 'state' parameter of HashIndex.load_state must hold {expected}. Got {found} instead."
            )
        codes_LC = state["codes"].cpu().numpy().copy()
        if int(codes_LC.min()) < 0 or int(codes_LC.max()) >> self.family.bits:
            raise ConfigError(
                f"The 'codes' of the state given to HashIndex.load_state must lie from 0 to "
                f"{(1 << self.family.bits) - 1}. Got {codes_LC.min()} to {codes_LC.max()} instead."
            )
        self.family.load_parameters(state)
        self.tables.build(codes_LC)
        self._built = True

    def _require_built(self, method: str) -> None:
        if not self._built:
            raise ConfigError(f"HashIndex.{method} was called before build; build the index first.")


_Family = TypeVar("_Family", bound="Callable[..., Any]")


def register_hash_family(name: str) -> Callable[[_Family], _Family]:
    """Register `HashIndex` over a family with `make_index` by `name`: a class decorator.

    The index's settings are one flat set: `bits` (None for automatic) and `tables`, the keyword-only parameters
    of the family's ``__init__`` after ``(in_features, *, bits, tables, seed, probes=0)`` with their defaults,
    and those of `HashIndex`. A family may say what automatic `bits` are with a method
    ``automatic_bits(num_classes)`` of its class; without one it is `automatic_bits`.

    Raises:
        ValueError: The family has a setting of the same name as one of `HashIndex`.
    """

    def register(family: _Family) -> _Family:
        choose_bits = getattr(family, "automatic_bits", automatic_bits)
        shared = keyword_settings(HashIndex)
        own = {key: value for key, value in keyword_settings(family).items() if key not in ("bits", "tables")}
        if own.keys() & shared.keys():
            raise ValueError(f"HashIndex has settings {sorted(own.keys() & shared.keys())} of its own.")

        @register_index(name, {"bits": None, "tables": 50, **own, **shared})
        def make(
            in_features: int,
            num_classes: int,
            *,
            seed: int,
            bits: int | None = None,
            tables: int = 50,
            **settings: Any,
        ) -> HashIndex:
            functions = family(
                in_features,
                bits=choose_bits(num_classes) if bits is None else bits,
                tables=tables,
                seed=seed,
                **{key: value for key, value in settings.items() if key in own},
            )
            for_index = {key: value for key, value in settings.items() if key in shared}
            return HashIndex(in_features, num_classes, functions, seed=seed, **for_index)

        return family

    return register
