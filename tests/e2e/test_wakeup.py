"""The scheduler hears from the database that there is something to do, and the API server answers a task as soon as it
is healthy (dockerfiles/airflow/wakeup)."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator

import httpx
import psycopg2
import pytest

from stack.airflow import Airflow
from tests.support import StackUnderTest, dag_file, run, wait_until

DAG_ID = "bench_one"
LISTENERS = "SELECT pid FROM pg_stat_activity WHERE application_name = 'wakeup'"


@pytest.fixture(scope="module")
def database(stack: StackUnderTest) -> Iterator[psycopg2.extensions.connection]:
    connection = stack.database("airflow")
    connection.autocommit = True
    yield connection
    connection.close()


@pytest.fixture(scope="module")
def one_task(stack: StackUnderTest, airflow: Airflow) -> Iterator[str]:
    """A DAG of one task that does nothing."""
    with dag_file(stack, f"bench/dags/{DAG_ID}.py"):
        airflow.wait_for_dag(DAG_ID)
        yield DAG_ID


def listeners(database: psycopg2.extensions.connection) -> list[int]:
    """The scheduler's connections that wait for a word."""
    with database.cursor() as cursor:
        cursor.execute(LISTENERS)
        return [pid for (pid,) in cursor.fetchall()]


def words(database: psycopg2.extensions.connection, patience: float) -> int:
    """How many words there were, waiting for the first at the most `patience` seconds."""
    # What this connection did itself is told with its answer.
    if not database.notifies:
        select.select([database], [], [], patience)
        database.poll()
    count = len(database.notifies)
    database.notifies.clear()
    return count


def test_a_new_run_and_a_task_that_ended_are_told(
    database: psycopg2.extensions.connection, airflow: Airflow, one_task: str
) -> None:
    """Nothing else is: not what the scheduler writes itself on a task's way."""
    with database.cursor() as cursor:
        cursor.execute("LISTEN stack_wakeup")
    words(database, 0)
    airflow.set_paused(one_task, True)
    run_id = airflow.trigger(one_task)
    assert words(database, 10) == 1
    airflow.set_paused(one_task, False)
    assert airflow.follow(one_task, run_id, patience=60) == "success"
    assert words(database, 10) == 1
    with database.cursor() as cursor:
        cursor.execute("UNLISTEN stack_wakeup")


@pytest.mark.parametrize("parked", ["deferred", "awaiting_input", "running"])
def test_a_task_that_goes_on_is_told(
    database: psycopg2.extensions.connection, airflow: Airflow, one_task: str, parked: str
) -> None:
    """One that a trigger resumes, one that a person has answered, and one that was answered before it had parked."""
    airflow.set_paused(one_task, False)
    run_id = airflow.trigger(one_task)
    assert airflow.follow(one_task, run_id, patience=60) == "success"
    with database.cursor() as cursor:
        cursor.execute("LISTEN stack_wakeup")
        words(database, 0)
        # Of a run that has ended, at which the scheduler does not look.
        for state, told in ((parked, parked != "running"), ("scheduled", True), ("success", True)):
            cursor.execute("UPDATE task_instance SET state = %s WHERE run_id = %s", (state, run_id))
            assert words(database, 10 if told else 0) == told, state
        cursor.execute("UNLISTEN stack_wakeup")


def test_the_scheduler_listens_and_listens_again(
    database: psycopg2.extensions.connection, airflow: Airflow, one_task: str
) -> None:
    """Its connection lost, it goes on by the clock, and has another one soon."""
    airflow.set_paused(one_task, False)
    (first,) = wait_until(lambda: listeners(database), 30, "the scheduler listens")
    with database.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(%s)", (first,))
    assert airflow.follow(one_task, airflow.trigger(one_task), patience=60) == "success"
    wait_until(lambda: listeners(database) not in ([], [first]), 30, "the scheduler listens again")


def test_a_pause_ends_with_a_word(stack: StackUnderTest) -> None:
    """And lasts its time without one; with the database away it is a plain one."""
    told = stack.python(
        "airflow-scheduler",
        "import time\n"
        "import sqlalchemy\n"
        "from airflow.configuration import conf\n"
        "from wakeup.scheduler import Clock\n"
        "url = conf.get('database', 'sql_alchemy_conn')\n"
        "clock, engine = Clock(url), sqlalchemy.create_engine(url, isolation_level='AUTOCOMMIT')\n"
        "clock.sleep(9)\n"
        "begun = time.monotonic()\n"
        "with engine.connect() as other: other.execute(sqlalchemy.text('NOTIFY stack_wakeup'))\n"
        "clock.sleep(9)\n"
        "assert time.monotonic() - begun < 5\n"
        "away = Clock(url.replace('@postgres:5432', '@127.0.0.1:1'))\n"
        "begun = time.monotonic()\n"
        "away.sleep(0.5)\n"
        "assert 0.5 <= time.monotonic() - begun < 5\n",
    )
    assert told.code == 0, told.output


def test_a_tasks_first_request_is_answered_at_once(stack: StackUnderTest) -> None:
    """To the first one after a start Airflow's own API server answers after five seconds, and nobody else meanwhile."""
    service = "airflow-apiserver"
    assert run("docker", "restart", stack.container(service)).code == 0
    wait_until(lambda: stack.inspect(service)["State"]["Health"]["Status"] == "healthy", 120, "the API server is back")
    asked = f"http://{stack.address(service)}:8080/execution/task-instances/none/run"
    begun = time.monotonic()
    assert httpx.patch(asked, json={}).status_code in (401, 403)
    assert time.monotonic() - begun < 1
