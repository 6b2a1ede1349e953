"""The clocks: that events are read once they have come to pass, in order, and never waited for."""

from __future__ import annotations

import pytest
import torch

from stepweave.planning.clock import PENDING, CudaClock, HostClock, clock_of


class Stream:
    """A device that is behind: events come to pass when it gets to them."""

    def __init__(self) -> None:
        self.made: list[Event] = []
        self.reached = 0

    def event(self) -> Event:
        return Event(self)


class Event:
    """As `torch.cuda.Event`, which fails if it is read before it was recorded or came to pass."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.at: int | None = None

    def record(self) -> None:
        assert self.at is None, "recorded twice"
        self.at = len(self._stream.made)
        self._stream.made.append(self)

    def query(self) -> bool:
        assert self.at is not None
        return self.at < self._stream.reached

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds: the square of an event's number is its time."""
        assert self.query() and end.query(), "not ready"
        assert self.at is not None and end.at is not None
        return float(end.at**2 - self.at**2)

    def synchronize(self) -> None:
        raise AssertionError("the host waits for the device")


@pytest.fixture
def stream() -> Stream:
    return Stream()


def forward(clock: CudaClock, told: list[float]) -> None:
    clock.stop(clock.start(), told.append)


def test_a_device_that_is_done_is_read_at_once(stream: Stream) -> None:
    clock, told = CudaClock(stream.event), []
    stream.reached = 10
    forward(clock, told)
    forward(clock, told)
    assert told == pytest.approx([0.001, 0.005])  # 1 - 0 and 9 - 4 ms


def test_a_device_that_is_behind_is_read_later_and_in_order(stream: Stream) -> None:
    clock, told = CudaClock(stream.event), []
    for _ in range(3):
        forward(clock, told)
    assert told == []
    stream.reached = 3  # the second forward has begun
    forward(clock, told)
    assert told == pytest.approx([0.001])
    stream.reached = 100
    forward(clock, told)
    assert told == pytest.approx([0.001, 0.005, 0.009, 0.013, 0.017])


def test_each_forward_is_told_to_its_own(stream: Stream) -> None:
    clock, told = CudaClock(stream.event), []
    for name in "abc":
        clock.stop(
            clock.start(), lambda seconds, name=name: told.append((name, round(seconds * 1000)))
        )
    stream.reached = 100
    forward(clock, [])
    assert told == [("a", 1), ("b", 5), ("c", 9)]


def test_forwards_may_overlap(stream: Stream) -> None:
    clock, told = CudaClock(stream.event), []
    first, second = clock.start(), clock.start()
    stream.reached = 100
    clock.stop(first, told.append)
    clock.stop(second, told.append)
    assert told == pytest.approx([0.004, 0.008])


def test_those_that_wait_are_bounded_and_it_recovers(stream: Stream) -> None:
    clock, told = CudaClock(stream.event), []
    for _ in range(PENDING + 50):
        forward(clock, told)
    stream.reached = 10**6
    forward(clock, told)
    assert len(told) == PENDING  # the others go untimed
    forward(clock, told)
    assert len(told) == PENDING + 1


def test_the_host_tells_at_once_how_long_it_took() -> None:
    clock, told = HostClock(), []
    started = clock.start()
    clock.stop(started - 2.0, told.append)
    clock.stop(clock.start(), told.append)
    assert told[0] == pytest.approx(2.0, abs=0.5)
    assert 0 <= told[1] < 0.5


def test_the_clock_goes_by_the_device() -> None:
    assert isinstance(clock_of(torch.device("cpu")), HostClock)
    assert isinstance(clock_of(torch.device("cuda")), CudaClock)
