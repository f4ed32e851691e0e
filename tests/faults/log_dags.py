"""The Airflow dag of test_logs.py, copied into the throwaway stack's folder."""

from __future__ import annotations

import time
from datetime import timedelta

from airflow.sdk import dag, get_current_context, task


@dag
def fault_late_log() -> None:
    """The first attempt fails at once; the second goes on for a while."""

    @task(retries=1, retry_delay=timedelta(seconds=1))
    def it() -> None:
        attempt = get_current_context()["ti"].try_number
        print(f"these are the words of attempt {attempt}")
        if attempt == 1:
            raise ValueError("the first attempt fails")
        time.sleep(20)

    it()


fault_late_log()
