"""How MLflow's processes are made where there are several: forked from one that has imported everything.

uvicorn's own would each import MLflow anew, 180 MiB that they have in common.
"""

from __future__ import annotations

import gc
import os
from typing import Any

from sqlalchemy.engine import Engine

bind = "0.0.0.0:5000"
workers = int(os.environ["MLFLOW_WORKERS"])
worker_class = "uvicorn_worker.UvicornWorker"
preload_app = True
# Longer than a proxy in front keeps its connections, so that it is not this end that closes one in use.
keepalive = 75
# A process whose loop has not turned for so long is replaced.
timeout = 120
# Within the container's stop_grace_period.
graceful_timeout = 25
# Where each process shows that it is alive: in memory, /tmp is a disk.
worker_tmp_dir = "/dev/shm"
control_socket_disable = True


def pre_fork(_server: Any, _worker: Any) -> None:
    """Closes the first process's connections, which two would speak on; what is left stays shared."""
    gc.collect()
    for engine in [one for one in gc.get_objects() if isinstance(one, Engine)]:
        engine.dispose()
    # The collector would write into all that is there. It also hides it: the engines are looked for before.
    gc.freeze()
