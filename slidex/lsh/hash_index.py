"""The candidate index over hash tables, for any hash family, and the registry that joins the two.

A family turns rows and queries into codes; the tables below neither know nor care how. A further family needs
the members of `HashFamily` and `register_hash_family`, nothing else. Legend: N rows in a batch, C classes, D
hidden width, K hash bits, L tables, V codes looked up per table.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from slidex.errors import ConfigError
from slidex.lsh.family import automatic_bits, code_dtype, hashing_bytes, require_cuda
from slidex.lsh.index import (
    IndexStats,
    QuerySample,
    check_class_ids,
    check_hidden,
    check_integer,
    check_queries,
    check_weights,
    is_cuda,
    keyword_settings,
    padded,
    register_index,
)
from slidex.lsh.reading import OVERFLOWS
from slidex.lsh.tables import BucketTables, TableSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from slidex.lsh.cuda.hashing import DeviceHashing
    from slidex.lsh.family import HashFamily

BUDGETS = ("votes", "first_come")
_QUERY_BYTES = 1 << 29  # at most, of a device's query
_MOST_INSERTED = 65_536


class HashIndex:
    """A `CandidateIndex` of bucket tables over a hash family.

    Memory is that of `BucketTables`: with 3.4 M classes and 50 tables, 680 MB of ids and 340 MB of codes.

    Args:
        in_features: Hidden width D.
        num_classes: C.
        family: Its hash functions.
        seed: Keys tie-breaking and bucket windows.
        min_votes: Leave out classes found in fewer buckets than this; 1 to ``L * (1 + probes)``.
        max_bucket: The most hashed classes read from one bucket per query; None for all.
        overflow: What is read of a bucket that holds more: ``"window"``, as many neighbours from a random
            place, another for each query; ``"reservoir"``, a fixed sample, every class of the bucket equally
            likely to be in it, which is what reservoir sampling would have kept; ``"first"``, the lowest
            classes, as SLIDE's first-in buckets filled in order of class do.
        budget: How k classes are chosen: ``"votes"``, those found in most buckets; ``"first_come"``, the first
            met, tables in random order, stopping as soon as there are enough (SLIDE, LNS): many times cheaper
            and a worse choice. A pool then takes the first met over (row, table) pairs in random order.
        insert: The most classes inserted per bucket by `build` with queries, see
            `slidex.lsh.insertion.InsertedLabels`; 0 for none. An inserted class has a vote of the bucket, so
            one that is hashed there too has two. What was counted is kept from build to build as long as the
            family's `query_version` stays the same.
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
        overflow: str = "window",
        budget: str = "votes",
        insert: int = 0,
    ) -> None:
        check_integer("min_votes", "make_index", min_votes, 1, family.tables * (1 + family.probes))
        if max_bucket is not None:
            check_integer("max_bucket", "make_index", max_bucket, 1)
        check_integer("insert", "make_index", insert, 0, _MOST_INSERTED)
        _check_choice("overflow", overflow, OVERFLOWS)
        _check_choice("budget", budget, BUDGETS)
        if budget == "first_come" and min_votes > 1:
            raise ConfigError(
                "The 'min_votes' parameter of make_index must be 1 with a budget of 'first_come', which counts "
                f"no votes. Got {min_votes!r} instead."
            )
        most_lookups = np.iinfo(np.uint16).max // (2 if insert else 1)
        if family.tables * (1 + family.probes) > most_lookups:
            raise ConfigError(
                f"The 'tables' parameter of make_index must keep tables * (1 + probes) to at most {most_lookups}. "
                f"Got {family.tables} tables and {family.probes} probes instead."
            )
        self.in_features = in_features
        self.num_classes = num_classes
        self.family = family
        self._settings = TableSettings(
            seed=seed,
            min_votes=min_votes,
            max_bucket=max_bucket,
            overflow=overflow,
            first_come=budget == "first_come",
            insert=insert,
        )
        self.tables = self._empty_tables()
        self._on_device: DeviceHashing | None = None  # in place of the tables where the weights are on a GPU
        self.uses_queries = family.uses_queries or insert > 0
        self._built = False
        self._builds = self._updates = self._rows_rehashed = 0
        self._build_seconds = self._update_seconds = 0.0

    @property
    def runs_on_cuda(self) -> bool:
        """Whether it has hash functions for weights on a CUDA device."""
        return getattr(self.family, "runs_on_cuda", False)

    def require_cuda(self) -> None:
        """See `DeviceCandidateIndex.require_cuda`."""
        require_cuda(self.family, self._settings)

    @property
    def bytes_on_device(self) -> int:
        """See `DeviceCandidateIndex`; what `slidex.lsh.cuda.tables.DeviceTables` says of it."""
        tables, bits = self.family.tables, self.family.bits
        stored = np.dtype(code_dtype(bits)).itemsize
        kept = tables * (4 * (2**bits + 1) + (4 + stored + 4) * self.num_classes)
        hashing = hashing_bytes(self.num_classes, self.in_features + 2, tables * bits)
        return kept + 64 * self.num_classes + max(hashing, min(_QUERY_BYTES, (1 << 16) * self.num_classes))

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
        self._go_to(weight_CD.device)
        version = self.family.query_version
        self.family.fit(weight_CD, bias_C, queries)
        self._insert(queries, forget=self.family.query_version != version)
        if self._on_device:
            self._on_device.build(weight_CD, bias_C)
        else:
            codes_LC = self.family.hash_rows(weight_CD, bias_C)
            self.tables.build(codes_LC.astype(code_dtype(self.family.bits), copy=False))
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
        self._check_device("update", weight_CD)
        ids = torch.unique(changed_ids)
        if self._on_device:
            self._on_device.update(weight_CD, bias_C, ids)
        else:
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
        if self._on_device:
            return self._on_device.query(hidden_ND, k, step=step)
        codes_NLV = self.family.hash_queries(hidden_ND)
        ids_NK = self.tables.query(codes_NLV, k, step=step)
        return torch.from_numpy(ids_NK).to(hidden_ND.device)

    def pool(self, hidden_ND: torch.Tensor, budget: int, *, step: int = 0) -> torch.Tensor:
        """The `budget` classes with most votes summed over the rows; see `CandidateIndex.pool`."""
        if self._on_device:
            ids = self.padded_pool(hidden_ND, budget, step=step)
            self._on_device.raise_late()
            return ids[ids >= 0]
        self._require_built("pool")
        check_hidden("HashIndex.pool", hidden_ND, self.in_features)
        check_integer("budget", "HashIndex.pool", budget, 1)
        check_integer("step", "HashIndex.pool", step, 0)
        codes_NLV = self.family.hash_queries(hidden_ND)
        ids = self.tables.pool(codes_NLV, budget, step=step)
        return torch.from_numpy(ids).to(hidden_ND.device)

    def padded_pool(self, hidden_ND: torch.Tensor, budget: int, *, step: int = 0) -> torch.Tensor:
        """As `pool`, of a size that does not depend on the answer; see `DeviceCandidateIndex.padded_pool`."""
        if not self._on_device:
            return padded(self.pool(hidden_ND, budget, step=step), min(budget, self.num_classes))
        self._require_built("padded_pool")
        check_hidden("HashIndex.padded_pool", hidden_ND, self.in_features)
        check_integer("budget", "HashIndex.padded_pool", budget, 1)
        check_integer("step", "HashIndex.padded_pool", step, 0)
        return self._on_device.pool(hidden_ND, budget, step=step)

    def drift(self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, sample_ids: torch.Tensor) -> float:
        """Share of the sampled rows' codes, over all tables, that differ from those in the tables."""
        self._require_built("drift")
        check_weights("HashIndex.drift", weight_CD, bias_C, self.num_classes, self.in_features)
        check_class_ids("sample_ids", "HashIndex.drift", sample_ids, self.num_classes)
        self._check_device("drift", weight_CD)
        if len(sample_ids) == 0:
            return 0.0
        if self._on_device:
            return self._on_device.drift(weight_CD, bias_C, sample_ids)
        codes_LM = self.family.hash_rows(weight_CD, bias_C, sample_ids)
        return float(np.mean(codes_LM != self.tables.codes[:, sample_ids.cpu().numpy()]))

    def stats(self) -> IndexStats:
        """See `CandidateIndex.stats`."""
        tables = self._on_device.tables if self._on_device else self.tables
        offsets = self._on_device.tables.offsets.cpu().numpy() if self._on_device else self.tables.offsets
        loads = np.diff(offsets, axis=1)
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
            bytes=tables.bytes + self.family.bytes,
            builds=self._builds,
            updates=self._updates,
        )

    def state(self) -> dict[str, torch.Tensor]:
        """Codes (L, C), uint16 or int32, what was inserted, and the family's fitted parameters.

        See `CandidateIndex.state`. The shapes of what was inserted vary with what it is.
        """
        self._require_built("state")
        if self._on_device:
            return {"codes": self._on_device.tables.codes, **self.family.parameters()}
        inserted = {name: torch.from_numpy(value) for name, value in self.tables.inserted.state().items()}
        return {"codes": torch.from_numpy(self.tables.codes), **inserted, **self.family.parameters()}

    def load_state(
        self,
        state: Mapping[str, torch.Tensor],
        weight_CD: torch.Tensor,
        bias_C: torch.Tensor | None = None,
    ) -> None:
        """Fill the tables from codes alone; see `CandidateIndex.load_state`."""
        check_weights("HashIndex.load_state", weight_CD, bias_C, self.num_classes, self.in_features)
        own = {name: torch.from_numpy(value) for name, value in self.tables.inserted.state().items()}
        expected = {
            "codes": ((self.family.tables, self.num_classes), str(code_dtype(self.family.bits))),
            **_shapes({**own, **self.family.parameters()}),
        }
        found = _shapes(state)
        for name in ("inserted_ids", "inserted_counts"):  # as many as there were; checked when loaded
            if name in expected and name in found and state[name].ndim == 1:
                expected[name] = (found[name][0], expected[name][1])
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
        self.tables.inserted.load_state(
            {name: value.cpu().numpy() for name, value in state.items()}, self.num_classes
        )
        self.family.load_parameters(state)
        self._go_to(weight_CD.device)
        if self._on_device:
            self._on_device.load(codes_LC)
        else:
            self.tables.build(codes_LC)
        self._built = True

    def _insert(self, queries: QuerySample | None, *, forget: bool) -> None:
        """Insert the true classes of the sampled rows; first forget those of other hash functions."""
        inserted = self.tables.inserted
        if forget:
            inserted.clear()
        if inserted.most and queries is not None and len(queries.hidden_ND):
            codes_NL = self.family.hash_queries(queries.hidden_ND)[:, :, 0]
            labels = queries.label_indptr.cpu().numpy(), queries.label_ids.cpu().numpy()
            inserted.add(codes_NL, *labels)

    def _require_built(self, method: str) -> None:
        if not self._built:
            raise ConfigError(f"HashIndex.{method} was called before build; build the index first.")
        if self._on_device:
            self._on_device.raise_late(wait=method not in ("query", "padded_pool"))

    def _go_to(self, device: torch.device) -> None:
        """Keep hash functions and tables where the weights are from now on."""
        if not is_cuda(device):
            self._on_device = None
        elif self._on_device is None or self._on_device.device != device:
            from slidex.lsh.cuda.hashing import DeviceHashing  # noqa: PLC0415  (needs numba-cuda)

            self._on_device = DeviceHashing(self.num_classes, self.family, self._settings, device)
            self.tables = self._empty_tables()

    def _empty_tables(self) -> BucketTables:
        return BucketTables(self.num_classes, self.family.tables, self.family.bits, self._settings)

    def _check_device(self, method: str, weight_CD: torch.Tensor) -> None:
        there = self._on_device.device if self._on_device else None
        if (weight_CD.device if is_cuda(weight_CD.device) else None) != there:
            raise ConfigError(
                f"The 'weight_CD' parameter of HashIndex.{method} must be on the device the index was built for, "
                f"{there or 'cpu'}. Got weights on {weight_CD.device} instead; build the index again."
            )


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {
        name: (tuple(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in tensors.items()
    }


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(
            f"The {name!r} parameter of make_index must be one of {', '.join(choices)}. Got {value!r} instead."
        )


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
