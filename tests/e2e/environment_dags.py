"""The Airflow dag of test_environments.py, copied into the throwaway stack's folder."""

from __future__ import annotations

from typing import Any

from airflow.sdk import dag, task


@dag(schedule=None)
def uses_environment() -> None:
    @task.external_python(
        python="/opt/environments/xgboost/bin/python", expect_airflow=False, retries=0, resources={"ram": 512}
    )
    def train() -> dict[str, Any]:
        """Reads a CSV from S3, trains, and logs parameters, a metric and the model."""
        import importlib.util
        import json
        import os
        import sys

        import boto3
        import mlflow
        import pandas as pd
        import xgboost
        from sklearn.datasets import load_breast_cancer

        connection = json.loads(os.environ["AIRFLOW_CONN_STACK_DATA"])
        store = boto3.client(
            "s3",
            endpoint_url=connection["extra"]["endpoint_url"],
            region_name=connection["extra"]["region_name"],
            aws_access_key_id=connection["login"],
            aws_secret_access_key=connection["password"],
        )
        place = {"Bucket": "pipelines", "Key": "uses_environment/raw.csv"}
        store.put_object(**place, Body=load_breast_cancer(as_frame=True).frame.to_csv(index=False).encode())
        frame = pd.read_csv(store.get_object(**place)["Body"])

        features, target = frame.drop(columns="target"), frame["target"]
        model = xgboost.XGBClassifier(n_estimators=20, max_depth=3, n_jobs=1).fit(features, target)
        mlflow.set_experiment("uses_environment")
        with mlflow.start_run() as run:
            mlflow.log_params({"n_estimators": 20, "max_depth": 3})
            mlflow.log_metric("accuracy", float(model.score(features, target)))
            # Named, because finding them out takes another process with all of these libraries.
            logged = mlflow.xgboost.log_model(model, name="model", pip_requirements=["xgboost-cpu==3.2.0"])
        return {
            "prefix": sys.prefix,
            "version": xgboost.__version__,
            "airflow": importlib.util.find_spec("airflow") is not None,
            "rows": len(frame),
            "run_id": run.info.run_id,
            "model_uri": logged.model_uri,
        }

    @task
    def outside() -> str:
        """The version of the image's own environment."""
        import xgboost

        return str(xgboost.__version__)

    train()
    outside()


uses_environment()
