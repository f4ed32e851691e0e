"""What must be refused, each beside its allowed twin."""

from __future__ import annotations

import contextlib
import socket

import httpx
import psycopg2
import pytest
import redis
from botocore.exceptions import ClientError

from tests.support import StackUnderTest

DATABASES = ("airflow", "celery", "mlflow", "mlflow_auth")
BUCKETS = {"mlflow": "mlflow", "airflow-logs": "airflow-logs", "pipelines": "pipelines"}
READABLE = {"pipelines": {"predictions"}}
"""Identity -> what it may read besides its own bucket."""


def database(stack: StackUnderTest, role: str, name: str, password: str) -> None:
    psycopg2.connect(
        host=stack.address("postgres"), user=role, dbname=name, password=password, connect_timeout=5
    ).close()


@pytest.mark.parametrize("role", DATABASES)
def test_a_role_reaches_its_own_database_only(stack: StackUnderTest, role: str) -> None:
    """Each role, with its right password, is let into its own database and into no other."""
    password = stack.secret(f"{role}_db_password")
    database(stack, role, role, password)
    for other in {*DATABASES, "postgres"} - {role}:
        with pytest.raises(psycopg2.OperationalError, match=r"no pg_hba.conf entry|permission denied"):
            database(stack, role, other, password)


@pytest.mark.parametrize("role", DATABASES)
def test_a_wrong_database_password_is_refused(stack: StackUnderTest, role: str) -> None:
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
        database(stack, role, role, "wrong")


def test_the_superuser_is_refused_over_the_network(stack: StackUnderTest) -> None:
    """Even with the right password the superuser gets in only through the container's own socket."""
    with pytest.raises(psycopg2.OperationalError, match=r"no pg_hba.conf entry"):
        database(stack, "postgres", "postgres", stack.secret("postgres_password"))


def test_the_worker_cannot_reach_the_metadata_database(stack: StackUnderTest) -> None:
    """With everything that the worker has, its own database opens and Airflow's does not."""
    code = """
import os, psycopg2
url = os.environ["AIRFLOW__CELERY__RESULT_BACKEND"].removeprefix("db+").replace("+psycopg2", "")
psycopg2.connect(url).close()
print("results: open")
try:
    psycopg2.connect(url.rsplit("/", 1)[0] + "/airflow")
    print("metadata: open")
except psycopg2.OperationalError as error:
    print("metadata: refused", error)
"""
    said = stack.python("airflow-worker", code)
    assert "results: open" in said.output, said
    assert "metadata: refused" in said.output, said


def test_the_worker_has_no_key_of_the_platform(stack: StackUnderTest) -> None:
    """Neither the metadata DSN nor the Fernet key nor the JWT secret is anywhere in the worker."""
    code = "import os; print(os.environ); print(sorted(os.listdir('/run/secrets')))"
    said = stack.python("airflow-worker", code)
    assert "broker_url" in said.output, said
    for name in ("airflow_db_url", "airflow_db_password", "fernet_key", "jwt_secret", "api_secret_key"):
        assert stack.secret(name) not in said.output, name
        assert f"'{name}'" not in said.output, name


def test_redis_without_a_password_is_refused(stack: StackUnderTest) -> None:
    """No login, a wrong password and the default user are refused; the queue's user is let in."""
    address = stack.address("redis")
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(address, socket_timeout=5).ping()
    for user, password in (("airflow", "wrong"), ("default", stack.secret("redis_password"))):
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(address, username=user, password=password, socket_timeout=5).ping()
    allowed = redis.Redis(address, username="airflow", password=stack.secret("redis_password"), socket_timeout=5)
    assert allowed.ping()


@pytest.mark.parametrize("command", ["CONFIG GET requirepass", "ACL LIST", "KEYS *"])
def test_the_queue_user_cannot_administer_redis(stack: StackUnderTest, command: str) -> None:
    client = redis.Redis(
        stack.address("redis"), username="airflow", password=stack.secret("redis_password"), socket_timeout=5
    )
    with pytest.raises((redis.ResponseError, redis.exceptions.NoPermissionError), match=r"(?i)permission"):
        client.execute_command(*command.split())


@pytest.mark.parametrize("identity", BUCKETS)
def test_an_s3_identity_uses_its_own_bucket_only(stack: StackUnderTest, identity: str) -> None:
    """Each identity lists its bucket; every other bucket, and a list of all, is denied. Tasks read the predictions
    that were logged, and change none."""
    client = stack.s3(identity)
    client.list_objects_v2(Bucket=BUCKETS[identity], MaxKeys=1)
    readable = READABLE.get(identity, set())
    for other in {*BUCKETS.values(), "predictions"} - {BUCKETS[identity]}:
        with pytest.raises(ClientError, match="AccessDenied"):
            client.put_object(Bucket=other, Key="x", Body=b"x")
        with pytest.raises(ClientError, match="AccessDenied"):
            client.delete_object(Bucket=other, Key="x")
        if other in readable:
            client.list_objects_v2(Bucket=other, MaxKeys=1)
            continue
        with pytest.raises(ClientError, match="AccessDenied"):
            client.list_objects_v2(Bucket=other)
        with pytest.raises(ClientError, match=r"AccessDenied|403|Forbidden"):
            client.get_object(Bucket=other, Key="x")
    with pytest.raises(ClientError, match="AccessDenied"):
        client.create_bucket(Bucket="of-my-own")


def test_s3_refuses_strangers(stack: StackUnderTest) -> None:
    """A wrong secret, an unknown identity and an anonymous caller get nothing."""
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        stack.s3("mlflow", "wrong-secret").list_objects_v2(Bucket="mlflow")
    with pytest.raises(ClientError, match="InvalidAccessKeyId"):
        stack.s3("stranger", "wrong-secret").list_objects_v2(Bucket="mlflow")
    assert httpx.get(f"http://{stack.address('minio')}:9000/mlflow/").status_code == 403


def test_the_log_identity_cannot_delete(stack: StackUnderTest) -> None:
    """Tasks write logs and cannot remove them."""
    with pytest.raises(ClientError, match="AccessDenied"):
        stack.s3("airflow-logs").delete_object(Bucket="airflow-logs", Key="x")


def test_the_predictions_identity_only_writes(stack: StackUnderTest) -> None:
    """Serving lists, reads and deletes nothing, and knows no other bucket (what it adds to its own:
    tests/e2e/test_serving.py)."""
    client = stack.s3("serving")
    for refused in (
        lambda: client.get_object(Bucket="predictions", Key="x"),
        lambda: client.delete_object(Bucket="predictions", Key="x"),
        lambda: client.list_objects_v2(Bucket="predictions"),
        lambda: client.create_bucket(Bucket="of-my-own"),
        *(
            lambda bucket=bucket: client.put_object(Bucket=bucket, Key="x", Body=b"x")  # type: ignore[misc]
            for bucket in BUCKETS.values()
        ),
    ):
        with pytest.raises(ClientError, match=r"AccessDenied|403|Forbidden"):
            refused()


def test_mlflow_asks_for_a_login(stack: StackUnderTest) -> None:
    """Anonymous and wrong logins get 401 from pages, API and artifacts; the right one is let in."""
    search = f"{stack.mlflow_url}/api/2.0/mlflow/experiments/search?max_results=1"
    for path in ("/", "/api/2.0/mlflow/experiments/search?max_results=1", "/api/2.0/mlflow-artifacts/artifacts?path="):
        assert httpx.get(f"{stack.mlflow_url}{path}").status_code == 401, path
    for user, password in ((stack.settings.admin_user, "wrong"), ("admin", "password1234"), ("airflow", "airflow")):
        assert httpx.get(search, auth=(user, password)).status_code == 401, user
    for user, secret in ((stack.settings.admin_user, "admin_password"), ("airflow", "mlflow_airflow_password")):
        assert httpx.get(search, auth=(user, stack.secret(secret))).status_code == 200, user


def test_mlflow_users_cannot_make_users(stack: StackUnderTest) -> None:
    """The tasks' login is an ordinary one: it neither creates logins nor promotes itself."""
    auth = ("airflow", stack.secret("mlflow_airflow_password"))
    base = f"{stack.mlflow_url}/api/2.0/mlflow/users"
    made = httpx.post(f"{base}/create", json={"username": "x", "password": "xxxxxxxxxxxx"}, auth=auth)
    assert made.status_code == 403, made.text
    promoted = httpx.patch(f"{base}/update-admin", json={"username": "airflow", "is_admin": True}, auth=auth)
    assert promoted.status_code == 403, promoted.text


def test_mlflow_refuses_foreign_hosts(stack: StackUnderTest) -> None:
    """A page of another site cannot use a visitor's login (DNS rebinding): its host name is refused."""
    auth = (stack.settings.admin_user, stack.secret("admin_password"))
    url = f"{stack.mlflow_url}/api/2.0/mlflow/experiments/search?max_results=1"
    assert httpx.get(url, auth=auth, headers={"Host": "evil.example"}).status_code == 403
    assert httpx.get(url, auth=auth).status_code == 200


def test_airflow_asks_for_a_login(stack: StackUnderTest) -> None:
    """Anonymous calls and wrong passwords get 401; so does the tutorials' airflow/airflow."""
    assert httpx.get(f"{stack.airflow_url}/api/v2/dags").status_code == 401
    for user, password in ((stack.settings.admin_user, "wrong"), ("airflow", "airflow"), ("admin", "admin")):
        answer = httpx.post(f"{stack.airflow_url}/auth/token", json={"username": user, "password": password})
        assert answer.status_code == 401, (user, answer.text)
    with stack.airflow() as client:
        assert client.call("GET", "/dags")["total_entries"] >= 1


def test_the_execution_api_asks_for_a_task_token(stack: StackUnderTest) -> None:
    """Nobody reads connections through the API that tasks use without a task's token."""
    # The first call of a fresh API server builds that API's routes: seconds.
    answer = httpx.get(f"{stack.airflow_url}/execution/connections/stack_data", timeout=30)
    assert answer.status_code in (401, 403), answer.text


def test_back_end_ports_are_not_on_the_host(stack: StackUnderTest) -> None:
    """Postgres, Redis and MinIO answer on no port of this host's addresses that is ours."""
    for service in ("postgres", "redis", "minio"):
        assert not stack.inspect(service)["NetworkSettings"]["Ports"] or not any(
            stack.inspect(service)["NetworkSettings"]["Ports"].values()
        ), service
    for port in (stack.settings.airflow_port, stack.settings.mlflow_port):
        with contextlib.closing(socket.create_connection(("127.0.0.1", port), timeout=5)):
            pass
        # The host's other addresses do not answer.
        for address in other_addresses():
            with pytest.raises(OSError, match=r"refused|timed out"):
                socket.create_connection((address, port), timeout=2).close()


def other_addresses() -> list[str]:
    """This host's own addresses beyond loopback."""
    found = socket.getaddrinfo(socket.gethostname(), None, family=socket.AF_INET)
    return sorted({str(one[4][0]) for one in found if not str(one[4][0]).startswith("127.")})


def test_serving_asks_for_its_token(stack: StackUnderTest) -> None:
    """Serving, where it is on, answers nobody without the token; the right one is let in. No login opens it."""
    if stack.settings.serving == "off":
        pytest.skip("SERVING=off on this stack")
    url = f"{stack.settings.serving_url}/metrics"
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert httpx.get(url, auth=(stack.settings.admin_user, stack.secret("admin_password"))).status_code == 401
    assert httpx.get(url, headers={"Authorization": f"Bearer {stack.secret('serving_token')}"}).status_code == 200


def test_servings_login_reads_models_and_nothing_else(stack: StackUnderTest) -> None:
    """Not even what everybody may read in MLflow; a wrong password gets 401 as everybody's."""
    base, auth = f"{stack.mlflow_url}/api/2.0/mlflow", ("serving", stack.secret("mlflow_serving_password"))
    assert httpx.get(f"{base}/registered-models/search", auth=auth).status_code == 200
    assert httpx.get(f"{base}/registered-models/search", auth=("serving", "wrong")).status_code == 401
    for path in ("experiments/search?max_results=1", "users/list"):
        assert httpx.get(f"{base}/{path}", auth=auth).status_code == 403, path
    for path, body in (("experiments/create", {"name": "x"}), ("registered-models/create", {"name": "x"})):
        assert httpx.post(f"{base}/{path}", json=body, auth=auth).status_code == 403, path


def test_flower_asks_for_a_login(stack: StackUnderTest) -> None:
    """Flower, where it is on, is behind a login."""
    if stack.settings.flower == "off":
        pytest.skip("FLOWER=off on this stack")
    url = f"http://localhost:{stack.settings.flower_port}/"
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, auth=(stack.settings.admin_user, "wrong")).status_code == 401
    assert httpx.get(url, auth=(stack.settings.admin_user, stack.secret("flower_password"))).status_code == 200
