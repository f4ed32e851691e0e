"""MLflow's tracking store, with runs and metrics written to Postgres by few statements.

*Metrics.* MLflow 3.17 makes an object of each metric and of each key's latest value, reads the latter back
under a lock, and sends an UPDATE for each: 100 round trips for a batch of 100. Here it is two statements.

*Runs.* It reads the experiment with its tags in a transaction of its own, makes objects of the run and its tags, and
asks for the data sets of a run that is only being made. Here it is three statements in one transaction.

What is stored is the same (tests/e2e/test_metrics.py and test_runs.py compare the two). mlstack_plugin.py has MLflow
use it.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import sqlalchemy
from mlflow.entities import (
    LifecycleStage,
    Metric,
    Run,
    RunData,
    RunInfo,
    RunInputs,
    RunStatus,
    RunTag,
    SourceType,
    ViewType,
)
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.store.tracking.dbmodels.models import SqlRun, SqlTag
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME
from mlflow.utils.name_utils import _generate_random_name
from mlflow.utils.uri import append_to_uri_path
from mlflow.utils.validation import _validate_metric

ROWS = (
    "unnest(CAST(:keys AS text[]), CAST(:values AS float8[]), CAST(:timestamps AS bigint[]),"
    " CAST(:steps AS bigint[]), CAST(:nans AS boolean[]))"
    " WITH ORDINALITY AS one (key, value, timestamp, step, is_nan, place)"
)

HISTORY = sqlalchemy.text(
    "INSERT INTO metrics (run_uuid, key, value, timestamp, step, is_nan)"
    f" SELECT :run, key, value, timestamp, step, is_nan FROM {ROWS}"
    # What is there already was logged before, by a client that tries again.
    " ON CONFLICT DO NOTHING"
)

# The latest is the one of the highest step, of those the youngest, of those the largest, of those the first.
# In the order of the keys: two batches that lock the same rows then wait for each other, and do not lock up.
LATEST = sqlalchemy.text(
    "INSERT INTO latest_metrics AS known (run_uuid, key, value, timestamp, step, is_nan)"
    f" SELECT DISTINCT ON (key) :run, key, value, timestamp, step, is_nan FROM {ROWS}"
    " ORDER BY key, step DESC, timestamp DESC, value DESC, place"
    " ON CONFLICT (key, run_uuid) DO UPDATE"
    " SET value = EXCLUDED.value, timestamp = EXCLUDED.timestamp, step = EXCLUDED.step, is_nan = EXCLUDED.is_nan"
    " WHERE (EXCLUDED.step, EXCLUDED.timestamp, EXCLUDED.value) > (known.step, known.timestamp, known.value)"
)


RUN, TAGS = sqlalchemy.insert(SqlRun.__table__), sqlalchemy.insert(SqlTag.__table__)
EXPERIMENT_OF = sqlalchemy.select(SqlRun.experiment_id).where(SqlRun.run_uuid == sqlalchemy.bindparam("run"))


def read(store: Any, question: sqlalchemy.Select[Any], **values: object) -> list[sqlalchemy.Row[Any]]:
    """The rows that answer one question to a store of MLflow's, without a transaction: that is two round trips more.
    Raises MlflowException where the database cannot be asked."""
    with store.ManagedSessionMaker() as session:
        connection = session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        return list(connection.execute(question, values))


class PostgresStore(SqlAlchemyStore):  # type: ignore[misc]
    """MLflow's own store but for how runs are created and metrics are written."""

    def experiment_of(self, run_id: str) -> str | None:
        """The experiment that a run belongs to, for good; None where there is no such run."""
        found = read(self, EXPERIMENT_OF, run=run_id)
        return str(found[0].experiment_id) if found else None

    def create_run(
        self, experiment_id: str, user_id: str, start_time: int, tags: Sequence[RunTag] | None, run_name: str | None
    ) -> Run:
        """Writes a new run (`start_time` in ms since 1970) with its tags. Raises MlflowException for an experiment that
        is not there or not active, and for two names that are not the same."""
        with self.ManagedSessionMaker(read_only=False) as session:
            experiment = self._get_experiment(session, experiment_id, ViewType.ALL)
            self._check_experiment_is_active(experiment)
            tagged = next((tag.value for tag in tags or () if tag.key == MLFLOW_RUN_NAME), None)
            if run_name and tagged and run_name != tagged:
                raise MlflowException(
                    f"The run's name is {run_name!r}, and its tag {MLFLOW_RUN_NAME} is {tagged!r}",
                    INVALID_PARAMETER_VALUE,
                )
            name = run_name or tagged or _generate_random_name()
            all_tags = [*(tags or ()), *([] if tagged else [RunTag(MLFLOW_RUN_NAME, name)])]
            run_id = uuid.uuid4().hex
            info = RunInfo(
                run_id=run_id,
                run_name=name,
                experiment_id=str(experiment_id),
                user_id=user_id,
                status=RunStatus.to_string(RunStatus.RUNNING),
                start_time=start_time,
                end_time=None,
                lifecycle_stage=LifecycleStage.ACTIVE,
                artifact_uri=append_to_uri_path(experiment.artifact_location, run_id, self.ARTIFACTS_FOLDER_NAME),
            )
            row = {
                "run_uuid": run_id,
                "name": name,
                "source_type": SourceType.to_string(SourceType.UNKNOWN),
                "source_name": "",
                "entry_point_name": "",
                "user_id": user_id,
                "status": info.status,
                "start_time": start_time,
                "source_version": "",
                "lifecycle_stage": info.lifecycle_stage,
                "artifact_uri": info.artifact_uri,
                "experiment_id": experiment_id,
            }
            session.execute(RUN, row)
            session.execute(TAGS, [{"key": tag.key, "value": tag.value, "run_uuid": run_id} for tag in all_tags])
        return Run(info, RunData(tags=all_tags), RunInputs(dataset_inputs=[]))

    def _log_metrics_once(self, run_id: str, metrics: Sequence[Metric]) -> None:
        """Writes a batch of metrics of a run, in one transaction; one that is there already is no error.

        MLflow calls it for one metric and for many, and again where Postgres ended a deadlock. Raises
        MlflowException for a metric that is not valid, and for a run that is not active.
        """
        if not metrics:
            return
        for index, metric in enumerate(metrics):
            path = "" if len(metrics) == 1 else f"metrics[{index}]"
            _validate_metric(metric.key, metric.value, metric.timestamp, metric.step, path=path)
        stored = [self.sanitize_metric_value(metric.value) for metric in metrics]
        rows = {
            "run": run_id,
            "keys": [metric.key for metric in metrics],
            "values": [value for _, value in stored],
            "timestamps": [metric.timestamp for metric in metrics],
            "steps": [metric.step for metric in metrics],
            "nans": [is_nan for is_nan, _ in stored],
        }
        with self.ManagedSessionMaker(read_only=False) as session:
            self._check_run_is_active(self._get_run(run_uuid=run_id, session=session))
            session.execute(HISTORY, rows)
            session.execute(LATEST, rows)
