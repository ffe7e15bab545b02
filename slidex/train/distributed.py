"""The processes of a training job: one alone, or several that share the classes and split every batch.

The training loop talks to one object, `Solo` or `Ranks`, and does not ask which. Whatever decides what happens next is
decided in process 0 and told to the others, or computed by all from the same bits. Values travel as JSON, tensors as
they are, both by the collectives of torch.distributed.

Legend: N rows of a batch, D width, R processes.
"""

from __future__ import annotations

import json
import os
import signal
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from slidex import errors
from slidex.errors import LostPeerError, SlidexError
from slidex.nn.sharding import Peers, Shard, part_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for one that is alive but does not answer; one that has ended is noticed at once."""

_T = TypeVar("_T")


class Solo:
    """A job of one process, which has all rows and all classes."""

    rank, size, local_size = 0, 1, 1
    waiting_stage = "encoder"
    """What the time spent on exchanging rows is booked on."""

    @property
    def main(self) -> bool:
        """Whether this is the process that writes the log and speaks."""
        return self.rank == 0

    def shard(self, num_classes: int) -> Shard | None:
        """The classes of this process; None for all."""
        del num_classes

    def rows(self, num_rows: int) -> slice:
        """The rows of a batch that this process encodes."""
        return slice(0, num_rows)

    def gather_rows(self, x_ND: torch.Tensor, num_rows: int) -> torch.Tensor:
        """What the processes have of a batch of `num_rows`, each its `rows`, put together: (N, D)."""
        del num_rows
        return x_ND

    def add(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over processes, in place."""
        return x

    def add_gradients(self, parameters: Iterable[torch.Tensor]) -> None:
        """Sums the `.grad` of every parameter over processes."""

    def totals(self, *numbers: float) -> list[float]:
        """Each number's sum over processes."""
        return [float(number) for number in numbers]

    def everywhere(self, action: Callable[[], _T]) -> list[_T]:
        """Has every process do something; what it gave in each, in the order of ranks, must be plain values.

        Where it raises a SlidexError or an OSError in some, all raise one.
        """
        return [action()]

    def on_main(self, action: Callable[[], _T]) -> _T:
        """Has process 0 do something; all get what it gave, or raise what it raised, as `everywhere`."""
        return action()

    def agree_signal(self, received: str | None) -> str | None:
        """The name of a signal that any process has received, or None."""
        return received


class Ranks(Solo):
    """A job of several processes.

    Args:
        group: The processes; None is the default group of torch.distributed.
        local_size: How many of them share this machine's cores.
    """

    waiting_stage = "exchange"

    def __init__(self, group: dist.ProcessGroup | None = None, *, local_size: int = 1) -> None:
        self._peers = Peers.of_group(group)
        self.rank, self.size, self.local_size = self._peers.rank, self._peers.size, local_size

    def shard(self, num_classes: int) -> Shard:
        """See `Solo.shard`."""
        return Shard.of(num_classes, self._peers.group)

    def rows(self, num_rows: int) -> slice:
        """See `Solo.rows`: a contiguous part; sizes differ by at most one."""
        return slice(*part_of(num_rows, self.rank, self.size))

    def gather_rows(self, x_ND: torch.Tensor, num_rows: int) -> torch.Tensor:
        """See `Solo.gather_rows`."""
        parts = (part_of(num_rows, rank, self.size) for rank in range(self.size))
        return self._peers.gather_rows(x_ND, [end - begin for begin, end in parts])[0]

    def add(self, x: torch.Tensor) -> torch.Tensor:
        """See `Solo.add`."""
        return self._peers.reduce(x)

    def add_gradients(self, parameters: Iterable[torch.Tensor]) -> None:
        """See `Solo.add_gradients`; one all-reduce for all of them."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if gradients:
            total = self.add(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def totals(self, *numbers: float) -> list[float]:
        """See `Solo.totals`."""
        return self.add(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def everywhere(self, action: Callable[[], _T]) -> list[_T]:
        """See `Solo.everywhere`."""
        failure = None
        try:
            outcome = {"value": action()}
        except LostPeerError:
            raise
        except (SlidexError, OSError) as error:
            failure, outcome = error, {"error": str(error), "kind": type(error).__name__}
        outcomes = self._exchange(outcome)
        if failure is not None:
            raise failure
        for rank, other in enumerate(outcomes):
            if "error" in other:
                kind = getattr(errors, other["kind"], SlidexError)
                raise kind(f"in process {rank} of {self.size}: {other['error']}")
        return [other["value"] for other in outcomes]

    def on_main(self, action: Callable[[], _T]) -> _T:
        """See `Solo.on_main`."""
        values: list[Any] = self.everywhere(lambda: action() if self.main else None)
        return values[0]

    def agree_signal(self, received: str | None) -> str | None:
        """See `Solo.agree_signal`; one all-reduce of one number."""
        number = 0 if received is None else signal.Signals[received].value
        largest = int(self._peers.reduce(torch.tensor([number]), "max"))
        return signal.Signals(largest).name if largest else None

    def _exchange(self, value: Any) -> Sequence[Any]:
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        texts, counts = self._peers.gather_rows(text)
        return [json.loads(part.numpy().tobytes()) for part in texts.split(counts)]


@contextmanager
def launched_processes() -> Iterator[Solo]:
    """The processes that torchrun has started, joined by gloo while entered; or this one alone.

    torchrun says in the environment who they are (RANK, WORLD_SIZE and what torch.distributed needs to join them).
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Solo()
        return
    dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield Ranks(local_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    finally:
        dist.destroy_process_group()
