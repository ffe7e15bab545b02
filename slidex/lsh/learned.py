"""SimHash in a learned geometry: hidden vectors and the rows they should find are turned towards each other first.

A random hyperplane separates a hidden vector from a class's row by their angle alone, and in a trained classifier
that angle says little: hidden vectors share a large mean, rows a large common component, and how popular a class
is shows in its norm and bias. So two linear maps are learned, one for queries and one for rows, and the random
hyperplanes cut the space they lead to (the idea of MONGOOSE, ICLR 2021, and HALOS, MLSys 2022, with two maps in
place of K·L hyperplanes, which costs the same for any number of tables: about a second of one core at D = 128).

What is minimised follows from what a table does. A row c is in the bucket of a query h with probability
``p(h, c) = (1 - θ/π)^K``, θ their angle after the maps, so that it makes up a share of

    p(h, c) / (Σ_i p(h, i) + 0.2 C / 2^K)

of what is read there. The loss is the mean of -log of this share over the rows c that h should find: its true
classes (HALOS) and the classes its softmax lies on. The sum over all classes i is estimated without bias from the
batch's true classes, each counted once, and uniformly drawn classes, each counted for those it stands for. The
term beside it, a fifth of the mean bucket load, keeps rows and queries from fleeing each other, which would make
buckets pure and empty.

Maps and hyperplanes are multiplied and rounded to the small integers of SimHash, so that codes stay exact:
updating one row equals rebuilding all. Vectors are standardised per coordinate before they are rounded to 8 bits;
this acts on one entry at a time and is as exact.

Legend: N rows in a batch, C classes, D hidden width, E = D + 1, K bits, L tables, B = K L hyperplanes, M vectors,
    P pairs of a row and a true class, U classes in the pool.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from slidex.errors import DivergedError
from slidex.kernels.dense_adam import DenseAdam
from slidex.lsh.hash_index import register_hash_family
from slidex.lsh.index import QuerySample, check_integer
from slidex.lsh.simhash import SimHash, round_projections

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_LEARNING_STREAM = 0x1EA4
_BATCH = 128
_POOL = 1024
_STATISTICS_ROWS = 8192
_CONSTANT = 4.0
"""The constant entry of a standardised vector, as large as its other entries get, so that no digits are lost."""
_LOAD_FLOOR = 0.2
"""In mean bucket loads: at 1, recall is the same and a query reads three to four times as many classes; without it,
buckets empty and recall falls (measured on four trained models)."""
_STEP_SIZE = 0.4
"""Adam's step times D."""
_LABEL_SHARE = 0.5
"""Of the target; the softmax has the rest. On trained weights 0 and 1 do about as well."""
_SMALLEST_SPREAD = 0.1
"""A coordinate that spreads less than this share of the others' is not stretched further."""


@register_hash_family("learned")
class LearnedSimHash(SimHash):
    """SimHash over learned linear maps of rows and queries; plain SimHash until `fit` has seen queries.

    Every `fit` with queries goes on from the maps of the one before. Learning runs on one thread and draws on
    (seed, round) alone, so a run repeats itself for any number of threads; another processor or version of torch
    may round its sums otherwise. Hashing is exact everywhere, and `parameters` hold the rounded hyperplanes.

    Args:
        in_features: Hidden width D.
        bits: K, 1 to 24.
        tables: L, at least 1.
        seed: Fixes hyperplanes and learning.
        probes: See `SimHash`.
        steps: Adam steps per round of learning, each on 128 hidden vectors; at least 1.
    """

    uses_queries = True
    runs_on_cuda = False

    def __init__(
        self,
        in_features: int,
        *,
        bits: int,
        tables: int,
        seed: int,
        probes: int = 0,
        steps: int = 100,
    ) -> None:
        super().__init__(in_features, bits=bits, tables=tables, seed=seed, probes=probes)
        check_integer("steps", "learned", steps, 1)
        self.query_version = 0
        self._seed, self._steps = seed, steps
        self._plain_BE = self._row_projection_BE
        width = in_features + 1
        self._learned = {
            "rounds": torch.zeros(1, dtype=torch.int64),
            "row_mean": torch.zeros(width),
            "row_spread": torch.ones(width),
            "query_mean": torch.zeros(in_features),
            "query_spread": torch.ones(in_features),
            "row_map": torch.zeros(width + 1, width),
            "query_map": torch.zeros(width, width),
            "row_projection": torch.zeros(len(self._plain_BE), width + 1, dtype=torch.int8),
            "query_projection": torch.zeros(len(self._plain_BE), width, dtype=torch.int8),
        }

    @property
    def bytes(self) -> int:
        """Memory of hyperplanes and maps."""
        return super().bytes + sum(value.nbytes for value in self._learned.values())

    def parameters(self) -> dict[str, torch.Tensor]:
        """Everything learned, and the number of rounds."""
        return dict(self._learned)

    def load_parameters(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Restore what was learned."""
        self._adopt({name: parameters[name].cpu().clone() for name in self._learned})

    def fit(
        self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, queries: QuerySample | None = None
    ) -> None:
        """One round of learning; without queries (None or no rows) nothing changes.

        Raises:
            DivergedError: A hidden vector or a sampled row holds a value that is not finite, or scores are
                not finite.
        """
        if queries is None or len(queries.hidden_ND) == 0:
            return
        queries = QuerySample(
            _as_float(queries.hidden_ND), queries.label_indptr.cpu(), queries.label_ids.cpu()
        )
        rounds = self.query_version
        source = np.random.Philox(key=[self._seed, _LEARNING_STREAM], counter=[0, 0, 0, rounds])
        generator = np.random.Generator(source)
        with _one_thread(), torch.inference_mode(False), torch.enable_grad():
            learned = self._standardised(weight_CD, bias_C, queries, generator)
            if rounds == 0:
                learned |= _plain_maps(learned)
            learned |= self._improved(learned, weight_CD, bias_C, queries, generator)
            for side in ("row", "query"):
                if not bool(torch.isfinite(learned[f"{side}_map"]).all()):
                    raise DivergedError(
                        "Hash functions cannot be learned: scores of classes are not finite; weights are too large."
                    )
                planes_BE = self._plain_BE @ learned[f"{side}_map"].T
                planes_BE /= planes_BE.abs().amax(dim=1, keepdim=True)
                rounded = torch.from_numpy(round_projections(planes_BE.numpy(), 127.0))
                learned[f"{side}_projection"] = rounded.to(torch.int8)
        self._adopt(learned | {"rounds": torch.tensor([rounds + 1])})

    def _adopt(self, learned: dict[str, torch.Tensor]) -> None:
        self._learned = learned
        self.query_version = int(learned["rounds"])
        self._row_projection_BE = self._query_projection_BE = self._plain_BE
        if self.query_version > 0:
            self._row_projection_BE = learned["row_projection"].float()
            self._query_projection_BE = learned["query_projection"].float()

    def _prepare_rows(self, rows_ME: torch.Tensor) -> torch.Tensor:
        if self.query_version == 0:
            return rows_ME
        return _standardise(rows_ME, self._learned["row_mean"], self._learned["row_spread"])

    def _prepare_queries(self, rows_ME: torch.Tensor) -> torch.Tensor:
        if self.query_version == 0:
            return rows_ME
        hidden_MD = rows_ME[:, : self._in_features]
        return _standardise(hidden_MD, self._learned["query_mean"], self._learned["query_spread"])

    def _standardised(
        self,
        weight_CD: torch.Tensor,
        bias_C: torch.Tensor | None,
        queries: QuerySample,
        generator: np.random.Generator,
    ) -> dict[str, torch.Tensor]:
        """What was learned, with mean and spread of today's rows and queries."""
        hidden_ND = queries.hidden_ND
        if not bool(torch.isfinite(hidden_ND).all()):
            bad = int((~torch.isfinite(hidden_ND)).any(dim=1).nonzero()[0])
            raise DivergedError(f"Row {bad} of the hidden vectors holds a value that is not finite.")
        count = min(_STATISTICS_ROWS, len(weight_CD))
        rows_ME = _gather_rows(
            weight_CD, bias_C, torch.from_numpy(generator.integers(len(weight_CD), size=count))
        )
        return self._learned | {
            "row_mean": rows_ME.mean(dim=0),
            "row_spread": _spread(rows_ME),
            "query_mean": hidden_ND.mean(dim=0),
            "query_spread": _spread(hidden_ND),
        }

    def _improved(
        self,
        learned: dict[str, torch.Tensor],
        weight_CD: torch.Tensor,
        bias_C: torch.Tensor | None,
        queries: QuerySample,
        generator: np.random.Generator,
    ) -> dict[str, torch.Tensor]:
        """Both maps after `steps` steps of Adam."""
        maps = {name: learned[name].clone().requires_grad_() for name in ("row_map", "query_map")}
        adam = DenseAdam(maps.values(), 0.9, 0.999, 1e-8)
        num_classes = len(weight_CD)
        order = torch.from_numpy(generator.permutation(len(queries.hidden_ND)))
        for step in range(self._steps):
            picked = order[torch.arange(step * _BATCH, (step + 1) * _BATCH) % len(order)]
            row_P, label_P = _true_pairs(queries, picked, generator)
            ids_U, place_P, weight_U = _pool(label_P, num_classes, generator)
            rows_UE = _gather_rows(weight_CD, bias_C, ids_U)
            hidden_ND = queries.hidden_ND[picked]
            scores_NU = torch.addmm(rows_UE[:, -1], hidden_ND, rows_UE[:, :-1].T)
            target_NU = (1 - _LABEL_SHARE) * (scores_NU + weight_U).softmax(dim=1)
            true_N = torch.bincount(row_P, minlength=_BATCH)
            target_NU[row_P, place_P] += _LABEL_SHARE / true_N[row_P]
            query_NE = (
                _standardise(hidden_ND, learned["query_mean"], learned["query_spread"]) @ maps["query_map"]
            )
            row_UE = _standardise(rows_UE, learned["row_mean"], learned["row_spread"]) @ maps["row_map"]
            adam.zero_grad()
            floor = math.log(_LOAD_FLOOR * num_classes) - self.bits * math.log(2)
            _bucket_share_loss(query_NE, row_UE, target_NU, weight_U, self.bits, floor).backward()
            adam.step(_STEP_SIZE / self._in_features)
        return {name: value.detach() for name, value in maps.items()}


def _bucket_share_loss(
    query_NE: torch.Tensor,
    row_UE: torch.Tensor,
    target_NU: torch.Tensor,
    weight_U: torch.Tensor,
    bits: int,
    floor: float,
) -> torch.Tensor:
    """Mean of ``-Σ_c target_c log(p_c / (Σ_i weight_i p_i + e^floor))``, ``p = (1 - θ/π)^K``; `weight_U` in logs."""
    normalise = torch.nn.functional.normalize
    cosine_NU = (normalise(query_NE, dim=1) @ normalise(row_UE, dim=1).T).clamp(-0.999, 0.999)
    log_p_NU = bits * torch.log1p(-torch.acos(cosine_NU) / math.pi)
    load_N = torch.logaddexp((log_p_NU + weight_U).logsumexp(dim=1), torch.tensor(floor))
    return (target_NU.sum(dim=1) * load_N - (target_NU * log_p_NU).sum(dim=1)).mean()


def _true_pairs(
    queries: QuerySample, picked_N: torch.Tensor, generator: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the batch and their true classes, int64 (P,) both; at random `_POOL` pairs where there are more."""
    first_N = queries.label_indptr[picked_N]
    count_N = queries.label_indptr[picked_N + 1] - first_N
    row_P = torch.repeat_interleave(torch.arange(len(picked_N)), count_N)
    shift_N = first_N - (count_N.cumsum(dim=0) - count_N)
    label_P = queries.label_ids[torch.arange(len(row_P)) + shift_N[row_P]]
    if len(row_P) <= _POOL:
        return row_P, label_P
    kept = torch.from_numpy(generator.choice(len(row_P), _POOL, replace=False))
    return row_P[kept], label_P[kept]


def _pool(
    label_P: torch.Tensor, num_classes: int, generator: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """True and random classes (U,), each label's place among them (P,), and log of how many each stands for."""
    true, place_P = torch.unique(label_P, return_inverse=True)
    drawn = torch.unique(torch.from_numpy(generator.integers(num_classes, size=_POOL)))
    drawn = drawn[~torch.isin(drawn, true)]
    stands_for = (num_classes - len(true)) / max(1, len(drawn))
    weight_U = torch.zeros(len(true) + len(drawn))
    weight_U[len(true) :] = math.log(max(1.0, stands_for))
    return torch.cat([true, drawn]), place_P, weight_U


def _plain_maps(learned: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Maps that take standardised vectors back to [w, b] and [h, 1], scaled to a norm near 1."""
    query_mean = torch.cat([learned["query_mean"], torch.ones(1)])
    query_spread = torch.cat([learned["query_spread"], torch.zeros(1)])
    row_mean, row_spread = learned["row_mean"], learned["row_spread"]
    query_map = torch.cat(
        [query_spread[:-1, None] * torch.eye(len(query_mean))[:-1], query_mean[None] / _CONSTANT]
    )
    row_map = torch.cat([row_spread.diag(), row_mean[None] / _CONSTANT])
    return {
        "query_map": query_map / float(torch.cat([query_mean, query_spread]).double().norm()),
        "row_map": row_map / float(torch.cat([row_mean, row_spread]).double().norm()),
    }


def _standardise(vectors_ME: torch.Tensor, mean_E: torch.Tensor, spread_E: torch.Tensor) -> torch.Tensor:
    """Vectors less the mean, over the spread, with the constant entry appended: fresh float32 (M, E + 1)."""
    out = vectors_ME.new_full((len(vectors_ME), len(mean_E) + 1), _CONSTANT)
    out[:, :-1] = (vectors_ME - mean_E) / spread_E
    return out


def _spread(vectors_ME: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each coordinate, none far below the others."""
    spread_E = vectors_ME.double().std(dim=0, correction=0)
    typical = float(spread_E.square().mean().sqrt())
    return (
        spread_E.clamp(min=_SMALLEST_SPREAD * typical).float() if typical > 0 else torch.ones(len(spread_E))
    )


def _gather_rows(weight_CD: torch.Tensor, bias_C: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
    """``[w_c, b_c]`` of the given classes: float32 (M, D + 1)."""
    ids_there = ids.to(weight_CD.device)
    weight_MD = _as_float(weight_CD[ids_there])
    bias_M = torch.zeros(len(ids)) if bias_C is None else _as_float(bias_C[ids_there])
    rows_ME = torch.cat([weight_MD, bias_M[:, None]], dim=1)
    finite_M = torch.isfinite(rows_ME).all(dim=1)
    if not bool(finite_M.all()):
        bad = int(ids[int((~finite_M).nonzero()[0])])
        raise DivergedError(f"The weight row or bias of class {bad} holds a value that is not finite.")
    return rows_ME


def _as_float(values: torch.Tensor) -> torch.Tensor:
    return values.detach().to(device="cpu", dtype=torch.float32)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The order of torch's sums depends on its number of threads; with one, learning repeats itself."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
