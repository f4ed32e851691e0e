"""Where MLflow finds our tracking store: the entry point group `mlflow.tracking_store` names `postgresql`.

MLflow loads it while MLflow itself is being imported: the store, which is made of MLflow, is imported later.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlstack_store import PostgresStore


def postgresql(store_uri: str, artifact_uri: str | None = None) -> PostgresStore:
    """The store at an address; `artifact_uri` is where new experiments have their artifacts, by default what
    mlflow-server says."""
    from mlstack_store import PostgresStore

    return PostgresStore(store_uri, artifact_uri or os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"])
