"""Bounds on what a task writes, since the process that supervises it reads it into memory.

A line without an end is cut at LONGEST_LINE. The supervisor keeps a line in memory until its end
comes, and looks through all of it at each read: 500 MB would take it hours and half a gigabyte.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

LONGEST_LINE = 64 * 1024
"""Characters; nobody reads more, and the UI shows no more."""


def cut(text: str) -> str:
    """A message of a bearable length, saying what is missing."""
    if len(text) <= LONGEST_LINE:
        return text
    return f"{text[:LONGEST_LINE]} [cut here: {len(text)} characters in one line, {LONGEST_LINE} are kept]"


class _Lines(io.TextIOBase):
    """A text stream that ends a line which has become too long, and drops the rest of it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._column = 0

    def write(self, text: str) -> int:
        for piece in text.splitlines(keepends=True):
            room = LONGEST_LINE - self._column
            ends = piece.endswith("\n")
            if len(piece) > room:
                if room > 0:
                    self._stream.write(piece[:room] + " [cut here: the line is too long]")
                self._column = LONGEST_LINE
                if ends:
                    self._stream.write("\n")
            else:
                self._stream.write(piece)
                self._column += len(piece)
            if ends:
                self._column = 0
        return len(text)

    def writable(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _cut_event(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor."""
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = cut(value)
    return event


def bound() -> None:
    """Puts the bounds in place, for this process and those that it forks."""
    sys.stdout = _Lines(sys.stdout)
    sys.stderr = _Lines(sys.stderr)
    # Operators log through structlog. Its loggers share this list; the last one renders, and by then
    # a message has its arguments in it.
    structlog.get_config()["processors"].insert(-1, _cut_event)
    make = logging.getLogRecordFactory()

    def record(*args: Any, **words: Any) -> logging.LogRecord:
        made = make(*args, **words)
        if isinstance(made.msg, str):
            made.msg = cut(made.msg)
        if isinstance(made.args, tuple):
            made.args = tuple(cut(one) if isinstance(one, str) else one for one in made.args)
        return made

    logging.setLogRecordFactory(record)
