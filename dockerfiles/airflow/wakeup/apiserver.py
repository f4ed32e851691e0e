"""`airflow api-server`, which is awake when it says so (`python3 -m wakeup.apiserver`).

The routes of the API for tasks are made by its first request, once for each of the versions that Airflow still
speaks: five seconds of CPU in which the process answers nobody, not the web page either, and a task gives up after
as long. Here a process makes them before it listens; those of the older versions it only prepares, and each of these
is finished by its first request, in a fifth of a second: a task speaks the newest, unless an upgrade overtook it.

tests/stack/test_upstream.py notices when this is no longer as assumed here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from cadwyn import Cadwyn


class Routers(dict[str, Any]):
    """The routers of an application by version; what is due of one is done when it is first asked for."""

    def __init__(self, routers: dict[str, Any]) -> None:
        super().__init__(routers)
        self.due: dict[str, Callable[[], object]] = {}

    def __getitem__(self, version: str) -> Any:
        finish = self.due.pop(version, None)
        if finish:
            finish()
        return super().__getitem__(version)


def make_routes_at_once() -> None:
    """For every process of the API server, each of which has an application of its own."""
    include = Cadwyn.generate_and_include_versioned_routers
    add = Cadwyn._add_versioned_routers

    def include_and_make(application: Any, *routers: Any) -> None:
        include(application, *routers)
        made = application.router.versioned_routers = Routers(application.router.versioned_routers)
        application._cadwyn_initialize()
        # The newest, at once.
        made[max(made)]

    def add_when_asked_for(application: Any, *routers: Any, version: str) -> list[Any]:
        application.router.versioned_routers.due[version] = partial(add, application, *routers, version=version)
        return []

    Cadwyn.generate_and_include_versioned_routers = include_and_make
    Cadwyn._add_versioned_routers = add_when_asked_for


def main() -> None:
    """Runs the API server until it ends."""
    from airflow.__main__ import main as airflow

    sys.argv = ["airflow", "api-server"]
    airflow()


# uvicorn starts its further processes anew, and these import this module under another name.
make_routes_at_once()

if __name__ == "__main__":
    main()
