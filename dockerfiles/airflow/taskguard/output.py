"""Bounds on what a task writes, since others read it into memory.

A line is cut at LONGEST_LINE: the process that supervises the task keeps a line until its end comes,
and looks through all of it at each read; 500 MB would take it hours and half a gigabyte. A log is cut
at LONGEST_LOG: that process reads it whole to upload it, and the API server takes 70 MiB to answer it
as one JSON document. The task itself goes on.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

LONGEST_LINE = 64 * 1024
"""Characters; nobody reads more."""
LONGEST_LOG = 8 * 2**20
"""Characters of the log's file. Half as much again is kept for errors, which come last and matter most."""
AROUND_A_LINE = 112
"""Characters that Airflow puts around a line in that file: its time, level and logger. Four million lines of
one character would be a file of half a gigabyte otherwise."""
FULL = f"This log has {LONGEST_LOG // 2**20} MiB; more is not kept, errors apart. The task goes on."


def cut(text: str) -> str:
    """A message of a bearable length, saying what is missing."""
    if len(text) <= LONGEST_LINE:
        return text
    return f"{text[:LONGEST_LINE]} [cut here: {len(text)} characters in one line, {LONGEST_LINE} are kept]"


class Meter:
    """How much a process has written."""

    def __init__(self) -> None:
        self._written = 0

    def room(self, size: int, *, lines: int = 1, error: bool = False) -> bool:
        """Whether so much more may be written; says once that it is over."""
        before = self._written
        self._written += size + lines * AROUND_A_LINE
        if before <= LONGEST_LOG < self._written and sys.__stderr__:
            sys.__stderr__.write(FULL + "\n")
        return self._written <= LONGEST_LOG * (1.5 if error else 1)


class _Lines(io.TextIOBase):
    """A text stream that ends a line which has become too long, and drops the rest of it."""

    def __init__(self, stream: Any, meter: Meter) -> None:
        self._stream = stream
        self._meter = meter
        self._column = 0

    def write(self, text: str) -> int:
        for piece in text.splitlines(keepends=True):
            self._write_piece(piece)
        return len(text)

    def _write_piece(self, piece: str) -> None:
        room = LONGEST_LINE - self._column
        ends = piece.endswith("\n")
        kept = piece
        if len(piece) > room:
            kept = piece[:room] + " [cut here: the line is too long]" if room > 0 else ""
            kept += "\n" if ends else ""
        if kept and self._meter.room(len(kept), lines=int(ends)):
            self._stream.write(kept)
        self._column = 0 if ends else min(LONGEST_LINE, self._column + len(piece))

    def writable(self) -> bool:
        return True

    # The base class has these itself, and would say that there is no such thing.

    def fileno(self) -> int:
        return int(self._stream.fileno())

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return bool(self._stream.isatty())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return str(self._stream.encoding)

    @property
    def errors(self) -> str:  # type: ignore[override]
        return str(self._stream.errors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def bound() -> None:
    """Puts the bounds in place, for this process and those that it forks."""
    meter = Meter()
    sys.stdout = _Lines(sys.stdout, meter)
    sys.stderr = _Lines(sys.stderr, meter)

    def cut_event(_: Any, level: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        size = 0
        for key, value in event.items():
            if isinstance(value, str):
                event[key] = cut(value)
                size += len(event[key])
        if not meter.room(size, error=level in ("error", "exception", "critical")):
            raise structlog.DropEvent
        return event

    # Operators log through structlog. Its loggers share this list; the last one renders, and by then
    # a message has its arguments in it.
    structlog.get_config()["processors"].insert(-1, cut_event)
    make = logging.getLogRecordFactory()

    def record(*args: Any, **words: Any) -> logging.LogRecord:
        made = make(*args, **words)
        if isinstance(made.msg, str):
            made.msg = cut(made.msg)
        if isinstance(made.args, tuple):
            made.args = tuple(cut(one) if isinstance(one, str) else one for one in made.args)
        return made

    logging.setLogRecordFactory(record)
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda made: meter.room(len(str(made.msg)), error=made.levelno >= logging.ERROR))
