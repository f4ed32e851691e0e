"""A small client of Airflow's REST API, for the programs and the tests."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import httpx

from stack.answers import Client, good
from stack.console import say
from stack.errors import Exit, StackError

FINISHED = ("success", "failed")
"""The states in which a run has ended."""


class Airflow:
    """Airflow's REST API with a person's login. A context manager."""

    def __init__(self, url: str, user: str, password: str) -> None:
        self.url = url
        self._http = Client("Airflow", url)
        token = self._http.post("/auth/token", json={"username": user, "password": password})
        if token.status_code in (400, 401, 403):
            raise StackError(
                "E-LOGIN",
                f"Airflow at {url} refused the login of {user}",
                why=f"{token.status_code}: {token.text[:200]}",
                fix="the password may have been changed in Airflow; `make password` prints the first one",
            )
        self._http.headers["Authorization"] = f"Bearer {_good(token).json()['access_token']}"

    def __enter__(self) -> Airflow:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._http.close()

    def call(self, method: str, path: str, **words: Any) -> Any:
        """One call under /api/v2; returns the JSON answer. Raises StackError (E-AIRFLOW-API)."""
        return self.request(method, f"/api/v2{path}", **words)

    def request(self, method: str, path: str, **words: Any) -> Any:
        """As `call`, with the whole path: some of Airflow's API is its authentication manager's."""
        answer = _good(self._http.request(method, path, **words))
        return answer.json() if answer.content else None

    def has(self, path: str) -> bool:
        """Whether there is something at a path. Raises StackError (E-AIRFLOW-API)."""
        answer = self._http.get(path)
        return answer.status_code != 404 and _good(answer).is_success

    def wait_for_dag(self, dag_id: str, patience: float = 60) -> dict[str, Any]:
        """The DAG, once the DAG processor has read it. Raises StackError after `patience` seconds."""
        deadline = time.monotonic() + patience
        while True:
            answer = self._http.get(f"/api/v2/dags/{dag_id}")
            found: dict[str, Any] = answer.json() if answer.status_code == 200 else {"is_stale": True}
            # Stale: its file was gone, and is not read again yet.
            if not found["is_stale"]:
                return found
            if time.monotonic() > deadline:
                raise StackError(
                    "E-DAG",
                    f"Airflow does not know the DAG {dag_id}",
                    why=f"{answer.status_code} after {patience:.0f} s; import errors: "
                    f"{[error['filename'] for error in self.call('GET', '/importErrors')['import_errors']]}",
                    fix="see the import errors in Airflow's UI, and `make logs S=airflow-dag-processor`",
                    exit_code=Exit.TIMED_OUT,
                )
            time.sleep(0.5)

    def set_paused(self, dag_id: str, paused: bool) -> None:
        """Pauses or unpauses a DAG."""
        self.call("PATCH", f"/dags/{dag_id}", json={"is_paused": paused})

    def under_way(self, dag_id: str) -> list[dict[str, Any]]:
        """The runs of a DAG that have not ended."""
        return [run for run in self.runs(dag_id) if run["state"] not in FINISHED]

    def pause_again(self, dag_id: str) -> None:
        """Pauses a DAG, but not while a run of it goes on, for that would stand still: then it says so. Where Airflow
        does not answer, too: it is called at the end of what may have failed for that reason."""
        try:
            if self.under_way(dag_id):
                say(f"{dag_id} was paused, and is not any more: a run of it goes on")
            else:
                self.set_paused(dag_id, True)
        except StackError as error:
            say(f"{dag_id} was paused, and may not be any more: {error.what}")

    def delete_dag(self, dag_id: str) -> None:
        """Forgets a DAG and its runs."""
        self.call("DELETE", f"/dags/{dag_id}")

    def trigger(self, dag_id: str, conf: dict[str, Any] | None = None) -> str:
        """Starts a run and returns its id."""
        run = self.call("POST", f"/dags/{dag_id}/dagRuns", json={"logical_date": None, "conf": conf or {}})
        return str(run["dag_run_id"])

    def runs(self, dag_id: str) -> list[dict[str, Any]]:
        """A DAG's latest runs, a hundred at the most, the latest first."""
        params = {"limit": 100, "order_by": "-run_after"}
        found: list[dict[str, Any]] = self.call("GET", f"/dags/{dag_id}/dagRuns", params=params)["dag_runs"]
        return found

    def run_state(self, dag_id: str, run_id: str) -> str:
        """A run's state."""
        return str(self.call("GET", f"/dags/{dag_id}/dagRuns/{run_id}")["state"])

    def task_instances(self, dag_id: str, run_id: str) -> list[dict[str, Any]]:
        """A run's task instances, mapped ones included."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances"
        found: list[dict[str, Any]] = []
        while True:
            # A page has at most `[api] maximum_page_limit` entries, 100 by default.
            page = self.call("GET", path, params={"limit": 100, "offset": len(found)})
            found += page["task_instances"]
            if len(found) >= page["total_entries"] or not page["task_instances"]:
                return found

    def xcom(self, dag_id: str, run_id: str, task_id: str) -> Any:
        """What a task returned."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/xcomEntries/return_value"
        return self.call("GET", path, params={"deserialize": True})["value"]

    def task_log(self, dag_id: str, run_id: str, task_id: str, *, map_index: int = -1, attempt: int = 1) -> str:
        """A task's log, asked for as the UI does: line by line, which costs the API server less than one document."""
        path = f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/logs/{attempt}"
        answer = self._http.get(path, params={"map_index": map_index}, headers={"Accept": "application/x-ndjson"})
        return "\n".join(_log_line(json.loads(line)) for line in _good(answer).text.split("\n") if line)

    def follow(
        self,
        dag_id: str,
        run_id: str,
        *,
        patience: float,
        on_progress: Callable[[list[dict[str, Any]]], None] | None = None,
    ) -> str:
        """Waits for a run's end and returns its state; `on_progress` gets its task instances each second.
        Raises StackError after `patience` seconds."""
        deadline = time.monotonic() + patience
        while True:
            state = self.run_state(dag_id, run_id)
            if on_progress:
                on_progress(self.task_instances(dag_id, run_id))
            if state in FINISHED:
                return state
            if time.monotonic() > deadline:
                instances = self.task_instances(dag_id, run_id)
                now = {f"{one['task_id']}[{one['map_index']}]": one["state"] for one in instances}
                raise StackError(
                    "E-RUN-TIMEOUT",
                    f"the run {run_id} of {dag_id} did not end within {patience:.0f} s",
                    why=f"its task instances: {now}",
                    fix=f"see {self.url}/dags/{dag_id}/runs/{run_id}",
                    changed="the run goes on",
                    exit_code=Exit.TIMED_OUT,
                )
            time.sleep(1)


def _good(answer: httpx.Response) -> httpx.Response:
    return good(answer, "E-AIRFLOW-API", "Airflow", "see `make logs S=airflow-apiserver`")


def _log_line(entry: dict[str, Any]) -> str:
    """A structured log entry as text; an exception's type and message stand below its event."""
    lines = [str(entry["event"])]
    for error in entry.get("error_detail") or []:
        lines.append(f"{error.get('exc_type')}: {error.get('exc_value')}")
    return "\n".join(lines)
