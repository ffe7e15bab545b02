"""L tables of 2^K buckets on the device, filled by a sort and read by the kernels of `slidex.lsh.cuda.voting`.

Offsets, ids and codes are those of `slidex.lsh.tables.BucketTables`, entry by entry: a stable sort by code leaves
ids ascending within a bucket. An update sorts each table anew in which any class moved, so it equals a build.

Why it does not merge, by the bytes: a radix sort of 16-bit codes with 64-bit places reads and writes 10 bytes an
entry in each of two to three passes, beside counting, writing 4-byte ids and finding offsets: near 80 bytes. With
3.35 TB/s of an H100, 50 tables of 670 thousand classes (33.5 million entries) are 2.7 GB, 0.8 ms; of 10 million, 12
ms. A merge has to read and write every id as well, 8 bytes an entry and more where it looks for its places, so it
could spare nine tenths of a time that is spent once in 50 to 1,000 steps; hashing the changed rows alone, which is
done, spares more: products of 670 thousand rows of 128 with 450 hyperplanes are 77 GFLOP, 1.2 ms and more. (From data
sheets, not measured.)

Legend: N rows in a batch, C classes, K hash bits, B = 2^K buckets per table, L tables, V codes looked up per
    table, M classes that changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from slidex.kernels.cuda.launch import WARP
from slidex.lsh.cuda.grid import MOST_BLOCKS, THREADS, blocks_of
from slidex.lsh.cuda.voting import HASH_DIGITS, NEVER, pool_votes, query_tables, rank_votes
from slidex.lsh.reading import OVERFLOWS

if TYPE_CHECKING:
    from slidex.lsh.tables import TableSettings

_WORKSPACE_BYTES = 1 << 29
"""The most memory for hash tables of votes; where a query may touch very many classes, fewer rows run side by side."""
_BIAS = -(1 << 15)


class DeviceTables:
    """Classes by code; see `slidex.lsh.tables.BucketTables`.

    Memory: ``4 L (C + 2^K + 1)`` bytes, the codes ``2 L C`` bytes (4 beyond 16 bits). For a time: the ``4 L C`` bytes
    of the codes given to `build` and near 30 bytes a class as a table is sorted; 20 bytes a class as a pool is
    chosen; at most `_WORKSPACE_BYTES` in a query.

    Args:
        num_classes: C.
        tables: L.
        bits: K.
        settings: What is read of a bucket; nothing inserted, not the first come.
        device: Where everything is.

    Attributes:
        offsets: int32 (L, B + 1).
        ids: int32 (L, C), ascending within a bucket.
    """

    def __init__(
        self,
        num_classes: int,
        tables: int,
        bits: int,
        settings: TableSettings,
        device: torch.device,
    ) -> None:
        self.offsets = torch.zeros((tables, (1 << bits) + 1), dtype=torch.int32, device=device)
        self.offsets[:, -1] = num_classes
        self.ids = torch.zeros((tables, num_classes), dtype=torch.int32, device=device)
        self._stored = torch.zeros(
            (tables, num_classes), dtype=torch.int16 if bits <= 16 else torch.int32, device=device
        )
        self._seed, self._min_votes = settings.seed, settings.min_votes
        self._limit = settings.limit(num_classes)
        self._overflow = OVERFLOWS.index(settings.overflow)
        self._loads: list[int] = []

    @property
    def bytes(self) -> int:
        """Memory held."""
        return self.offsets.nbytes + self.ids.nbytes + self._stored.nbytes

    @property
    def codes(self) -> torch.Tensor:
        """The bucket of every class in every table: uint16 (L, C), or int32 beyond 16 bits; shares memory."""
        return self._stored.view(torch.uint16) if self._stored.dtype == torch.int16 else self._stored

    def build(self, codes_LC: torch.Tensor) -> None:
        """Fill the tables from codes, int32 (L, C)."""
        self._stored.copy_(codes_LC)
        self._sort(range(len(self.ids)))

    def update(self, changed_ids: torch.Tensor, codes_LM: torch.Tensor) -> None:
        """Give classes new codes; equal to `build` with the codes of all.

        Args:
            changed_ids: int64 (M,), distinct.
            codes_LM: int32 (L, M).
        """
        moved_L = self.differ(changed_ids, codes_LM).any(dim=1)
        self._stored[:, changed_ids] = codes_LM.to(self._stored.dtype)
        self._sort(moved_L.nonzero()[:, 0].tolist())

    def differ(self, ids: torch.Tensor, codes_LM: torch.Tensor) -> torch.Tensor:
        """Whether codes are other than those held: bool (L, M), arguments as for `update`."""
        return self._stored[:, ids] != codes_LM.to(self._stored.dtype)

    def _sort(self, tables: range | list[int]) -> None:
        """Place all classes of the given tables anew."""
        buckets = torch.arange(self.offsets.shape[1] - 1, device=self.ids.device).to(self._stored.dtype)
        for t in tables:
            keys, order = torch.sort(_sortable(self._stored[t]), stable=True)
            self.ids[t] = order
            self.offsets[t, :-1] = torch.searchsorted(keys, _sortable(buckets), out_int32=True)
        largest_L = self.offsets.diff(dim=1).amax(dim=1).clamp(max=self._limit)
        self._loads = largest_L.tolist()

    def query(self, codes_NLV: torch.Tensor, k: int, *, step: int) -> torch.Tensor:
        """The k most voted classes of each query: int64 (N, k), -1 where there are no more; waits for nothing.

        Equal votes are in random order, keyed by seed, step and the query's codes.

        Args:
            codes_NLV: int32 (N, L, V), distinct along V.
            k: At least 1.
            step: Non-negative.
        """
        num_rows, tables, versions = codes_NLV.shape
        device = codes_NLV.device
        ranks_NK = torch.full((num_rows, k), -1, dtype=torch.int64, device=device)
        ids_NK = torch.full((num_rows, k), -1, dtype=torch.int32, device=device)
        most = min(self.ids.shape[1], versions * sum(self._loads))
        slots = 1 << most.bit_length() + 1
        blocks = max(1, min(num_rows, _WORKSPACE_BYTES // (8 * slots), MOST_BLOCKS))
        slots_TW2 = torch.empty((blocks, slots, 2), dtype=torch.int32, device=device)
        digits = HASH_DIGITS + ((tables * versions).bit_length() + 7) // 8
        query_tables.launch(
            blocks if num_rows else 0,
            THREADS,
            self.offsets,
            self.ids,
            codes_NLV,
            self._limit,
            self._overflow,
            self._seed,
            step,
            self._min_votes,
            digits,
            slots_TW2,
            ranks_NK,
            ids_NK,
        )
        order_NK = ranks_NK.argsort(dim=1, descending=True)
        return ids_NK.gather(1, order_NK).long()

    def pool(self, codes_NLV: torch.Tensor, budget: int, *, step: int) -> torch.Tensor:
        """The `budget` most voted classes over all queries: int64 (min(budget, C),), as the CPU's; waits for nothing.

        They ascend, with -1 after them where fewer classes have votes. Of those at the cut the smallest hashes are
        taken, a fair draw.
        """
        votes_C = torch.zeros(self.ids.shape[1], dtype=torch.int32, device=self.ids.device)
        pool_votes.launch(
            blocks_of(WARP * codes_NLV.numel()),
            THREADS,
            self.offsets,
            self.ids,
            codes_NLV,
            self._limit,
            self._overflow,
            self._seed,
            step,
            votes_C,
        )
        budget = min(budget, len(votes_C))
        cut = votes_C.topk(budget, sorted=False).values.min().clamp(min=self._min_votes)
        order_C = torch.empty(len(votes_C), dtype=torch.int64, device=votes_C.device)
        rank_votes.launch(blocks_of(len(votes_C)), THREADS, votes_C, cut.view(1), self._seed, step, order_C)
        order, found = order_C.topk(budget, largest=False, sorted=False)
        found = found.masked_fill_(order == int(NEVER), len(votes_C)).sort().values
        return found.masked_fill_(found == len(votes_C), -1)


def _sortable(codes: torch.Tensor) -> torch.Tensor:
    """Codes in an order of signed numbers: those of 16 bits are stored as they are, half of them negative."""
    return codes ^ _BIAS if codes.dtype == torch.int16 else codes
