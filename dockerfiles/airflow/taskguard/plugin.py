"""How Airflow finds the listener: entry point `airflow.plugins` of this package."""

from __future__ import annotations

from airflow.plugins_manager import AirflowPlugin

from taskguard import listener


class TaskguardPlugin(AirflowPlugin):
    """Memory budgets for tasks."""

    name = "taskguard"
    listeners = [listener]  # noqa: RUF012  (a list is what Airflow documents)
