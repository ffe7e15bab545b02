"""A run's batches in their order; each is read, and sent to the model's device, while the one before trains."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from slidex.nn.device_labels import DeviceLabels
from slidex.train.settle import STREAM_ORDER, counter_rng

if TYPE_CHECKING:
    from collections.abc import Iterator

    from slidex.data import Split
    from slidex.data.csr import CsrArrays
    from slidex.nn.bag_inputs import BagInputs, InputRules
    from slidex.nn.placement import Placement
    from slidex.train.config import TrainConfig

Batch = tuple["CsrArrays | BagInputs", "CsrArrays | DeviceLabels"]
"""Features and true classes: as they are read, or where the model is."""


class _Sent(NamedTuple):
    """A batch on its way to a device.

    Args:
        x: Features, with dropout masks.
        y: True classes.
        there: Tells when it is there; None where it is at once.
    """

    x: BagInputs
    y: DeviceLabels
    there: torch.cuda.Event | None

    def claim(self, device: torch.device) -> Batch:
        """The batch, for work that is enqueued from now on."""
        if self.there is not None:
            stream = torch.cuda.current_stream(device)
            stream.wait_event(self.there)
            for tensor in (*self.x.tensors(), *self.y.tensors()):
                tensor.record_stream(
                    stream
                )  # else its memory would be another's as soon as this object is gone
        return self.x, self.y


class BatchReader:
    """Reads the batches of a run.

    Args:
        split: Of the data set.
        rows: int64, the rows to train on.
        config: Of the run.
        rules: Make the encoder's inputs, where a batch goes to a device.
        placement: Where it goes.
    """

    def __init__(
        self, split: Split, rows: np.ndarray, config: TrainConfig, rules: InputRules, placement: Placement
    ) -> None:
        self._split, self._rows, self._config = split, rows, config
        self._rules, self._placement = rules, placement
        self._kept_order = -1, rows
        self._stream = None
        if placement.device.type == "cuda":
            self._stream = torch.cuda.Stream(placement.device)

    def batches(self, first: int, last: int, per_epoch: int) -> Iterator[Batch]:
        """The batches of steps ``first + 1`` to `last`, where an epoch has `per_epoch`."""

        def read(step: int) -> Batch | _Sent:
            epoch, position = divmod(step, per_epoch)
            begin = position * self._config.batch_size
            chosen = np.sort(self._order(epoch)[begin : begin + self._config.batch_size])
            x, y = self._split.x.take(chosen), self._split.y.take(chosen)
            return (x, y) if self._placement.waits else self._send(x, y, step + 1)

        with ThreadPoolExecutor(1) as pool:
            upcoming = None
            for step in range(first, last):
                batch = upcoming.result() if upcoming is not None else read(step)
                upcoming = pool.submit(read, step + 1) if step + 1 < last else None
                yield batch.claim(self._placement.device) if isinstance(batch, _Sent) else batch

    def _send(self, x: CsrArrays, y: CsrArrays, step: int) -> _Sent:
        """Starts the copies on a stream of their own, beside the step at hand."""
        inputs = self._rules.apply(x, step)
        with torch.cuda.stream(self._stream):  # of None nothing is entered
            sent = inputs.to(self._placement), DeviceLabels.from_csr(y, self._placement)
            there = None
            if self._stream is not None:
                there = torch.cuda.Event()
                there.record(self._stream)
        return _Sent(*sent, there)

    def _order(self, epoch: int) -> np.ndarray:
        """Order of the training rows in an epoch; the one asked for last is kept."""
        if self._kept_order[0] != epoch:
            order = counter_rng(self._config.seed, STREAM_ORDER, epoch).permutation(self._rows)
            self._kept_order = epoch, order
        return self._kept_order[1]
