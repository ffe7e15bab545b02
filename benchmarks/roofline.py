"""What a training step must move and do at least, and what time that takes at given rates.

A stage's floor is the longest of three times: its bytes at the bandwidth of their kind, its arithmetic at the rate of
matrix products, its counting at the rate of counters. Every array counts once, read or written, however often the code
goes over it; what is in a cache already (pairs of one batch that meet the same row) is arithmetic, not bytes.

Letters: N rows of the batch, M stored features in them (F distinct), P their true classes, D width of the bag, H hidden
width, U classes of the pool or distinct classes of all rows, A slots of a row, L tables of K bits, C classes, T rows
rehashed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SOFTMAX_FLOPS = 25
"""A score in `losses._softmax_shared_row`: offset, maximum, difference, 20 for the exponential, sum, scale."""
UPDATE_FLOPS = 11
"""An entry in the update of a row: two moments, root, quotient, decay, difference."""
SHARED, PER_SAMPLE = MODES = ("shared", "per_sample")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The sizes of one step, as counted in its arrays; letters as above.

    Args:
        rows: N.
        features: M.
        feature_bytes: Of a stored feature in the data set: 4, or 8 with a value.
        distinct_features: F.
        labels: P.
        bag_width: D.
        width: H.
        dense: Parameters of the encoder's dense layers and biases.
        retrieved: Classes from the index, over all rows.
        random: Random classes.
        slots: A; 0 for a pool.
        pairs: Slots of all rows that hold a class; 0 for a pool.
        classes: U.
        bits: L * K.
        tables: L.
        entries: Classes in the buckets that were looked up; a bucket that a pool looks up twice counts once.
        code_bytes: Of a stored code.
        all_classes: C.
        rehashed: T; 0 where this step did not rehash.
        class_bytes: Of an output row, its bias and their optimiser states.
        bag_bytes: Of a feature row and its optimiser state.
    """

    rows: int
    features: int
    feature_bytes: int
    distinct_features: int
    labels: int
    bag_width: int
    width: int
    dense: int
    retrieved: int
    random: int
    slots: int
    pairs: int
    classes: int
    bits: int
    tables: int
    entries: int
    code_bytes: int
    all_classes: int
    rehashed: int
    class_bytes: float
    bag_bytes: float

    @property
    def scores(self) -> int:
        """Scores of the batch."""
        return self.rows * (self.slots or self.classes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a stage cannot avoid.

    Args:
        stream: Bytes in long runs, of arrays beyond the caches.
        cached: Bytes of arrays that the step makes, which a cache can hold.
        rows: Bytes of scattered rows that are read.
        updates: Bytes of scattered rows that are read and written: both count.
        flops: Floating-point operations.
        counts: Increments of scattered counters, or as much work on one integer.
    """

    stream: float = 0
    cached: float = 0
    rows: float = 0
    updates: float = 0
    flops: float = 0
    counts: float = 0

    @property
    def bytes(self) -> float:
        """All bytes."""
        return self.stream + self.cached + self.rows + self.updates


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The best rate of each kind of `Work`, by the same names, a second; `benchmarks.ceilings` measures them."""

    stream: float
    cached: float
    rows: float
    updates: float
    flops: float
    counts: float

    def floor(self, work: Work) -> float:
        """Least seconds for the work, its scattered rows at the bandwidth of scattered rows."""
        moved = sum(
            getattr(work, kind) / getattr(self, kind) for kind in ("stream", "cached", "rows", "updates")
        )
        return max(moved, work.flops / self.flops, work.counts / self.counts)

    def stream_floor(self, work: Work) -> float:
        """Least seconds if every byte came at stream bandwidth, and counting were free."""
        return max(work.bytes / self.stream, work.flops / self.flops)


@dataclass(frozen=True, slots=True)
class Stage:
    """A line of the table.

    Args:
        name: Of the stage.
        modes: In which it exists.
        work: What it must do for a batch.
        amortised: Takes place in few steps: means over the steps, not medians.
    """

    name: str
    modes: Sequence[str]
    work: Callable[[Batch], Work]
    amortised: bool = False


STAGES = (
    # take: features and labels copied out of the memory map; beside the step, so only the wait for it is timed.
    Stage("data", MODES, lambda b: Work(stream=2 * (b.feature_bytes * b.features + 4 * b.labels))),
    # _bags: every distinct feature row read, N sums written; a product and a sum for each stored feature.
    Stage(
        "bag sum",
        MODES,
        lambda b: Work(
            rows=4 * b.distinct_features * b.bag_width,
            cached=8 * b.features + 4 * b.rows * b.bag_width,
            flops=2 * b.features * b.bag_width,
        ),
    ),
    # forward_train: values of unit norm written; bias and ReLU of N x D read and written; dense layers.
    Stage(
        "encoder layers",
        MODES,
        lambda b: Work(
            cached=b.feature_bytes * b.features + 8 * b.rows * b.bag_width, flops=2 * b.rows * b.dense
        ),
    ),
    # SimHash.hash_queries: [h, 1] times L * K projections, codes written.
    Stage(
        "hashing",
        MODES,
        lambda b: Work(
            cached=4 * (b.rows * (b.width + 1) + b.bits * (b.width + 1) + b.rows * b.tables),
            flops=2 * b.rows * (b.width + 1) * b.bits,
        ),
    ),
    # pool_votes, query_tables: ids of the buckets read, a counter each; the best written as int64.
    Stage("voting", MODES, lambda b: Work(stream=4 * b.entries + 8 * b.retrieved, counts=b.entries)),
    # ClassSampler.sample: int64 ids written, one draw each.
    Stage("random draw", MODES, lambda b: Work(cached=8 * b.random, counts=b.random)),
    # _merge_pool: all candidates read and looked up, U written.
    Stage(
        "selection",
        (SHARED,),
        lambda b: Work(
            cached=4 * b.labels + 8 * (b.retrieved + b.random + b.classes),
            counts=b.labels + b.retrieved + b.random,
        ),
    ),
    # _fill_active_sets: every slot filled, an id (int64) and a target (float32) each, and looked up once.
    Stage("selection", (PER_SAMPLE,), lambda b: Work(cached=12 * b.scores, counts=b.scores)),
    # _gather: U rows and biases read where they lie, written as a block.
    Stage(
        "gather",
        (SHARED,),
        lambda b: Work(rows=4 * b.classes * (b.width + 1), cached=4 * b.classes * (b.width + 1)),
    ),
    # hidden (N, H) @ rows (U, H).T -> scores (N, U).
    Stage(
        "score product",
        (SHARED,),
        lambda b: Work(
            cached=4 * (b.rows * b.width + b.classes * b.width + b.scores), flops=2 * b.scores * b.width
        ),
    ),
    # pair_logits: distinct rows read, slots read (int64), scores written; a product and a sum for each entry of a pair.
    Stage(
        "score product",
        (PER_SAMPLE,),
        lambda b: Work(
            rows=4 * b.classes * (b.width + 1),
            cached=4 * b.rows * b.width + 12 * b.scores,
            flops=2 * b.pairs * b.width,
        ),
    ),
    # Bias added to the scores: a pass that the product or the loss could take along.
    Stage("score passes", MODES, lambda _: Work()),
    # _softmax_shared_row: scores read, gradient written in their place. _softmax_dense_row: scores and targets read.
    Stage("softmax", (SHARED,), lambda b: Work(cached=8 * b.scores, flops=SOFTMAX_FLOPS * b.scores)),
    Stage("softmax", (PER_SAMPLE,), lambda b: Work(cached=12 * b.scores, flops=SOFTMAX_FLOPS * b.pairs)),
    # Gradient scaled by 1 / N, and summed for the biases: passes that the loss or the products could take along.
    Stage("gradient passes", MODES, lambda _: Work()),
    # grad (N, U) @ rows (U, H), and its transpose @ hidden (N, H): each array once.
    Stage(
        "gradient products",
        (SHARED,),
        lambda b: Work(
            cached=4 * (b.scores + 2 * b.rows * b.width + 2 * b.classes * b.width),
            flops=4 * b.scores * b.width,
        ),
    ),
    # pair_hidden_grad: distinct rows read, slots and gradients read, N x H written.
    Stage(
        "gradient products",
        (PER_SAMPLE,),
        lambda b: Work(
            rows=4 * b.classes * b.width,
            cached=4 * b.rows * b.width + 12 * b.scores,
            flops=2 * b.pairs * b.width,
        ),
    ),
    # group_by_id: slots read (int64), keys written (int64), each placed at least once.
    Stage("pair grouping", (PER_SAMPLE,), lambda b: Work(cached=16 * b.pairs, counts=b.pairs)),
    # rows_*: U rows, biases and states read and written; the gradient's block read.
    Stage(
        "row update",
        (SHARED,),
        lambda b: Work(
            updates=2 * b.classes * b.class_bytes,
            cached=4 * b.classes * (b.width + 1),
            flops=UPDATE_FLOPS * b.classes * (b.width + 1),
        ),
    ),
    # pair_*: the same, gradients summed over the pairs from hidden vectors in the cache; keys and gradients read.
    Stage(
        "row update",
        (PER_SAMPLE,),
        lambda b: Work(
            updates=2 * b.classes * b.class_bytes,
            cached=12 * b.pairs + 4 * b.rows * b.width,
            flops=2 * b.pairs * b.width + UPDATE_FLOPS * b.classes * (b.width + 1),
        ),
    ),
    # TrainingGraph: ReLU's mask, hidden gradient in, bag's gradient out, dense layers twice.
    Stage(
        "encoder backward",
        MODES,
        lambda b: Work(cached=12 * b.rows * b.bag_width, flops=4 * b.rows * b.dense),
    ),
    # group_by_id: ids read (int32), keys written (int64).
    Stage("bag grouping", MODES, lambda b: Work(cached=12 * b.features, counts=b.features)),
    # embedding_bag_*: distinct feature rows and their states read and written; pairs sum N gradient rows in the cache.
    Stage(
        "bag update",
        MODES,
        lambda b: Work(
            updates=2 * b.distinct_features * b.bag_bytes,
            cached=12 * b.features + 4 * b.rows * b.bag_width,
            flops=2 * b.features * b.bag_width + UPDATE_FLOPS * b.distinct_features * b.bag_width,
        ),
    ),
    # Adam on the dense parameters: parameter, two moments read and written, gradient read.
    Stage("dense update", MODES, lambda b: Work(cached=28 * b.dense, flops=UPDATE_FLOPS * b.dense)),
    # HashIndex.update or build: T rows read and projected, codes written; every table's ids read and written once.
    Stage(
        "rehash",
        MODES,
        lambda b: Work(
            rows=4 * b.rehashed * (b.width + 1),
            stream=(b.rehashed > 0) * 8 * b.tables * b.all_classes + b.code_bytes * b.tables * b.rehashed,
            flops=2 * b.rehashed * (b.width + 1) * b.bits,
        ),
        amortised=True,
    ),
    # ClassRecord.note: active ids read (int64), a byte of flags changed for each.
    Stage("class record", (SHARED,), lambda b: Work(cached=8 * b.classes, counts=b.classes)),
    Stage("class record", (PER_SAMPLE,), lambda b: Work(cached=8 * b.scores, counts=b.scores)),
    Stage("other", MODES, lambda _: Work()),
)
"""Every stage with what it must move and do, after the function of the library that does it."""


def stages_of(mode: str) -> dict[str, Stage]:
    """The stages of a mode, by name, in the order of a step."""
    return {stage.name: stage for stage in STAGES if mode in stage.modes}


def in_words(ceilings: Ceilings) -> str:
    """The rates on one line."""
    rates = {item.name: getattr(ceilings, item.name) / 1e9 for item in fields(ceilings)}
    return (
        "stream {stream:.1f}, cached {cached:.1f}, scattered rows {rows:.1f} read, {updates:.1f} updated GB/s; "
        "products {flops:.0f} GFLOP/s; counters {counts:.2f} G/s"
    ).format(**rates)
