"""MLflow with several processes, as larger hosts have it: they share no connection, and a lost one is replaced."""

from __future__ import annotations

import collections
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.support import StackUnderTest, run, wait_until

CALLS = 200


@pytest.fixture(scope="module")
def server(stack: StackUnderTest) -> Iterator[str]:
    """A second MLflow server of the stack, with two processes; its container's name."""
    name = f"{stack.compose.project}-mlflow-two"
    words = ["run", "--rm", "--detach", "--no-deps", "--name", name, "--env", "MLFLOW_WORKERS=2"]
    # Not with `emptied`: both have the same volume for temporary files, and the first one is using it.
    stack.compose.capture(*words, "mlflow", "mlflow-server")
    yield name
    run("docker", "rm", "--force", name)


@pytest.fixture(scope="module")
def http(stack: StackUnderTest, server: str) -> Iterator[httpx.Client]:
    network = f"{stack.compose.project}_backend"
    address = run(
        "docker", "inspect", "--format", f'{{{{(index .NetworkSettings.Networks "{network}").IPAddress}}}}', server
    ).output.strip()
    login = (stack.settings.admin_user, stack.secret("admin_password"))
    # The server answers to the names that people use.
    with httpx.Client(
        base_url=f"http://{address}:5000/api/2.0/mlflow", auth=login, headers={"Host": "localhost:5000"}, timeout=30
    ) as client:
        wait_until(lambda: answers(client), 60, "the second MLflow server to answer")
        yield client


def answers(http: httpx.Client) -> bool:
    try:
        return http.get("/experiments/search", params={"max_results": 1}).is_success
    except httpx.HTTPError:
        return False


def processes(server: str) -> list[int]:
    """The processes of gunicorn in the container, the first one first."""
    code = """
import pathlib
for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    if path.read_bytes().split(b"\\0")[1:2] == [b"/opt/venv/bin/gunicorn"]: print(path.parent.name)
"""
    return sorted(int(line) for line in run("docker", "exec", server, "python3", "-c", code).output.split())


def create_runs(http: httpx.Client) -> collections.Counter[int]:
    """Runs made by sixteen clients at once; the answers' status codes."""
    experiment = http.post("/experiments/create", json={"name": f"two-{time.time_ns()}"}).json()["experiment_id"]

    def create(_: int) -> int:
        return http.post("/runs/create", json={"experiment_id": experiment, "start_time": 1}).status_code

    with ThreadPoolExecutor(16) as pool:
        return collections.Counter(pool.map(create, range(CALLS)))


def test_processes_that_were_forked_share_no_connection(http: httpx.Client, server: str) -> None:
    """Two that speak on one connection to Postgres get each other's answers."""
    assert len(processes(server)) == 3
    assert create_runs(http) == {200: CALLS}


def test_a_lost_process_is_replaced(http: httpx.Client, server: str) -> None:
    _, lost, _ = processes(server)
    run("docker", "exec", server, "python3", "-c", f"import os; os.kill({lost}, 9)")
    wait_until(lambda: len(processes(server)) == 3 and lost not in processes(server), 30, "a process in its place")
    wait_until(lambda: answers(http), 30, "the server to answer again")
    assert create_runs(http) == {200: CALLS}
