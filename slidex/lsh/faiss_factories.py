"""The FAISS indexes by name, with defaults measured on trained weights (docs/performance.md).

A row is searched among the root of C cells, a quarter of FAISS's rule of thumb: training and filing rows, which
a moving index does again and again, cost four to sixteen times less, and equal recall costs about equal time
per query. Legend: C classes, D hidden width.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, TypeVar

from slidex.errors import ConfigError
from slidex.lsh.faiss_index import FaissIndex
from slidex.lsh.faiss_rows import FloatRows, SignRows
from slidex.lsh.faiss_store import FaissStore, most_cells
from slidex.lsh.index import check_integer, keyword_settings, register_index

if TYPE_CHECKING:
    from collections.abc import Callable

_PROBED_CELLS = 32
_TRAINED = ("train_rows", "retrain_share", "device")
"""Settings of `FaissStore` that every index with quantisers has."""


def automatic_cells(num_classes: int) -> int:
    """nlist: the root of C, which balances the search for cells with that in them, and at most C / 39."""
    return min(most_cells(num_classes), round(math.sqrt(num_classes)))


def _cells(num_classes: int, nlist: int | None, nprobe: int | None) -> tuple[int, int]:
    if nlist is None:
        nlist = automatic_cells(num_classes)
    check_integer("nlist", "make_index", nlist, 1, most_cells(num_classes))
    return nlist, min(_PROBED_CELLS, nlist) if nprobe is None else nprobe


_Factory = TypeVar("_Factory", bound="Callable[..., FaissIndex]")


def _register(name: str, *store_settings: str) -> Callable[[_Factory], _Factory]:
    """Register a factory that has its own settings and hands those named on to `FaissStore`, with its defaults."""

    def register(factory: _Factory) -> _Factory:
        defaults = keyword_settings(FaissStore)
        handed_on = {setting: defaults[setting] for setting in store_settings}
        return register_index(name, keyword_settings(factory) | handed_on)(factory)

    return register


@_register("faiss", "nprobe", "ef_search", *_TRAINED)
def faiss_index(
    in_features: int,
    num_classes: int,
    *,
    seed: int,
    factory: str = "Flat",
    k_factor: int = 1,
    **store_settings: Any,
) -> FaissIndex:
    """Whatever a FAISS factory string names.

    Args:
        in_features: Hidden width D.
        num_classes: C.
        seed: See `FaissStore`.
        factory: For inner products over vectors of width D + 1; where it has ``PQm``, padded with zeros to a
            multiple of m. ``PQ65`` wastes nothing at D = 128, ``PQ64`` a third.
        k_factor: See `FaissIndex`.
        store_settings: See `FaissStore`; FAISS's own `nprobe` is 1, its `ef_search` 16.
    """
    quantised = re.search(r"(?<!O)PQ(\d+)", factory) if isinstance(factory, str) else None
    store = FaissStore(
        FloatRows(in_features, max(1, int(quantised[1])) if quantised else 1),
        num_classes,
        factory=factory,
        seed=seed,
        **store_settings,
    )
    return FaissIndex(in_features, num_classes, store, seed=seed, k_factor=k_factor)


@_register("faiss-flat", "device")
def faiss_flat_index(in_features: int, num_classes: int, *, seed: int, **store_settings: Any) -> FaissIndex:
    """Exact scores of a copy of the rows.

    Args:
        in_features: Hidden width D.
        num_classes: C.
        seed: See `FaissIndex`.
        store_settings: See `FaissStore`.
    """
    store = FaissStore(FloatRows(in_features), num_classes, factory="Flat", seed=seed, **store_settings)
    return FaissIndex(in_features, num_classes, store, seed=seed)


@_register("faiss-ivf", *_TRAINED)
def faiss_ivf_index(
    in_features: int,
    num_classes: int,
    *,
    seed: int,
    nlist: int | None = None,
    nprobe: int | None = None,
    **store_settings: Any,
) -> FaissIndex:
    """Rows filed in cells around k-means centres; the nearest cells are searched, exactly (IVF-Flat).

    Args:
        in_features: Hidden width D.
        num_classes: C.
        seed: See `FaissStore`.
        nlist: Cells, 1 to C / 39; None for `automatic_cells`.
        nprobe: Cells searched per query, 1 to nlist; None for 32, or all where there are fewer.
        store_settings: See `FaissStore`.
    """
    nlist, nprobe = _cells(num_classes, nlist, nprobe)
    store = FaissStore(
        FloatRows(in_features),
        num_classes,
        factory=f"IVF{nlist},Flat",
        seed=seed,
        nprobe=nprobe,
        **store_settings,
    )
    return FaissIndex(in_features, num_classes, store, seed=seed)


@_register("faiss-pq", *_TRAINED)
def faiss_pq_index(
    in_features: int,
    num_classes: int,
    *,
    seed: int,
    nlist: int | None = None,
    nprobe: int | None = None,
    m: int | None = None,
    bits: int = 4,
    k_factor: int = 2,
    **store_settings: Any,
) -> FaissIndex:
    """Cells of product-quantised rows (Jégou et al. 2011), ranked by exact score at the end (IVF-PQ).

    Args:
        in_features: Hidden width D.
        num_classes: C.
        seed: See `FaissStore`.
        nlist: See `faiss_ivf_index`.
        nprobe: See `faiss_ivf_index`.
        m: Parts a row is cut into, 1 to D + 1, the row padded with zeros to a multiple; None for parts of two
            numbers.
        bits: Bits of a part's code: 4, scanned in registers (fast-scan, André et al. 2017) on CPUs only, or 8.
        k_factor: See `FaissIndex`.
        store_settings: See `FaissStore`; on the device "cuda" `bits` must be 8.
    """
    nlist, nprobe = _cells(num_classes, nlist, nprobe)
    m = math.ceil((in_features + 1) / 2) if m is None else m
    check_integer("m", "make_index", m, 1, in_features + 1)
    on_gpu = store_settings.get("device") == "cuda"
    if bits not in (4, 8) or isinstance(bits, bool) or (bits == 4 and on_gpu):
        limits = "8 on a GPU" if on_gpu else "4 or 8"
        raise ConfigError(f"The 'bits' parameter of make_index must be {limits}. Got {bits!r} instead.")
    store = FaissStore(
        FloatRows(in_features, m),
        num_classes,
        factory=f"IVF{nlist},PQ{m}x{'4fsr' if bits == 4 else '8'}",
        seed=seed,
        nprobe=nprobe,
        **store_settings,
    )
    return FaissIndex(in_features, num_classes, store, seed=seed, k_factor=k_factor)


@_register("faiss-hnsw")
def faiss_hnsw_index(
    in_features: int,
    num_classes: int,
    *,
    seed: int,
    M: int = 16,
    ef_construction: int = 40,
    ef_search: int = 64,
) -> FaissIndex:
    """A graph of near rows (Malkov & Yashunin 2018) for weights that stay: every update builds it anew.

    Args:
        in_features: Hidden width D.
        num_classes: C.
        seed: See `FaissIndex`.
        M: Links of a row (twice as many on the lowest level), 2 to 512.
        ef_construction: See `FaissStore`.
        ef_search: See `FaissStore`; FAISS takes k where k is larger.
    """
    check_integer("M", "make_index", M, 2, 512)
    store = FaissStore(
        FloatRows(in_features),
        num_classes,
        factory=f"HNSW{M}",
        seed=seed,
        ef_construction=ef_construction,
        ef_search=ef_search,
    )
    return FaissIndex(in_features, num_classes, store, seed=seed)


@_register("faiss-binary", *_TRAINED)
def faiss_binary_index(
    in_features: int,
    num_classes: int,
    *,
    seed: int,
    bits: int = 256,
    center: bool = False,
    nlist: int | None = None,
    nprobe: int | None = None,
    k_factor: int = 4,
    **store_settings: Any,
) -> FaissIndex:
    """SimHash codes nearest by Hamming distance, ranked by exact score at the end.

    Args:
        in_features: Hidden width D.
        num_classes: C.
        seed: See `SignRows` and `FaissStore`.
        bits: Bits of a code, a multiple of 16.
        center: See `SimHash`.
        nlist: See `faiss_ivf_index`; 0 for no cells: all codes are scanned and nothing is trained.
        nprobe: See `faiss_ivf_index`; only with cells.
        k_factor: See `FaissIndex`.
        store_settings: See `FaissStore`.
    """
    check_integer("bits", "make_index", bits, 16, 65_536)
    if bits % 16:
        raise ConfigError(
            f"The 'bits' parameter of make_index must be a multiple of 16. Got {bits!r} instead."
        )
    factory = "BFlat"
    if nlist != 0 or isinstance(nlist, bool):
        nlist, nprobe = _cells(num_classes, nlist, nprobe)
        factory = f"BIVF{nlist}"
    store = FaissStore(
        SignRows(in_features, bits=bits, seed=seed, center=center),
        num_classes,
        factory=factory,
        seed=seed,
        nprobe=nprobe,
        **store_settings,
    )
    return FaissIndex(in_features, num_classes, store, seed=seed, k_factor=k_factor)
