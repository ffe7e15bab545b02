"""slidex's layer with candidates from FAISS on the same GPU, for comparison with its own tables.

slidex refuses such a layer in training: queries go through the host, so every step waits for the device, and after
every rehash the whole index is copied there anew. Here it is made nevertheless, to show what that costs.
Legend: N rows in a batch, C classes, D hidden width, K candidates per row.
"""

from __future__ import annotations

import torch

from slidex.errors import ConfigError, MissingExtraError
from slidex.lsh import FaissIndex
from slidex.lsh.faiss_factories import faiss_ivf_index
from slidex.lsh.faiss_parts import check_device
from slidex.lsh.faiss_rows import load_faiss
from slidex.lsh.index import padded, register_index

INDEX = "faiss-ivf on a GPU"
"""What `register` calls it."""
MOST_CLASSES = 1_000_000
"""Up to so many the benchmark builds it: cells are filled on the host, by C^1.5 D multiply-adds."""


class AbsentError(Exception):
    """What there is no measurement of, and why."""


class FaissOnDevice(FaissIndex):
    """A FAISS index as a `slidex.lsh.index.DeviceCandidateIndex`, but for one thing: it waits for the device."""

    runs_on_cuda = True

    @property
    def bytes_on_device(self) -> int:
        """The copy of all rows in float32; FAISS's own scratch memory comes on top."""
        return 4 * self.num_classes * (self.in_features + 1)

    def require_cuda(self) -> None:
        """FAISS has said when the index was made whether it can."""

    def padded_pool(self, hidden_ND: torch.Tensor, budget: int, *, step: int = 0) -> torch.Tensor:
        """See `slidex.lsh.index.DeviceCandidateIndex.padded_pool`."""
        return padded(self.pool(hidden_ND, budget, step=step), min(budget, self.num_classes))


def require_faiss(num_classes: int) -> None:
    """Raises AbsentError, with the reason, where there is no FAISS on a GPU, or the index is too large to fill."""
    try:
        check_device(load_faiss(), "cuda")
    except (ConfigError, MissingExtraError) as error:
        raise AbsentError(str(error)) from error
    if num_classes > MOST_CLASSES:
        raise AbsentError(f"more than {MOST_CLASSES:,} classes take the host too long to file")


def register() -> None:
    """Has slidex know the index `INDEX`: exact scores within the nearest cells, ``faiss-ivf`` with its defaults."""

    def make(in_features: int, num_classes: int, *, seed: int) -> FaissOnDevice:
        made = faiss_ivf_index(in_features, num_classes, seed=seed, device="cuda")
        return FaissOnDevice(in_features, num_classes, made._store, seed=seed)

    register_index(INDEX)(make)


def outside_bytes(device: torch.device) -> int:
    """Memory in use on a GPU that torch did not allocate, which is where FAISS keeps its index; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)
