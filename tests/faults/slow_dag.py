"""A DAG file that takes long to read, in the worker only."""

from __future__ import annotations

import os
import time

from airflow.sdk import dag, task

if "TASKGUARD_CAPACITY" in os.environ:
    time.sleep(12)


@dag(dag_id="fault_slow")
def slow() -> None:
    @task(retries=0)
    def it() -> None:
        """Ends at once."""

    it()


slow()
