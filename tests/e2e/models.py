"""Small models for the tests of serving and of drift, made as a task would: in Airflow's image, with its login."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import httpx
from mlflow import MlflowClient

from tests.support import StackUnderTest

ALIAS = "champion"

CODE = """
import json, pathlib, sys, tempfile
import mlflow, sklearn
from mlflow.models import infer_signature
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

name, kind = sys.argv[1:]
frame = load_breast_cancer(as_frame=True).frame
names = ["mean radius", "mean texture", "mean perimeter", "mean area", "mean smoothness", "mean concavity"]
features, target = frame[names], frame["target"]
model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(features, target)
words = {"signature": infer_signature(features, model.predict(features)), "input_example": features.head(2)}
mlflow.set_experiment("tests-of-serving")
with mlflow.start_run() as run:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "reference.csv")
        features.to_csv(path, index=False)
        mlflow.log_artifact(str(path))
    logged = mlflow.sklearn.log_model(
        model, name="model", pip_requirements=[f"scikit-learn=={sklearn.__version__}"],
        **({} if kind == "without a signature" else words),
    )
if kind == "too large":
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "much")
        path.write_bytes(bytes(41 << 20))
        mlflow.MlflowClient().log_model_artifact(logged.model_id, str(path))
version = mlflow.register_model(logged.model_uri, name)
print("MADE " + json.dumps({"version": str(version.version), "run_id": run.info.run_id, "model_id": logged.model_id}))
"""


@dataclass(frozen=True)
class Made:
    """A version of a registered model."""

    name: str
    version: str
    run_id: str
    model_id: str
    """Of the logged model that the version is."""

    def promote(self, client: MlflowClient) -> None:
        """Gives it the alias."""
        client.set_registered_model_alias(self.name, ALIAS, self.version)


def make(stack: StackUnderTest, kind: str = "good") -> Made:
    """A new version of the served model; its run has `reference.csv`, as the training pipeline's have."""
    name = stack.settings.serving_model
    words = ("run", "--rm", "--no-deps", "-T", "airflow-cli", "python3", "-c", CODE, name, kind)
    told = stack.compose.capture(*words, timeout=180)
    (line,) = [line for line in told.out.splitlines() if line.startswith("MADE ")]
    made: dict[str, Any] = json.loads(line.removeprefix("MADE "))
    return Made(name, **made)


def ready(stack: StackUnderTest) -> dict[str, Any]:
    """What serving says of itself."""
    found: dict[str, Any] = httpx.get(f"{stack.settings.serving_url}/health/ready", timeout=5).json()
    return found


def champion(client: MlflowClient, name: str) -> str | None:
    """The version that has the alias."""
    found = client.search_registered_models(f"name = '{name}'")
    return str(found[0].aliases[ALIAS]) if found and ALIAS in found[0].aliases else None


def put_back(client: MlflowClient, name: str, version: str | None) -> None:
    """Gives the alias back to who had it: other tests look at the pipeline's own version."""
    if version is not None:
        client.set_registered_model_alias(name, ALIAS, version)
    elif champion(client, name) is not None:
        client.delete_registered_model_alias(name, ALIAS)
