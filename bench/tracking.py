"""What is measured of MLflow: our server and `mlflow server` with its defaults, on the same Postgres and MinIO."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import httpx

from bench.systems import usage
from bench.workloads import MIB, Sample

CLIENTS = 8
WARM_UP = 10 * CLIENTS
"""Calls before anything is timed, or as many as are: a process answers its first ones slowly, on either side."""
MOST_TIMES, BYTES = 20, 3 * 10**8
"""An artifact is sent so often, or until so much has been sent."""


class Tracking:
    """One MLflow server, by its REST API."""

    def __init__(self, address: str, login: tuple[str, str] | None, project: str) -> None:
        self.http = httpx.Client(
            base_url=f"http://{address}:5000",
            auth=login,
            # The server answers to its names only.
            headers={"Host": "localhost:5000"},
            timeout=300,
            limits=httpx.Limits(max_connections=CLIENTS),
        )
        self._project = project
        self.experiment = self.post("experiments/create", name=f"bench-{time.time_ns()}")["experiment_id"]
        # A login that is no admin's writes to a run of its own.
        self._artifacts = f"/api/2.0/mlflow-artifacts/artifacts/{self.experiment}/{self.run()}/artifacts"

    def post(self, path: str, **body: object) -> dict[str, str]:
        """One call; raises httpx.HTTPStatusError."""
        answer = self.http.post(f"/api/2.0/mlflow/{path}", json=body)
        answer.raise_for_status()
        return dict(answer.json())

    def run(self) -> str:
        """A new run's id."""
        made = self.post("runs/create", experiment_id=self.experiment, start_time=time.time_ns() // 10**6)
        return str(made["run"]["info"]["run_id"])  # type: ignore[index]

    def memory(self) -> int:
        """Bytes of the server's container."""
        return usage(self._project, "mlflow").memory

    def memory_after(self, done: Sequence[str]) -> Sample:
        """MiB of the server, after these."""
        return Sample(self.memory() / MIB, f"after {', '.join(done)}")

    def _rate(self, number: int, act: Callable[[int], object]) -> float:
        """Calls a second, from CLIENTS threads at once, once warm."""
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(act, range(min(WARM_UP, number))))
            started = time.monotonic()
            list(pool.map(act, range(number)))
            return number / (time.monotonic() - started)

    def log_batch(self, number: int) -> Sample:
        """Batches of 100 metrics a second."""
        runs = [self.run() for _ in range(CLIENTS)]

        def act(index: int) -> None:
            stamp = time.time_ns() // 10**6
            metrics = [{"key": f"m{k}", "value": k * 0.5, "timestamp": stamp, "step": index} for k in range(100)]
            self.post("runs/log-batch", run_id=runs[index % CLIENTS], metrics=metrics)

        return Sample(self._rate(number, act), f"{number} batches of 100")

    def create_run(self, number: int) -> Sample:
        """Runs created a second."""
        return Sample(self._rate(number, lambda _: self.run()), f"{number} runs")

    def search(self, number: int) -> Sample:
        """Searches a second that each return 100 runs of 10 metrics."""
        for index in range(100):
            metrics = [{"key": f"m{k}", "value": index + k, "timestamp": 1, "step": 0} for k in range(10)]
            self.post("runs/log-batch", run_id=self.run(), metrics=metrics)

        def act(_: int) -> None:
            found = self.post("runs/search", experiment_ids=[self.experiment], max_results=100)
            if len(found["runs"]) != 100:
                raise ValueError(f"a search returned {len(found['runs'])} of 100 runs")

        return Sample(self._rate(number, act), f"{number} searches of 100 runs")

    def upload(self, path: Path) -> Sample:
        """MB a second of one artifact up, through the server."""
        return put(self.http, f"{self._artifacts}/{path.name}", path)

    def download(self, path: Path) -> Sample:
        """MB a second of the same artifact down."""
        return get(self.http, f"{self._artifacts}/{path.name}", path)

    def memory_added(self, path: Path, before: int) -> Sample:
        """MiB that the server's memory has more than `before` (bytes, when no such file had come yet) while a file
        goes up and down, looked at as often as the engine answers. Not while that is timed: the looks take from it."""
        with ThreadPoolExecutor(1) as pool:
            at_once = pool.submit(lambda: (self.upload(path), self.download(path)))
            peak = before
            while not at_once.done():
                peak = max(peak, self.memory())
                time.sleep(0.25)
            at_once.result()
        return Sample((peak - before) / MIB, f"{path.stat().st_size} bytes")


class Store:
    """The object store itself, by signed addresses: as fast as an artifact can go."""

    def __init__(self, address: str, secret: str) -> None:
        self.http = httpx.Client(timeout=300)
        self._s3 = boto3.client(
            "s3",
            endpoint_url=f"http://{address}:9000",
            region_name="us-east-1",
            aws_access_key_id="mlflow",
            aws_secret_access_key=secret,
        )

    def _signed(self, verb: str, path: Path) -> str:
        words = {"Bucket": "mlflow", "Key": f"bench-raw/{path.name}"}
        return str(self._s3.generate_presigned_url(verb, Params=words, ExpiresIn=3600))

    def upload(self, path: Path) -> Sample:
        """MB a second up."""
        return put(self.http, self._signed("put_object", path), path)

    def download(self, path: Path) -> Sample:
        """MB a second down."""
        return get(self.http, self._signed("get_object", path), path)


def put(http: httpx.Client, url: str, path: Path) -> Sample:
    """A file up, again and again; MB a second."""
    size = path.stat().st_size

    def once() -> None:
        with path.open("rb") as file:
            # With a length: an object store takes no chunked body.
            http.put(url, content=file, headers={"Content-Length": str(size)}).raise_for_status()

    return _again(size, once)


def get(http: httpx.Client, url: str, path: Path) -> Sample:
    """The same file down; MB a second. Raises ValueError where less came back."""
    size = path.stat().st_size

    def once() -> None:
        got = 0
        with http.stream("GET", url) as answer:
            answer.raise_for_status()
            for piece in answer.iter_raw(1 << 20):
                got += len(piece)
        if got != size:
            raise ValueError(f"{got} of {size} bytes came back")

    return _again(size, once)


def _again(size: int, act: Callable[[], None]) -> Sample:
    """The median of several times; the first of more than one warms up."""
    took = []
    for _ in range(max(1, min(MOST_TIMES, BYTES // size))):
        started = time.monotonic()
        act()
        took.append(time.monotonic() - started)
    return Sample(size / 1e6 / statistics.median(took[1:] or took), f"{len(took)} x {size} bytes")
