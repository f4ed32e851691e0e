"""Serving without its libraries: what is read of a request, who answers, what is kept, what HTTP says of it."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import httpx
import pytest
from mlflow.entities import FileInfo

from scripts import predict
from serving import app, follower, inputs
from serving.follower import Follower
from serving.inputs import Column, RefusedError
from serving.prediction_log import BATCH, OBJECT, PredictionLog
from serving.registry import Registry, Version
from stack import images, settings

COLUMNS = (Column("a", "double"), Column("b", "long"), Column("note", "string", required=False))
JSON = "application/json"
TOKEN = "a-token"


def read(document: Any, columns: tuple[Column, ...] = COLUMNS) -> dict[str, list[Any]]:
    return inputs.parse(json.dumps(document).encode(), JSON, columns)


def refused(body: bytes, kind: str = JSON, columns: tuple[Column, ...] = COLUMNS) -> RefusedError:
    with pytest.raises(RefusedError) as error:
        inputs.parse(body, kind, columns)
    return error.value


def refused_at_the_cost_of(body: bytes, kind: str = JSON) -> tuple[RefusedError, int]:
    """The refusal, and the bytes that it took at most."""
    tracemalloc.start()
    try:
        return refused(body, kind), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


ROWS = {"a": [1.0, 2.5], "b": [3, 4], "note": [None, None]}


@pytest.mark.parametrize(
    "document",
    [
        {"dataframe_split": {"columns": ["b", "a"], "data": [[3, 1], [4, 2.5]]}},
        {"dataframe_split": {"index": [0, 1], "columns": ["a", "b"], "data": [[1, 3], [2.5, 4]]}},
        {"dataframe_records": [{"a": 1, "b": 3}, {"b": 4, "a": 2.5}]},
        {"instances": [{"a": 1, "b": 3}, {"a": 2.5, "b": 4}]},
        {"instances": [[1, 3, None], [2.5, 4, None]]},
        {"inputs": {"a": [1, 2.5], "b": [3, 4]}},
        {"inputs": [[1, 3, None], [2.5, 4, None]]},
    ],
)
def test_each_format_of_the_protocol(document: Any) -> None:
    """The same rows, in the model's order and types, whatever they were sent as."""
    assert read(document) == ROWS
    assert list(read(document)) == ["a", "b", "note"]
    assert type(read(document)["a"][0]) is float


@pytest.mark.parametrize("kind", ["text/csv", "Text/CSV; charset=UTF-8", 'text/csv; header=present; charset="utf-8"'])
def test_csv(kind: str) -> None:
    assert inputs.parse(b"b,a\n3,1\n\n4,2.5\n", kind, COLUMNS) == ROWS
    assert inputs.parse("\ufeffa,b,note\r\n1,3,\r\n2.5,4,\r\n".encode(), kind, COLUMNS) == ROWS


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"1", b"\xff", b"[" * 100_000, b'{"a": 1, "b": 2}', b'{"dataframe_records": []}'),
        *(b'{"dataframe_records": {}}', b'{"dataframe_records": [1]}', b'{"dataframe_records": [{}]}'),
        b'{"dataframe_records": [{"a": 1, "b": 2}], "params": {}}',
        *(b'{"dataframe_split": {"columns": ["a", "b"]}}', b'{"dataframe_split": []}'),
        *(b'{"dataframe_split": {"columns": ["a", "a"], "data": [[1, 2]]}}',),
        *(b'{"dataframe_split": {"columns": ["a", "b"], "data": [[1]]}}', b'{"instances": [[1]]}'),
        *(b'{"inputs": {"a": [1, 2], "b": [3]}}', b'{"instances": 1}', b'{"dataframe_records": [{"a": NaN, "b": 1}]}'),
    ],
)
def test_what_is_no_request(body: bytes) -> None:
    assert (refused(body).status, refused(body).code) == (400, "MALFORMED")


@pytest.mark.parametrize("body", [b"a,b\n1\n", b"a,a\n1,2\n", b'a,b\n"1,2\n', b"a,b\n", b"\xff,b\n1,2\n"])
def test_what_is_no_csv(body: bytes) -> None:
    assert (refused(body, "text/csv").status, refused(body, "text/csv").code) == (400, "MALFORMED")


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/json; charset=latin-1", "application/vnd.apache.parquet"]
)
def test_other_content(kind: str) -> None:
    assert refused(b"{}", kind).status == 415


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"a": 1}, ("columns missing: b",)),
        ({}, ("no rows",)),
        ({"a": 1, "b": 2, "c": 3, "d": 4}, ("does not have: c, d",)),
        ({"a": "1", "b": 2}, ("a: double expected, got '1' in row 1",)),
        ({"a": True, "b": 2.0}, ("a: double", "b: long expected, got 2.0")),
        ({"a": 1, "b": None}, ("b: long expected, got None",)),
        ({"a": 10**400, "b": 2**63}, ("a: double", "b: long")),
        ({"a": [1], "b": {"x": 1}}, ("a: double", "b: long")),
        ({"a": 1, "b": 2, "note": 3}, ("note: string expected, got 3",)),
    ],
)
def test_rows_that_the_signature_does_not_allow(row: Any, told: tuple[str, ...]) -> None:
    """Each column is named, with what it should be and the first value that is not."""
    error = refused(json.dumps({"dataframe_records": [row]}).encode())
    assert error.status == (422 if row else 400)
    for text in told:
        assert text in error.message, error.message


def test_a_value_that_one_row_lacks() -> None:
    error = refused(b'{"dataframe_records": [{"a": 1, "b": 2}, {"a": 1}]}')
    assert (error.status, error.message) == (422, "b: long expected, got nothing in row 2")


def test_names_that_the_model_does_not_have_are_only_counted() -> None:
    """One in each of many rows, which takes little room in a request, takes little here."""
    body = json.dumps({"dataframe_records": [{f"k{number}": 0} for number in range(5000)]}).encode()
    error, peak = refused_at_the_cost_of(body)
    assert error.status == 422
    assert "does not have: k0, k1" in error.message
    assert "and 4990 more" in error.message
    assert peak < 20 * 2**20


@pytest.mark.parametrize(
    ("unit", "around", "kind", "status"),
    [
        (b"\n", (b"", b""), "text/csv", 400),
        (b"1\n", (b"a\n", b""), "text/csv", 413),
        (b"[" * 400 + b"]" * 400 + b",", (b'{"instances": [', b"0]}"), JSON, 413),
        (b'{"":0},', (b'{"instances": [', b"0]}"), JSON, 413),
    ],
)
def test_what_is_short_in_a_request_is_not_long_in_memory(
    unit: bytes, around: tuple[bytes, bytes], kind: str, status: int
) -> None:
    """Two megabytes of nearly nothing are refused before they are 50 to 140."""
    size = 2 << 20
    error, peak = refused_at_the_cost_of(around[0] + unit * (size // len(unit)) + around[1], kind)
    assert error.status == status, error.message
    assert peak < 8 * size


def test_a_text_without_an_end_is_refused_at_once() -> None:
    """A body that was cut, of quotes that are none: not a search from each of them to the end."""
    began = time.monotonic()
    assert refused(b'{"a": "' + b'\\"' * (inputs.LARGE // 2)).status == 400
    assert time.monotonic() - began < 10


def test_brackets_in_a_text_are_no_rows() -> None:
    text = '[{ "\\' * inputs.LARGE
    assert read({"instances": [{"a": 1, "b": 2, "note": text}]})["note"] == [text]


def test_too_many_rows() -> None:
    row = {"a": 1, "b": 2}
    assert len(read({"dataframe_records": [row] * inputs.ROWS})["a"]) == inputs.ROWS
    error = refused(json.dumps({"dataframe_records": [row] * (inputs.ROWS + 1)}).encode())
    assert (error.status, error.code) == (413, "TOO_LARGE")


@pytest.mark.parametrize("moment", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "1600-01-01"])
def test_a_moment_that_cannot_be_counted(moment: str) -> None:
    body = json.dumps({"instances": [moment]}).encode()
    assert refused(body, columns=(Column("when", "datetime"),)).status == 422


def test_a_number_too_large_to_be_one() -> None:
    assert refused(b'{"dataframe_records": [{"a": 1e999, "b": 2}]}').status == 422


@pytest.mark.parametrize("text", ["x", "1_0", "nan", "inf", "0x10"])
def test_csv_numbers_are_what_everybody_reads_as_numbers(text: str) -> None:
    assert refused(f"a,b\n{text},1\n".encode(), "text/csv").status == 422


def test_missing_values() -> None:
    """Where the type has one: a number that is none. An empty field of CSV is the same."""
    assert math.isnan(read({"dataframe_records": [{"a": None, "b": 1}]})["a"][0])
    assert math.isnan(inputs.parse(b"a,b\n,1\n", "text/csv", COLUMNS)["a"][0])
    text = (Column("x", "string"), Column("b", "long"))
    assert refused(json.dumps({"dataframe_records": [{"x": None, "b": 1}]}).encode(), columns=text).status == 422
    assert refused(b"x,b\n,1\n", "text/csv", columns=text).status == 422


@pytest.mark.parametrize(
    ("kind", "good", "bad", "value"),
    [
        ("boolean", True, 1, True),
        ("integer", -(2**31), 2**31, -(2**31)),
        ("float", 1.5, 1e39, 1.5),
        ("binary", "AAE=", "AAE", b"\0\1"),
        ("datetime", "2026-01-02T03:04:05+01:00", "soon", datetime(2026, 1, 2, 2, 4, 5)),
    ],
)
def test_other_types(kind: str, good: Any, bad: Any, value: Any) -> None:
    columns = (Column("x", kind),)
    assert read({"instances": [good]}, columns) == {"x": [value]}
    assert refused(json.dumps({"instances": [bad]}).encode(), columns=columns).status == 422
    text = str(good).lower() if kind == "boolean" else str(good)
    assert inputs.parse(f"x\n{text}\n".encode(), "text/csv", columns) == {"x": [value]}
    assert refused(f"x\n{bad}\n".encode(), "text/csv", columns).status == 422


# --- The follower ---


@dataclass(frozen=True)
class FakeVersion:
    number: str
    model: str = "m"
    run_id: str = "r"


@dataclass(frozen=True)
class FakeModel:
    version: FakeVersion
    columns: tuple[Column, ...] = (Column("x", "double"),)

    def predict(self, table: dict[str, list[Any]]) -> list[Any]:
        if any(math.isnan(value) for value in table["x"]):
            raise ValueError("Input contains NaN")
        if 99.0 in table["x"]:
            raise RuntimeError("of its own")
        return [value + int(self.version.number) for value in table["x"]]

    def schema(self) -> dict[str, Any]:
        return {"version": self.version.number}


@dataclass
class FakeRegistry:
    """MLflow: a version, nobody, or an error."""

    answer: Any = None
    broken: set[str] = field(default_factory=set)
    sizes: dict[str, int] = field(default_factory=dict)
    loads: list[str] = field(default_factory=list)
    model: str = "m"
    alias: str = "champion"

    def champion(self) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return FakeVersion(self.answer) if self.answer else None

    def size(self, version: Any) -> int:
        return self.sizes.get(version.number, 0)

    def load(self, version: Any) -> Any:
        self.loads.append(version.number)
        if version.number in self.broken:
            raise ModuleNotFoundError("No module named 'torch'")
        return FakeModel(version)


@pytest.fixture
def registry() -> FakeRegistry:
    return FakeRegistry()


@pytest.fixture
def followed(registry: FakeRegistry) -> Follower:
    return Follower(registry, registry.load)


def answering(followed: Follower) -> str | None:
    followed.look()
    return followed.state.model.version.number if followed.state.model else None


def test_it_follows_the_alias(registry: FakeRegistry, followed: Follower) -> None:
    """Nobody, one, another, nobody again; what is there already is not loaded again."""
    assert answering(followed) is None
    assert "no version of m has the alias champion" in followed.state.why
    for number in ("1", "1", "2"):
        registry.answer = number
        assert answering(followed) == number
    assert registry.loads == ["1", "2"]
    registry.answer = None
    assert answering(followed) is None


def test_a_version_that_cannot_be_loaded_keeps_the_old_one(registry: FakeRegistry, followed: Follower) -> None:
    """It is told, tried again later, and forgotten when the alias moves on."""
    registry.answer, registry.broken = "1", {"2"}
    assert answering(followed) == "1"
    registry.answer = "2"
    assert [answering(followed), answering(followed)] == ["1", "1"]
    assert followed.failures == 1
    failure = followed.state.failure
    assert failure is not None
    assert "torch" in failure.error
    registry.answer = "3"
    assert answering(followed) == "3"
    assert followed.state.failure is None


def test_a_version_that_is_too_large_is_not_loaded(registry: FakeRegistry, followed: Follower) -> None:
    """With the old one in memory the kernel would end both; the old one goes on, and it is told why."""
    registry.sizes = {"1": follower.LARGEST, "2": follower.LARGEST + 1}
    registry.answer = "1"
    assert answering(followed) == "1"
    registry.answer = "2"
    assert answering(followed) == "1"
    assert registry.loads == ["1"]
    assert followed.failures == 1
    assert followed.state.failure is not None
    assert "TooLargeError: it has 40.0 MiB of files, 40 MiB are the most" in followed.state.failure.error


def test_the_size_of_a_version_is_that_of_all_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = {
        "models:/m/3": [FileInfo("MLmodel", False, 5), FileInfo("data", True, None)],
        "models:/m/3/data": [FileInfo("data/model.ubj", False, 70), FileInfo("data/more", True, None)],
        "models:/m/3/data/more": [FileInfo("data/more/x", False, 900)],
    }
    monkeypatch.setattr("mlflow.artifacts.list_artifacts", lambda artifact_uri: listed[artifact_uri])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.test")
    assert Registry("m", "champion").size(Version("m", "3", "r", 0)) == 975


def test_a_version_that_cannot_be_loaded_is_tried_again(
    registry: FakeRegistry, followed: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "RETRY_S", 0)
    registry.answer, registry.broken = "2", {"2"}
    assert answering(followed) is None
    assert "version 2 has the alias and cannot be loaded" in followed.state.why
    registry.broken = set()
    assert answering(followed) == "2"


def test_without_mlflow_everything_stays(registry: FakeRegistry, followed: Follower) -> None:
    registry.answer = ConnectionError("refused")
    assert answering(followed) is None
    assert "refused" in followed.state.why
    registry.answer = "1"
    assert answering(followed) == "1"
    registry.answer = ConnectionError("refused")
    assert answering(followed) == "1"
    assert "refused" in followed.state.unreachable
    registry.answer = "1"
    assert answering(followed) == "1"
    assert followed.state.unreachable == ""


# --- The log ---


@dataclass
class FakeStore:
    away: bool = False
    objects: list[tuple[str, list[dict[str, Any]]]] = field(default_factory=list)

    def put(self, key: str, body: bytes) -> None:
        if self.away:
            raise ConnectionError("away")
        self.objects.append((key, [json.loads(line) for line in body.splitlines()]))

    @property
    def predictions(self) -> list[Any]:
        return [row["prediction"] for _, rows in self.objects for row in rows]


def test_what_is_kept_of_an_answer() -> None:
    store = FakeStore()
    log = PredictionLog("m", store.put)
    log.add("3", {"a": [1.0, math.nan], "b": [b"\1", b"\2"]}, [0, math.inf])
    assert log.write()
    ((key, rows),) = store.objects
    assert key.startswith("m/20")
    assert key.endswith(".jsonl")
    assert len(key.split("/")) == 5
    assert all(datetime.fromisoformat(row.pop("at")).utcoffset() is not None for row in rows)
    assert rows == [
        {"version": "3", "inputs": {"a": 1.0, "b": "01"}, "prediction": 0},
        {"version": "3", "inputs": {"a": None, "b": "02"}, "prediction": None},
    ]
    assert (log.queued, log.written, log.dropped) == (0, 2, 0)


def test_many_rows_are_several_objects_in_their_order() -> None:
    """Each with a moment of its own: who has seen the first object only goes on with the second."""
    store = FakeStore()
    log = PredictionLog("m", store.put)
    rows = 2 * BATCH + 5
    log.add("1", {"a": [0.0] * (rows - 1)}, list(range(rows - 1)))
    log.add("1", {"a": [0.0]}, [rows - 1])
    assert log.write()
    assert [len(rows) for _, rows in store.objects] == [BATCH, BATCH, 5]
    assert store.predictions == list(range(rows))
    moments = [row["at"] for _, rows in store.objects for row in rows]
    assert moments == sorted(set(moments))


def test_with_the_store_away_the_newest_rows_wait() -> None:
    """The oldest are dropped and counted, those that were being written as well."""
    store = FakeStore(away=True)
    log = PredictionLog("m", store.put, most=10)
    for number in range(8):
        log.add("1", {"a": [0.0]}, [number])
    assert not log.write()
    log.add("1", {"a": [0.0] * 4}, [8, 9, 10, 11])
    assert (log.queued, log.dropped) == (10, 2)
    store.away = False
    assert log.write()
    assert store.predictions == list(range(2, 12))


@pytest.mark.parametrize("document", [True, False])
def test_rows_that_wait_are_bounded_by_their_bytes(document: bool) -> None:
    """Documents of 50 KB each, or thirty numbers: what waits has so much memory, and the newest are kept."""
    store = FakeStore(away=True)
    largest = 2 << 20
    log = PredictionLog("m", store.put, largest=largest)
    tracemalloc.start()
    try:
        for number in range(100):
            if document:
                log.add("1", {"a": [f"{number:50000}"]}, [{"label": [f"{number:1000}"]}])
            else:
                log.add("1", {f"c{name}": [number / (row + 3) for row in range(40)] for name in range(30)}, [0] * 40)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.7 * largest < held < 1.3 * largest
    assert not log.write()
    assert log.queued + log.dropped == (100 if document else 4000)
    assert log.queued > (30 if document else 1000)


def test_a_row_that_is_too_large_alone_is_counted() -> None:
    store = FakeStore()
    log = PredictionLog("m", store.put, largest=5000)
    log.add("1", {"a": ["x", "y" * 5000, "z"]}, [0, 1, 2])
    assert log.write()
    assert (store.predictions, log.dropped) == ([2], 2)


def test_large_rows_are_several_objects() -> None:
    """What a JSON text has counts: six letters for one that ASCII does not have."""
    store = FakeStore()
    log = PredictionLog("m", store.put)
    log.add("1", {"a": ["\u00e9" * (OBJECT // 12)] * 5}, list(range(5)))
    assert log.write()
    assert [len(rows) for _, rows in store.objects] == [2, 2, 1]
    assert store.predictions == list(range(5))


def test_large_rows_are_written_at_once() -> None:
    """The thread does not sleep for ten seconds while they come."""
    store = FakeStore()
    log = PredictionLog("m", store.put)
    log.start()
    log.add("1", {"a": ["x" * OBJECT]}, [0])
    end = time.monotonic() + 5
    while not store.objects and time.monotonic() < end:
        time.sleep(0.01)
    assert store.predictions == [0]
    log.stop()


def test_what_the_store_took_without_saying_so_is_written_to_the_same_place() -> None:
    """It answers too late: the same rows come again, and more that came meanwhile."""
    objects: dict[str, bytes] = {}
    slow = [True, True, False]

    def put(key: str, body: bytes) -> None:
        objects[key] = body
        if slow.pop(0):
            raise TimeoutError

    log = PredictionLog("m", put)
    for number in range(3):
        log.add("1", {"a": [0.0]}, [number])
        log.write()
    log.add("1", {"a": [0.0]}, [3])
    slow.append(False)
    assert log.write()
    assert sorted(len(body.splitlines()) for body in objects.values()) == [1, 3]


def test_what_is_left_is_written_at_the_end() -> None:
    store = FakeStore()
    log = PredictionLog("m", store.put)
    log.start()
    log.add("1", {"a": [0.0] * 7}, list(range(7)))
    log.stop()
    assert store.predictions == list(range(7))


# --- HTTP ---


@dataclass
class FakeMetrics:
    statuses: list[int] = field(default_factory=list)
    content_type = "text/plain"

    def answered(self, status: int, seconds: float) -> None:
        assert seconds >= 0
        self.statuses.append(status)

    def render(self) -> bytes:
        return b"figures"


@dataclass
class Served:
    app: Any
    registry: FakeRegistry
    follower: Follower
    log: PredictionLog
    metrics: FakeMetrics

    def call(self, method: str, path: str, *, login: str = f"Bearer {TOKEN}", **words: Any) -> httpx.Response:
        async def one() -> httpx.Response:
            way = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=way, base_url="http://serving") as client:
                headers = words.pop("headers", {}) | ({"Authorization": login} if login else {})
                return await client.request(method, path, headers=headers, **words)

        return asyncio.run(one())

    def get(self, path: str) -> httpx.Response:
        return self.call("GET", path)

    def post(self, body: bytes, kind: str) -> httpx.Response:
        return self.call("POST", "/invocations", content=body, headers={"Content-Type": kind})

    def ask(self, *rows: float | None) -> httpx.Response:
        return self.call("POST", "/invocations", json={"dataframe_records": [{"x": row} for row in rows]})


@pytest.fixture
def served(registry: FakeRegistry, followed: Follower) -> Served:
    """Without its life: no thread follows or writes."""
    log, metrics = PredictionLog("m", FakeStore().put), FakeMetrics()
    made = app.build(followed, log, metrics, TOKEN)  # type: ignore[arg-type]
    registry.answer = "1"
    followed.look()
    return Served(made, registry, followed, log, metrics)


@pytest.mark.parametrize(("padding", "at_once"), [(0, 2), (inputs.LARGE, 1)])
def test_one_large_body_is_read_at_a_time(
    served: Served, monkeypatch: pytest.MonkeyPatch, padding: int, at_once: int
) -> None:
    both, inside, seen = threading.Event(), [], []
    parse = inputs.parse

    def watched(*words: Any) -> Any:
        inside.append(1)
        seen.append(len(inside))
        if len(inside) == 2:
            both.set()
        # Long enough for one that may come in, and for one that may not to show that it does.
        both.wait(10 if at_once == 2 else 0.5)
        inside.pop()
        return parse(*words)

    monkeypatch.setattr(inputs, "parse", watched)
    body = b'{"inputs": [1.5]}' + b" " * padding
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: served.post(body, JSON).status_code, range(2)))
    assert (answers, max(seen)) == ([200, 200], at_once)


def test_a_prediction(served: Served) -> None:
    answer = served.ask(1.5, 2)
    assert answer.status_code == 200
    assert answer.json() == {"predictions": [2.5, 3.0], "model": "m", "version": "1"}
    assert answer.headers["x-model-version"] == "1"
    assert (served.log.queued, served.metrics.statuses) == (2, [200])
    served.registry.answer = "2"
    served.follower.look()
    assert served.ask(1.5).json() == {"predictions": [3.5], "model": "m", "version": "2"}


def test_each_refusal_is_an_error_for_programs_and_people(served: Served) -> None:
    """And leaves nothing in the log."""
    # `make predict` does not even read more.
    assert predict.LARGEST == app.LARGEST
    large = b" " * (app.LARGEST + 1)
    answers = {
        400: served.post(b"{", JSON),
        413: served.post(large, JSON),
        415: served.post(b"{}", "text/html"),
        422: served.post(b'{"dataframe_records": [{"y": 1}]}', JSON),
        404: served.get("/nothing"),
        405: served.get("/invocations"),
        500: served.ask(99),
    }
    assert {status: answer.status_code for status, answer in answers.items()} == {status: status for status in answers}
    for answer in answers.values():
        assert set(answer.json()) == {"error", "message"}
    assert "columns missing: x" in answers[422].json()["message"]
    of_the_model = served.ask(None)
    assert (of_the_model.status_code, of_the_model.json()["error"]) == (422, "MODEL")
    assert served.log.queued == 0
    assert served.metrics.statuses == [400, 413, 415, 422, 500, 422]


def test_half_a_character_in_a_name(served: Served) -> None:
    answer = served.post(b'{"dataframe_records": [{"\\ud800": 1}]}', JSON)
    assert (answer.status_code, answer.json()["error"]) == (422, "SIGNATURE")


def test_large_requests_at_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their bytes are counted, however many requests they are, and counted out again."""
    monkeypatch.setattr(app, "HELD", 60)
    body = b'{"dataframe_records": [{"x": 1}]}'
    for _ in range(3):
        assert served.post(body, JSON).status_code == 200
        assert served.post(body + b" " * 60, JSON).json()["error"] == "BUSY"


def test_a_request_that_does_not_come(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "SLOW_S", 0.05)

    async def hangs() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    answer = served.call("POST", "/invocations", content=hangs(), headers={"Content-Type": JSON})
    assert (answer.status_code, answer.json()["error"]) == (408, "SLOW")
    assert served.ask(1.5).status_code == 200


def test_without_a_model(served: Served) -> None:
    served.registry.answer = None
    served.follower.look()
    for answer in (served.ask(1), served.get("/schema")):
        assert (answer.status_code, answer.json()["error"]) == (503, "NO_MODEL")
        assert "champion" in answer.json()["message"]
    ready, live = served.get("/health/ready"), served.get("/health/live")
    assert (ready.status_code, ready.json()["status"]) == (503, "not ready")
    assert (live.status_code, live.json()) == (200, {"status": "live"})


def test_health_tells_of_what_is_not_as_it_should_be(served: Served) -> None:
    assert served.get("/health/ready").json() == {"status": "ready", "model": "m", "version": "1"}
    served.registry.answer, served.registry.broken = "2", {"2"}
    served.follower.look()
    served.registry.answer = ConnectionError("refused")
    served.follower.look()
    told = served.get("/health/ready")
    assert told.status_code == 200
    assert told.json()["failed"]["version"] == "2"
    assert "refused" in told.json()["mlflow"]


def test_a_follower_that_hangs_is_not_alive(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "STALLED_S", -1)
    assert served.get("/health/live").status_code == 503


@pytest.mark.parametrize("told", ["", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer", f"bearer {TOKEN}"])
def test_nothing_but_the_probes_without_the_token(served: Served, told: str) -> None:
    for path in ("/schema", "/metrics", "/nothing"):
        answer = served.call("GET", path, login=told)
        assert (answer.status_code, answer.json()["error"]) == (401, "TOKEN"), path
        assert answer.headers["www-authenticate"] == "Bearer"
    assert served.call("POST", "/invocations", login=told, json={}).status_code == 401
    assert served.call("GET", "/health/ready", login=told).status_code == 200
    assert served.call("GET", "/health/live", login=told).status_code == 200
    assert served.get("/metrics").text == "figures"


def test_the_image_is_made_only_where_the_service_is_on() -> None:
    every = dict.fromkeys(images.IMAGES, "tag")
    assert set(every) - set(images.needed(settings.DEFAULTS, every)) == {"serving"}
    assert images.needed(settings.parse("SERVING=on"), every) == every
