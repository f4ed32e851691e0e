"""What a login may do, found with fewer questions to the database.

MLflow 3.17 asks for the same user several times in one request, reads a run with all its metrics to know which
experiment it belongs to, asks each of these questions in a transaction of its own, and parses an answer that it
has just written to look for links to models, which it takes out for a login that may not see any. Each of these is
answered shorter here, with the same result (tests/e2e/test_permissions.py compares them); what is asked of the database
is still asked for each request.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import sqlalchemy
from flask import Response, g, has_request_context, request
from mlflow.server import auth
from mlflow.server.auth.db.models import SqlRole, SqlRolePermission, SqlUser, SqlUserRoleAssignment
from mlflow.server.auth.entities import User
from mlflow.server.auth.permissions import RESOURCE_TYPE_WORKSPACE, _validate_resource_type
from mlflow.server.auth.sqlalchemy_store import RoleGrantRow
from mlstack_store import read
from sqlalchemy import bindparam

LINKS = (b'"model_inputs"', b'"model_outputs"', b'"model_id"')
"""In an answer's text, whatever may link to a model is under one of these names."""

USER = sqlalchemy.select(SqlUser.id, SqlUser.username, SqlUser.password_hash, SqlUser.is_admin).where(
    SqlUser.username == bindparam("username")
)
GRANTS = (
    sqlalchemy.select(SqlRolePermission.resource_type, SqlRolePermission.resource_pattern, SqlRolePermission.permission)
    .join(SqlRole, SqlRole.id == SqlRolePermission.role_id)
    .join(SqlUserRoleAssignment, SqlUserRoleAssignment.role_id == SqlRole.id)
    .where(
        SqlUserRoleAssignment.user_id == bindparam("user"),
        SqlRole.workspace == bindparam("workspace"),
        SqlRolePermission.resource_type.in_(bindparam("types", expanding=True)),
    )
)


def install() -> None:
    """From now on MLflow's application asks this way."""
    auth._run_requirement = run_requirement
    auth.store.get_user = once_a_request(auth.store.get_user)
    auth.store.list_grants = list_grants
    for handlers in (auth.AFTER_REQUEST_HANDLERS, auth.PARAMETERIZED_AFTER_REQUEST_HANDLERS):
        for route, handler in handlers.items():
            if handler in (
                auth.redact_search_runs_model_links,
                auth.redact_get_run_model_links,
                auth.redact_metric_history_model_ids,
            ):
                handlers[route] = where_needed(handler)


def run_requirement(run_id: str, action: str) -> tuple[tuple[str, str], list[Any]] | None:
    """In place of MLflow's function of this name: what a login needs for an action on a run; None for a run that
    does not exist."""
    experiment_id = auth._get_tracking_store().experiment_of(run_id)
    if experiment_id is None:
        return None
    experiment = (auth.RESOURCE_TYPE_EXPERIMENT, experiment_id)
    return experiment, [
        auth.Requirement(*experiment, "read"),
        auth.Requirement(auth.RESOURCE_TYPE_RUN, "*", action, fallback_if_no_grant=(experiment,)),
    ]


def once_a_request(get_user: Callable[[str], User]) -> Callable[[str], User]:
    """The same user within a request, but for one that changes users."""

    @functools.wraps(get_user)
    def get(username: str) -> User:
        if not has_request_context() or "/users/" in request.path:
            return get_user(username)
        known: dict[str, User] = g.setdefault("mlstack_users", {})
        if username not in known:
            found = read(auth.store, USER, username=username)
            # For one that is not there MLflow's own has the words.
            known[username] = User(*found[0]) if found else get_user(username)
        return known[username]

    return get


def list_grants(user_id: int, workspace: str, resource_types: Collection[str]) -> list[RoleGrantRow]:
    """In place of the store's method of this name: what a user may do with some kinds of things, and with all."""
    for kind in resource_types:
        _validate_resource_type(kind)
    kinds = [*resource_types, RESOURCE_TYPE_WORKSPACE]
    return [RoleGrantRow(*row) for row in read(auth.store, GRANTS, user=user_id, workspace=workspace, types=kinds)]


def where_needed(redact: Callable[[Response], None]) -> Callable[[Response], None]:
    """Takes links to models out of an answer that has some, for a login that may not see them."""

    @functools.wraps(redact)
    def look(answer: Response) -> None:
        if not any(name in answer.data for name in LINKS) or auth.sender_is_admin():
            return
        tier = auth.RESOURCE_TYPE_LOGGED_MODEL
        if auth._denied_sibling_tiers(auth.authenticate_request().username, (tier,)):
            redact(answer)

    return look
