"""People: a login in Airflow and in MLflow at once, with a role."""

from __future__ import annotations

import re
import secrets
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import httpx

from stack import connect
from stack.airflow import Airflow
from stack.answers import Client, good
from stack.errors import StackError
from stack.instance import Instance
from stack.settings import Settings


@dataclass(frozen=True)
class Role:
    """What a person may do: Airflow's role of that name; in MLflow everyone reads, and makes what is theirs."""

    airflow: str
    mlflow_edits: bool = False
    """May also log to the experiments, and add to the models, that others made."""
    mlflow_admin: bool = False


ROLES = {
    "viewer": Role("Viewer"),
    "user": Role("User", mlflow_edits=True),
    "op": Role("Op", mlflow_edits=True),
    "admin": Role("Admin", mlflow_admin=True),
}

NAME = re.compile(r"[a-z][a-z0-9._-]{1,31}")

AIRFLOW_USERS = "/auth/fab/v1/users"
MLFLOW_USERS = "/api/2.0/mlflow/users"
MLFLOW_GRANT = "/api/3.0/mlflow/users/permissions/grant"


class People:
    """The logins of a running stack. A context manager; raises StackError (E-NO-STACK) where none answers."""

    def __init__(self, here: Instance) -> None:
        self._open = ExitStack()
        airflow, chosen = connect.airflow(here)
        self._airflow: Airflow = self._open.enter_context(airflow)
        self.settings: Settings = chosen
        login = (chosen.admin_user, connect.admin_password(here))
        self._mlflow = self._open.enter_context(Client("MLflow", chosen.mlflow_url, auth=login))

    def __enter__(self) -> People:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def add(self, name: str, role: Role) -> str:
        """Makes both logins and returns their password. Raises StackError, and then neither is there; where MLflow does
        not answer any more, one may be left, which the error says."""
        self._check(name)
        if places := self._places(name):
            raise StackError(
                "E-USER-EXISTS",
                f"there is a user {name} already",
                why=f"in {' and '.join(places)}",
                fix=f"choose another name, or `make user-remove NAME={name}` first",
            )
        password = secrets.token_urlsafe(18)
        with ExitStack() as undo:
            try:
                self._ask_mlflow("POST", f"{MLFLOW_USERS}/create", {"username": name, "password": password})
            except StackError as error:
                if error.code == "E-NO-STACK":
                    # The question may have arrived.
                    error.changed = left_in_mlflow(name)
                raise
            undo.push(lambda _kind, error, _trace: self._take_back(name, error))
            if role.mlflow_admin:
                self._ask_mlflow("PATCH", f"{MLFLOW_USERS}/update-admin", {"username": name, "is_admin": True})
            for kind in ("experiment", "registered_model") if role.mlflow_edits else ():
                grant = {"username": name, "resource_type": kind, "resource_id": "*", "permission": "EDIT"}
                self._ask_mlflow("POST", MLFLOW_GRANT, grant)
            person = {
                "username": name,
                "password": password,
                # Airflow wants these of everyone; the address need not exist.
                "first_name": name,
                "last_name": "-",
                "email": f"{name}@localhost.invalid",
                "roles": [{"name": role.airflow}],
            }
            self._airflow.request("POST", AIRFLOW_USERS, json=person)
            undo.pop_all()
        return password

    def _take_back(self, name: str, error: BaseException | None) -> None:
        """Removes the login in MLflow after an error, which says so where that fails: its own reason is not lost."""
        try:
            self._ask_mlflow("DELETE", f"{MLFLOW_USERS}/delete", {"username": name})
        except StackError:
            if not isinstance(error, StackError):
                raise
            error.changed = left_in_mlflow(name)

    def remove(self, name: str) -> list[str]:
        """Removes the logins and returns where there was one. What the person made stays."""
        self._check(name)
        places = self._places(name)
        if not places:
            raise StackError(
                "E-USER-UNKNOWN",
                f"there is no user {name}",
                why="neither in Airflow nor in MLflow",
                fix="check the name",
            )
        if "Airflow" in places:
            self._airflow.request("DELETE", f"{AIRFLOW_USERS}/{name}")
        if "MLflow" in places:
            try:
                self._ask_mlflow("DELETE", f"{MLFLOW_USERS}/delete", {"username": name})
            except StackError as error:
                error.changed = "the login in Airflow, if there was one, is removed"
                raise
        return places

    def _check(self, name: str) -> None:
        if not NAME.fullmatch(name):
            raise StackError(
                "E-USER-NAME",
                f"{name!r} cannot be a user's name",
                why="it has 2 to 32 small letters, digits, dots, dashes or underscores, and begins with a letter",
                fix="make user NAME=ada",
            )
        # Airflow finds a name whatever its letters' case.
        if name in (self.settings.admin_user.lower(), "airflow", "serving"):
            raise StackError(
                "E-USER-NAME",
                f"{name} is the stack's own login",
                why="the first login, that of Airflow's tasks and that of serving belong to the stack",
                fix="choose another name",
            )

    def _places(self, name: str) -> list[str]:
        in_airflow = self._airflow.has(f"{AIRFLOW_USERS}/{name}")
        answer = self._mlflow.get(f"{MLFLOW_USERS}/get", params={"username": name})
        in_mlflow = answer.status_code != 404 and _good(answer).is_success
        return [place for place, there in (("Airflow", in_airflow), ("MLflow", in_mlflow)) if there]

    def _ask_mlflow(self, method: str, path: str, body: dict[str, Any]) -> None:
        _good(self._mlflow.request(method, path, json=body))


def left_in_mlflow(name: str) -> str:
    """What an error says was changed, where a login without a known password may be there."""
    return f"there may be a login {name} in MLflow: `make user-remove NAME={name}`"


def _good(answer: httpx.Response) -> httpx.Response:
    fix = "where the first login's password was changed in MLflow, change it back; else `make logs S=mlflow`"
    return good(answer, "E-MLFLOW-API", "MLflow", fix)
