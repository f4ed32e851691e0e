"""What each task has needed so far: one row a task, in a small SQLite file that outlives restarts.

Peaks are MiB. At most MAX_TASKS tasks and MAX_OVERRUNS overruns are kept, the oldest go first.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger("taskguard")

MAX_TASKS = 5000
MAX_OVERRUNS = 2000
_SCHEMA = """
CREATE TABLE IF NOT EXISTS task (
    dag_id TEXT, task_id TEXT, runs INTEGER, peak INTEGER, recent REAL, last INTEGER,
    budget INTEGER, declared INTEGER, overruns INTEGER, seen REAL,
    PRIMARY KEY (dag_id, task_id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS overrun (
    dag_id TEXT, task_id TEXT, run_id TEXT, map_index INTEGER, try_number INTEGER,
    budget INTEGER, peak INTEGER, at REAL, told TEXT,
    PRIMARY KEY (dag_id, task_id, run_id, map_index, try_number)
) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Instance:
    """A task instance's name."""

    dag_id: str
    task_id: str
    run_id: str
    map_index: int
    try_number: int

    @classmethod
    def of(cls, words: dict[str, Any]) -> Instance:
        """From a message."""
        return cls(
            str(words["dag_id"]),
            str(words["task_id"]),
            str(words["run_id"]),
            int(words["map_index"]),
            int(words["try_number"]),
        )

    def __str__(self) -> str:
        index = f"[{self.map_index}]" if self.map_index >= 0 else ""
        return f"{self.dag_id}.{self.task_id}{index}"


class Ledger:
    """The file. Written behind by at most COMMIT_S: a crash costs the last seconds' figures, no more."""

    COMMIT_S = 2.0

    def __init__(self, path: Path | str) -> None:
        try:
            self._open(path)
        except sqlite3.OperationalError as error:
            # No room, or no access: the file may be whole.
            log.warning(
                "what tasks need is not kept until the worker's next start: %s cannot be opened: %s", path, error
            )
            self._open(":memory:")
        except sqlite3.DatabaseError:
            # Figures, not data: a damaged file is put aside, and counting begins anew.
            Path(path).replace(f"{path}.damaged")
            for rest in ("-wal", "-shm"):
                Path(f"{path}{rest}").unlink(missing_ok=True)
            self._open(path)
        self._written = time.monotonic()
        self._failing = False

    def _open(self, path: Path | str) -> None:
        self._file = sqlite3.connect(path, timeout=2)
        self._file.execute("PRAGMA journal_mode=WAL")
        self._file.execute("PRAGMA synchronous=NORMAL")
        self._file.executescript(_SCHEMA)

    @contextlib.contextmanager
    def _at_best(self) -> Iterator[None]:
        """Figures, again: with a full disk the guard goes on without writing them, and says so once."""
        try:
            yield
        except sqlite3.Error as error:
            if not self._failing:
                log.warning("what tasks need is not written down at the moment: %s", error)
            self._failing = True
            self._written = time.monotonic()

    def record(self, instance: Instance, peak: int, budget: int, declared: int | None, overrun: bool) -> None:
        """One run of a task: its peak, what it was given, what its DAG asked for."""
        with self._at_best():
            self._file.execute(
                "INSERT INTO task VALUES (?, ?, 1, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
                "runs = runs + 1, peak = max(peak, excluded.peak), recent = recent * 0.8 + excluded.peak * 0.2, "
                "last = excluded.last, budget = excluded.budget, declared = excluded.declared, "
                "overruns = overruns + excluded.overruns, seen = excluded.seen",
                (instance.dag_id, instance.task_id, peak, peak, peak, budget, declared, int(overrun), time.time()),
            )

    def record_overrun(self, instance: Instance, budget: int, peak: int, told: str) -> None:
        """A task that wanted more than its budget; `told`: what its log says."""
        with self._at_best():
            self._file.execute(
                "INSERT OR REPLACE INTO overrun VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    instance.dag_id,
                    instance.task_id,
                    instance.run_id,
                    instance.map_index,
                    instance.try_number,
                    budget,
                    peak,
                    time.time(),
                    told,
                ),
            )
        self.write(at_once=True)

    def last_overrun(self, instance: Instance) -> int | None:
        """The budget that an earlier attempt of this instance found too small."""
        with self._at_best():
            row = self._file.execute(
                "SELECT max(budget) FROM overrun WHERE dag_id = ? AND task_id = ? AND run_id = ? AND map_index = ? "
                "AND try_number < ?",
                (instance.dag_id, instance.task_id, instance.run_id, instance.map_index, instance.try_number),
            ).fetchone()
            return None if row[0] is None else int(row[0])
        return None

    @property
    def pending(self) -> bool:
        """Whether something is not committed yet."""
        return self._file.in_transaction

    def write(self, *, at_once: bool = False) -> None:
        """Commits what is due, and keeps the file small."""
        now = time.monotonic()
        if not self.pending or (not at_once and now - self._written < self.COMMIT_S):
            return
        with self._at_best():
            for table, order, most in (("task", "seen", MAX_TASKS), ("overrun", "at", MAX_OVERRUNS)):
                (count,) = self._file.execute(f"SELECT count(*) FROM {table}").fetchone()
                if count > most:
                    self._file.execute(
                        f"DELETE FROM {table} WHERE {order} <= "
                        f"(SELECT {order} FROM {table} ORDER BY {order} DESC LIMIT 1 OFFSET ?)",
                        (most,),
                    )
            self._file.commit()
            self._written = now
            self._failing = False

    def tasks(self) -> list[dict[str, Any]]:
        """Every task, the hungriest first."""
        return self._rows("SELECT * FROM task ORDER BY peak DESC")

    def overruns(self, since: float = 0) -> list[dict[str, Any]]:
        """Every overrun since a moment (seconds since 1970), the latest first."""
        return self._rows("SELECT * FROM overrun WHERE at >= ? ORDER BY at DESC", since)

    def _rows(self, query: str, *values: float) -> list[dict[str, Any]]:
        cursor = self._file.execute(query, values)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]

    def close(self) -> None:
        """Commits and closes."""
        with self._at_best():
            self._file.commit()
        self._file.close()
