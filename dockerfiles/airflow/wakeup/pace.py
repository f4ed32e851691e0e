"""How long the scheduler rests while the worker has enough to do, and how much it is sent for that time.

A round of the scheduler costs the more the more task instances are under way: Airflow reads all of each
running run's. With short rounds half a second's rest finds enough ended tasks to be worth the next round;
with long ones the rounds would become most of the machine's work.
"""

from __future__ import annotations

import time
from collections.abc import Callable

LEAST_S = 0.5
"""A rest, at the least."""

MOST_S = 2.0
"""A rest, at the most: a run that is triggered meanwhile waits for it."""

SHARE = 2
"""Times the CPU time of a round: the scheduler then has at most a third of one CPU."""

MOST_A_SLOT = 16
"""Tasks that are sent to the worker for each of its slots, at the most: an urgent one stands behind them."""


class Pace:
    """One scheduler's, with one worker of so many slots and `least` tasks sent to it (Plan.parallelism)."""

    def __init__(self, slots: int, least: int, clock: Callable[[], float] = time.process_time) -> None:
        self.slots = slots
        self._least = self._parallelism = least
        self.most = max(least, slots * MOST_A_SLOT)
        # Of CPU time: a round in which nothing happens ends with a pause of its own, which is no work.
        self._clock = clock
        self._rested_at = clock()

    def parallelism(self, left: int, *, was_full: bool) -> int:
        """Tasks that the worker is to be sent from now on, those in its slots included.

        `left` are those that have not ended of what it was sent in former rounds, `was_full` says whether this
        round's bring it to as much as allowed: where none of the former waits any more, it was too little for the
        time between two rounds; where half still wait, or the scheduler had no more to send, it was too much.
        """
        waiting = left - self.slots
        if was_full and waiting <= 0:
            self._parallelism = min(self.most, self._parallelism * 2)
        elif not was_full or waiting > (self._parallelism - self.slots) / 2:
            self._parallelism = max(self._least, self._parallelism // 2)
        return self._parallelism

    def rest(self, running: int) -> float:
        """Seconds to rest now: none where no task waits for a slot."""
        now = self._clock()
        work, self._rested_at = now - self._rested_at, now
        return min(MOST_S, max(LEAST_S, SHARE * work)) if running > self.slots else 0.0
