"""Loaded by the Celery worker before its pool forks (`imports` in extra_celery_config).

Imports once, in the parent, what every task would import for itself: a task's private memory falls
from 35 to 18 MB and its CPU from 0.3 to 0.06 s. Also writes the heartbeat that worker-probe reads.
"""

from __future__ import annotations

import gc
import importlib
import logging
from pathlib import Path

from celery.signals import heartbeat_sent, worker_init

HEARTBEAT = Path("/dev/shm/celery-heartbeat")
"""Touched at each heartbeat of Celery's main loop; in memory, gone with the container."""

# What a task process imports before the user's first line. A module that a later Airflow has no
# more is a slower task, not a broken worker.
MODULES = (
    "airflow.dag_processing.dagbag",
    "airflow.sdk.execution_time.supervisor",
    "airflow.sdk.execution_time.task_runner",
    "airflow.sdk.execution_time.secrets_masker",
    "airflow.providers.standard.operators.python",
    "airflow.providers.standard.operators.bash",
    "airflow.providers.standard.operators.empty",
)

log = logging.getLogger(__name__)


@worker_init.connect
def preload(**_: object) -> None:
    """Imports MODULES and moves everything alive out of the collector's sight, so that a forked
    child does not copy pages merely by collecting garbage."""
    for module in MODULES:
        try:
            importlib.import_module(module)
        except ImportError as error:
            log.warning("not preloaded: %s", error)
    gc.collect()
    gc.freeze()


@heartbeat_sent.connect
def touch_heartbeat(**_: object) -> None:
    """Tells worker-probe that the main loop turns."""
    HEARTBEAT.touch()
