"""MLflow's tracking store, with metrics written to Postgres by two statements for a whole batch.

MLflow 3.17 makes an object of each metric and of each key's latest value, reads the latter back under a
lock, and sends an UPDATE for each: 100 round trips for a batch of 100. What is stored is the same
(tests/e2e/test_metrics.py compares the two).

mlstack_plugin.py has MLflow use it.
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy
from mlflow.entities import DatasetInput, Metric
from mlflow.store.tracking.dbmodels.models import SqlRun
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.utils.validation import _validate_metric
from sqlalchemy.orm import Session

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


class PostgresStore(SqlAlchemyStore):  # type: ignore[misc]
    """MLflow's own store but for how metrics are written, and for a question about new runs."""

    def experiment_of(self, run_id: str) -> str:
        """The experiment that a run belongs to, for good. Raises MlflowException where there is no such run."""
        with self.ManagedSessionMaker() as session:
            return str(self._get_run(session, run_id).experiment_id)

    def _get_run_inputs(self, session: Session, run_uuids: Sequence[str]) -> list[list[DatasetInput]]:
        """The data sets of each run. A run that is being created has none: MLflow would ask nevertheless, a fifth
        of a creation's CPU."""
        new = {one.run_uuid for one in session.new if isinstance(one, SqlRun)}
        if new.issuperset(run_uuids):
            return [[] for _ in run_uuids]
        found: list[list[DatasetInput]] = super()._get_run_inputs(session, run_uuids)
        return found

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
