"""The helpers for DAGs inside Airflow's image, run for real on this host."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from stack.instance import ROOT
from tests import git_server
from tests.repositories import Repository, certificate
from tests.support import program

TOOLS = ROOT / "dockerfiles/airflow"
DAY_S = 24 * 3600


class TestCheckouts:
    """dag-checkouts, on folders like those that Airflow makes (tests/stack/test_upstream.py holds them together)."""

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Path:
        """With 14 versions, one a day, the first one today's."""
        storage = tmp_path / "storage" / "current"
        for age in range(14):
            self.version(storage, f"v{age:02}", used=age * DAY_S)
        return storage

    def version(self, storage: Path, name: str, *, used: float) -> None:
        path, mark = storage / "dags-git/versions" / name, storage / "_tracking/dags-git" / name
        path.mkdir(parents=True)
        (path / "dag.py").touch()
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        then = time.time() - used
        os.utime(mark, (then, then))
        os.utime(path, (then, then))

    def clean(self, storage: Path, *command: str) -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, "AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_STORAGE_PATH": str(storage)}
        words = [sys.executable, TOOLS / "dag-checkouts", *command]
        return subprocess.run(words, env=variables, capture_output=True, text=True, check=True, timeout=20)

    def left(self, storage: Path) -> list[str]:
        return sorted(path.name for path in (storage / "dags-git/versions").iterdir())

    def test_the_last_used_ones_stay_however_old(self, storage: Path) -> None:
        self.clean(storage)
        assert self.left(storage) == [f"v{age:02}" for age in range(10)]
        assert not (storage / "_tracking/dags-git/v12").exists()

    def test_those_of_today_stay_however_many(self, storage: Path) -> None:
        for number in range(10):
            self.version(storage, f"today{number}", used=60)
        self.clean(storage)
        assert len(self.left(storage)) == 11

    def test_one_that_a_task_uses_stays(self, storage: Path) -> None:
        """Airflow's own lock says so, for as long as the task runs."""
        with (storage / "_tracking/dags-git/v12").open() as mark:
            fcntl.flock(mark, fcntl.LOCK_SH)
            self.clean(storage)
        assert self.left(storage) == [*(f"v{age:02}" for age in range(10)), "v12"]

    def test_what_an_interrupted_removal_left_goes(self, storage: Path) -> None:
        (storage / "dags-git/versions/.v99").mkdir()
        self.clean(storage)
        assert ".v99" not in self.left(storage)

    def test_the_storage_of_another_repository_goes(self, storage: Path) -> None:
        self.version(storage.with_name("former"), "v1", used=0)
        self.clean(storage)
        assert not storage.with_name("former").exists()

    def test_a_new_storage_is_no_trouble_and_the_command_runs(self, tmp_path: Path) -> None:
        assert self.clean(tmp_path / "not-yet", "echo", "hello").stdout == "hello\n"


def test_a_commit_concerns_every_dag_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Airflow looks at a file's time only. Airflow itself is not installed here: its bundle is stood in for."""

    class Bundle:
        path, version = tmp_path, "1"

        def get_current_version(self) -> str:
            return self.version

        def refresh(self) -> None:
            self.version = self.next

    module = ModuleType("airflow.providers.git.bundles.git")
    module.GitDagBundle = Bundle  # type: ignore[attr-defined]
    for name in ("airflow", "airflow.providers", "airflow.providers.git", "airflow.providers.git.bundles"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "dagsource", raising=False)
    bundle = importlib.import_module("dagsource").CommitBundle()
    files = [tmp_path / "a.py", tmp_path / "deep/b.py", tmp_path / "deep/data.csv"]
    for path in files:
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, (1, 1))
    (tmp_path / "broken.py").symlink_to(tmp_path / "nowhere")

    def touched(after: str) -> list[bool]:
        bundle.next = after
        bundle.refresh()
        return [path.stat().st_mtime > 1 for path in files]

    assert touched("1") == [False, False, False]
    assert touched("2") == [True, True, False]
    assert not (tmp_path / "nowhere").exists()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    made = Repository.make(tmp_path_factory.mktemp("host") / "dags.git")
    made.commit("one.py", "1")
    made.commit("one.py", "2", branch="dev/x")
    return made


@pytest.fixture(scope="module")
def host(repository: Repository) -> Iterator[tuple[str, Path]]:
    """A Git host: the repository's address, and the host's certificate."""
    path = repository.bare.with_name("host.pem")
    certificate(path, "localhost")
    with git_server.server(repository.bare.parent, path, ("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield f"https://localhost:{server.server_address[1]}/{repository.bare.name}", path
        server.shutdown()
        thread.join()


def ask(url: str, ref: str = "main", *, env: dict[str, str] | None = None, **more: str) -> dict[str, Any]:
    """dags-git-check's answer."""
    question = json.dumps({"url": url, "ref": ref, "user": "git", **more})
    done = subprocess.run(
        [sys.executable, TOOLS / "dags-git-check"],
        input=question,
        env={**os.environ, "GIT_CONFIG_NOSYSTEM": "1", "HOME": "/nonexistent", **(env or {})},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.parametrize(("ref", "problem"), [("main", ""), ("dev/x", ""), ("x", "ref"), ("v1", "ref")])
def test_a_branch_is_found_by_its_whole_name(repository: Repository, ref: str, problem: str) -> None:
    answer = ask(f"file://{repository.bare}", ref)
    assert answer["problem"] == problem
    assert sorted(answer["refs"]) == ["dev/x", "main"]


def test_a_folder_without_a_repository(tmp_path: Path) -> None:
    assert ask(f"file://{tmp_path}")["problem"] == "repository"


@pytest.mark.parametrize(
    ("token", "trusted", "problem"),
    [
        (git_server.TOKEN, True, ""),
        ("another", True, "login"),
        ("", True, "login"),
        (git_server.TOKEN, False, "certificate"),
    ],
)
def test_a_host_with_a_login(host: tuple[str, Path], token: str, trusted: bool, problem: str) -> None:
    """The right token is let in; what is wrong is named, in git's own words and without the token."""
    url, path = host
    answer = ask(url, token=token, env={"GIT_SSL_CAINFO": str(path)} if trusted else None)
    assert answer["problem"] == problem, answer
    assert bool(answer["said"]) == bool(problem)
    assert not token or token not in answer["said"]


def test_a_token_is_for_its_host_only() -> None:
    """git offers it to no other one, whatever a repository redirects to or includes."""
    tool = program("dags-git-check")
    found = tool.settings_of({"url": "https://a@git.example:8443/x", "user": "a", "token": "t"}, Path("/nowhere"))
    assert found["GIT_CONFIG_KEY_0"] == "credential.https://git.example:8443.helper"
    assert "t" not in found["GIT_CONFIG_VALUE_0"].replace("STACK_GIT_TOKEN", "").split()


def test_nobody_answers() -> None:
    assert ask("https://localhost:1/x.git")["problem"] == "unreachable"


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ("git@git.example: Permission denied (publickey).\nfatal: Could not read from remote repository.", "login"),
        ("Host key verification failed.\nfatal: Could not read from remote repository.", "host-key"),
        ("fatal: unable to access 'https://x/': The requested URL returned error: 403", "login"),
        ("fatal: could not read Username for 'https://x': terminal prompts disabled", "login"),
        ("fatal: unable to access 'https://x/': Could not resolve host: x", "unreachable"),
        ("ssh: connect to host x port 22: Connection timed out", "unreachable"),
        ("fatal: unable to access 'https://x/': server certificate verification failed. CAfile: none", "certificate"),
        ("remote: Repository not found.\nfatal: repository 'https://x/y/' not found", "repository"),
        ("fatal: '/srv/dags.git' does not appear to be a git repository", "repository"),
    ],
)
def test_what_git_says_is_understood(said: str, problem: str) -> None:
    assert program("dags-git-check").problem_in(said) == problem
