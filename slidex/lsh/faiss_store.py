"""One FAISS index kept in step with moving weights: trained, filled, updated and searched.

FAISS is written for vectors that stay. Here rows move all the time, so this module adds what that takes: the
cheapest update each kind of index allows, and training anew once rows have left the cells that were made for
them. Legend: N rows in a batch, C classes, M of them, E indexed width, K candidates per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from slidex.errors import ConfigError
from slidex.lsh.faiss_parts import check_device, clear_removed, inner_indexes, moved_share, part_bytes, reason
from slidex.lsh.faiss_rows import faiss_call, load_faiss
from slidex.lsh.index import check_integer, check_number

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Mapping

    from slidex.lsh.faiss_rows import RowEncoder

ROWS_PER_CELL = 39
"""Training rows FAISS asks for per cell."""
_TRAIN_ROWS_PER_CELL = 40
_LEAST_TRAIN_ROWS = 20_000
_ANCHOR_ROWS = 4_096
_KMEANS_ROUNDS = 5
_FILL_ROWS = 65_536
_SHARED_FLOATS = 1 << 20
"""Waking a second thread for an index smaller than this costs more than it brings (milliseconds on busy cores)."""
_MOST_GPU_CANDIDATES = 2_048
_TRAIN_STREAM, _ANCHOR_STREAM = 0xFA15, 0xA2C0


def most_cells(num_classes: int) -> int:
    """The largest nlist for C classes."""
    return max(1, num_classes // ROWS_PER_CELL)


class FaissStore:
    """A FAISS index over all class rows; row c has the id c.

    Args:
        encoder: Turns class rows into what FAISS stores.
        num_classes: C.
        factory: What `faiss.index_factory`, or for codes `faiss.index_binary_factory`, is to make.
        seed: Draws the training rows and starts k-means.
        nprobe: Cells read per query, 1 to nlist; None for FAISS's own number.
        ef_construction: HNSW's candidate list when adding; None for FAISS's own number.
        ef_search: HNSW's candidate list when searching; None for FAISS's own number.
        train_rows: Rows the quantisers are trained on, at least 39 per cell; None for 40 per cell and at least
            20,000. No more than there are.
        retrain_share: Quantisers are trained anew in a build that finds this share of a sample of rows in
            another cell (without cells: off by more than a tenth) than right after the last training; 0 for
            every build, None for never.
        device: Where queries are searched, "cpu" or "cuda".

    Attributes:
        ready: Whether every class is in the index.
        trainings: How often the quantisers were trained.
        rows_written: Rows the last `build` or `update` wrote.

    Raises:
        ConfigError: A setting is out of range, or FAISS does not know the factory string.
        MissingExtraError: `faiss` is not installed.
    """

    def __init__(
        self,
        encoder: RowEncoder,
        num_classes: int,
        *,
        factory: str,
        seed: int,
        nprobe: int | None = None,
        ef_construction: int | None = None,
        ef_search: int | None = None,
        train_rows: int | None = None,
        retrain_share: float | None = 0.1,
        device: str = "cpu",
    ) -> None:
        self._faiss = load_faiss()
        self._encoder, self._num_classes = encoder, num_classes
        self._factory, self._seed = factory, seed
        self._nprobe, self._ef_construction, self._ef_search = nprobe, ef_construction, ef_search
        self._train_rows, self._retrain_share = train_rows, retrain_share
        self.device = device
        check_device(self._faiss, device)
        self.ready = False
        self.trainings = self.rows_written = 0
        self._anchor: np.ndarray | None = None
        self._adopt(self._make())
        self._check_settings()
        self._tune()
        self._learns = not self._index.is_trained

    def build(self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None) -> None:
        """Index all rows; quantisers stay as they are while rows still fit them."""
        self.ready = False
        self._encoder.fit(weight_CD, bias_C)
        if self._learns and self._training_is_due(weight_CD, bias_C):
            self._train(weight_CD, bias_C)
        self._fill(weight_CD, bias_C)

    def update(self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, ids: torch.Tensor) -> None:
        """Bring the rows `ids`, int64 (M,) and distinct, up to date.

        Flat rows are written in place; rows in cells are removed and added; everything else that FAISS cannot
        change (HNSW, a product quantiser without cells, a refining index) is filled anew.
        """
        self.rows_written = len(ids)
        if len(ids) == 0:
            return
        rows, places = self._encoder.rows(weight_CD, bias_C, ids), ids.cpu().numpy()
        if self._is_flat:
            self._stored()[places] = rows
        elif self._has_movable_cells:
            with self._calling():
                before = self.loads()
                self._index.remove_ids(places)
                clear_removed(self._faiss, self._cells, before, self.loads())
                self._index.add_with_ids(rows, places)
        else:
            self._fill(weight_CD, bias_C)
            return
        self._to_device()

    def search(self, hidden_ND: torch.Tensor, k: int) -> np.ndarray:
        """The nearest classes of each row: int64 (N, min(k, C)), best first, -1 where there are no more."""
        queries = self._encoder.queries(hidden_ND)
        k = min(k, self._num_classes)
        if self.device == "cuda":
            check_integer("k", "a FAISS index on a GPU", k, 1, _MOST_GPU_CANDIDATES)
        if len(queries) == 0:
            return np.empty((0, k), dtype=np.int64)
        with self._calling():
            return self._searcher.search(queries, k)[1]

    def drift(self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, ids: torch.Tensor) -> float:
        """Share of the rows in another cell than they are filed under; without cells: see `MOVED_SHARE`.

        Of codes: the share of their bits that differ.
        """
        now = self._place(self._encoder.rows(weight_CD, bias_C, ids))
        places = ids.cpu().numpy()
        if self._cells is not None:
            return moved_share(self._filed_cells()[places], now)
        return moved_share(self._stored()[places] if self._is_flat else self._reconstruct(places), now)

    def loads(self) -> np.ndarray:
        """Classes in each cell, int64 (nlist,); empty for an index without cells."""
        if self._cells is None:
            return np.empty(0, dtype=np.int64)
        lists = self._cells.invlists
        return np.array([lists.list_size(cell) for cell in range(self._cells.nlist)], dtype=np.int64)

    @property
    def bytes(self) -> int:
        """Memory of codes, ids, graph links and cell centres, without FAISS's small change."""
        return sum(part_bytes(part) for part in self._parts)

    def state(self) -> dict[str, torch.Tensor]:
        """The index as FAISS writes it, uint8, and where the anchor rows lay when it was trained."""
        faiss = self._faiss
        write = faiss.serialize_index_binary if self._encoder.binary else faiss.serialize_index
        anchor = np.empty(0, dtype=np.int64) if self._anchor is None else self._anchor
        return {
            "index": torch.from_numpy(write(self._index)),
            "anchor": torch.from_numpy(anchor),
            **self._encoder.parameters(),
        }

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state` gave.

        Raises:
            ConfigError: It is not the state of an index of these settings.
        """
        faiss, fresh = self._faiss, self._make()
        fitted = self._encoder.parameters()
        wanted = {"index", "anchor", *fitted}
        if (
            set(state) != wanted
            or state["index"].dtype != torch.uint8
            or any(state[name].shape != value.shape for name, value in fitted.items())
        ):
            raise ConfigError(
                f"The 'state' parameter of FaissIndex.load_state must hold {sorted(wanted)}, the first as bytes. "
                f"Got { ({name: tuple(value.shape) for name, value in state.items()}) } instead."
            )
        read = faiss.deserialize_index_binary if self._encoder.binary else faiss.deserialize_index
        try:
            index = read(state["index"].cpu().numpy())
        except RuntimeError as error:
            raise ConfigError(f"The 'index' of the state is not a FAISS index: {reason(error)}") from error
        ours, theirs = (
            (type(i).__name__.removesuffix("IP"), i.d, getattr(i, "code_size", 0), getattr(i, "nlist", 0))
            for i in (fresh, index)
        )
        if ours != theirs or index.ntotal != self._num_classes:
            raise ConfigError(
                f"The 'state' parameter of FaissIndex.load_state must be {ours} (kind, width, bytes of a code, "
                f"cells) with {self._num_classes} rows. Got {theirs} with {index.ntotal} instead."
            )
        self._adopt(index)
        self._check_settings()
        self._tune()
        self._encoder.load_parameters(state)
        self._anchor = state["anchor"].cpu().numpy().copy() if self._learns else None
        self.ready = True
        self._to_device()

    def _make(self) -> Any:
        faiss = self._faiss
        if not isinstance(self._factory, str):
            raise ConfigError(
                f"The 'factory' parameter of make_index must be text. Got {self._factory!r} instead."
            )
        try:
            if self._encoder.binary:
                return faiss.index_binary_factory(self._encoder.width, self._factory)
            return faiss.index_factory(self._encoder.width, self._factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise ConfigError(
                "The 'factory' parameter of make_index must be a FAISS index factory string for inner products "
                f"and vectors of width {self._encoder.width}. Got {self._factory!r} instead: {reason(error)}"
            ) from error

    def _adopt(self, index: Any) -> None:
        """Take an index and look up its parts, which live as long as it does."""
        faiss = self._faiss
        self._index = self._searcher = index
        self._parts = list(inner_indexes(faiss, index))
        depth = [at for at, part in enumerate(self._parts) if hasattr(part, "nlist")]
        self._cells = self._parts[depth[0]] if depth else None
        self._around_cells = self._parts[: depth[0]] if depth else []
        self._has_graph = any(hasattr(part, "hnsw") or hasattr(part, "nsg_k") for part in self._parts)
        self._is_flat = isinstance(index, faiss.IndexFlat | faiss.IndexBinaryFlat)
        self._has_movable_cells = bool(depth) and all(hasattr(part, "chain") for part in self._around_cells)

    def _check_settings(self) -> None:
        cells = 0 if self._cells is None else self._cells.nlist
        if cells > most_cells(self._num_classes):
            raise ConfigError(
                f"The 'factory' parameter of make_index must ask for at most {most_cells(self._num_classes)} cells "
                f"with {self._num_classes} classes: FAISS trains each on {ROWS_PER_CELL} rows. "
                f"Got {self._factory!r} instead."
            )
        if isinstance(self._index, self._faiss.IndexIDMap):
            raise ConfigError(
                "The 'factory' parameter of make_index must be without IDMap: classes are their own ids. "
                f"Got {self._factory!r} instead."
            )
        if self._train_rows is not None:
            check_integer("train_rows", "make_index", self._train_rows, max(1, ROWS_PER_CELL * cells))
        if self._retrain_share is not None:
            check_number("retrain_share", "make_index", self._retrain_share, 0, 1)
        if self._nprobe is not None:
            self._require("nprobe", self._nprobe, cells > 0, "cells (IVF)")
            check_integer("nprobe", "make_index", self._nprobe, 1, cells)
        for name in ("ef_construction", "ef_search"):
            value = getattr(self, f"_{name}")
            if value is not None:
                self._require(name, value, self._has_graph, "a graph (HNSW)")
                check_integer(name, "make_index", value, 1)

    def _require(self, name: str, value: object, fits: bool, what: str) -> None:
        if not fits:
            raise ConfigError(
                f"The {name!r} parameter of make_index is for an index with {what}, which {self._factory!r} "
                f"has not. Got {value!r}."
            )

    def _tune(self) -> None:
        """Set what a factory string does not say, on the index and on the indexes inside it."""
        for part in self._parts:
            for owner in (part, getattr(part, "pq", None)):
                if hasattr(owner, "cp"):
                    owner.cp.niter, owner.cp.seed = _KMEANS_ROUNDS, self._seed % (1 << 31)
                    # `_train` sees to enough rows; FAISS would print a warning for each quantiser.
                    owner.cp.min_points_per_centroid = 1
            if hasattr(part, "do_polysemous_training"):
                part.do_polysemous_training = False  # minutes, for a filter that is not used here
            if hasattr(part, "hnsw"):
                part.hnsw.efConstruction = self._ef_construction or part.hnsw.efConstruction
                part.hnsw.efSearch = self._ef_search or part.hnsw.efSearch
        if self._cells is not None and self._nprobe is not None:
            self._cells.nprobe = self._nprobe

    def _training_is_due(self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None) -> bool:
        if self._anchor is None or self._retrain_share is None:
            return self._anchor is None
        rows = self._encoder.rows(weight_CD, bias_C, self._sample(_ANCHOR_ROWS, _ANCHOR_STREAM))
        return moved_share(self._anchor, self._place(rows)) >= self._retrain_share

    def _train(self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None) -> None:
        cells = 0 if self._cells is None else self._cells.nlist
        wanted = self._train_rows or max(_TRAIN_ROWS_PER_CELL * cells, _LEAST_TRAIN_ROWS)
        rows = self._encoder.rows(weight_CD, bias_C, self._sample(wanted, _TRAIN_STREAM))
        # k-means wants a row per centre, and OPQ 39 for each of 256: give it the few there are several times.
        fewest = max([cells, *(part.pq.ksub for part in self._parts if hasattr(part, "pq"))])
        if any(hasattr(part, "chain") for part in self._parts):
            fewest = max(fewest, ROWS_PER_CELL * 256)
        if len(rows) < fewest:
            rows = np.resize(rows, (fewest, rows.shape[1]))
        self._adopt(self._make())
        self._tune()
        with self._calling(filling=True):
            try:
                self._index.train(rows)
            except RuntimeError as error:
                raise ConfigError(
                    f"FAISS cannot train {self._factory!r} on {len(rows)} rows: {reason(error)}"
                ) from error
        self._anchor = self._place(
            self._encoder.rows(weight_CD, bias_C, self._sample(_ANCHOR_ROWS, _ANCHOR_STREAM))
        )
        self.trainings += 1

    def _fill(self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None) -> None:
        self.ready = False
        if self._learns:
            self._index.reset()
        else:  # a graph that is reset goes on with its old random numbers
            self._adopt(self._make())
            self._tune()
        with self._calling(filling=True):
            for first in range(0, self._num_classes, _FILL_ROWS):
                ids = torch.arange(first, min(first + _FILL_ROWS, self._num_classes))
                self._index.add(self._encoder.rows(weight_CD, bias_C, ids))
        self.rows_written = self._num_classes
        self.ready = True
        self._to_device()

    def _calling(self, *, filling: bool = False) -> contextlib.AbstractContextManager[None]:
        small = self._num_classes * self._encoder.width < _SHARED_FLOATS
        # FAISS links a graph in the order in which its threads get there: one thread, one graph.
        return faiss_call(self._faiss, 1 if small or (filling and self._has_graph) else None)

    def _to_device(self) -> None:
        """Copy the index to the GPU, whole: FAISS's GPU indexes cannot change single rows."""
        if self.device != "cuda":
            return
        faiss = self._faiss
        copy = faiss.index_binary_cpu_to_gpu if self._encoder.binary else faiss.index_cpu_to_gpu
        try:
            self._gpu = faiss.StandardGpuResources()  # to be kept as long as the copy
            self._searcher = copy(self._gpu, 0, self._index)
        except RuntimeError as error:
            raise ConfigError(f"FAISS cannot put {self._factory!r} on a GPU: {reason(error)}") from error

    def _sample(self, count: int, stream: int) -> torch.Tensor:
        count = min(count, self._num_classes)
        generator = np.random.Generator(np.random.Philox(key=[self._seed, stream]))
        return torch.from_numpy(np.sort(generator.choice(self._num_classes, count, replace=False)))

    def _place(self, rows: np.ndarray) -> np.ndarray:
        """Where FAISS files rows: their cells, int64 (M,), or else what it keeps of them, (M, width)."""
        with self._calling():
            if self._cells is not None:
                for part in self._around_cells:
                    for i in range(part.chain.size() if hasattr(part, "chain") else 0):
                        rows = self._faiss.downcast_VectorTransform(part.chain.at(i)).apply(rows)
                return self._cells.quantizer.search(rows, 1)[1][:, 0]
            if not self._learns:
                return rows
            return self._index.sa_decode(self._index.sa_encode(rows))

    def _filed_cells(self) -> np.ndarray:
        """The cell of every class: int64 (C,)."""
        cells_C = np.empty(self._num_classes, dtype=np.int64)
        lists = self._cells.invlists  # pyrefly: ignore[missing-attribute]  (called where there are cells)
        for cell, size in enumerate(self.loads().tolist()):
            if size:
                cells_C[self._faiss.rev_swig_ptr(lists.get_ids(cell), size)] = cell
        return cells_C

    def _stored(self) -> np.ndarray:
        """The rows of a flat index, not copied."""
        width = self._encoder.width
        if self._encoder.binary:
            width //= 8
            start = self._index.xb.data()
        else:
            start = self._index.get_xb()
        return self._faiss.rev_swig_ptr(start, self._num_classes * width).reshape(-1, width)

    def _reconstruct(self, places: np.ndarray) -> np.ndarray:
        try:
            return self._index.reconstruct_batch(places)
        except RuntimeError as error:
            raise ConfigError(
                f"The drift of {self._factory!r} cannot be measured; use another rehash schedule: "
                f"{reason(error)}"
            ) from error
