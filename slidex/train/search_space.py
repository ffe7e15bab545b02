"""The indexes and settings that tuning tries."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from slidex.errors import ConfigError
from slidex.lsh.faiss_factories import automatic_cells
from slidex.lsh.family import MAX_BITS, automatic_bits

if TYPE_CHECKING:
    from collections.abc import Sequence

INSERTED = 16
"""Classes inserted per bucket."""
MOST_TABLE_BYTES = 1 << 30
"""Tables whose ids and codes take more are not tried."""
MOST_GRAPH_CLASSES = 200_000
"""A graph over more rows takes minutes to build."""


def search_space(num_classes: int, names: Sequence[str] | None) -> list[tuple[str, dict[str, Any]]]:
    """Kinds of index with their settings, in the order in which they are tried.

    Args:
        num_classes: C.
        names: Kinds to try, with default settings those that have no settings here; None for hash tables and, where
            it is installed, FAISS.

    Raises:
        ConfigError: `names` is empty, or nothing of what it names fits into `MOST_TABLE_BYTES`.
    """
    space = {
        "simhash": _hash_settings(num_classes, (0, 2, 4), (16, 32, 64)),
        "learned": _hash_settings(num_classes, (0, 2), (8, 16, 32)),
        "faiss-ivf": _cell_settings(num_classes, (4, 16, 64)),
        "faiss-pq": _cell_settings(num_classes, (4, 16, 64)),
        "faiss-hnsw": [{"ef_search": ef} for ef in (64, 256)],
    }
    if names is None:
        names = [name for name in space if not name.startswith("faiss")]
        if importlib.util.find_spec("faiss") is not None:
            names += ["faiss-ivf", "faiss-pq"]
            names += ["faiss-hnsw"] if num_classes <= MOST_GRAPH_CLASSES else []
    if not names:
        raise ConfigError("The 'indexes' parameter of tune-index must name an index. Got none instead.")
    found = [(name, options) for name in names for options in space.get(name, [{}])]
    if not found:
        raise ConfigError(
            f"The 'indexes' parameter of tune-index must name an index that fits {num_classes:,} classes into "
            f"{MOST_TABLE_BYTES:,} bytes. Got {', '.join(names)} instead: none that fits."
        )
    return found


def _hash_settings(num_classes: int, more_bits: Sequence[int], tables: Sequence[int]) -> list[dict[str, Any]]:
    """Tables with inserted labels, of the automatic number of bits and of more."""
    bits = automatic_bits(num_classes)
    return [
        {"bits": b, "tables": count, "insert": INSERTED}
        for b in dict.fromkeys(min(MAX_BITS, bits + more) for more in more_bits)
        for count in tables
        if num_classes * count * (6 if b <= 16 else 8) <= MOST_TABLE_BYTES
    ]


def _cell_settings(num_classes: int, probes: Sequence[int]) -> list[dict[str, Any]]:
    cells = automatic_cells(num_classes)
    return [{"nprobe": count} for count in dict.fromkeys(min(cells, count) for count in probes)]
