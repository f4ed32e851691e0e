"""A training pipeline through the whole stack: S3, validation, parallel training, MLflow, registry.

    ingest -> validate -> train (one mapped task for each candidate) -> compare -> register

Copy it for your own work: replace `load_source`, `EXPECTED` and `CANDIDATES`. Data that fails the
validation stops the run there; nothing is trained on it. Heavy libraries are imported inside the
tasks, so that reading this file stays quick.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk import Param, dag, get_current_context, task

if TYPE_CHECKING:
    import pandas as pd

BUCKET = "pipelines"
EXPERIMENT = "train_model"
MODEL_NAME = "tumour-classifier"
ALIAS = "champion"
SEED = 7

# What the data must look like: column -> lowest and highest plausible value.
TARGET = "target"
EXPECTED = {
    "mean radius": (5, 40),
    "mean texture": (5, 50),
    "mean perimeter": (30, 250),
    "mean area": (100, 3000),
    "mean smoothness": (0.02, 0.3),
    "mean concavity": (0, 1),
}
MIN_ROWS = 200
MIN_CLASS_SHARE = 0.1

# Each becomes a task, and a run in MLflow.
CANDIDATES: list[dict[str, Any]] = [
    {"name": "logistic-regression", "C": 0.5, "max_iter": 500},
    {"name": "random-forest", "n_estimators": 80, "max_depth": 6},
]


def load_source() -> pd.DataFrame:
    """The raw data: 569 tumours, measured under the microscope (ships with scikit-learn)."""
    from sklearn.datasets import load_breast_cancer

    frame = load_breast_cancer(as_frame=True).frame
    return frame[[*EXPECTED, TARGET]]


def object_store() -> Any:
    """An S3 client from the Airflow connection `stack_data`."""
    import boto3
    from airflow.sdk import Connection
    from botocore.config import Config

    connection = Connection.get("stack_data")
    extra = connection.extra_dejson
    return boto3.client(
        "s3",
        aws_access_key_id=connection.login,
        aws_secret_access_key=connection.password,
        endpoint_url=extra["endpoint_url"],
        region_name=extra["region_name"],
        config=Config(**extra["config_kwargs"]),
    )


def read_csv(key: str) -> pd.DataFrame:
    """A CSV object of the bucket."""
    import pandas as pd

    return pd.read_csv(object_store().get_object(Bucket=BUCKET, Key=key)["Body"])


def find_problems(frame: pd.DataFrame) -> list[str]:
    """What is wrong with the data; empty when nothing is."""
    missing = [column for column in (*EXPECTED, TARGET) if column not in frame.columns]
    if missing:
        return [f"columns missing: {', '.join(missing)}"]
    problems = []
    if len(frame) < MIN_ROWS:
        problems.append(f"{len(frame)} rows, at least {MIN_ROWS} expected")
    for column, (low, high) in EXPECTED.items():
        values = frame[column]
        if values.dtype.kind not in "if":
            problems.append(f"{column}: not numeric ({values.dtype})")
            continue
        if empty := int(values.isna().sum()):
            problems.append(f"{column}: {empty} empty values")
        if outside := int((~values.dropna().between(low, high)).sum()):
            problems.append(f"{column}: {outside} values outside {low} to {high}")
    shares = frame[TARGET].value_counts(normalize=True)
    if len(shares) != 2 or shares.min() < MIN_CLASS_SHARE:
        problems.append(f"{TARGET}: two classes of at least {MIN_CLASS_SHARE:.0%} expected, got {shares.to_dict()}")
    return problems


def build_model(candidate: dict[str, Any]) -> Any:
    """The estimator that a candidate describes."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    parameters = {key: value for key, value in candidate.items() if key != "name"}
    if candidate["name"] == "logistic-regression":
        return make_pipeline(StandardScaler(), LogisticRegression(**parameters, random_state=SEED))
    return RandomForestClassifier(**parameters, random_state=SEED, n_jobs=1)


@dag(
    schedule="@weekly",
    catchup=False,
    max_active_runs=1,
    is_paused_upon_creation=True,
    dagrun_timeout=timedelta(minutes=30),
    default_args={
        "retries": 2,
        "retry_delay": timedelta(seconds=10),
        "execution_timeout": timedelta(minutes=10),
    },
    params={
        "damage_data": Param(False, type="boolean", description="Spoil the data, to see the validation stop the run."),
    },
    tags=["example", "training"],
    doc_md=__doc__,
)
def train_model() -> None:
    @task
    def ingest() -> str:
        """Writes the raw data to S3 and returns its key."""
        context = get_current_context()
        frame = load_source()
        if context["params"]["damage_data"]:
            frame.loc[frame.index[:25], "mean radius"] = -1.0
        key = f"{EXPERIMENT}/{context['run_id']}/raw.csv"
        object_store().put_object(Bucket=BUCKET, Key=key, Body=frame.to_csv(index=False).encode())
        print(f"{len(frame)} rows written to s3://{BUCKET}/{key}")
        return key

    @task
    def validate(key: str) -> str:
        """Returns the key of good data; bad data fails the run at once, without retries."""
        from airflow.sdk.exceptions import AirflowFailException

        if problems := find_problems(read_csv(key)):
            raise AirflowFailException("the data is not fit for training: " + "; ".join(problems))
        return key

    # It took 215 to 320 MiB (`make memory`); on small hosts that is more than the default.
    @task(map_index_template="{{ candidate_name }}", resources={"ram": 512})
    def train(candidate: dict[str, Any], key: str) -> dict[str, Any]:
        """Trains a candidate and logs parameters, metrics, a plot and the model to MLflow."""
        import os

        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt
        import mlflow
        from mlflow.models import infer_signature
        from sklearn.metrics import RocCurveDisplay, accuracy_score, f1_score, roc_auc_score
        from sklearn.model_selection import train_test_split

        context = get_current_context()
        context["candidate_name"] = candidate["name"]
        frame = read_csv(key)
        features, target = frame.drop(columns=TARGET), frame[TARGET]
        x_train, x_test, y_train, y_test = train_test_split(
            features, target, test_size=0.3, random_state=SEED, stratify=target
        )
        model = build_model(candidate).fit(x_train, y_train)
        scores = model.predict_proba(x_test)[:, 1]
        metrics = {
            "accuracy": float(accuracy_score(y_test, model.predict(x_test))),
            "f1": float(f1_score(y_test, model.predict(x_test))),
            "roc_auc": float(roc_auc_score(y_test, scores)),
        }

        mlflow.set_experiment(EXPERIMENT)
        with mlflow.start_run(run_name=candidate["name"]) as run:
            mlflow.set_tags({"airflow.dag_id": "train_model", "airflow.run_id": context["run_id"]})
            mlflow.log_params(candidate)
            mlflow.log_param("data", f"s3://{BUCKET}/{key}")
            mlflow.log_metrics(metrics)
            figure, axes = plt.subplots(figsize=(5, 5))
            RocCurveDisplay.from_predictions(y_test, scores, ax=axes, name=candidate["name"])
            mlflow.log_figure(figure, "roc.png")
            plt.close(figure)
            logged = mlflow.sklearn.log_model(
                model,
                name="model",
                # The model file may hold this type besides plain data; loading it runs no other code.
                skops_trusted_types=["sklearn.tree._tree.Tree"],
                signature=infer_signature(x_train, model.predict(x_train)),
                input_example=x_train.head(2),
            )
        print(
            f"{candidate['name']}: {metrics}\n"
            f"{os.environ['MLFLOW_UI_URL']}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
        )
        return {
            "name": candidate["name"],
            "run_id": run.info.run_id,
            "experiment_id": run.info.experiment_id,
            "model_uri": logged.model_uri,
            **metrics,
        }

    @task
    def compare(results: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns the result with the best area under the ROC curve."""
        ranked = sorted(results, key=lambda result: result["roc_auc"], reverse=True)
        for place, result in enumerate(ranked, start=1):
            print(f"{place}. {result['name']}: roc_auc {result['roc_auc']:.4f}, f1 {result['f1']:.4f}")
        return ranked[0]

    @task
    def register(best: dict[str, Any]) -> dict[str, Any]:
        """Registers the better model and points the alias at it."""
        import mlflow

        version = mlflow.register_model(
            best["model_uri"], MODEL_NAME, tags={"airflow.run_id": get_current_context()["run_id"]}
        )
        mlflow.MlflowClient().set_registered_model_alias(MODEL_NAME, ALIAS, version.version)
        print(f"models:/{MODEL_NAME}@{ALIAS} is now version {version.version}: {best['name']}")
        return {"model": MODEL_NAME, "version": version.version, "alias": ALIAS, **best}

    key = validate(ingest())
    register(compare(train.partial(key=key).expand(candidate=CANDIDATES)))


train_model()
