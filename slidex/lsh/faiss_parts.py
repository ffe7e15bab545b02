"""Small questions about FAISS objects, whose classes share methods by habit rather than by type.

Legend: M rows.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from slidex.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

MOVED_SHARE = 0.1
"""A stored vector no longer fits where it is off by more than this share of the row's length."""


def check_device(faiss: ModuleType, device: object) -> None:
    """Raise ConfigError unless `device` is "cpu", or "cuda" where this build of FAISS sees a GPU."""
    if device not in ("cpu", "cuda"):
        raise ConfigError(
            f"The 'device' parameter of make_index must be 'cpu' or 'cuda'. Got {device!r} instead."
        )
    if device == "cuda" and not hasattr(faiss, "StandardGpuResources"):
        raise ConfigError(
            "The 'device' parameter of make_index must be 'cpu' with this build of faiss, which has no GPU "
            "code: uninstall faiss-cpu and install faiss-gpu or faiss-gpu-cuvs. Got 'cuda' instead."
        )
    if device == "cuda" and faiss.get_num_gpus() == 0:
        raise ConfigError(
            "The 'device' parameter of make_index must be 'cpu': faiss sees no GPU. Got 'cuda' instead."
        )


def part_bytes(part: Any) -> int:
    """Memory of an index's own codes, ids and graph links, without the indexes inside it."""
    total = 0
    if hasattr(part, "nlist"):
        total += part.ntotal * (part.code_size + 8)
    elif hasattr(part, "codes"):
        total += part.codes.size()
    elif hasattr(part, "xb"):
        total += part.xb.size()
    if hasattr(part, "hnsw"):
        total += 4 * part.hnsw.neighbors.size()
    return total


def inner_indexes(faiss: Any, index: Any) -> Iterator[Any]:
    """An index, then the indexes inside it, outermost first."""
    binary = isinstance(index, faiss.IndexBinary)
    index = faiss.downcast_IndexBinary(index) if binary else faiss.downcast_index(index)
    yield index
    for name in ("index", "base_index", "quantizer", "storage"):
        inner = getattr(index, name, None)
        if inner is not None:
            yield from inner_indexes(faiss, inner)


def clear_removed(faiss: ModuleType, cells: Any, loads_before: np.ndarray, loads: np.ndarray) -> None:
    """Set to zero what `remove_ids` left behind the last code of each cell of a fast-scan index.

    FAISS 1.15 packs new codes into a block by OR, so a row added where another was removed would get a mixture
    of both codes: seen as wrong scores of one row in seven, with no error. Other indexes are left alone.

    Args:
        faiss: The module.
        cells: An IVF index.
        loads_before: int64 (nlist,), rows per cell before the removal.
        loads: int64 (nlist,), rows per cell after it.
    """
    lists = faiss.downcast_InvertedLists(cells.invlists) if hasattr(cells, "bbs") else None
    if not isinstance(lists, faiss.BlockInvertedLists):
        return
    packer = lists.packer
    nothing = np.zeros(packer.code_size, dtype=np.uint8)
    for cell in np.flatnonzero(loads < loads_before).tolist():
        blocks = -(-int(loads[cell]) // packer.nvec)
        codes = faiss.rev_swig_ptr(lists.get_codes(cell), blocks * packer.block_size)
        last = codes.reshape(blocks, packer.block_size)[-1:]
        for place in range(int(loads[cell]), min(int(loads_before[cell]), blocks * packer.nvec)):
            packer.pack_1(nothing, place % packer.nvec, last)


def moved_share(before: np.ndarray, now: np.ndarray) -> float:
    """Share of cells or of code bits that differ, or of vectors off by more than `MOVED_SHARE`."""
    if len(now) == 0:
        return 0.0
    if now.dtype == np.uint8:
        return float(np.unpackbits(np.bitwise_xor(before, now)).mean())
    if now.ndim == 1:
        return float(np.mean(before != now))
    off = np.linalg.norm(now - before, axis=1) > MOVED_SHARE * np.linalg.norm(now, axis=1)
    return float(np.mean(off))


def reason(error: RuntimeError) -> str:
    """FAISS's message without the function and the place in its source."""
    return re.sub(r"^Error in .*? at \S+:\d+: (Error: )?", "", str(error), flags=re.DOTALL)
