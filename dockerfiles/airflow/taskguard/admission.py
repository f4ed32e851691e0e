"""Who may start, when memory is short: a queue over what the worker's tasks can have together.

Strictly first come, first served: a large task at the head holds small ones back, else it would
never get in. Pure: no clock, no processes. Sizes are MiB.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass
class Waiting:
    """A task at the door."""

    budget: int
    since: float
    held: int
    """What it takes already while it waits: its imports."""
    stays: bool = False
    """It cannot go and come back."""


@dataclass
class Admission(Generic[Key]):
    """Budgets granted and asked for."""

    capacity: int
    granted: dict[Key, int] = field(default_factory=dict)
    waiting: dict[Key, Waiting] = field(default_factory=dict)

    @property
    def committed(self) -> int:
        """MiB granted."""
        return sum(self.granted.values())

    @property
    def free(self) -> int:
        """MiB that could be granted now."""
        return max(0, self.capacity - self.committed)

    def possible(self, budget: int) -> bool:
        """Whether a task of this size can ever run here."""
        return budget <= self.capacity

    def ask(self, key: Key, budget: int, since: float, held: int = 0, *, stays: bool = False) -> None:
        """Queues a task. `since`: its place; a task that comes back keeps its old one."""
        # It asks again where the answer did not reach it, and must not wait for itself.
        self.granted.pop(key, None)
        self.waiting[key] = Waiting(budget, since, held, stays)

    def leave(self, key: Key) -> None:
        """Forgets a task: it has ended, or waits no more."""
        self.granted.pop(key, None)
        self.waiting.pop(key, None)

    def _order(self) -> list[Key]:
        return sorted(self.waiting, key=lambda key: self.waiting[key].since)

    def admit(self) -> list[Key]:
        """Grants from the head of the queue as long as it fits; returns who got in."""
        admitted = []
        for key in self._order():
            budget = self.waiting[key].budget
            others = sum(one.held for other, one in self.waiting.items() if other != key)
            # Where nothing runs, waiting for those who stay would be for ever. What they hold is little.
            nobody_leaves = not self.granted and all(one.stays for other, one in self.waiting.items() if other != key)
            if self.committed + others + budget > self.capacity and not nobody_leaves:
                break
            del self.waiting[key]
            self.granted[key] = budget
            admitted.append(key)
        return admitted

    def behind(self) -> list[Key]:
        """Who waits behind the first and may be sent away, to come back."""
        return [key for key in self._order()[1:] if not self.waiting[key].stays]

    def in_the_way(self) -> Key | None:
        """The last in the queue, if the head does not fit only because of what others hold while they
        wait behind it: it has to go and come back, else both would wait for ever."""
        order = self._order()
        if len(order) < 2 or self.committed + self.waiting[order[0]].budget > self.capacity:
            return None
        return next((key for key in reversed(self.behind()) if self.waiting[key].held), None)
