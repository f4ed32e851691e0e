"""How the programs talk: stdout is data, stderr is talk; progress on a terminal, lines without one."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

talk = Console(stderr=True, highlight=False, soft_wrap=True)
"""For people. Colours and live lines only where stderr is a terminal."""


class Step:
    """A long step that says how far it is: `step.update("3 of 12 healthy")`."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._started = time.monotonic()
        self._last = ""
        self._last_said = 0.0
        self._status = talk.status(f"{title} …") if talk.is_terminal else None

    @property
    def seconds(self) -> float:
        """Seconds since the step began."""
        return time.monotonic() - self._started

    def update(self, text: str) -> None:
        """Shows what the step is at. Without a terminal: a line at a change, twice a minute at most."""
        if self._status:
            self._status.update(f"{self._title} · {self.seconds:.0f} s · {text}")
        elif text != self._last and time.monotonic() - self._last_said > 5:
            talk.print(f"    {self.seconds:4.0f} s  {text}", markup=False)
            self._last_said = time.monotonic()
        self._last = text


@contextmanager
def step(title: str) -> Iterator[Step]:
    """Announces a step, shows its progress and says how long it took; an error says so, too."""
    current = Step(title)
    if current._status:
        current._status.start()
    else:
        talk.print(f"--> {title}", markup=False)
    try:
        yield current
    except BaseException:
        _finish(current, "[red]✗[/red]", title)
        raise
    _finish(current, "[green]✓[/green]", title)


def _finish(current: Step, mark: str, title: str) -> None:
    if current._status:
        current._status.stop()
    talk.print(f"{mark} {title} [dim]{current.seconds:.1f} s[/dim]")


def say(text: str) -> None:
    """One line for people."""
    talk.print(text, markup=False)


def confirmed(question: str) -> bool:
    """Whether a person at a terminal says yes; without a terminal nobody does."""
    if not sys.stdin.isatty():
        return False
    say(f"{question} [y/N]")
    return sys.stdin.readline().strip().lower() in ("y", "yes")
