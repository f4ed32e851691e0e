"""The running stack of an instance, for programs that work with it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import httpx

from stack import settings
from stack.airflow import Airflow
from stack.errors import StackError
from stack.instance import ROOT, Instance
from stack.settings import Settings


def airflow(here: Instance) -> tuple[Airflow, Settings]:
    """Airflow's API with the instance's first login, and its settings. Raises StackError (E-NO-STACK)."""
    chosen = settings.load(here.settings_file)
    password = admin_password(here)
    try:
        return Airflow(chosen.airflow_url, chosen.admin_user, password), chosen
    except httpx.HTTPError as error:
        raise StackError(
            "E-NO-STACK",
            "no running stack answers here",
            why=f"{type(error).__name__}: {error}",
            fix="make up, then make status",
        ) from error


def tracking(chosen: Settings, user: str, password: str) -> dict[str, str]:
    """The variables that MLflow's client reads."""
    return {
        "MLFLOW_TRACKING_URI": chosen.mlflow_url,
        "MLFLOW_TRACKING_USERNAME": user,
        "MLFLOW_TRACKING_PASSWORD": password,
    }


def exports(variables: Mapping[str, str]) -> str:
    """Variables as lines that a shell can run."""
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items())


def admin_password(here: Instance) -> str:
    """The first login's password, as it was made. Raises StackError (E-NO-INIT)."""
    path = here.secrets / "admin_password"
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise StackError(
            "E-NO-INIT", f"{path} cannot be read", why=str(error), fix="run `make up` first, as the same user"
        ) from error


def dags_folder(chosen: Settings) -> Path:
    """Where the operator's DAGs are."""
    return (ROOT / chosen.dags_dir).resolve()
