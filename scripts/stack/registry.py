"""A small client of MLflow's registry, for the programs and the tests."""

from __future__ import annotations

from typing import Any

import httpx

from stack.answers import Client, good


class Registry:
    """MLflow with a person's login. A context manager; each call raises StackError (E-MLFLOW-API, E-NO-STACK)."""

    def __init__(self, url: str, user: str, password: str) -> None:
        self._http = Client("MLflow", url, auth=(user, password))

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def tags(self, model: str, version: str) -> dict[str, str]:
        """The tags of a model version."""
        found = self._get("/api/2.0/mlflow/model-versions/get", name=model, version=version).json()
        return {tag["key"]: tag["value"] for tag in found["model_version"].get("tags", [])}

    def artifact(self, run_id: str, path: str) -> str:
        """A run's artifact, as text."""
        run: dict[str, Any] = self._get("/api/2.0/mlflow/runs/get", run_id=run_id).json()["run"]
        # mlflow-artifacts:/1/run/artifacts: all artifacts of this stack pass through the server.
        root = run["info"]["artifact_uri"].partition(":")[2].lstrip("/")
        return self._get(f"/api/2.0/mlflow-artifacts/artifacts/{root}/{path}").text

    def _get(self, path: str, **words: str) -> httpx.Response:
        answer = self._http.get(path, params=words)
        return good(answer, "E-MLFLOW-API", "MLflow", "see `make logs S=mlflow`")
