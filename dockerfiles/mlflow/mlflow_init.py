#!/usr/bin/env python3
"""Prepares MLflow: migrates the backend store and the store of logins, and creates the logins.

Runs alone before the server: two servers that migrate at the same moment race. The database URLs
are handed over in this process, never on a command line. Running it again changes nothing.

Exit: 0 done; anything else is Python's traceback, and the server is not started.
"""

from __future__ import annotations

import os
import sys

import mlflow.db
from mlflow.server.auth import bootstrap_admin_user
from mlflow.server.auth.config import read_auth_config
from mlflow.server.auth.db import cli as auth_db
from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

# Login -> the variable with its password, and the secret's file. Airflow's tasks report as an ordinary user, who owns
# what it creates; that of serving reads registered models and nothing else (mlstack_logins.py).
LOGINS = {
    "airflow": ("MLFLOW_AIRFLOW_PASSWORD", "mlflow_airflow_password"),
    "serving": ("MLFLOW_SERVING_PASSWORD", "mlflow_serving_password"),
}


def main() -> int:
    """Migrates, creates the logins that are missing, and returns the exit code."""
    mlflow.db.commands.main(["upgrade", os.environ["MLFLOW_BACKEND_STORE_URI"]], standalone_mode=False)
    database = read_auth_config().database_uri
    auth_db.commands.main(["upgrade", "--url", database], standalone_mode=False)

    bootstrap_admin_user()
    store = SqlAlchemyStore()
    store.init_db(database)
    for user, (variable, secret) in LOGINS.items():
        password = os.environ[variable]
        if not store.has_user(user):
            store.create_user(user, password)
            print(f"created the login {user}")
        elif not store.authenticate_user(user, password):
            # The generated secret is the truth: a restored secrets/ directory must work.
            store.update_user(user, password=password)
            print(f"the login {user} got the password of secrets/{secret}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
