"""`airflow api-server`, which is awake when it says so (`python3 -m wakeup.apiserver`).

The routes of the API for tasks are made by its first request, once for each of the versions that Airflow still
speaks: five seconds of CPU in which the process answers nobody, not the web page either, and a task gives up after
as long. Here a process makes them before it listens.

tests/stack/test_upstream.py notices when this is no longer as assumed here.
"""

from __future__ import annotations

import sys
from typing import Any

from cadwyn import Cadwyn


def make_routes_at_once() -> None:
    """For every process of the API server, each of which has an application of its own."""
    include = Cadwyn.generate_and_include_versioned_routers

    def include_and_make(application: Any, *routers: Any) -> None:
        include(application, *routers)
        application._cadwyn_initialize()

    Cadwyn.generate_and_include_versioned_routers = include_and_make


def main() -> None:
    """Runs the API server until it ends."""
    from airflow.__main__ import main as airflow

    sys.argv = ["airflow", "api-server"]
    airflow()


# uvicorn starts its further processes anew, and these import this module under another name.
make_routes_at_once()

if __name__ == "__main__":
    main()
