"""A training pipeline from raw data to a model in production; each step is a gate for those behind it.

    ingest -> validate -> features -> train and evaluate (mapped: one task a candidate)
        -> choose -> register -> approve -> promote -> smoke_test -> announce
                                                                  -> restore (only for a champion that was not tested)

Copy it for your own work: give the function `train_model`, `MODEL_NAME` and `SOURCE` other names, and replace
`load_source`, `EXPECTED`, `CANDIDATES` with what they need (`NEEDED`), and the thresholds. Heavy libraries are imported
inside the tasks, so that reading this file stays quick. It runs once a week, and when `drift_watch` says that the data
has changed.

- **Your own data**: `make upload FILE=mine.csv` puts a CSV or Parquet file into the bucket `pipelines`; name its key as
  `source`. For the runs that nobody starts, too, name it in the Airflow variable `train_model_source`.
- **Approval**: open the task `approve` of the run (or *Required actions* on Airflow's home page). Nobody
  answers in time: the run fails there, and nothing is deployed; cleared with what is behind it, `approve` asks again,
  and nothing is trained again. `approval: automatic` asks nobody. Where another version has become champion meanwhile,
  `promote` fails: clear `choose`, which compares with that one.
- **From here to MLflow and back**: each run's link is in the log and the XCom of `train`, the promoted one's in the
  event of the asset that `announce` updates; in MLflow a run's description links to the Airflow run.
- **MLflow or the object store is away for a while**: a task waits for MLflow, or is tried again. A run of MLflow whose
  task lost it is ended by the next try; a version is registered once.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.providers.standard.exceptions import HITLTimeoutError
from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import (
    Asset,
    AssetOrTimeSchedule,
    Context,
    CronTriggerTimetable,
    Param,
    TriggerRule,
    dag,
    get_current_context,
    task,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd
    from mlflow.entities import Run

BUCKET = "pipelines"
MODEL_NAME = "tumour-classifier"
CHAMPION, CHALLENGER = "champion", "challenger"
PREVIOUS = "previous_champion"
"""Tag of a model version: whose place it took."""
MADE_BY = "airflow.run_id"
"""Tag of what a run makes in MLflow."""
SEED = 7

# Without names of their own, so that a copy for another model has other assets.
DRIFT = Asset(uri=f"mlstack://drift/{MODEL_NAME}")
DEPLOYED = Asset(uri=f"mlstack://models/{MODEL_NAME}/{CHAMPION}")

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
MAX_BYTES, MAX_VALUES = 20_000_000, 2_000_000
"""Of the user's own file: a task holds the whole table in memory, and has RAM_MB for it."""
RAM_MB = 384
"""Of a task that holds a table or a model."""
SOURCE = "train_model_source"
"""The Airflow variable that names the user's own file for runs whose `source` is empty."""
SMOKE_ROWS = 20

# Each becomes a task, and a run in MLflow.
CANDIDATES: list[dict[str, Any]] = [
    {"name": "logistic-regression", "C": 0.5, "max_iter": 500},
    {"name": "xgboost", "n_estimators": 120, "max_depth": 3, "learning_rate": 0.1},
    {"name": "neural-network", "hidden_layer_sizes": 32, "learning_rate_init": 0.01, "max_iter": 200},
]
NEEDED = {
    "sklearn": ("pandas", "scikit-learn", "skops"),
    "xgboost": ("pandas", "scikit-learn", "xgboost-cpu"),
}
"""Packages that a logged model needs, by the library that it is of. For another library's MLflow finds out: it loads
the model once more in a process of its own, which takes as long as all else in `train`."""
TOLERANCE = 0.002
"""How much worse than the champion, on the same rows, a challenger may be: these are few, and another few would say
otherwise."""
FOLDS = 3
"""Of the training rows, to choose a candidate by. Not by the rows that are held back: the best of several on the same
rows looks better than it is, and the gates would believe it."""


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


def is_parquet(body: bytes) -> bool:
    """Whether a Parquet file's marks stand at both ends, and its footer is as long as it says. The reader looks for a
    footer in anything: of bytes that have none it read what lies beyond them in memory, and once did not come back."""
    marked = body[:4] == body[-4:] == b"PAR1"
    return marked and 0 < int.from_bytes(body[-8:-4], "little") <= len(body) - 12


def load_own(key: str) -> pd.DataFrame:
    """The user's own table. Raises ValueError with the reason where it is none."""
    import io

    import pandas as pd
    from botocore.exceptions import ClientError

    store = object_store()
    try:
        size = store.head_object(Bucket=BUCKET, Key=key)["ContentLength"]
    except ClientError as error:
        if error.response["Error"]["Code"] in ("404", "NoSuchKey"):
            raise ValueError(f"there is no s3://{BUCKET}/{key}") from error
        raise
    if size > MAX_BYTES:
        raise ValueError(f"s3://{BUCKET}/{key} has {size:,} bytes, at most {MAX_BYTES:,} fit into a task")
    body = store.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    parquet = key.endswith(".parquet")
    if parquet and not is_parquet(body):
        raise ValueError(f"s3://{BUCKET}/{key} is not a table: it is no Parquet file, or not all of one")
    try:
        values = parquet_values(body) if parquet else body.count(b"\n") * (body.partition(b"\n")[0].count(b",") + 1)
        if values <= MAX_VALUES:
            return (pd.read_parquet if parquet else pd.read_csv)(io.BytesIO(body))
    except MemoryError:
        raise
    except Exception as error:  # Of a damaged Parquet file it can be any.
        raise ValueError(f"s3://{BUCKET}/{key} is not a table: {error}") from error
    raise ValueError(f"s3://{BUCKET}/{key} has {values:,} values, at most {MAX_VALUES:,} fit into a task")


def parquet_values(body: bytes) -> int:
    """How many values a Parquet file has, by its footer: a few bytes can be millions of equal ones."""
    import io

    from fastparquet import ParquetFile

    file = ParquetFile(io.BytesIO(body))
    return int(file.count()) * len(file.columns)


def read_csv(key: str) -> pd.DataFrame:
    """A CSV object of the bucket."""
    import pandas as pd

    return pd.read_csv(object_store().get_object(Bucket=BUCKET, Key=key)["Body"])


def write_csv(name: str, frame: pd.DataFrame) -> str:
    """Writes a table of this run to the bucket; its key."""
    import tempfile

    key = f"{dag_id()}/{get_current_context()['run_id']}/{name}.csv"
    # Not text in memory beside the table.
    with tempfile.TemporaryFile() as file:
        frame.to_csv(file, index=False)
        file.seek(0)
        object_store().upload_fileobj(file, BUCKET, key)
    print(f"{len(frame)} rows written to s3://{BUCKET}/{key}")
    return key


SPLIT = "features-1"
"""How `held_back` does it, a parameter of each candidate's run: another name for another way."""


def comparable(champion: Any) -> bool:
    """Whether a champion may be measured on the rows that are held back: not where a run of this DAG trained it on what
    another split left for training. Of one that was made otherwise it is not known."""
    import mlflow

    made = mlflow.MlflowClient().get_run(champion.run_id).data if champion.run_id else None
    return made is None or made.tags.get("airflow.dag_id") != dag_id() or made.params.get("split") == SPLIT


def held_back(frame: pd.DataFrame) -> pd.Series:
    """Which rows are for testing, three of ten: by what is in them, and not by their place. So a row that the champion
    was trained on does not come among those that it is tested on, whatever has been added or has gone since, nor does
    its twin with another answer. Raises ValueError where one of the two parts has not both classes."""
    import pandas as pd

    found = pd.Series(pd.util.hash_pandas_object(frame[[*EXPECTED]], index=False) % 10 < 3, index=frame.index)
    if min(frame[found][TARGET].nunique(), frame[~found][TARGET].nunique()) < 2:
        raise ValueError("too few rows of one class: all of them are for training, or all for testing")
    return found


def find_problems(frame: pd.DataFrame) -> list[str]:
    """What is wrong with the data; empty when nothing is."""
    missing = [column for column in (*EXPECTED, TARGET) if column not in frame.columns]
    if missing:
        return [f"columns missing: {', '.join(missing)}"]
    # As `features` does: the same row many times is one.
    frame = frame[[*EXPECTED, TARGET]].drop_duplicates()
    problems = []
    if len(frame) < MIN_ROWS:
        problems.append(f"{len(frame)} different rows, at least {MIN_ROWS} expected")
    for column, (low, high) in EXPECTED.items():
        values = frame[column]
        if values.dtype.kind not in "if":
            problems.append(f"{column}: not numeric ({values.dtype})")
            continue
        if empty := int(values.isna().sum()):
            problems.append(f"{column}: {empty} empty values")
        if outside := int((~values.dropna().between(low, high)).sum()):
            problems.append(f"{column}: {outside} values outside {low} to {high}")
        elif values.nunique() < 2:
            problems.append(f"{column}: always the same value")
    shares = frame[TARGET].value_counts(normalize=True, dropna=False)
    if set(shares.index) != {0, 1} or shares.min() < MIN_CLASS_SHARE:
        problems.append(f"{TARGET}: 0 and 1, each at least {MIN_CLASS_SHARE:.0%}, expected; got {shares.to_dict()}")
    return problems


def build_model(candidate: dict[str, Any]) -> Any:
    """The estimator that a candidate describes."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    parameters = {key: value for key, value in candidate.items() if key != "name"}
    if candidate["name"] == "xgboost":
        from xgboost import XGBClassifier

        return XGBClassifier(**parameters, random_state=SEED, n_jobs=1)
    kind = {"logistic-regression": LogisticRegression, "neural-network": MLPClassifier}[candidate["name"]]
    return make_pipeline(StandardScaler(), kind(**parameters, random_state=SEED))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """To store or load a model, its functions' homes are looked for in every module; Airflow's former ones warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The `airflow")
        yield


def log_model(model: Any, example: pd.DataFrame) -> str:
    """Logs a fitted model to the active MLflow run, in its library's own format; its address."""
    from importlib.metadata import version

    import mlflow
    from mlflow.models import infer_signature

    library = type(model).__module__.partition(".")[0]
    words = {
        "name": "model",
        "signature": infer_signature(example, model.predict(example)),
        "input_example": example,
        "pip_requirements": [f"{name}=={version(name)}" for name in NEEDED.get(library, ())] or None,
    }
    # The model file may hold these types besides plain data; loading it runs no other code.
    trusted = ["sklearn.neural_network._stochastic_optimizers.AdamOptimizer"]
    with quiet():
        if library == "xgboost":
            return str(mlflow.xgboost.log_model(model, model_format="ubj", **words).model_uri)
        return str(mlflow.sklearn.log_model(model, skops_trusted_types=trusted, **words).model_uri)


def evaluate_model(model_uri: str, frame: pd.DataFrame) -> tuple[dict[str, float], list[int]]:
    """MLflow's own evaluation on held-out rows, logged to the active run with its plots: the metrics. And the model's
    answers to the first SMOKE_ROWS of them, which the served one must give, too."""
    import matplotlib as mpl

    mpl.use("Agg")
    import mlflow

    with quiet():
        model = mlflow.pyfunc.load_model(model_uri)
        answers = model.predict(frame.head(SMOKE_ROWS).drop(columns=TARGET))
        found = mlflow.models.evaluate(
            model,
            frame,
            targets=TARGET,
            model_type="classifier",
            evaluators="default",
            evaluator_config={"log_model_explainability": False, "pos_label": 1},
        )
    return {name: float(value) for name, value in found.metrics.items()}, [int(answer) for answer in answers]


def dag_id() -> str:
    """This DAG's: what a copy of it makes, under a name of its own, is its own."""
    return str(get_current_context()["dag"].dag_id)


def airflow_link() -> str:
    """This Airflow run's page."""
    return f"{os.environ['AIRFLOW_UI_URL']}/dags/{dag_id()}/runs/{get_current_context()['run_id']}"


def mlflow_link(run: Run) -> str:
    """A run's page in MLflow."""
    return f"{os.environ['MLFLOW_UI_URL']}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"


def end_former_tries(experiment_id: str, name: str, tag: str = MADE_BY) -> None:
    """Ends the runs of this name that former tries of a task began: one that lost MLflow could not end its own, and
    that would be running for ever."""
    import mlflow

    client = mlflow.MlflowClient()
    query = f"attributes.status = 'RUNNING' and attributes.run_name = '{name}'"
    query += f" and tags.`{tag}` = '{get_current_context()['run_id']}'"
    for run in client.search_runs([experiment_id], filter_string=query):
        client.set_terminated(run.info.run_id, "KILLED")


def champion_version() -> Any:
    """The model version that is in production, or None."""
    import mlflow

    client = mlflow.MlflowClient()
    # Asked for the alias of a model that is not there, MLflow says that it may not be read.
    models = client.search_registered_models(f"name = '{MODEL_NAME}'")
    version = models[0].aliases.get(CHAMPION) if models else None
    return client.get_model_version(MODEL_NAME, str(version)) if version else None


class Approval(ApprovalOperator):
    """Asks a person, for as long as the run's parameters say, or nobody."""

    def execute(self, context: Context) -> Any:
        if context["params"]["approval"] == "automatic":
            print("approval is automatic in this run")
            return None
        self.response_timeout = timedelta(minutes=context["params"]["approval_minutes"])
        return super().execute(context)

    def execute_complete(self, context: Context, event: dict[str, Any]) -> Any:
        from airflow.sdk.exceptions import AirflowFailException

        try:
            return super().execute_complete(context, event)
        except HITLTimeoutError as error:
            minutes = context["params"]["approval_minutes"]
            raise AirflowFailException(
                f"nobody answered within {minutes} minutes: nothing is deployed, and the version stays {CHALLENGER}"
            ) from error


@dag(
    schedule=AssetOrTimeSchedule(
        # Unpaused on a Monday it would else begin with the run of that night, on top of the one that is asked for.
        timetable=CronTriggerTimetable("0 3 * * 1", timezone="UTC", run_immediately=timedelta(0)),
        assets=DRIFT,
    ),
    catchup=False,
    max_active_runs=1,
    is_paused_upon_creation=True,
    # Longer than anybody may be waited for.
    dagrun_timeout=timedelta(days=8),
    default_args={
        "retries": 2,
        "retry_delay": timedelta(seconds=10),
        "execution_timeout": timedelta(minutes=10),
    },
    params={
        "source": Param(
            None,
            # The form wants a text that is one where only a text is allowed.
            type=["null", "string"],
            description=f"Key of a CSV or Parquet file in the bucket; empty: what the variable {SOURCE} names, or the "
            "example.",
        ),
        "min_roc_auc": Param(0.95, type="number", minimum=0, maximum=1, description="A model below this goes nowhere."),
        "approval": Param("human", enum=["human", "automatic"], description="Who decides that a model is deployed."),
        "approval_minutes": Param(
            1440, type="integer", minimum=1, maximum=7 * 1440, description="How long to wait for a person."
        ),
        "damage_data": Param(False, type="boolean", description="Spoil the data, to see the validation stop the run."),
        "fail_smoke_test": Param(False, type="boolean", description="See the alias go back to the last model."),
    },
    tags=["example", "training"],
    doc_md=__doc__,
)
def train_model() -> None:
    @task(resources={"ram": RAM_MB})
    def ingest() -> dict[str, str]:
        """Writes the raw data to S3: its key, and whose data it is."""
        from airflow.sdk import Variable
        from airflow.sdk.exceptions import AirflowFailException

        params = get_current_context()["params"]
        own = params["source"] or Variable.get(SOURCE, default="")
        try:
            frame = load_own(own) if own else load_source()
        except ValueError as error:
            raise AirflowFailException(str(error)) from error
        if params["damage_data"]:
            frame.loc[frame.index[:25], "mean radius"] = -1.0
        return {"key": write_csv("raw", frame), "source": f"s3://{BUCKET}/{own}" if own else "the example's data"}

    @task(resources={"ram": RAM_MB})
    def validate(key: str) -> str:
        """Returns the key of good data; bad data fails the run at once, without retries."""
        from airflow.sdk.exceptions import AirflowFailException

        if problems := find_problems(read_csv(key)):
            raise AirflowFailException("the data is not fit for training: " + "; ".join(problems))
        return key

    @task(resources={"ram": RAM_MB})
    def features(key: str) -> dict[str, str]:
        """Splits the rows once, for every candidate and for the champion: the keys of both parts."""
        from airflow.sdk.exceptions import AirflowFailException

        frame = read_csv(key)[[*EXPECTED, TARGET]].drop_duplicates()
        frame = frame.astype(dict.fromkeys(EXPECTED, "float64") | {TARGET: "int64"})
        try:
            test = held_back(frame)
        except ValueError as error:
            raise AirflowFailException(str(error)) from error
        return {"train": write_csv("train", frame[~test]), "test": write_csv("test", frame[test])}

    @task(map_index_template="{{ candidate_name }}", resources={"ram": RAM_MB})
    def train(candidate: dict[str, Any], keys: dict[str, str], source: str) -> dict[str, Any]:
        """Trains a candidate and logs parameters, loss, the training rows and the model to MLflow."""
        import time

        import mlflow
        from mlflow.entities import Metric
        from sklearn.model_selection import StratifiedKFold, cross_val_score

        context = get_current_context()
        context["candidate_name"] = candidate["name"]
        frame = read_csv(keys["train"])
        rows, target = frame.drop(columns=TARGET), frame[TARGET]
        end_former_tries(mlflow.set_experiment(dag_id()).experiment_id, candidate["name"])
        with mlflow.start_run(
            run_name=candidate["name"],
            description=f"[Airflow run]({airflow_link()})",
            tags={"airflow.dag_id": dag_id(), MADE_BY: context["run_id"]},
        ) as run:
            mlflow.log_params(candidate)
            mlflow.log_params({"source": source, "data": f"s3://{BUCKET}/{keys['train']}", "split": SPLIT})
            folds = StratifiedKFold(FOLDS, shuffle=True, random_state=SEED)
            scores = cross_val_score(build_model(candidate), rows, target, scoring="roc_auc", cv=folds)
            mlflow.log_metric("cv_roc_auc", scores.mean())
            model = build_model(candidate).fit(rows, target)
            now = int(time.time() * 1000)
            losses = getattr(model[-1] if hasattr(model, "steps") else model, "loss_curve_", [])
            mlflow.MlflowClient().log_batch(
                run.info.run_id, metrics=[Metric("train_loss", loss, now, step) for step, loss in enumerate(losses)]
            )
            # What drift is measured against.
            mlflow.log_text(rows.to_csv(index=False), "reference.csv")
            model_uri = log_model(model, rows.head(2))
        result = {
            "name": candidate["name"],
            "run_id": run.info.run_id,
            "experiment_id": run.info.experiment_id,
            "model_uri": model_uri,
            "cv_roc_auc": float(scores.mean()),
            "source": source,
            "url": mlflow_link(run),
        }
        print(result["url"])
        return result

    @task(map_index_template="{{ candidate_name }}", resources={"ram": RAM_MB})
    def evaluate(trained: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
        """The candidate's metrics and plots, on rows that it has not seen."""
        import mlflow

        get_current_context()["candidate_name"] = trained["name"]
        with mlflow.start_run(run_id=trained["run_id"]):
            metrics, answers = evaluate_model(trained["model_uri"], read_csv(keys["test"]))
        return {**trained, "metrics": metrics, "answers": answers}

    @task(resources={"ram": RAM_MB})
    def choose(results: list[dict[str, Any]], keys: dict[str, str]) -> dict[str, Any]:
        """Returns the best candidate by cross-validation; it must be good enough on rows that nobody has seen, and
        there not worse than the champion."""
        import mlflow
        from airflow.sdk.exceptions import AirflowFailException
        from mlflow.models import MetricThreshold
        from mlflow.models.evaluation import EvaluationResult
        from mlflow.models.evaluation.validation import ModelValidationFailedException

        ranked = sorted(results, key=lambda result: result["cv_roc_auc"], reverse=True)
        for place, result in enumerate(ranked, start=1):
            held_out = result["metrics"]["roc_auc"]
            print(f"{place}. {result['name']}: {result['cv_roc_auc']:.4f} in cross-validation, roc_auc {held_out:.4f}")
        best = ranked[0]
        limit = get_current_context()["params"]["min_roc_auc"]
        champion, not_compared = champion_version(), None
        if champion is not None and not comparable(champion):
            not_compared = champion.version
            print(f"champion, version {not_compared}: trained on rows of another split, and so not compared")
        elif champion is not None:
            name, tag = f"champion-{champion.version}", "airflow.compared_by"
            end_former_tries(mlflow.set_experiment(dag_id()).experiment_id, name, tag)
            with mlflow.start_run(
                run_name=name,
                description=f"[Airflow run]({airflow_link()})",
                tags={"airflow.dag_id": dag_id(), tag: get_current_context()["run_id"]},
            ) as run:
                rows = read_csv(keys["test"])
                try:
                    metrics, _ = evaluate_model(f"models:/{MODEL_NAME}/{champion.version}", rows)
                except Exception as error:
                    raise RuntimeError(
                        f"the {CHAMPION}, version {champion.version}, was not evaluated on these rows: {error}. Where "
                        "MLflow and the store are well: is its model there, and made for these columns? If not, take "
                        "the alias from it in MLflow's pages, and clear `choose` with what is behind it: without a "
                        "champion there is no comparison"
                    ) from error
            score = metrics["roc_auc"]
            print(f"champion, version {champion.version}: roc_auc {score:.4f}, {mlflow_link(run)}")
            limit = max(limit, score - TOLERANCE)
        try:
            mlflow.validate_evaluation_results(
                validation_thresholds={"roc_auc": MetricThreshold(threshold=limit, greater_is_better=True)},
                candidate_result=EvaluationResult(metrics=best["metrics"], artifacts={}),
            )
        except ModelValidationFailedException as error:
            raise AirflowFailException(f"{best['name']} is not good enough: {error}") from error
        known = {"champion": champion.version if champion else None, "not_compared": not_compared}
        return {**best, "limit": limit, **known}

    @task
    def register(best: dict[str, Any]) -> dict[str, Any]:
        """Registers the best model as challenger. Run again, it finds the version that it made before."""
        import mlflow

        client, run_id = mlflow.MlflowClient(), get_current_context()["run_id"]

        def made() -> list[Any]:
            """The versions that this run has made of it, the first one first. One that a person made is theirs."""
            found = client.search_model_versions(f"name = '{MODEL_NAME}' and run_id = '{best['run_id']}'")
            return sorted((one for one in found if one.tags.get(MADE_BY) == run_id), key=lambda one: int(one.version))

        if not made():
            tags = {MADE_BY: run_id, "airflow.url": airflow_link()}
            mlflow.register_model(best["model_uri"], MODEL_NAME, tags=tags)
        # MLflow's client asks again where an answer does not come: that may have made it twice.
        version, *again = made()
        for one in again:
            client.delete_model_version(MODEL_NAME, one.version)
        client.set_registered_model_alias(MODEL_NAME, CHALLENGER, version.version)
        print(f"models:/{MODEL_NAME}@{CHALLENGER} is now version {version.version}: {best['name']}")
        return {"model": MODEL_NAME, "version": version.version, **best}

    approve = Approval(
        task_id="approve",
        subject="Deploy a new model?",
        body=(
            "{% set made = ti.xcom_pull(task_ids='register') %}"
            "**{{ made.name }}**, version {{ made.version }} of `{{ made.model }}`: "
            "roc_auc {{ '%.4f' | format(made.metrics.roc_auc) }} "
            "(at least {{ '%.4f' | format(made.limit) }}), trained on {{ made.source }}. "
            "{% if made.not_compared %}Not compared with the champion, version {{ made.not_compared }}, which was "
            "trained on rows of another split. {% endif %}"
            "[The run in MLflow]({{ made.url }})"
        ),
        # Not asked a second time; how long is Approval's to say.
        retries=0,
        execution_timeout=None,
    )

    @task
    def promote(challenger: dict[str, Any]) -> dict[str, Any]:
        """Makes the challenger the champion, and remembers whose place it took: of one that it was compared with."""
        import mlflow
        from airflow.sdk.exceptions import AirflowFailException

        client, version = mlflow.MlflowClient(), str(challenger["version"])
        before = champion_version()
        if before and before.version not in (version, challenger.get("champion")):
            raise AirflowFailException(
                f"version {before.version} has become {CHAMPION} since version {version} was compared: clear `choose` "
                "with what is behind it"
            )
        if before is None or before.version != version:
            # Not where it is champion already: a task that is tried again must not take the new one for the old.
            client.set_model_version_tag(MODEL_NAME, version, PREVIOUS, before.version if before else "none")
        client.set_registered_model_alias(MODEL_NAME, CHAMPION, version)
        if str(client.get_registered_model(MODEL_NAME).aliases.get(CHALLENGER)) == version:
            client.delete_registered_model_alias(MODEL_NAME, CHALLENGER)
        print(f"models:/{MODEL_NAME}@{CHAMPION} is now version {version}")
        return {**challenger, "alias": CHAMPION}

    # Where nothing is served it loads the model itself.
    @task(resources={"ram": RAM_MB})
    def smoke_test(deployed: dict[str, Any], keys: dict[str, str]) -> str:
        """Asks the champion, as it is served, about rows that it was evaluated on: it must answer as it did there. The
        version that does."""
        from airflow.sdk.exceptions import AirflowFailException

        rows = read_csv(keys["test"]).head(SMOKE_ROWS).drop(columns=TARGET)
        answers = ask_champion(rows, str(deployed["version"]))
        same = sum(int(answer) == known for answer, known in zip(answers, deployed["answers"], strict=True))
        print(f"{same} of {len(rows)} answers are those of the evaluation")
        if same < len(rows) or get_current_context()["params"]["fail_smoke_test"]:
            raise AirflowFailException("the champion does not answer as it did in its evaluation")
        return str(deployed["version"])

    @task(outlets=[DEPLOYED])
    def announce(deployed: dict[str, Any]) -> None:
        """The end of a run that did what it was for: updates the asset, on which DAGs of your own can be scheduled."""
        print(f"{deployed['model']} version {deployed['version']} is deployed: {deployed['url']}")
        event = {"version": deployed["version"], "mlflow": deployed["url"]}
        get_current_context()["outlet_events"][DEPLOYED].extra.update(event)

    # Not given up soon: meanwhile a model is champion that nobody has tested.
    @task(trigger_rule=TriggerRule.ONE_FAILED, retries=60, retry_delay=timedelta(minutes=1))
    def restore(challenger: dict[str, Any] | None, tested: str | None) -> None:
        """Gives the alias back to the model that had it, if what this run made is champion and has not passed its smoke
        test, and fails: the run did not do what it was for."""
        import mlflow
        from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException
        from mlflow.exceptions import MlflowException

        now = champion_version() if challenger else None
        if now is None or now.version != str(challenger["version"]):
            raise AirflowSkipException("what this run made is not champion")
        # A run that was cleared, and fails further up, has what it returned before; a task that begins anew has not.
        if tested == now.version:
            raise AirflowSkipException(f"version {tested} has passed its smoke test")
        client, version = mlflow.MlflowClient(), now.version
        before = now.tags.get(PREVIOUS, "none")
        try:
            if before != "none":
                client.set_registered_model_alias(MODEL_NAME, CHAMPION, before)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            print(f"version {before} has been deleted since")
            before = "none"
        if before == "none":
            client.delete_registered_model_alias(MODEL_NAME, CHAMPION)
        again = "nobody" if before == "none" else f"version {before}"
        raise AirflowFailException(f"version {version} failed its smoke test; {CHAMPION} is {again} again")

    raw = ingest()
    keys = features(validate(raw["key"]))
    trained = train.partial(keys=keys, source=raw["source"]).expand(candidate=CANDIDATES)
    challenger = register(choose(evaluate.partial(keys=keys).expand(trained=trained), keys))
    deployed = promote(challenger)
    tested = smoke_test(deployed, keys)
    challenger >> approve >> deployed
    tested >> announce(deployed)
    deployed >> restore(challenger, tested)


def ask_champion(rows: pd.DataFrame, version: str) -> list[Any]:
    """The champion's answers: over HTTP where `serving` serves it, else from the model that the alias names.

    Raises AirflowFailException where the alias names another version, TimeoutError where that version does not
    answer within a minute: the task may be tried again, serving may be.
    """
    import time

    import mlflow
    from airflow.sdk.exceptions import AirflowFailException

    url = os.environ.get("SERVING_URL")
    if not url or (os.environ["SERVING_MODEL"], os.environ["SERVING_ALIAS"]) != (MODEL_NAME, CHAMPION):
        found = champion_version()
        if found is None or found.version != version:
            raise AirflowFailException(f"the alias {CHAMPION} does not name version {version}")
        print("nothing is served (SERVING): asking the model itself")
        with quiet():
            return list(mlflow.pyfunc.load_model(f"models:/{MODEL_NAME}/{version}").predict(rows))
    import requests

    deadline = time.monotonic() + 60
    while True:
        try:
            answer = requests.post(
                f"{url}/invocations",
                json={"dataframe_split": rows.to_dict(orient="split")},
                headers={"Authorization": f"Bearer {os.environ['SERVING_TOKEN']}"},
                timeout=10,
            )
        except requests.RequestException as error:
            # It may be starting.
            told = str(error)
            print(f"asking {url} again: {told}")
        else:
            if answer.ok and answer.json()["version"] == version:
                print(f"asked {url}, where version {version} is served")
                return list(answer.json()["predictions"])
            told = f"{answer.status_code} {answer.text}"
        if time.monotonic() > deadline:
            raise TimeoutError(f"after 60 s version {version} does not answer: {told}")
        time.sleep(1)


train_model()
