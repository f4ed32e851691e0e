"""The verbs on a real stack: twice the same, stopped and started, damaged and mended. In this order."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from stack.airflow import Airflow
from tests.support import StackUnderTest, free_ports, run, wait_until


def ids(stack: StackUnderTest) -> dict[str, str]:
    """Service -> container id and start time."""
    return {
        one.service: run("docker", "inspect", "--format", "{{.Id}} {{.State.StartedAt}}", one.name).output.strip()
        for one in stack.compose.containers()
    }


def test_a_second_up_changes_nothing(stack: StackUnderTest) -> None:
    """Nothing is created, started or restarted anew, and it says so."""
    before = ids(stack)
    said = stack.make("up")
    stack.timings["second up, nothing to do"] = said.seconds
    assert said.code == 0, said.output
    assert "nothing to do" in said.output, said.output
    assert ids(stack) == before


def test_what_the_stack_wrote_belongs_to_the_caller(stack: StackUnderTest) -> None:
    """Every file in the clone is the caller's; secrets are in a directory of theirs alone."""
    owner = stack.clone.stat().st_uid
    for directory, _, names in os.walk(stack.clone):
        for name in names:
            assert os.lstat(os.path.join(directory, name)).st_uid == owner, (directory, name)
    assert stack.instance.secrets.stat().st_mode & 0o777 == 0o700


def test_status(stack: StackUnderTest) -> None:
    """`make status` ends with 0 and names every service."""
    said = stack.make("status")
    assert said.code == 0, said.output
    for service in stack.compose.hashes():
        assert service in said.output, said.output


def test_airflow_commands(stack: StackUnderTest) -> None:
    """`make airflow` runs a command of Airflow's own with the stack's database."""
    said = stack.make("airflow", "ARGS=users list")
    assert said.code == 0, said.output
    assert stack.settings.admin_user in said.output, said.output
    left = run("docker", "ps", "--all", "--quiet", "--filter", f"name={stack.compose.project}-airflow-cli")
    assert not left.output.strip(), "its container is left behind"


class TestProbesSeeOutages:
    """Each probe is seen failing while the thing that it asks for is gone."""

    @pytest.mark.parametrize(
        ("service", "words"),
        [
            (
                "airflow-apiserver",
                ["http-probe", "8080", "/api/v2/monitor/health", '"metadatabase":\\{"status":"healthy"'],
            ),
            (
                "mlflow",
                [
                    *("http-probe", "5000", "/api/2.0/mlflow/experiments/search?max_results=1", "experiments"),
                    "/run/secrets/mlflow_probe_header",
                ],
            ),
            ("airflow-scheduler", ["airflow-probe", "SchedulerJob"]),
            ("airflow-triggerer", ["airflow-probe", "TriggererJob"]),
            ("airflow-dag-processor", ["airflow-probe", "DagProcessorJob"]),
        ],
    )
    def test_without_postgres(self, stack: StackUnderTest, service: str, words: list[str]) -> None:
        """With Postgres frozen the probe fails within its time-out; thawed, it is well again."""
        assert stack.exec(service, *words).code == 0
        postgres = stack.container("postgres")
        # On a busy host the kernel may need more than one attempt to freeze all of its processes.
        wait_until(lambda: run("docker", "pause", postgres).code == 0, 30, "Postgres frozen")
        try:
            seen = stack.exec(service, "timeout", "10", *words)
            assert seen.code != 0, seen
        finally:
            run("docker", "unpause", postgres)
        wait_until(lambda: stack.exec(service, *words).code == 0, 90, f"{service} well again after Postgres came back")

    @pytest.mark.parametrize(
        ("service", "program", "probe"),
        [
            ("postgres", "postgres", ["postgres-probe"]),
            ("redis", "redis-server", ["redis-probe"]),
            ("minio", "minio", ["http-probe", "9000", "/minio/health/cluster"]),
        ],
    )
    def test_of_a_frozen_server(self, stack: StackUnderTest, service: str, program: str, probe: list[str]) -> None:
        """With the server's processes stopped its probe fails within its time-out."""
        assert stack.exec(service, *probe).code == 0
        for number, expected in (("STOP", False), ("CONT", True)):
            send = (
                "for p in /proc/[0-9]*; do read -r name < $p/comm && "
                f"[[ $name == {program}* ]] && kill -{number} ${{p#/proc/}}; done; true"
            )
            assert stack.exec(service, "bash", "-c", send).code == 0
            if expected:
                wait_until(lambda: stack.exec(service, *probe).code == 0, 30, f"{service} well again")
            else:
                assert stack.exec(service, "timeout", "10", *probe).code != 0

    def test_of_a_frozen_worker(self, stack: StackUnderTest) -> None:
        """With Celery's main process stopped its heartbeat grows old, and the probe says so."""
        assert stack.exec("airflow-worker", "worker-probe").code == 0
        stop = "for p in $(cat /proc/1/task/1/children); do kill -%s $p; done"
        assert stack.exec("airflow-worker", "bash", "-c", stop % "STOP").code == 0
        try:
            wait_until(lambda: stack.exec("airflow-worker", "worker-probe").code != 0, 60, "the worker's probe failing")
        finally:
            stack.exec("airflow-worker", "bash", "-c", stop % "CONT")
        wait_until(lambda: stack.exec("airflow-worker", "worker-probe").code == 0, 30, "the worker well again")


TAKES_LONG = """
import time
from airflow.sdk import dag, task

@dag(dag_id="takes_long", schedule=None)
def takes_long():
    @task(retries=0)
    def it():
        from mlflow import MlflowClient

        # Longer than the API server, or MLflow, takes to stop.
        time.sleep(40)
        MlflowClient().search_experiments()

    it()

takes_long()
"""


def start_a_long_task(airflow: Airflow) -> str:
    """Returns the run's id once its task is under way."""
    airflow.wait_for_dag("takes_long")
    airflow.set_paused("takes_long", False)
    run_id = airflow.trigger("takes_long")
    wait_until(
        lambda: [one["state"] for one in airflow.task_instances("takes_long", run_id)] == ["running"],
        60,
        "the task is under way",
    )
    return run_id


def how_it_ended(airflow: Airflow, run_id: str) -> list[tuple[str, int]]:
    """The task's state and tries, when its run has ended."""
    airflow.follow("takes_long", run_id, patience=120)
    return [(one["state"], one["try_number"]) for one in airflow.task_instances("takes_long", run_id)]


@pytest.fixture
def long_task(stack: StackUnderTest) -> Iterator[Path]:
    """Its DAG's file; afterwards neither is there."""
    file = stack.clone / "dags" / "takes_long.py"
    yield file
    file.unlink(missing_ok=True)
    with stack.airflow() as airflow:
        if airflow.has("/api/v2/dags/takes_long"):
            airflow.delete_dag("takes_long")


def test_down_and_up_keep_the_data(stack: StackUnderTest, long_task: Path) -> None:
    """Stopping removes the containers and nothing else; the run and the model are there again, and a task that was
    under way has ended well before: all that it needs has waited for it."""
    long_task.write_text(TAKES_LONG)
    with stack.airflow() as airflow:
        runs = airflow.call("GET", "/dags/train_model/dagRuns")["total_entries"]
        under_way = start_a_long_task(airflow)
    down = stack.make("down")
    stack.timings["down, with a task of 40 s under way"] = down.seconds
    assert down.code == 0, down.output
    assert stack.compose.containers() == []
    up = stack.make("up")
    stack.timings["up, volumes kept"] = up.seconds
    assert up.code == 0, up.output
    with stack.airflow() as airflow:
        assert airflow.call("GET", "/dags/train_model/dagRuns")["total_entries"] == runs
        assert how_it_ended(airflow, under_way) == [("success", 1)]
    auth = (stack.settings.admin_user, stack.secret("admin_password"))
    answer = httpx.get(f"{stack.mlflow_url}/api/2.0/mlflow/registered-models/search", auth=auth)
    assert (answer.status_code, "tumour-classifier" in answer.text) == (200, runs > 0), answer.text


def test_another_fernet_key_is_noticed_at_start(stack: StackUnderTest) -> None:
    """The start fails and says which key is wrong; with the former key all is well, nothing is lost."""
    path = stack.instance.secrets / "fernet_key"
    former = path.read_bytes()
    path.chmod(0o600)
    try:
        path.write_text("A" * 43 + "=")
        path.chmod(0o444)
        said = stack.make("up")
        assert said.code != 0, said.output
        assert "E-FERNET" in said.output, said.output
    finally:
        path.write_bytes(former)
        path.chmod(0o444)
    assert stack.make("up").code == 0
    with stack.airflow() as airflow:
        assert airflow.call("GET", "/connections")["total_entries"] >= 0


def test_a_changed_setting_touches_only_what_it_concerns(stack: StackUnderTest) -> None:
    """Another port for Flower makes a new Flower, and every other container stays as it was."""
    before = ids(stack)
    path = stack.instance.settings_file
    (port,) = free_ports(1)
    path.write_text(re.sub(r"^FLOWER_PORT=.*$", f"FLOWER_PORT={port}", path.read_text(), flags=re.MULTILINE))
    said = stack.make("up")
    assert said.code == 0, said.output
    after = ids(stack)
    assert after["flower"] != before["flower"]
    assert {name: one for name, one in before.items() if name in SERVERS} == {
        name: one for name, one in after.items() if name in SERVERS
    }


def test_a_service_that_is_turned_off_is_gone(stack: StackUnderTest) -> None:
    """FLOWER=off removes Flower; its memory goes to the others."""
    path = stack.instance.settings_file
    path.write_text(path.read_text().replace("FLOWER=on", "FLOWER=off"))
    said = stack.make("up")
    assert said.code == 0, said.output
    assert "flower" not in ids(stack)


SERVERS = ("postgres", "redis", "minio", "mlflow", "airflow-apiserver", "airflow-scheduler", "airflow-worker")


def test_a_package_that_contradicts_the_image_stops_the_build(stack: StackUnderTest) -> None:
    """The message names the package, the image's version and the one asked for; the stack runs on."""
    path = stack.clone / "dags" / "requirements.txt"
    former = path.read_text()
    before = ids(stack)
    try:
        path.write_text("pandas==1.5.3\n")
        said = stack.make("up")
    finally:
        path.write_text(former)
    assert said.code != 0, said.output
    for text in ("error[E-BUILD]", "E-REQUIREMENTS", "pandas==1.5.3", "pandas==3."):
        assert text in said.output, said.output
    assert ids(stack) == before


def test_an_environment_that_cannot_be_stops_the_build(stack: StackUnderTest) -> None:
    """The message names the file, and the resolver's what is wrong with it; the stack runs on."""
    path = stack.clone / "dags" / "environments" / "broken.txt"
    before = ids(stack)
    try:
        path.write_text("six<1\nsix>1\n")
        said = stack.make("up")
    finally:
        path.unlink()
    assert said.code != 0, said.output
    for text in ("error[E-BUILD]", "E-REQUIREMENTS", "dags/environments/broken.txt", "unsatisfiable"):
        assert text in said.output, said.output
    assert ids(stack) == before


def test_interrupting_a_restart_loses_nothing(stack: StackUnderTest) -> None:
    """Ctrl-C in the middle of `make restart`, then `make up`: all healthy."""
    child = stack.start("make", "--no-print-directory", "restart")
    wait_until(lambda: not stack.compose.containers() or child.poll() is not None, 60, "the containers gone")
    wait_until(lambda: stack.compose.containers() or child.poll() is not None, 60, "a first container again")
    os.killpg(child.pid, signal.SIGINT)
    child.communicate(timeout=60)
    assert child.returncode != 0
    said = stack.make("up")
    assert said.code == 0, said.output
    assert all(one.good for one in stack.compose.containers())


@pytest.mark.parametrize("service", ["airflow-worker", "mlflow"])
def test_temporary_files_do_not_outlive_a_restart(stack: StackUnderTest, service: str) -> None:
    """What killed processes left, closed folders included; without them it is healthy soon."""
    left = "mkdir -p /tmp/left/closed && touch /tmp/left/closed/file && chmod 0 /tmp/left/closed"
    assert stack.exec(service, "sh", "-c", left).code == 0
    assert run("docker", "restart", stack.container(service)).code == 0
    wait_until(lambda: stack.inspect(service)["State"]["Health"]["Status"] == "healthy", 120, f"a healthy {service}")
    assert "left" not in stack.exec(service, "ls", "-A", "/tmp").output.split()
