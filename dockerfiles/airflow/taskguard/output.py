"""Bounds on what a task writes, since others read it into memory.

A line is cut at LONGEST_LINE: the process that supervises the task keeps a line until its end comes,
and looks through all of it at each read; 500 MB would take it hours and half a gigabyte. A log is cut
at LONGEST_LOG: that process reads it whole to upload it, and the API server takes 70 MiB to answer it
as one JSON document. The task itself goes on.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
from collections.abc import Callable, MutableMapping
from typing import Any

import structlog

LONGEST_LINE = 64 * 1024
"""Characters; nobody reads more."""
LONGEST_LOG = 8 * 2**20
"""Bytes of the log's file. Half as much again is kept for errors, which come last and matter most."""
AROUND_A_LINE = 112
"""Bytes that Airflow puts around a printed line in that file: its time, level and logger. Four million lines of
one character would be a file of half a gigabyte otherwise."""
FULL = f"This log has {LONGEST_LOG // 2**20} MiB; more is not kept, errors apart. The task goes on."
_as_json = json.JSONEncoder(ensure_ascii=False).encode


def size(text: str) -> int:
    """Bytes of a text in the log's file, which is JSON: a letter may take four, a control character six."""
    return len(_as_json(text).encode(errors="surrogatepass"))


def cut(value: Any) -> Any:
    """A message of a bearable length, saying what is missing; a traceback with each text in it cut like that."""
    if isinstance(value, dict):
        return {key: cut(one) for key, one in value.items()}
    if isinstance(value, list):
        return [cut(one) for one in value]
    if not isinstance(value, str) or len(value) <= LONGEST_LINE:
        return value
    return f"{value[:LONGEST_LINE]} [cut here: {len(value)} characters in one line, {LONGEST_LINE} are kept]"


class Meter:
    """How much a process has written."""

    def __init__(self) -> None:
        self._written = 0
        self._full = False

    def room(self, more: int, *, error: bool = False) -> bool:
        """Whether so many bytes more may be written; says once that it is over."""
        if not self._full and self._written + more > LONGEST_LOG:
            self._full = True
            if sys.__stderr__:
                sys.__stderr__.write(FULL + "\n")
        if self._full and not (error and self._written + more <= 1.5 * LONGEST_LOG):
            return False
        self._written += more
        return True


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
        if kept and self._meter.room(size(kept) + AROUND_A_LINE * ends):
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

    def cut_event(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        for key, value in event.items():
            event[key] = cut(value)
        return event

    def metered(render: Callable[..., Any]) -> Callable[..., Any]:
        def rendered(logger: Any, level: str, event: MutableMapping[str, Any]) -> Any:
            line = render(logger, level, event)
            written = len(line if isinstance(line, bytes) else line.encode(errors="surrogatepass"))
            if not meter.room(written + 1, error=level in ("error", "exception", "critical")):
                raise structlog.DropEvent
            return line

        return rendered

    # Operators log through structlog. Its loggers share this list; the last one renders, and by then
    # a message has its arguments in it, and an exception is its traceback.
    processors = structlog.get_config()["processors"]
    processors[-1:] = [cut_event, metered(processors[-1])]
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, structlog.stdlib.ProcessorFormatter):
            *others, render = handler.formatter.processors
            handler.formatter.processors = [*others, cut_event, metered(render)]
            handler.emit = _unless_dropped(handler.emit)  # type: ignore[method-assign, assignment]


def _unless_dropped(emit: Callable[[logging.LogRecord], None]) -> Callable[[logging.LogRecord], None]:
    """A handler's `emit` that takes a dropped event for what it is, as structlog's own loggers do."""

    def emitted(record: logging.LogRecord) -> None:
        with contextlib.suppress(structlog.DropEvent):
            emit(record)

    return emitted
