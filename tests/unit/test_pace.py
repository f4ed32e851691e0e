"""wakeup.pace: how long the scheduler rests, and how many tasks the worker is sent for that time."""

from __future__ import annotations

import pytest

from wakeup import pace
from wakeup.pace import Pace

SLOTS, LEAST = 4, 12


class Clock:
    """CPU time that only passes when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def paced(clock: Clock) -> Pace:
    return Pace(SLOTS, LEAST, clock)


@pytest.mark.parametrize(("work", "rest"), [(0.01, pace.LEAST_S), (0.4, 0.4 * pace.SHARE), (30.0, pace.MOST_S)])
def test_a_rest_follows_the_rounds_work(paced: Pace, clock: Clock, work: float, rest: float) -> None:
    for _ in range(2):
        clock.now += work
        assert paced.rest(SLOTS + 1) == pytest.approx(rest)


def test_nothing_rests_while_a_slot_is_free(paced: Pace, clock: Clock) -> None:
    clock.now += 1
    assert paced.rest(SLOTS) == 0
    # Its work was before: the next rest is not for it.
    assert paced.rest(SLOTS + 1) == pace.LEAST_S


def test_more_is_sent_when_the_worker_ran_dry_until_the_bound(paced: Pace) -> None:
    sent = [paced.parallelism(SLOTS, was_full=True) for _ in range(6)]
    assert sent[:2] == [2 * LEAST, 4 * LEAST]
    assert sent[-1] == SLOTS * pace.MOST_A_SLOT


def test_what_was_just_enough_stays(paced: Pace) -> None:
    sent = paced.parallelism(SLOTS, was_full=True)
    assert paced.parallelism(SLOTS + 1, was_full=True) == sent


@pytest.mark.parametrize(("left", "was_full"), [(8 * LEAST, True), (5 * SLOTS, False), (0, False)])
def test_less_is_sent_when_it_was_more_than_needed(paced: Pace, left: int, was_full: bool) -> None:
    for _ in range(2):
        paced.parallelism(SLOTS, was_full=True)
    assert paced.parallelism(left, was_full=was_full) == 2 * LEAST
    for _ in range(3):
        last = paced.parallelism(left, was_full=was_full)
    assert last == LEAST
