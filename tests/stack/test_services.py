"""The services are set up as the design says, asked through their own interfaces."""

from __future__ import annotations

import configparser
import json
import re
from datetime import timedelta

import httpx
import pytest

from stack.airflow import Airflow
from stack.instance import ROOT
from tests.support import StackUnderTest


def query(stack: StackUnderTest, role: str, sql: str) -> list[tuple[object, ...]]:
    """Rows of a read-only query in a role's own database."""
    connection = stack.database(role)
    connection.set_session(readonly=True, autocommit=True)
    try:
        with connection.cursor() as cursor:
            cursor.execute(sql)
            return list(cursor.fetchall())
    finally:
        connection.close()


def test_postgres_is_utf8_scram_and_checksummed(stack: StackUnderTest) -> None:
    """A database in SQL_ASCII would kill the worker; MD5 passwords could be cracked from a backup."""
    for role in ("airflow", "celery", "mlflow", "mlflow_auth"):
        assert query(stack, role, "SHOW server_encoding") == [("UTF8",)]
    settings = dict(
        query(stack, "airflow", "SELECT name, setting FROM pg_settings")  # type: ignore[arg-type]
    )
    assert settings["password_encryption"] == "scram-sha-256"
    assert settings["data_checksums"] == "on"
    assert settings["jit"] == "off"
    assert int(settings["max_connections"]) == int(stack.compose.values["POSTGRES_MAX_CONNECTIONS"])


def test_postgres_data_is_versioned_by_major(stack: StackUnderTest) -> None:
    """The data directory carries the major version, so that two majors never meet in one."""
    assert stack.exec("postgres", "cat", "/var/lib/postgresql/17/data/PG_VERSION").output.strip() == "17"


def test_roles_are_not_superusers(stack: StackUnderTest) -> None:
    """No service's role may create roles or databases, or bypass permissions."""
    rows = query(
        stack,
        "airflow",
        "SELECT rolname, rolsuper OR rolcreaterole OR rolcreatedb OR rolbypassrls FROM pg_roles "
        "WHERE rolname !~ '^pg_' AND rolname <> 'postgres' ORDER BY 1",
    )
    assert rows == [("airflow", False), ("celery", False), ("mlflow", False), ("mlflow_auth", False)]


def test_redis_forgets_nothing(stack: StackUnderTest) -> None:
    """Append-only file on, nothing evicted, a memory limit below the container's."""
    code = """
import os, redis
info = redis.Redis.from_url(os.environ["AIRFLOW__CELERY__BROKER_URL"]).info()
print(info["aof_enabled"], info["maxmemory_policy"], info["maxmemory"], info["aof_last_write_status"])
"""
    aof, policy, limit, status = stack.python("airflow-scheduler", code).output.split()
    assert (aof, policy, status) == ("1", "noeviction", "ok")
    assert 0 < int(limit) < stack.inspect("redis")["HostConfig"]["Memory"]


def test_all_experiments_are_proxied(stack: StackUnderTest) -> None:
    """Every experiment's artifacts pass through the server: an s3:// location would ask each client
    for credentials that it has not."""
    rows = query(stack, "mlflow", "SELECT name, artifact_location FROM experiments")
    assert rows
    for name, location in rows:
        assert str(location).startswith("mlflow-artifacts:"), (name, location)


def test_mlflow_server_variables_are_those_of_its_own_command(stack: StackUnderTest) -> None:
    """mlflow-server sets what `mlflow server` would: the installed version still knows each name."""
    script = (ROOT / "dockerfiles/mlflow/mlflow-server").read_text()
    names = set(re.findall(r"^export (_MLFLOW_\w+)=", script, re.MULTILINE))
    assert len(names) >= 6
    code = """
import json, mlflow.server.constants as constants, mlflow.environment_variables as variables
names = [value for value in vars(constants).values() if isinstance(value, str)]
names += [value.name for value in vars(variables).values() if isinstance(getattr(value, "name", None), str)]
print("NAMES" + json.dumps(names))
"""
    said = stack.python("mlflow", code).output
    known = set(json.loads(said.split("NAMES")[1]))
    assert names <= known, names - known


def test_mlflow_has_no_idle_parent_and_no_job_consumers(stack: StackUnderTest) -> None:
    """No `mlflow server` command line waits beside the server, and no job runner."""
    code = """
import pathlib
for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try: print(path.read_bytes().replace(b"\\0", b" ").decode())
    except OSError: pass
"""
    processes = stack.python("mlflow", code).output
    # uvicorn alone, or gunicorn with several.
    assert "bin/uvicorn" in processes or "bin/gunicorn" in processes
    assert "mlflow server" not in processes
    assert "huey" not in processes


def test_airflow_health(stack: StackUnderTest) -> None:
    """Airflow itself says that database, scheduler, triggerer and DAG processor are healthy."""
    health = httpx.get(f"{stack.airflow_url}/api/v2/monitor/health").json()
    assert {name: part["status"] for name, part in health.items()} == dict.fromkeys(
        ("metadatabase", "scheduler", "triggerer", "dag_processor"), "healthy"
    )


def test_airflow_settings_are_in_force(stack: StackUnderTest) -> None:
    """Airflow knows every option of our file, and uses our value: a misplaced key is ignored silently."""
    ours = configparser.ConfigParser(interpolation=None)
    ours.read(ROOT / "config/airflow/airflow.cfg")
    options = {section: dict(ours.items(section)) for section in ours.sections()}
    code = f"""
import json
from airflow.configuration import conf
known = {{}}
for section, options in {options!r}.items():
    for key in options:
        described = key in conf.configuration_description.get(section, {{}}).get("options", {{}})
        known[section + "." + key] = [conf.get(section, key, fallback=None), described]
print("KNOWN" + json.dumps(known))
"""
    said = stack.python("airflow-scheduler", code).output
    known = json.loads(said.split("KNOWN")[1])
    unknown = [name for name, (_, is_known) in known.items() if not is_known]
    # Sections that Airflow hands on to a library as they are, and an option that only its code knows (the
    # tests of what is relied on without a promise look after that).
    free = {name for name in unknown if name.startswith("celery_broker_transport_options.")}
    assert set(unknown) == free | {"scheduler.num_stuck_in_queued_retries"}
    for name, (value, _) in known.items():
        section, key = name.split(".")
        assert value == options[section][key], name


def test_timeouts_fit_each_other() -> None:
    """A cut-off task gives up before it is declared dead; a queued one is queued again before its token runs out; a
    running one is not delivered again."""
    ours = configparser.ConfigParser(interpolation=None)
    ours.read(ROOT / "config/airflow/airflow.cfg")
    retries, wait = (
        ours.getint("workers", "execution_api_retries"),
        ours.getint("workers", "execution_api_retry_wait_max"),
    )
    assert retries * wait < ours.getint("scheduler", "task_instance_heartbeat_timeout")
    late = ours.getint("scheduler", "task_queued_timeout_check_interval") + ours.getint(
        "scheduler", "orphaned_tasks_check_interval"
    )
    assert late < ours.getint("api_auth", "jwt_leeway")
    assert ours.getint("core", "default_task_retries") >= 1
    assert ours.getint("celery_broker_transport_options", "visibility_timeout") >= timedelta(days=7).total_seconds()


@pytest.mark.parametrize(("service", "most"), [("airflow-worker", 2), ("mlflow", 1)])
def test_libraries_make_few_threads_on_any_host(stack: StackUnderTest, service: str, most: int) -> None:
    """Else they make one for each CPU, which takes more memory on a larger host than a task has."""
    told = stack.python(service, "import os; print(os.environ['OPENBLAS_NUM_THREADS'], os.environ['OMP_NUM_THREADS'])")
    assert told.output.split() == [str(most), str(most)], told.output


@pytest.mark.shipped
def test_the_shipped_pipeline_is_there_and_paused(airflow: Airflow, stack: StackUnderTest) -> None:
    """The shipped DAG is read without errors; nothing runs before somebody wants it."""
    errors = airflow.call("GET", "/importErrors")["import_errors"]
    assert errors == []
    dag = airflow.wait_for_dag("train_model")
    assert dag["timetable_summary"] is not None
    assert dag["is_paused"] or stack.user is None


@pytest.mark.parametrize(
    ("service", "words"),
    [
        ("airflow-scheduler", ["airflow-probe", "NoSuchJob"]),
        (
            "airflow-apiserver",
            ["http-probe", "8080", "/api/v2/monitor/health", '"metadatabase":\\{"status":"unhealthy"'],
        ),
        ("airflow-apiserver", ["http-probe", "8080", "/api/v2/no-such-thing"]),
        ("airflow-apiserver", ["http-probe", "8081", "/"]),
        ("mlflow", ["http-probe", "5000", "/api/2.0/mlflow/experiments/search?max_results=1"]),
        ("minio", ["http-probe", "9000", "/minio/health/nothing"]),
    ],
)
def test_probes_can_fail(stack: StackUnderTest, service: str, words: list[str]) -> None:
    """A probe that asks for something that is not so says so (the real outages: tests/lifecycle)."""
    said = stack.exec(service, *words)
    assert said.code != 0, said


def test_the_probe_of_serving_can_fail(stack: StackUnderTest) -> None:
    """It asks whether serving is alive, with or without a model; a question behind the token fails."""
    if stack.settings.serving == "off":
        pytest.skip("SERVING=off on this stack")
    assert stack.exec("serving", "http-probe", "5002", "/health/live", '"status":"live"').code == 0
    assert stack.exec("serving", "http-probe", "5002", "/health/live", '"status":"stalled"').code != 0
    assert stack.exec("serving", "http-probe", "5002", "/schema").code != 0
    assert stack.exec("serving", "http-probe", "5003", "/health/live").code != 0
