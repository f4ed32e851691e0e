"""`airflow scheduler`, which unpickles nothing that the worker wrote (wakeup.results), with two changes to what costs
it time (`python3 -m wakeup.scheduler`).

- Its pause between two rounds in which nothing happened ends when the database says that something
  did. The loop calls `time.sleep`, found in its own module; there is no setting or hook for it. Where
  the database is away, and with a scheduler that pauses otherwise, the pause is a plain one.
- It rests for a moment in each round while tasks wait for a slot of the worker, which is sent enough for
  that time (wakeup.pace). Each task's end is worth a round otherwise, which could start nothing: four times
  the CPU for a task of a fan-out.

tests/stack/test_upstream.py notices when one of them is no longer as assumed here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import sys
import time
from typing import Any

import psycopg2
from sqlalchemy.engine import make_url

from wakeup import results
from wakeup.database import CHANNEL
from wakeup.pace import Pace

CONNECT_S = 5
"""Seconds that a connection may take to come about: the database is on the same host."""

log = logging.getLogger(__name__)


class Clock:
    """The `time` module, but for a `sleep` that ends early when the database has something to say."""

    def __init__(self, url: str) -> None:
        self._login = make_url(url).translate_connect_args(username="user", database="dbname")
        self._connection: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        """Seconds at the most. What was said since the last pause ends this one at once."""
        until = time.monotonic() + seconds
        try:
            heard = self._listen(seconds)
        except (psycopg2.Error, OSError) as error:
            log.warning("the database cannot wake the scheduler; it looks by itself: %s", error)
            self._hang_up()
            heard = False
        if not heard:
            time.sleep(max(0.0, until - time.monotonic()))

    def _listen(self, seconds: float) -> bool:
        if self._connection is None:
            connection = psycopg2.connect(**self._login, connect_timeout=CONNECT_S, application_name="wakeup")
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(f"LISTEN {CHANNEL}")
            self._connection = connection
            # What was said before is not known.
            return True
        readable, _, _ = select.select([self._connection], [], [], seconds)
        if readable:
            self._connection.poll()
            self._connection.notifies.clear()
        return bool(readable)

    def _hang_up(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(psycopg2.Error):
                self._connection.close()
        self._connection = None


def rest_while_tasks_wait(pace: Pace) -> None:
    """Has the executor rest once a round while the worker has more tasks than slots: one that ends is
    followed by one that waits there, and the next round finds several ended ones at once."""
    from airflow.providers.celery.executors.celery_executor import CeleryExecutor

    heartbeat = CeleryExecutor.heartbeat

    def heartbeat_and_rest(executor: CeleryExecutor) -> None:
        # The heartbeat sends what this round has found, and learns which of those that were sent before have ended.
        was_full, new = executor.slots_available <= 0, len(executor.queued_tasks)
        heartbeat(executor)
        running = len(executor.running)
        executor.parallelism = pace.parallelism(max(0, running - new), was_full=was_full)
        time.sleep(pace.rest(running))

    CeleryExecutor.heartbeat = heartbeat_and_rest


def main() -> None:
    """Runs the scheduler until it ends."""
    from airflow.configuration import conf
    from airflow.jobs import scheduler_job_runner

    results.keep_as_json()
    scheduler_job_runner.time = Clock(conf.get_mandatory_value("database", "sql_alchemy_conn"))
    pace = Pace(conf.getint("celery", "worker_concurrency"), conf.getint("core", "parallelism"))
    rest_while_tasks_wait(pace)
    # The scheduler has a bound of its own, which is read once. The executor's, set by now, is the lower one.
    os.environ["AIRFLOW__CORE__PARALLELISM"] = str(pace.most)
    from airflow.__main__ import main as airflow

    sys.argv = ["airflow", "scheduler"]
    airflow()


if __name__ == "__main__":
    main()
