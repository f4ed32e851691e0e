"""The running stack is made of exactly what tests/stack/expected.py says."""

from __future__ import annotations

import re
from typing import Any

import pytest
import testinfra

from stack import dags
from stack.settings import parse_size
from tests.stack.expected import GIT_VOLUMES, NETWORKS, OPT_IN, SERVICES, VOLUMES, Expected, with_git
from tests.support import StackUnderTest, run


@pytest.fixture(scope="session")
def expected(stack: StackUnderTest) -> dict[str, Expected]:
    chosen = stack.settings
    return (
        SERVICES
        | {name: one for name, one in OPT_IN.items() if getattr(chosen, name) == "on"}
        | (with_git(dags.scheme(chosen)) if chosen.dags_git_url else {})
    )


@pytest.fixture(scope="session")
def inspected(stack: StackUnderTest, expected: dict[str, Expected]) -> dict[str, dict[str, Any]]:
    return {service: stack.inspect(service) for service in expected}


def test_exactly_these_containers_volumes_and_networks(stack: StackUnderTest, expected: dict[str, Expected]) -> None:
    """Nothing is missing, and nothing else carries this stack's label."""
    project = stack.compose.project
    label = f"label=com.docker.compose.project={project}"
    assert {one.service for one in stack.compose.containers()} == set(expected)
    volumes = run("docker", "volume", "ls", "--filter", label, "--format", "{{.Name}}").output.split()
    wanted = VOLUMES | (GIT_VOLUMES if stack.settings.dags_git_url else set())
    assert {name.removeprefix(f"{project}_") for name in volumes} == wanted
    networks = run("docker", "network", "ls", "--filter", label, "--format", "{{.Name}}").output.split()
    assert {name.removeprefix(f"{project}_") for name in networks} == NETWORKS


def test_every_service_is_healthy_and_every_job_done(stack: StackUnderTest, expected: dict[str, Expected]) -> None:
    """Services run, healthy, never restarted; jobs ended with 0."""
    for one in stack.compose.containers():
        assert one.good, one
        assert one.state == ("exited" if expected[one.service].job else "running"), one
        assert one.restarts == 0, one
        assert expected[one.service].job or one.health == "healthy", one


def test_images_and_users(
    stack: StackUnderTest, inspected: dict[str, dict[str, Any]], expected: dict[str, Expected]
) -> None:
    """Each container runs our image of it, as its own user, who is not root."""
    for service, want in expected.items():
        assert inspected[service]["Config"]["Image"].startswith(f"{stack.settings.image_prefix}/{want.image}:"), service
        if not want.job:
            host = testinfra.get_host(f"docker://{stack.container(service)}")
            assert host.check_output("id -u") == str(want.uid), service


def test_published_ports(
    stack: StackUnderTest, inspected: dict[str, dict[str, Any]], expected: dict[str, Expected]
) -> None:
    """Only web pages and the predictions' API are published, on loopback, at the port of the setting."""
    for service, want in expected.items():
        published = {
            (binding["HostIp"], int(binding["HostPort"]))
            for bindings in (inspected[service]["HostConfig"]["PortBindings"] or {}).values()
            for binding in bindings
        }
        wanted = {(stack.settings.bind_address, getattr(stack.settings, want.port))} if want.port else set()
        assert published == wanted, service


def test_networks(stack: StackUnderTest, inspected: dict[str, dict[str, Any]], expected: dict[str, Expected]) -> None:
    """Each service is on its networks only, and the back end is internal."""
    project = stack.compose.project
    for service, want in expected.items():
        found = {name.removeprefix(f"{project}_") for name in inspected[service]["NetworkSettings"]["Networks"]}
        assert found == want.networks, service
    backend = run("docker", "network", "inspect", "--format", "{{.Internal}}", f"{project}_backend")
    assert backend.output.strip() == "true"


def test_mounts_and_secrets(inspected: dict[str, dict[str, Any]], expected: dict[str, Expected]) -> None:
    """Each container has its mounts and secrets and no others; what it need not write is read-only."""
    for service, want in expected.items():
        mounts = {mount["Destination"]: mount["RW"] for mount in inspected[service]["Mounts"]}
        secrets = {path for path in mounts if path.startswith("/run/secrets/")}
        assert {path.removeprefix("/run/secrets/") for path in secrets} == want.secrets, service
        assert not any(mounts[path] for path in secrets), service
        assert {path: rw for path, rw in mounts.items() if path not in secrets} == want.mounts, service


def test_limits(stack: StackUnderTest, inspected: dict[str, dict[str, Any]], expected: dict[str, Expected]) -> None:
    """The plan's memory limits are in force, without swap, and they sum up below the budget."""
    total = 0
    for service, want in expected.items():
        settings = inspected[service]["HostConfig"]
        limit = parse_size(stack.compose.values.get(want.limit, want.limit))
        assert settings["Memory"] == limit, service
        assert settings["MemorySwap"] in (limit, -1), service
        assert 0 < settings["MemoryReservation"] < limit, service
        assert 0 < settings["PidsLimit"] <= 4096, service
        total += 0 if want.job else limit
    if stack.settings.stack_memory:
        assert total <= stack.settings.stack_memory


@pytest.mark.parametrize(
    ("service", "variable", "planned"),
    [
        ("airflow-apiserver", "AIRFLOW__API__WORKERS", "APISERVER_WORKERS"),
        ("airflow-dag-processor", "AIRFLOW__DAG_PROCESSOR__PARSING_PROCESSES", "DAG_PARSERS"),
        ("airflow-worker", "AIRFLOW__CELERY__WORKER_CONCURRENCY", "WORKER_CONCURRENCY"),
        ("mlflow", "MLFLOW_WORKERS", "MLFLOW_WORKERS"),
    ],
)
def test_processes(
    stack: StackUnderTest, inspected: dict[str, dict[str, Any]], service: str, variable: str, planned: str
) -> None:
    """As many as planned."""
    assert f"{variable}={stack.compose.values[planned]}" in inspected[service]["Config"]["Env"]


def test_privileges(inspected: dict[str, dict[str, Any]], expected: dict[str, Expected]) -> None:
    """No capability, no way to gain one, a read-only root, capped logs, the right restart policy."""
    for service, want in expected.items():
        settings = inspected[service]["HostConfig"]
        assert settings["CapDrop"] == ["ALL"], service
        assert not settings["CapAdd"], service
        assert not settings["Privileged"], service
        assert "no-new-privileges:true" in settings["SecurityOpt"], service
        assert settings["ReadonlyRootfs"], service
        assert settings["LogConfig"]["Config"]["max-size"] == "10m", service
        assert settings["RestartPolicy"]["Name"] == ("no" if want.job else "unless-stopped"), service


def test_capabilities_inside(stack: StackUnderTest, expected: dict[str, Expected]) -> None:
    """The processes themselves have no capability left, not even in their bounding set."""
    for service in (name for name, want in expected.items() if not want.job):
        status = stack.exec(service, "cat", "/proc/1/status").output
        assert re.search(r"CapEff:\s+0+\n", status), service
        assert re.search(r"CapBnd:\s+0+\n", status), service
        assert re.search(r"NoNewPrivs:\s+1", status), service


def test_root_cannot_be_written(stack: StackUnderTest, expected: dict[str, Expected]) -> None:
    """Writing outside the mounts fails, writing to /tmp or a data volume does not."""
    for service in (name for name, want in expected.items() if not want.job):
        assert stack.exec(service, "touch", "/usr/x").code != 0, service
        assert stack.exec(service, "touch", "/etc/x").code != 0, service
    assert stack.exec("airflow-worker", "bash", "-c", "f=$(mktemp) && rm $f").code == 0


def test_no_secret_is_visible(stack: StackUnderTest, inspected: dict[str, dict[str, Any]]) -> None:
    """No secret's value is in `docker inspect`, in a log, in an image's history, or in an argument list."""
    values = {
        path.name: path.read_text(encoding="utf-8").strip()
        for path in stack.instance.secrets.iterdir()
        if not path.name.startswith("conn_") and path.name not in ("mlflow_auth_ini", "redis_acl")
    }
    assert len(values) >= 21
    for service in inspected:
        places = {
            "docker inspect": str(inspected[service]),
            "its log": run("docker", "logs", stack.container(service)).output,
            "its image": run("docker", "history", "--no-trunc", inspected[service]["Config"]["Image"]).output,
        }
        if inspected[service]["State"]["Running"]:
            places["an argument list"] = run("docker", "top", stack.container(service), "-eo", "args").output
        for where, text in places.items():
            assert not (leaked := [name for name, value in values.items() if value in text]), (service, where, leaked)


def test_healthchecks_start_quickly(inspected: dict[str, dict[str, Any]], expected: dict[str, Expected]) -> None:
    """Each service's probe looks often while starting and seldom afterwards."""
    for service, want in expected.items():
        if not want.job:
            probe = inspected[service]["Config"]["Healthcheck"]
            assert probe["StartInterval"] <= 1_000_000_000, service
            assert probe["Interval"] >= 30_000_000_000, service


def test_image_labels(inspected: dict[str, dict[str, Any]]) -> None:
    """Each image says which version of the software it holds, and its tag begins with it."""
    for service, facts in inspected.items():
        version = facts["Config"]["Labels"]["org.opencontainers.image.version"]
        assert facts["Config"]["Image"].rsplit(":", 1)[1].startswith(f"{version}-"), service


# MB, as `docker images` counts; each well below what its published counterpart takes.
SIZES = {
    "airflow": 950,
    "mlflow": 1050,
    "serving": 800,
    "postgres": 400,
    "redis": 140,
    "minio": 200,
    "minio-init": 200,
}


@pytest.mark.shipped
def test_images_are_small(inspected: dict[str, dict[str, Any]]) -> None:
    for facts in inspected.values():
        image = facts["Config"]["Image"]
        name = image.rsplit("/", 1)[1].split(":")[0]
        size = int(run("docker", "image", "inspect", "--format", "{{.Size}}", image).output) / 1e6
        assert 50 < size < SIZES[name], (name, size)


def test_images_hold_no_tools_of_their_making(stack: StackUnderTest, expected: dict[str, Expected]) -> None:
    """No compiler, installer or package cache is left; the one program that must be there is found."""
    look = (
        "command -v bash; command -v gcc cc go uv pip pip3 make; "
        "ls -d /opt/uv /var/lib/apt/lists/*Packages* /var/cache/apt/archives/*.deb 2>/dev/null; true"
    )
    for service in (name for name, want in expected.items() if not want.job):
        assert stack.exec(service, "bash", "-c", look).output.split() == ["/usr/bin/bash"], service
