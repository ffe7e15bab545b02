"""Errors that a device finds and the host hears of later; and the check that nothing waits."""

from __future__ import annotations

import pytest
import torch

from slidex import late
from slidex.errors import DivergedError
from tests.waiting import NoWaiting


class Event:
    """Of a device that has not come so far until `here` is set, or somebody waits."""

    here = False

    def query(self) -> bool:
        return self.here

    def synchronize(self) -> None:
        self.here = True


def error(number: int) -> DivergedError:
    return DivergedError(f"number {number}")


def test_an_error_is_told_when_its_number_is_there_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    event, errors, send = Event(), late.LateErrors(), late.send
    monkeypatch.setattr(late, "send", lambda number: send(number)._replace(arrived=event))
    errors.expect(torch.tensor(-1), error)
    errors.expect(torch.tensor(4), error)
    errors.settle(wait=False)
    event.here = True
    with pytest.raises(DivergedError, match="number 4"):
        errors.settle(wait=False)
    errors.settle(wait=True)


def test_waiting_tells_the_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    errors, send = late.LateErrors(), late.send
    monkeypatch.setattr(late, "send", lambda number: send(number)._replace(arrived=Event()))
    for number in (-1, 7, 2):
        errors.expect(torch.tensor(number), error)
    for number in (7, 2):
        with pytest.raises(DivergedError, match=f"number {number}"):
            errors.settle(wait=True)


def test_the_check_for_waiting_notices_it() -> None:
    for wait in (int, torch.nonzero, torch.unique):
        with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
            wait(torch.zeros(()))
