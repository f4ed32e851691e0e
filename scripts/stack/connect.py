"""The running stack of an instance, for programs that work with it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from stack import settings
from stack.airflow import Airflow
from stack.errors import StackError
from stack.instance import ROOT, Instance
from stack.registry import Registry
from stack.serving import Serving
from stack.settings import Settings


def airflow(here: Instance) -> tuple[Airflow, Settings]:
    """Airflow's API with the instance's first login, and its settings. Raises StackError (E-NO-STACK)."""
    chosen = settings.load(here.settings_file)
    return Airflow(chosen.airflow_url, chosen.admin_user, admin_password(here)), chosen


def serving(here: Instance, chosen: Settings) -> Serving:
    """The predictions' API with the instance's token. Raises StackError (E-SERVING-OFF, E-NO-INIT)."""
    if chosen.serving == "off":
        raise StackError(
            "E-SERVING-OFF",
            "serving is off",
            why=f"SERVING is off in {here.settings_file}, as it is by default",
            fix="write SERVING=on there, then make up",
        )
    return Serving(chosen.serving_url, _secret(here, "serving_token"))


def registry(here: Instance, chosen: Settings) -> Registry:
    """MLflow's registry with the instance's first login. Raises StackError (E-NO-INIT)."""
    return Registry(chosen.mlflow_url, chosen.admin_user, admin_password(here))


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
    return _secret(here, "admin_password")


def _secret(here: Instance, name: str) -> str:
    path = here.secrets / name
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise StackError(
            "E-NO-INIT", f"{path} cannot be read", why=str(error), fix="run `make up` first, as the same user"
        ) from error


def dags_folder(chosen: Settings) -> Path:
    """Where the operator's DAGs are."""
    return (ROOT / chosen.dags_dir).resolve()
