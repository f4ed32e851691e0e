"""Figures for Prometheus. What others know is asked of them when somebody looks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from serving.follower import Follower
from serving.prediction_log import PredictionLog

BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Metrics:
    """What /metrics shows."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, follower: Follower, log: PredictionLog) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "serving_requests", "Answers to /invocations, by HTTP status", ["status"], registry=self._registry
        )
        self._seconds = Histogram(
            "serving_request_seconds",
            "From a request's head to its answer, where it was a prediction",
            buckets=BUCKETS,
            registry=self._registry,
        )
        self._registry.register(_Known(follower, log))
        ProcessCollector(registry=self._registry)

    def answered(self, status: int, seconds: float) -> None:
        """Counts an answer."""
        self._requests.labels(str(status)).inc()
        if status == 200:
            self._seconds.observe(seconds)

    def render(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return bytes(generate_latest(self._registry))


class _Known:
    """What the follower and the log know."""

    def __init__(self, follower: Follower, log: PredictionLog) -> None:
        self._follower = follower
        self._log = log

    def collect(self) -> Iterator[Any]:
        state = self._follower.state
        info = GaugeMetricFamily(
            "serving_model_info", "The version that answers", labels=["model", "version", "run_id"]
        )
        if state.model:
            version = state.model.version
            info.add_metric([version.model, version.number, version.run_id], 1)
        yield info
        yield GaugeMetricFamily("serving_ready", "1 while there is a model", value=int(state.model is not None))
        yield GaugeMetricFamily("serving_mlflow_up", "1 while MLflow answers", value=int(not state.unreachable))
        yield CounterMetricFamily(
            "serving_load_failures", "Versions that could not be loaded, each try", value=self._follower.failures
        )
        yield GaugeMetricFamily("serving_log_queued_rows", "Predictions that wait to be stored", value=self._log.queued)
        yield CounterMetricFamily("serving_log_written_rows", "Predictions in the store", value=self._log.written)
        yield CounterMetricFamily(
            "serving_log_dropped_rows",
            "Predictions lost because the store was away, or too slow",
            value=self._log.dropped,
        )
