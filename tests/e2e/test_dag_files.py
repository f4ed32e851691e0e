"""How soon Airflow knows what somebody has written into the DAG folder."""

from __future__ import annotations

import time

from stack.airflow import Airflow
from tests.support import StackUnderTest, wait_until

DAG_ID = "edited"
SOON_S = 15
TEXT = """
from airflow.sdk import dag, task

@dag(schedule=None, description="WORDS")
def edited():
    @task
    def one(): return 1
    one()

edited()
"""


def test_an_edited_dag_is_seen_soon(stack: StackUnderTest, airflow: Airflow) -> None:
    """A new file, and then the same one changed, in at most 15 s each."""
    path = stack.clone / "dags" / f"{DAG_ID}.py"
    try:
        for what in ("new", "changed"):
            path.write_text(TEXT.replace("WORDS", what))
            started = time.monotonic()
            wait_until(lambda words=what: described(airflow, words), 2 * SOON_S, f"the {what} file")
            seconds = time.monotonic() - started
            stack.timings[f"a {what} DAG file, until Airflow shows it"] = seconds
            assert seconds <= SOON_S
    finally:
        path.unlink()


def described(airflow: Airflow, words: str) -> bool:
    """Whether Airflow knows the DAG with this description."""
    path = f"/dags/{DAG_ID}"
    return airflow.has(f"/api/v2{path}") and airflow.call("GET", path)["description"] == words
