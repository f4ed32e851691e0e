"""The running stack of an instance, for programs that work with it."""

from __future__ import annotations

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
    try:
        password = (here.secrets / "admin_password").read_text(encoding="utf-8").strip()
        return Airflow(f"http://localhost:{chosen.airflow_port}", chosen.admin_user, password), chosen
    except (OSError, httpx.HTTPError) as error:
        raise StackError(
            "E-NO-STACK",
            "no running stack answers here",
            why=f"{type(error).__name__}: {error}",
            fix="make up, then make status",
        ) from error


def dags_folder(chosen: Settings) -> Path:
    """Where the operator's DAGs are."""
    return (ROOT / chosen.dags_dir).resolve()
