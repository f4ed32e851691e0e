"""Watches whether what the served model is asked still looks like what it was trained on.

    collect -> compare -> past_threshold -> retrain

`collect` gathers the predictions that were logged since the last look, of the version that is champion now; with too
few of them the run ends there, skipped. `compare` holds each numeric column against `reference.csv`, the features
that the champion was trained on and which its run in MLflow has as an artifact: the population stability index (PSI),
Kolmogorov-Smirnov for the values that are there, Fisher's exact test for the share of those that are missing. All are
logged to the experiment `drift`. Only where enough columns have drifted is `retrain` reached: it updates the asset
`DRIFT`, on which the training pipeline is scheduled, once for a champion.

Copy it for your own model: give the function `drift_watch` and `MODEL_NAME` other names. Heavy libraries are
imported inside the tasks, so that reading this file stays quick.
"""

from __future__ import annotations

import contextlib
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk import Asset, Param, dag, get_current_context, task

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities import Run

MODEL_NAME = "tumour-classifier"
ALIAS = "champion"
EXPERIMENT = "drift"
REFERENCE = "reference.csv"
PREDICTIONS = "predictions"
BUCKET = "pipelines"
# In MLflow: on a look's run, up to which moment it has seen; on a version, which run has asked for its successor.
SEEN = "window.until"
ASKED = "drift.retraining"

# As the training pipeline has it.
DRIFT = Asset(uri=f"mlstack://drift/{MODEL_NAME}")

# A column has drifted where PSI and one of the tests say so. PSI beyond 0.2 is what the trade calls a significant
# change; the tests keep a small sample's noise from being one.
PSI_LIMIT = 0.2
P_LIMIT = 0.01
BINS = 10

# Of a task that holds as many rows as `max_rows` allows: as Python's objects and as CSV, or two samples and a picture.
RAM_MB = 384


def object_store() -> Any:
    """An S3 client from the Airflow connection `stack_data`; it may read the predictions, and not change them."""
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


def champion(client: MlflowClient) -> Any:
    """The version that has the alias; None where nobody has, or where there is no such model."""
    models = client.search_registered_models(f"name = '{MODEL_NAME}'")
    number = models[0].aliases.get(ALIAS) if models else None
    return client.get_model_version(MODEL_NAME, str(number)) if number else None


def last_look(client: MlflowClient, version: str) -> str:
    """Up to which moment the predictions of a version have been looked at; empty where they have not."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return ""
    done = (
        f"tags.`model.version` = '{version}' and tags.`model.name` = '{MODEL_NAME}' and attributes.status = 'FINISHED'"
    )
    # Not the one that was begun last: an old look that is taken again saw what it had seen.
    runs: list[Run] = client.search_runs(
        [experiment.experiment_id], done, order_by=["start_time DESC"], max_results=100
    )
    return max((run.data.tags.get(SEEN, "") for run in runs), default="")


def have_seen(verdict: dict[str, Any]) -> None:
    """Remembers on a look's run what it has seen, once it is known what comes of it: what a look that failed on the way
    had before it is in the next one's window, too."""
    from mlflow import MlflowClient

    MlflowClient().set_tag(verdict["run_id"], SEEN, verdict["until"])


def objects(store: Any, since: datetime, until: datetime) -> Iterator[str]:
    """The keys of the predictions' objects that were written in a window, the newest first."""
    # A row's moment may be a little later than the name of its object: each row of a large request has one of its own.
    since -= timedelta(seconds=1)
    for back in range((until.date() - since.date()).days + 1):
        prefix = f"{MODEL_NAME}/{until.date() - timedelta(days=back):%Y/%m/%d}/"
        pages = store.get_paginator("list_objects_v2").paginate(Bucket=PREDICTIONS, Prefix=prefix)
        keys = sorted((one["Key"] for page in pages for one in page.get("Contents", [])), reverse=True)
        # An object's rows are else older than its name: one from before the window has none of it.
        yield from (key for key in keys if key >= f"{MODEL_NAME}/{since:%Y/%m/%d/%H%M%S}")


def present(values: Any) -> Any:
    """A column's values without those that are missing, or no number."""
    import numpy as np

    numbers = values.to_numpy(dtype=float)
    return numbers[np.isfinite(numbers)]


def psi(reference: Any, live: Any, missing: tuple[int, int]) -> float:
    """How differently two samples fall into the reference's tenths, and among what is missing (rows in addition to
    the samples'): 0 where they do alike."""
    import numpy as np

    edges = np.empty(0)
    if len(reference):
        # Fewer where a value is frequent; and one for what is smaller than all that there was.
        below = np.nextafter(reference.min(), -np.inf)
        edges = np.unique([below, *np.quantile(reference, np.linspace(0, 1, BINS + 1))[1:-1]])

    def counts(values: Any, absent: int) -> Any:
        found = np.bincount(np.searchsorted(edges, values, side="left"), minlength=len(edges) + 1)
        return np.append(found, absent)

    old, new = counts(reference, missing[0]), counts(live, missing[1])
    filled = old + new > 0
    # Half a row for a tenth that one of them has nothing in: the logarithm of nothing would be infinite.
    expected, found = (np.maximum(each[filled], 0.5) / each.sum() for each in (old, new))
    return float(np.sum((found - expected) * np.log(found / expected)))


def examine(reference: pd.DataFrame, live: pd.DataFrame) -> list[dict[str, Any]]:
    """Each numeric column of the reference that was asked with: its figures, and whether it has drifted.

    All are numbers, but a mean of nothing, which is None. Where all values are missing there is nothing to compare
    them by: `ks` is 0 then, and `p` 1.
    """
    from scipy.stats import fisher_exact, ks_2samp

    found = []
    for column in reference.select_dtypes("number").columns:
        if column not in live or not (len(reference) and len(live)):
            continue
        old, new = present(reference[column]), present(live[column])
        missing = len(reference) - len(old), len(live) - len(new)
        ks, p = 0.0, 1.0
        if len(old) and len(new):
            # The exact test takes seconds for thousands of rows and says the same.
            test = ks_2samp(old, new, method="asymp")
            ks, p = float(test.statistic), float(test.pvalue)
        missing_p = float(fisher_exact([[missing[0], len(old)], [missing[1], len(new)]]).pvalue)
        index = psi(old, new, missing)
        found.append(
            {
                "column": str(column),
                "psi": index,
                "ks": ks,
                "p": p,
                "missing_p": missing_p,
                "drifted": bool(index > PSI_LIMIT and min(p, missing_p) < P_LIMIT),
                "reference_mean": float(old.mean()) if len(old) else None,
                "live_mean": float(new.mean()) if len(new) else None,
                "reference_missing": missing[0] / len(reference),
                "live_missing": missing[1] / len(live),
            }
        )
    return found


def picture(columns: list[dict[str, Any]], reference: pd.DataFrame, live: pd.DataFrame) -> Any:
    """Each column's distribution, then and now, and how much of it is missing now."""
    import numpy as np
    from matplotlib.figure import Figure

    across = 3
    rows = -(-len(columns) // across)
    figure = Figure(figsize=(4 * across, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, across, squeeze=False)
    for place, one in zip(axes.flat, columns, strict=False):
        samples = {"trained on": present(reference[one["column"]]), "asked now": present(live[one["column"]])}
        bins = np.histogram_bin_edges(np.concatenate([*samples.values()]), 30)
        for label, values in samples.items():
            # The density of nothing is not a number.
            place.hist(values, bins=bins, density=len(values) > 0, alpha=0.6, label=label)
        said = f"{one['column']}: PSI {one['psi']:.2f}"
        said += f", {one['live_missing']:.0%} missing" if one["live_missing"] else ""
        place.set_title(said + (" (drifted)" if one["drifted"] else ""), fontsize=9)
    for place in axes.flat[len(columns) :]:
        place.axis("off")
    axes.flat[0].legend(fontsize=8)
    return figure


@dag(
    schedule="*/15 * * * *",
    catchup=False,
    max_active_runs=1,
    is_paused_upon_creation=True,
    dagrun_timeout=timedelta(minutes=14),
    default_args={
        "retries": 2,
        "retry_delay": timedelta(seconds=10),
        "execution_timeout": timedelta(minutes=5),
    },
    params={
        "hours": Param(24, type="integer", minimum=1, maximum=720, description="Look back so far at the most."),
        "min_rows": Param(200, type="integer", minimum=200, description="With fewer new predictions nothing is said."),
        "max_rows": Param(
            20_000, type="integer", minimum=100, maximum=50_000, description="Of more, the newest are looked at."
        ),
        "threshold": Param(
            0.1, type="number", exclusiveMinimum=0, maximum=1, description="Retrain when this share has drifted."
        ),
    },
    tags=["example", "monitoring"],
    doc_md=__doc__,
)
def drift_watch() -> None:
    @task(resources={"ram": RAM_MB})
    def collect() -> dict[str, Any]:
        """Writes the champion's new predictions to S3 and returns where they are; too few end the run, skipped."""
        import csv
        import io
        import json
        from datetime import datetime, timezone

        from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException
        from mlflow import MlflowClient

        context = get_current_context()
        params = context["params"]
        client = MlflowClient()

        def skip(reason: str) -> AirflowSkipException:
            print(f"nothing to look at: {reason}")
            return AirflowSkipException(reason)

        version = champion(client)
        if version is None:
            raise skip(f"no version of {MODEL_NAME} has the alias {ALIAS}")
        files = {one.path for one in client.list_artifacts(version.run_id)} if version.run_id else set()
        if REFERENCE not in files:
            raise AirflowFailException(
                f"version {version.version} of {MODEL_NAME} cannot be watched: its run has no artifact {REFERENCE}, "
                "the features that it was trained on; dags/train_model.py logs it"
            )

        number, until = str(version.version), datetime.now(timezone.utc)
        # As the predictions' log writes a moment: so written, the later one is the larger one.
        earliest = (until - timedelta(hours=params["hours"])).isoformat(timespec="microseconds")
        since = max(earliest, last_look(client, number))
        store, rows = object_store(), []
        for key in objects(store, datetime.fromisoformat(since), until):
            body = store.get_object(Bucket=PREDICTIONS, Key=key)["Body"].read()
            lines = (json.loads(line) for line in body.splitlines())
            rows += [line for line in lines if line["version"] == number and line["at"] > since]
            if len(rows) >= params["max_rows"]:
                break
        if len(rows) < params["min_rows"]:
            raise skip(
                f"{len(rows)} predictions by version {number} since {since}, at least {params['min_rows']} wanted"
            )

        rows = sorted(rows, key=lambda row: row["at"])[-params["max_rows"] :]
        names = list(dict.fromkeys(name for row in rows for name in row["inputs"]))
        text = io.StringIO()
        table = csv.DictWriter(text, names, lineterminator="\n")
        table.writeheader()
        table.writerows(row["inputs"] for row in rows)
        key = f"{context['dag'].dag_id}/{context['run_id']}/live.csv"
        store.put_object(Bucket=BUCKET, Key=key, Body=text.getvalue().encode())
        print(f"{len(rows)} predictions by version {number} since {since} written to s3://{BUCKET}/{key}")
        return {
            "key": key,
            "version": number,
            "run_id": version.run_id,
            "rows": len(rows),
            "since": since,
            # Not the present: what was answered a moment ago is still on its way to the store.
            "until": rows[-1]["at"],
        }

    @task(resources={"ram": RAM_MB})
    def compare(window: dict[str, Any]) -> dict[str, Any]:
        """Holds the window against the reference, logs what it finds to MLflow, and returns it in short."""
        import os
        import re
        import tempfile

        import mlflow
        import pandas as pd
        from airflow.sdk.exceptions import AirflowFailException

        context = get_current_context()
        live = pd.read_csv(object_store().get_object(Bucket=BUCKET, Key=window["key"])["Body"])
        with tempfile.TemporaryDirectory() as folder:
            reference = pd.read_csv(
                mlflow.artifacts.download_artifacts(run_id=window["run_id"], artifact_path=REFERENCE, dst_path=folder)
            )
        columns = examine(reference, live)
        if not columns:
            raise AirflowFailException(
                f"version {window['version']} of {MODEL_NAME} cannot be watched: none of the numeric columns of its "
                f"{REFERENCE} is among those that it is asked with"
            )
        drifted = [one["column"] for one in columns if one["drifted"]]
        share = len(drifted) / len(columns)
        report = {
            "model": MODEL_NAME,
            "threshold": context["params"]["threshold"],
            "share": share,
            "window": window,
            "columns": columns,
        }

        dag_id = context["dag"].dag_id
        tags = {
            "airflow.dag_id": dag_id,
            "airflow.run_id": context["run_id"],
            "model.name": MODEL_NAME,
            "model.version": window["version"],
        }
        experiment = mlflow.set_experiment(EXPERIMENT)
        # A former try that lost MLflow could not end its run, which would be running for ever.
        begun = f"attributes.status = 'RUNNING' and tags.`airflow.run_id` = '{context['run_id']}'"
        begun += f" and tags.`airflow.dag_id` = '{dag_id}'"
        for former in mlflow.MlflowClient().search_runs([experiment.experiment_id], begun):
            mlflow.MlflowClient().set_terminated(former.info.run_id, "KILLED")
        page = f"{os.environ['AIRFLOW_UI_URL']}/dags/{dag_id}/runs/{context['run_id']}"
        with mlflow.start_run(
            run_name=f"version {window['version']}", description=f"[Airflow run]({page})", tags=tags
        ) as run:
            mlflow.log_params({"threshold": report["threshold"], "rows": window["rows"], "since": window["since"]})
            metrics = {"drifted_share": share, "drifted_columns": float(len(drifted)), "rows": float(window["rows"])}
            for one in columns:
                # MLflow takes fewer characters in a metric's name than a column may have.
                name = re.sub(r"[^\w.\- ]", "_", one["column"])
                metrics |= {f"psi/{name}": one["psi"], f"ks/{name}": one["ks"], f"ks_p/{name}": one["p"]}
                metrics |= {f"missing/{name}": one["live_missing"], f"missing_p/{name}": one["missing_p"]}
            mlflow.log_metrics(metrics)
            mlflow.log_dict(report, "drift.json")
            mlflow.log_figure(picture(columns, reference, live), "drift.png")
        print(
            f"{len(drifted)} of {len(columns)} columns have drifted ({share:.0%}): {', '.join(drifted) or 'none'}\n"
            f"{os.environ['MLFLOW_UI_URL']}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
        )
        return {
            "version": window["version"],
            "rows": window["rows"],
            "share": share,
            "drifted": drifted,
            "experiment_id": run.info.experiment_id,
            "run_id": run.info.run_id,
            "until": window["until"],
        }

    @task.short_circuit
    def past_threshold(verdict: dict[str, Any]) -> bool:
        """Whether to ask for a retraining: enough has drifted, and none was asked for on account of this champion."""
        from mlflow import MlflowClient

        context = get_current_context()
        threshold = context["params"]["threshold"]
        if verdict["share"] < threshold:
            print(f"{verdict['share']:.0%} drifted, less than {threshold:.0%}: all is well")
            have_seen(verdict)
            return False
        asked = MlflowClient().get_model_version(MODEL_NAME, verdict["version"]).tags.get(ASKED)
        if asked and asked != context["run_id"]:
            print(
                f"version {verdict['version']} has drifted; the run {asked} has asked for a retraining already. "
                f"If nothing came of it (train_model was paused?), remove the version's tag {ASKED} in MLflow"
            )
            have_seen(verdict)
            return False
        return True

    @task(outlets=[DRIFT])
    def retrain(verdict: dict[str, Any]) -> None:
        """Updates the asset, which triggers the training pipeline; remembers on the version that it was done."""
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        context = get_current_context()
        # Before the asset, which is updated when this task has ended well. A second attempt finds its own run's name
        # here and goes on; a later run finds another's and does not get here.
        MlflowClient().set_model_version_tag(MODEL_NAME, verdict["version"], ASKED, context["run_id"])
        # It is asked for: that this look be forgotten must not keep the asset from being updated.
        with contextlib.suppress(MlflowException):
            have_seen(verdict)
        context["outlet_events"][DRIFT].extra = {
            "model": MODEL_NAME,
            "version": verdict["version"],
            "share": verdict["share"],
            "drifted": verdict["drifted"],
        }
        print(f"asked for a retraining: version {verdict['version']}, {', '.join(verdict['drifted'])} drifted")

    verdict = compare(collect())
    past_threshold(verdict) >> retrain(verdict)


drift_watch()
