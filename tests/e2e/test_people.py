"""A person's first steps: a login for both programs, and a first run from a client of their own."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from mlflow import MlflowClient

from stack.airflow import Airflow
from stack.errors import StackError
from tests.e2e.conftest import password_in
from tests.support import StackUnderTest, wait_until

USERS = "/auth/fab/v1/users"
FIRST_RUN_S = 30
CACHED_S = 30
"""auth_cache_ttl_seconds: for so long MLflow believes a login that it has checked."""


def client(stack: StackUnderTest, user: str, password: str) -> httpx.Client:
    return httpx.Client(base_url=f"{stack.mlflow_url}/api/2.0/mlflow", auth=(user, password), timeout=30)


def add_to_airflow(airflow: Airflow, username: str, email: str) -> None:
    """A viewer that MLflow does not know."""
    person = {
        "username": username,
        "password": "only-for-this-test",
        "first_name": username,
        "last_name": "-",
        "email": email,
    }
    airflow.request("POST", USERS, json={**person, "roles": [{"name": "Viewer"}]})


def roles(airflow: Airflow, username: str) -> list[str]:
    return [role["name"] for role in airflow.request("GET", f"{USERS}/{username}")["roles"]]


@pytest.mark.parametrize(
    ("role", "in_airflow", "logs"),
    [("viewer", "Viewer", 403), ("user", "User", 200), ("op", "Op", 200), ("admin", "Admin", 200)],
)
def test_one_login_for_both(
    stack: StackUnderTest, airflow: Airflow, username: str, role: str, in_airflow: str, logs: int
) -> None:
    """It opens both programs, and in MLflow others' experiments where the role says so."""
    made = stack.make("user", f"NAME={username}", f"ROLE={role}")
    assert made.code == 0, made.output
    password = password_in(made.output)
    assert roles(airflow, username) == [in_airflow]
    Airflow(stack.airflow_url, username, password)
    with client(stack, stack.settings.admin_user, stack.secret("admin_password")) as admin:
        experiment = admin.post("/experiments/create", json={"name": username}).json()["experiment_id"]
        assert admin.get("/users/get", params={"username": username}).json()["user"]["is_admin"] is (role == "admin")
    with client(stack, username, password) as person:
        assert person.get("/experiments/get", params={"experiment_id": experiment}).status_code == 200
        assert person.post("/runs/create", json={"experiment_id": experiment}).status_code == logs
        own = person.post("/experiments/create", json={"name": f"{username}-own"}).json()["experiment_id"]
        assert person.post("/runs/create", json={"experiment_id": own}).status_code == 200


def test_who_is_removed_is_gone_from_both(stack: StackUnderTest, username: str) -> None:
    made = stack.make("user", f"NAME={username}")
    password = password_in(made.output)
    with client(stack, username, password) as person:
        assert person.get("/users/get", params={"username": username}).status_code == 200
        removed = stack.make("user-remove", f"NAME={username}")
        assert removed.code == 0, removed.output
        assert "Airflow and MLflow" in removed.output
        with pytest.raises(StackError, match="refused the login"):
            Airflow(stack.airflow_url, username, password)
        search = {"experiment_ids": ["0"]}
        wait_until(
            lambda: person.post("/runs/search", json=search).status_code == 401,
            2 * CACHED_S,
            "MLflow to refuse the login",
        )
    again = stack.make("user-remove", f"NAME={username}")
    assert again.code != 0
    assert "E-USER-UNKNOWN" in again.output


def test_a_name_that_exists_in_mlflow_only_is_refused(stack: StackUnderTest, airflow: Airflow, username: str) -> None:
    with client(stack, stack.settings.admin_user, stack.secret("admin_password")) as admin:
        admin.post("/users/create", json={"username": username, "password": "only-for-this-test"}).raise_for_status()
    refused = stack.make("user", f"NAME={username}")
    assert "E-USER-EXISTS" in refused.output
    assert "why: in MLflow" in refused.output
    assert not airflow.has(f"{USERS}/{username}")
    with client(stack, username, "only-for-this-test") as person:
        assert person.get("/users/get", params={"username": username}).status_code == 200


def test_a_name_that_exists_in_airflow_only_is_refused(stack: StackUnderTest, airflow: Airflow, username: str) -> None:
    add_to_airflow(airflow, username, f"{username}@example.invalid")
    refused = stack.make("user", f"NAME={username}", "ROLE=admin")
    assert "E-USER-EXISTS" in refused.output
    assert "why: in Airflow" in refused.output
    assert roles(airflow, username) == ["Viewer"]
    with client(stack, stack.settings.admin_user, stack.secret("admin_password")) as admin:
        assert admin.get("/users/get", params={"username": username}).status_code == 404


def test_half_a_user_is_taken_back(stack: StackUnderTest, airflow: Airflow, username: str) -> None:
    """Airflow refuses an address that somebody has: the login that MLflow had made is gone again."""
    add_to_airflow(airflow, f"{username}x", f"{username}@localhost.invalid")
    try:
        refused = stack.make("user", f"NAME={username}")
        assert refused.code != 0
        assert "E-AIRFLOW-API" in refused.output
        with client(stack, stack.settings.admin_user, stack.secret("admin_password")) as admin:
            assert admin.get("/users/get", params={"username": username}).status_code == 404
    finally:
        airflow.request("DELETE", f"{USERS}/{username}x")


@pytest.mark.parametrize("bad", ["Ada", "a", "a b", "x" * 33, "admin", "airflow", "serving", "", "-rf", "a;id"])
def test_a_bad_name_is_refused(stack: StackUnderTest, bad: str) -> None:
    refused = stack.make("user", f"NAME={bad}")
    assert refused.code != 0
    assert "E-USER-NAME" in refused.output or "usage:" in refused.output, refused.output


def test_an_unknown_role_is_refused(stack: StackUnderTest, airflow: Airflow, username: str) -> None:
    refused = stack.make("user", f"NAME={username}", "ROLE=boss")
    assert refused.code != 0
    # Some versions of Python put the four into quotes.
    assert re.search("invalid choice: 'boss' .choose from '?viewer'?, '?user'?, '?op'?, '?admin'?", refused.output)
    assert not airflow.has(f"{USERS}/{username}")


def test_the_first_run(stack: StackUnderTest, tracking: MlflowClient) -> None:
    """In a virtual environment that is made for it: parameters, a metric over steps, a text, a figure, a model."""
    done = stack.make("first-run")
    assert done.code == 0, done.output
    link = re.search(rf"{re.escape(stack.mlflow_url)}/#/experiments/(\d+)/runs/(\w+)", done.output)
    assert link, done.output
    run = tracking.get_run(link[2])
    assert run.info.status == "FINISHED"
    assert run.data.params["hidden_layer_sizes"] == "32"
    history = tracking.get_metric_history(link[2], "test_loss")
    assert [one.step for one in history] == list(range(20))
    assert history[-1].value < history[0].value
    assert {one.path for one in tracking.list_artifacts(link[2])} >= {"data.txt", "confusion.png"}
    models: list[Any] = tracking.search_logged_models([link[1]])
    assert [model.source_run_id for model in models if model.source_run_id == link[2]] == [link[2]]


def test_another_first_run_is_quick(stack: StackUnderTest) -> None:
    """With the client installed it takes no half minute."""
    again = stack.make("first-run")
    assert again.code == 0, again.output
    stack.timings["make first-run, with the client installed"] = again.seconds
    assert again.seconds < FIRST_RUN_S


def test_the_variables_are_those_that_the_client_reads(stack: StackUnderTest) -> None:
    """`make env`, read by a shell, is enough; without it the example says what to do."""
    python = "var/client/bin/python"
    code = "import mlflow; print('FOUND', len(mlflow.search_experiments()))"
    told = stack.start("sh", "-c", f'eval "$(make --silent env)" && {python} -c "{code}"').communicate(timeout=120)[0]
    assert re.search(r"^FOUND [1-9]", told, re.MULTILINE), told
    bare = stack.start("sh", "-c", f"unset MLFLOW_TRACKING_URI; {python} examples/first_run.py").communicate(
        timeout=120
    )[0]
    assert "make --silent env" in bare
