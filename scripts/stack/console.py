"""How the programs talk: stdout is data, stderr is talk; progress on a terminal, lines without one."""

from __future__ import annotations

import sys
import threading
import time

from rich.console import Console
from rich.markup import escape

talk = Console(stderr=True, highlight=False, soft_wrap=True)
"""For people. Colours and live lines only where stderr is a terminal."""


QUIET_S = 30
"""Seconds that a step in a log may be silent: its reader wants to know that it still goes on."""
CHANGE_S = 5
"""Seconds between two lines of a log at the least."""


class Step:
    """A long step, entered by `with`: says that it begins, how far it is, and how long it took, failed or not."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._started = time.monotonic()
        self._text = ""
        self._said_at = self._started - CHANGE_S
        self._status = talk.status(escape(f"{title} …")) if talk.is_terminal else None
        self._ended = threading.Event()
        self._clock = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Step:
        if self._status:
            self._status.start()
        else:
            talk.print(f"--> {self._title}", markup=False)
        self._clock.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        self._clock.join()
        if self._status:
            self._status.stop()
        mark = "[red]✗[/red]" if kind else "[green]✓[/green]"
        talk.print(f"{mark} {escape(self._title)} [dim]{self.seconds:.1f} s[/dim]")

    @property
    def seconds(self) -> float:
        """Seconds since the step began."""
        return time.monotonic() - self._started

    def update(self, text: str) -> None:
        """Shows what the step is at. Without a terminal: at a change, or when nothing was said for QUIET_S."""
        changed, self._text = text != self._text, text
        if self._status or (changed and self._silent_for(CHANGE_S)):
            self._show()

    def _tick(self) -> None:
        while not self._ended.wait(min(1, QUIET_S)):
            if self._status or self._silent_for(QUIET_S):
                self._show()

    def _silent_for(self, seconds: float) -> bool:
        return time.monotonic() - self._said_at >= seconds

    def _show(self) -> None:
        text = self._text or "under way"
        if self._status:
            # Others' words: what stands in brackets is no markup.
            self._status.update(escape(f"{self._title} · {self.seconds:.0f} s · {text}"))
        else:
            talk.print(f"    {self.seconds:4.0f} s  {text}", markup=False)
            self._said_at = time.monotonic()


def say(text: str) -> None:
    """One line for people."""
    talk.print(text, markup=False)


def confirmed(question: str) -> bool:
    """Whether a person at a terminal says yes; without a terminal nobody does."""
    if not sys.stdin.isatty():
        return False
    say(f"{question} [y/N]")
    return sys.stdin.readline().strip().lower() in ("y", "yes")
