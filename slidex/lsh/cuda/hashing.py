"""What `slidex.lsh.HashIndex` does for weights on a CUDA device: hash there, keep the tables there, answer there.

The same seed, settings and weights give the codes that the CPU gives, to the bit, but where `center` is on: a mean
over all rows is summed in another order and may round otherwise in its last bit. Bucket contents, votes, windows,
reservoirs and pools are equal too. Only which of equally voted classes a query keeps, and their order, differs: the
CPU shuffles them one after the other, the device ranks them by a hash.

Legend: N rows in a batch, C classes, D hidden width, L tables, V codes looked up per table, M rows hashed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from slidex.errors import DivergedError
from slidex.kernels.cuda.environment import require_device
from slidex.late import LateErrors
from slidex.lsh.cuda.tables import DeviceTables
from slidex.lsh.family import require_cuda

if TYPE_CHECKING:
    from slidex.lsh.family import HashFamily
    from slidex.lsh.tables import TableSettings


class DeviceHashing:
    """Hash functions and tables on one device.

    Queries wait for nothing on the host, so a hidden vector that is not finite is found out late: by the first call
    after the device has seen it, see `raise_late`.

    Args:
        num_classes: C.
        family: Its hash functions; must be a `DeviceHashFamily`.
        settings: Of the tables.
        device: Where the weights are.

    Attributes:
        tables: `DeviceTables`.
        device: Where they are.

    Raises:
        ConfigError: Family or settings have no CUDA implementation.
        DeviceError: Kernels cannot run on this device.
    """

    def __init__(
        self,
        num_classes: int,
        family: HashFamily,
        settings: TableSettings,
        device: torch.device,
    ) -> None:
        self._family = require_cuda(family, settings)
        require_device(device)
        self.device = device
        self.tables = DeviceTables(
            num_classes,
            family.tables,
            family.bits,
            settings,
            device,
        )
        self._errors = LateErrors()

    def build(self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None) -> None:
        """Hash all rows and fill the tables."""
        self.tables.build(self._family.hash_rows_on_device(weight_CD, bias_C))

    def load(self, codes_LC: np.ndarray) -> None:
        """Fill the tables from codes, of `slidex.lsh.family.code_dtype`."""
        self.tables.build(torch.from_numpy(codes_LC.astype(np.int32)).to(self.device))

    def update(self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, ids: torch.Tensor) -> None:
        """Rehash rows, int64 (M,), distinct, and sort the tables in which any moved."""
        ids = ids.to(self.device)
        self.tables.update(ids, self._family.hash_rows_on_device(weight_CD, bias_C, ids))

    def drift(self, weight_CD: torch.Tensor, bias_C: torch.Tensor | None, ids: torch.Tensor) -> float:
        """Share of the rows' codes, over all tables, that differ from those in the tables."""
        ids = ids.to(self.device)
        differ_LM = self.tables.differ(ids, self._family.hash_rows_on_device(weight_CD, bias_C, ids))
        return float(differ_LM.sum()) / differ_LM.numel()

    def query(self, hidden_ND: torch.Tensor, k: int, *, step: int) -> torch.Tensor:
        """As `slidex.lsh.CandidateIndex.query`, on the device of `hidden_ND`."""
        codes_NLV = self._look_up(hidden_ND)
        return self.tables.query(codes_NLV, k, step=step).to(hidden_ND.device)

    def pool(self, hidden_ND: torch.Tensor, budget: int, *, step: int) -> torch.Tensor:
        """As `slidex.lsh.HashIndex.padded_pool`, on the device of `hidden_ND`."""
        codes_NLV = self._look_up(hidden_ND)
        return self.tables.pool(codes_NLV, budget, step=step).to(hidden_ND.device)

    def raise_late(self, *, wait: bool = True) -> None:
        """Raise for a hidden vector of an earlier query that was not finite.

        Args:
            wait: Wait for the device; False to look only at what it has done.

        Raises:
            DivergedError: There was one. It is told once.
        """
        self._errors.settle(wait=wait)

    def _look_up(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Codes to look up: int32 (N, L, V), contiguous; notes whether any row is not finite."""
        hidden_ND = hidden_ND.detach().to(self.device, torch.float32)
        if len(hidden_ND):
            self._errors.expect(_first_bad(hidden_ND), _not_finite)
            self.raise_late(wait=False)
        return self._family.hash_queries_on_device(hidden_ND)


def _first_bad(rows_ND: torch.Tensor) -> torch.Tensor:
    """The first row that is not finite, or -1: int64 ()."""
    bad_N = ~torch.isfinite(rows_ND).all(dim=1)
    return torch.where(bad_N.any(), bad_N.byte().argmax(), -1)


def _not_finite(row: int) -> DivergedError:
    return DivergedError(f"Row {row} of the hidden vectors holds a value that is not finite.")
