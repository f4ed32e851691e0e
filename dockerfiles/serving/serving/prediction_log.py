"""What was answered, row by row, on its way to the store.

A request only puts its rows into memory. A thread writes them as objects of JSON lines, every ten seconds or as
soon as there are enough. While the store is away the rows wait; when there are too many, or they are too large, the
oldest go, and are counted.
"""

from __future__ import annotations

import collections
import json
import logging
import math
import secrets
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

log = logging.getLogger(__name__)

INTERVAL_S = 10.0
BATCH = 1000
"""Rows that are written at once, however little time has passed."""
OBJECT = 8 << 20
"""Bytes that are written at once: an object ends with the row that makes it as large."""
MOST = 50_000
"""Rows that wait at the most."""
LARGEST = 32 << 20
"""Bytes of memory that they have at the most: beside two models some 100 MiB are left (docs/memory.md), and requests
under way may hold 64 of these."""
ROW = 290
"""Bytes of memory that a row has beside its values."""
MOMENT = timedelta(microseconds=1)
"""Between the rows of a request: the least that the log's lines tell apart."""
LAST_WORDS_S, AGAIN_S = 15.0, 1.0
"""How long it goes on writing when the service stops, and how soon it tries again then."""

Row = tuple[datetime, str, tuple[str, ...], tuple[Any, ...], Any, int]
"""When, by which version, the columns, their values, the prediction; the bytes of memory that these have, about."""


class PredictionLog:
    """Takes rows from any thread; `put(key, body)` writes an object, and raises where it cannot."""

    def __init__(self, model: str, put: Callable[[str, bytes], None], most: int = MOST, largest: int = LARGEST) -> None:
        self.dropped = 0
        self.written = 0
        self._model = model
        self._put = put
        self._most, self._largest = most, largest
        self._rows: collections.deque[Row] = collections.deque()
        self._bytes = 0
        """Of all that wait."""
        self._free = datetime.min.replace(tzinfo=timezone.utc)
        """From when on no row has been."""
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._away = False
        self._key = ""
        """Of the object that is being written."""
        self._thread = threading.Thread(target=self._run, name="prediction-log", daemon=True)

    @property
    def queued(self) -> int:
        """Rows that wait."""
        return len(self._rows)

    def add(self, version: str, table: dict[str, list[Any]], predictions: list[Any]) -> None:
        """Keeps the rows of an answer."""
        names = tuple(table)
        common = ROW + sys.getsizeof(names) // max(len(predictions), 1) + 8 * len(names)
        rows = [
            (version, names, values, told, common + sum(map(sys.getsizeof, values)) + _size(told))
            for values, told in zip(zip(*table.values(), strict=True), predictions, strict=True)
        ]
        with self._lock:
            # Each has a moment that no other row has: whoever has read up to one of them goes on behind it.
            first = max(datetime.now(timezone.utc), self._free)
            self._free = first + len(rows) * MOMENT
            self._rows.extend((first + place * MOMENT, *row) for place, row in enumerate(rows))
            self._bytes += sum(row[-1] for row in rows)
            self._drop()
            enough = len(self._rows) >= BATCH or self._bytes >= OBJECT
        if enough:
            self._wake.set()

    def start(self) -> None:
        """Begins to write."""
        self._thread.start()

    def stop(self) -> None:
        """Writes what is left, for a while. What cannot be written is said, and lost."""
        self._stopping.set()
        self._wake.set()
        self._thread.join(LAST_WORDS_S + 5)
        if self.queued:
            log.error("%s predictions could not be written before the end, and are lost", self.queued)

    def _run(self) -> None:
        while not self._stopping.is_set():
            # With the store away, more rows are no reason to try at once.
            (self._stopping if self._away else self._wake).wait(INTERVAL_S)
            self._wake.clear()
            self.write()
        end = time.monotonic() + LAST_WORDS_S
        while self.queued and time.monotonic() < end:
            if not self.write():
                time.sleep(AGAIN_S)

    def write(self) -> bool:
        """Writes all that waits; whether the store took it."""
        while True:
            batch, lines = self._take()
            if not batch:
                return True
            # The first attempt's: the store may have taken that, and been too slow to say so.
            self._key = self._key or self._new_key()
            try:
                self._put(self._key, b"".join(lines))
            except Exception as error:
                if not self._away:
                    log.warning("the store does not take the predictions; the newest wait: %s", error)
                self._away = True
                self._give_back(batch)
                return False
            self._key = ""
            self.written += len(batch)
            if self._away:
                log.info("the store takes the predictions again")
                self._away = False

    def _new_key(self) -> str:
        return f"{self._model}/{datetime.now(timezone.utc):%Y/%m/%d/%H%M%S}-{secrets.token_hex(4)}.jsonl"

    def _take(self) -> tuple[list[Row], list[bytes]]:
        """The oldest rows, and the lines of an object with them."""
        batch: list[Row] = []
        lines: list[bytes] = []
        length = 0
        while len(batch) < BATCH and length < OBJECT:
            with self._lock:
                if not self._rows:
                    break
                batch.append(self._oldest())
            lines.append(_line(batch[-1]))
            length += len(lines[-1])
        return batch, lines

    def _give_back(self, batch: list[Row]) -> None:
        with self._lock:
            self._rows.extendleft(reversed(batch))
            self._bytes += sum(row[-1] for row in batch)
            self._drop()

    def _drop(self) -> None:
        """The oldest go. The lock is held."""
        while len(self._rows) > self._most or self._bytes > self._largest:
            self._oldest()
            self.dropped += 1

    def _oldest(self) -> Row:
        """Takes it out. The lock is held."""
        row = self._rows.popleft()
        self._bytes -= row[-1]
        return row


def _size(value: Any) -> int:
    """Bytes of memory that a value has, with what is in it."""
    if isinstance(value, dict):
        return sys.getsizeof(value) + sum(_size(key) + _size(one) for key, one in value.items())
    if isinstance(value, list | tuple):
        return sys.getsizeof(value) + sum(map(_size, value))
    return sys.getsizeof(value)


def _line(row: Row) -> bytes:
    at, version, names, values, told, _ = row
    inputs = dict(zip(names, (_plain(value) for value in values), strict=True))
    line = {
        "at": at.isoformat(timespec="microseconds"),
        "version": version,
        "inputs": inputs,
        "prediction": finite(told),
    }
    return json.dumps(line, separators=(",", ":"), default=str).encode() + b"\n"


def _plain(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else finite(value)


def finite(value: Any) -> Any:
    """The same with null for what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return finite(value.tolist()) if hasattr(value, "tolist") else value
