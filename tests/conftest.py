"""Fixtures: the stack under test, a throwaway one by default, the running one with --running."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from stack.airflow import Airflow
from stack.instance import ROOT, Instance
from tests.support import StackUnderTest, throwaway


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--running", action="store_true", help="test the running stack, read-only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Whoever has put DAGs and packages of their own into a stack asks whether it works, not whether it is ours."""
    if config.getoption("--running"):
        for item in items:
            if item.get_closest_marker("shipped"):
                item.add_marker(pytest.mark.skip(reason="the running stack may have DAGs and packages of its own"))


# As on any host: what make and argparse say is looked at, and what is written here is read by a container's user.
os.environ |= {"LC_ALL": "C.UTF-8", "LANGUAGE": "en"}
os.umask(0o022)

TIMINGS = pytest.StashKey[dict[str, float]]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The times that the tests took: told here, and judged, if at all, where they were taken."""
    for what, seconds in config.stash.get(TIMINGS, {}).items():
        terminalreporter.write_line(f"{seconds:8.3f} s  {what}")


@pytest.fixture(scope="session")
def stack(request: pytest.FixtureRequest) -> Iterator[StackUnderTest]:
    if request.config.getoption("--running"):
        here = Path(os.environ.get("STACK_DIR", ROOT)).resolve()
        if not Instance(here).env_file.exists():
            pytest.exit("there is no running stack here: run `make up` first", returncode=3)
        yield StackUnderTest(here)
        return
    for found in throwaway(request):
        request.config.stash[TIMINGS] = found.timings
        yield found


@pytest.fixture(scope="session")
def airflow(stack: StackUnderTest) -> Iterator[Airflow]:
    with stack.airflow() as client:
        yield client
