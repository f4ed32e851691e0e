"""What MLflow lets a login do and see is what it would without our shorter ways to find that out, but for the
passwords of the generated logins."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, Metric

from tests.support import StackUnderTest

USERS, PERMISSIONS = "/api/2.0/mlflow/users", "/api/3.0/mlflow/users/permissions"
BOTH = """
import json, os, sys
from mlflow.server import auth
auth._get_tracking_store(os.environ["MLFLOW_BACKEND_STORE_URI"], "mlflow-artifacts:/")
theirs = auth._run_requirement
from mlstack_permissions import run_requirement
print(json.dumps([[f(run, action) for run in sys.argv[1:] for action in ("read", "update", "delete")]
                  for f in (theirs, run_requirement)]))
"""

LOGINS = """
import json, time
from mlflow.server import app, auth
from mlflow.server.auth.permissions import VALID_RESOURCE_TYPES
import mlstack_permissions

store, name = auth.store, f"p{time.time_ns()}"
store.init_db(auth.auth_config.database_uri)
none, some = (store.create_user(f"{name}-{kind}", "a long password", kind == "admin") for kind in ("admin", "some"))
roles = [store.create_role(f"{name}-{number}", place) for number, place in enumerate(("default", "default", "other"))]
store.grant_user_resource_permission(some.username, "experiment", "7", "MANAGE")
store.grant_user_resource_permission(some.username, "registered_model", "m", "EDIT")
for role, kind, pattern, permission in (
    (roles[0], "experiment", "7", "READ"), (roles[0], "run", "*", "DENY"), (roles[1], "experiment", "*", "EDIT"),
    (roles[1], "workspace", "*", "USE"),
    (roles[2], "experiment", "8", "MANAGE"), (roles[2], "workspace", "*", "MANAGE"),
):
    store.add_role_permission(role.id, kind, pattern, permission)
for role in roles:
    store.assign_role_to_user(some.id, role.id)

def told(act, *words):
    try:
        return act(*words)
    except Exception as error:
        return [type(error).__name__, error.error_code]

def rows(list_grants):
    asked = ([], ["experiment"], ["run", "experiment"], ["registered_model"], sorted(VALID_RESOURCE_TYPES), ["nothing"])
    places = ((user, place) for user in (none.id, some.id, -1) for place in ("default", "other", "nowhere"))
    return [sorted(told(list_grants, *place, kinds)) for place in places for kinds in asked]

def users(get_user):
    found = []
    for user in (none.username, some.username, name):
        with app.test_request_context("/api/2.0/mlflow/runs/create"):
            one = told(get_user, user)
            found.append(one if isinstance(one, list) else vars(one))
    return found

theirs = rows(store.list_grants), users(store.get_user)
ours = rows(mlstack_permissions.list_grants), users(mlstack_permissions.once_a_request(store.get_user))
for user in (none, some):
    store.delete_user(user.username)
for role in roles:
    store.delete_role(role.id)
print(json.dumps([theirs, ours]))
"""


@pytest.fixture
def admin(stack: StackUnderTest) -> Iterator[httpx.Client]:
    login = (stack.settings.admin_user, stack.secret("admin_password"))
    with httpx.Client(base_url=stack.mlflow_url, auth=login, timeout=30) as client:
        yield client


@pytest.fixture
def person(stack: StackUnderTest, admin: httpx.Client) -> Iterator[httpx.Client]:
    """A login that may read everything, as everybody may, and change what is its own."""
    login = (f"p{time.time_ns()}", secrets.token_urlsafe(12))
    admin.post(f"{USERS}/create", json=dict(zip(("username", "password"), login, strict=True))).raise_for_status()
    # A connection stays with one of MLflow's processes: each request has its own here.
    fresh = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(base_url=stack.mlflow_url, auth=login, timeout=30, limits=fresh) as client:
        client.headers["X-Name"] = login[0]
        yield client
    admin.request("DELETE", f"{USERS}/delete", json={"username": login[0]}).raise_for_status()


def permit(admin: httpx.Client, way: str, person: httpx.Client, kind: str, permission: str) -> None:
    """Grants a permission on all of a kind, or revokes it."""
    body = {"username": person.headers["X-Name"], "resource_type": kind, "resource_id": "*", "permission": permission}
    admin.post(f"{PERMISSIONS}/{way}", json=body).raise_for_status()


@pytest.fixture
def linked(tracking: MlflowClient) -> tuple[str, str, str]:
    """A run with a model among its outputs, and a metric of that model: experiment, run, model."""
    experiment = tracking.create_experiment(f"links-{time.time_ns()}")
    run = tracking.create_run(experiment).info.run_id
    model = tracking.create_logged_model(experiment, source_run_id=run).model_id
    tracking.log_outputs(run, [LoggedModelOutput(model, step=0)])
    tracking.log_batch(run, [Metric("loss", 0.5, 1, 0, model_id=model, dataset_name="d", dataset_digest="1")])
    return experiment, run, model


def seen(client: httpx.Client, experiment: str, run: str) -> dict[str, Any]:
    """The answers that may name a run's model: MLflow 3.17 leaves it out of a metric's history."""
    found = client.post("/api/2.0/mlflow/runs/search", json={"experiment_ids": [experiment]})
    single = client.get("/api/2.0/mlflow/runs/get", params={"run_id": run})
    history = client.get("/api/2.0/mlflow/metrics/get-history", params={"run_id": run, "metric_key": "loss"})
    answers = {"search": found, "get": single, "history": history}
    return {name: answer.raise_for_status().json() for name, answer in answers.items()}


def test_a_run_needs_the_same(stack: StackUnderTest, linked: tuple[str, str, str]) -> None:
    """Of a run that is there, and of one that is not."""
    _, run, _ = linked
    told = stack.exec("mlflow", "with-secrets", "python3", "-c", BOTH, run, "0" * 32)
    assert told.code == 0, told.output
    (line,) = [line for line in told.output.splitlines() if line.startswith("[[")]
    theirs, ours = json.loads(line)
    assert theirs[0] is not None
    assert theirs[-1] is None
    assert ours == theirs


def test_a_login_is_and_may_do_the_same(stack: StackUnderTest) -> None:
    """Without roles and with several, of other workspaces too; denied; of everything; of what there is not."""
    told = stack.exec("mlflow", "with-secrets", "python3", "-c", LOGINS)
    assert told.code == 0, told.output
    (line,) = [line for line in told.output.splitlines() if line.startswith("[[[")]
    theirs, ours = json.loads(line)
    assert max(map(len, theirs[0])) > 5
    assert [isinstance(user, list) for user in theirs[1]] == [False, False, True]
    assert ours == theirs


def test_links_to_models_are_hidden_from_who_may_see_none(
    admin: httpx.Client, person: httpx.Client, linked: tuple[str, str, str]
) -> None:
    """From the next request on, in both answers that have them, and only the links."""
    experiment, run, model = linked
    open_to_all = seen(person, experiment, run)
    assert open_to_all == seen(admin, experiment, run)
    assert [name for name, answer in open_to_all.items() if model in json.dumps(answer)] == ["search", "get"]
    permit(admin, "grant", person, "logged_model", "DENY")
    held_back = seen(person, experiment, run)
    assert model not in json.dumps(held_back)
    assert held_back["get"]["run"]["info"] == open_to_all["get"]["run"]["info"]
    assert held_back["history"] == open_to_all["history"]
    permit(admin, "revoke", person, "logged_model", "DENY")
    assert seen(person, experiment, run) == open_to_all


def test_what_is_granted_or_revoked_counts_at_once(
    admin: httpx.Client, person: httpx.Client, linked: tuple[str, str, str]
) -> None:
    """For the next request of a login that MLflow knows already; eight times each, by new connections, so that
    more than one of its processes answers."""
    _, run, _ = linked

    def logs() -> set[int]:
        body = {"run_id": run, "key": "late", "value": 1, "timestamp": 1}
        return {person.post("/api/2.0/mlflow/runs/log-metric", json=body).status_code for _ in range(8)}

    assert logs() == {403}
    permit(admin, "grant", person, "experiment", "EDIT")
    assert logs() == {200}
    permit(admin, "revoke", person, "experiment", "EDIT")
    assert logs() == {403}
    for is_admin, code in ((True, 200), (False, 403)):
        changed = {"username": person.headers["X-Name"], "is_admin": is_admin}
        admin.patch(f"{USERS}/update-admin", json=changed).raise_for_status()
        assert logs() == {code}


def test_a_task_cannot_lock_the_others_out(stack: StackUnderTest, admin: httpx.Client, person: httpx.Client) -> None:
    """Whoever asks, by both paths, the generated logins keep their passwords; a person's can be changed."""
    password = stack.secret("mlflow_airflow_password")
    with httpx.Client(base_url=stack.mlflow_url, auth=("airflow", password), timeout=30) as task:
        for api in ("api", "ajax-api"):
            change = f"/{api}/2.0/mlflow/users/update-password"
            new = {"password": secrets.token_urlsafe(12), "current_password": password}
            answers = [task.patch(change, json={"username": "airflow", **new})]
            # With what they have: were they not refused, this would mend what the first did.
            for user in ("airflow", "serving"):
                own = {"username": user, "password": stack.secret(f"mlflow_{user}_password")}
                answers.append(admin.patch(change, json=own))
            assert [answer.status_code for answer in answers] == [403] * 3
            other = {"username": person.headers["X-Name"], "password": secrets.token_urlsafe(12)}
            assert admin.patch(change, json=other).status_code == 200
        assert task.get(f"{USERS}/current").status_code == 200
