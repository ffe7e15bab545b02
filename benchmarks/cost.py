"""CPU time of a batch where SLIDE's own implementations were measured: npm-deps-2017, 128 rows, width 128, one thread.

Run it as ``python -m benchmarks --only cost``.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from benchmarks.report import Comparison
from benchmarks.rivals import DenseSoftmax, SparseSoftmax
from benchmarks.steps import OUR_STEPS, REPEATS, WARM_UP, OurSteps, dense_steps, sparse_steps
from slidex.threads import set_threads

if TYPE_CHECKING:
    from pathlib import Path

RIVAL_STEPS = 3


def per_batch(data: Path, pool_size: int = 1000) -> list[Comparison]:
    """CPU milliseconds of slidex, of a dense softmax and of torch's sparse tools."""
    set_threads(1)
    clock = time.process_time
    ours = OurSteps("npm-deps-2017", data, mode="shared", batch_size=128, pool_size=pool_size, threads=1)
    model, precision = ours.trainer.model, ours.config.precision
    dense, sparse = DenseSoftmax(model, 128, precision), SparseSoftmax(model, precision)
    ours.run(WARM_UP)
    dense_steps(dense, ours.batches(1))
    sparse_steps(sparse, ours, ours.batches(1))
    times = [
        (
            ours.run(OUR_STEPS, clock),
            dense_steps(dense, ours.batches(RIVAL_STEPS), clock),
            sparse_steps(sparse, ours, ours.batches(RIVAL_STEPS), clock),
        )
        for _ in range(REPEATS)
    ]
    slidex, theirs_dense, theirs_sparse = zip(*times, strict=True)
    what = f"batch of 128, npm-deps-2017, one thread, pool of {pool_size:,}"
    note = "SLIDE's C++ 412, its AVX-512 port 78 (another machine)"
    return [
        Comparison(what, f"torch dense, {precision}", "CPU ms", slidex, theirs_dense, note),
        Comparison(what, f"torch sparse, {precision}", "CPU ms", slidex, theirs_sparse),
    ]
