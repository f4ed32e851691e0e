"""DAGs from a Git repository: in a folder of the host, then behind TLS and a login. In this order; the stack is as
before at the end."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stack import dags
from stack.airflow import Airflow
from stack.compose import JOBS, volumes
from stack.instance import ROOT
from tests import git_server
from tests.lifecycle.test_verbs import ids
from tests.repositories import Repository, certificate
from tests.support import PROJECT, Run, StackUnderTest, run, wait_until

DAG_ID = "from_git"
SEEN_S = 30
"""The repository is looked at every 10 s, and the DAG processor reads the files one after the other."""
HOST, PORT = "git-server", 8443
URL = f"https://{HOST}:{PORT}/dags.git"
DAG = """
from airflow.sdk import dag, task

@dag(schedule=None)
def from_git():
    @task(retries=0)
    def word():
        from git_words import WORD
        return WORD
    word()

from_git()
"""


@pytest.fixture(scope="module")
def repository(stack: StackUnderTest) -> Repository:
    """A DAG that imports a module beside it, in a folder of its repository."""
    made = Repository.make(stack.clone.parent / "dags.git")
    made.commit("pipelines/from_git.py", DAG)
    made.commit("pipelines/git_words.py", 'WORD = "first"\n')
    return made


@pytest.fixture(scope="module", autouse=True)
def as_before(stack: StackUnderTest, airflow: Airflow) -> Iterator[None]:
    """Takes the settings back, and what they have left."""
    former = stack.instance.settings_file.read_text()
    yield
    stack.instance.settings_file.write_text(former)
    for name in dags.GIVEN:
        (stack.instance.secrets / name).unlink(missing_ok=True)
    said = stack.make("up")
    assert said.code == 0, said.output
    for name in ("dag-bundles", "worker-dag-bundles"):
        run("docker", "volume", "rm", f"{PROJECT}_{name}")
    assert not [name for name in volumes(PROJECT) if "bundles" in name]
    # The DAGs of the folder are back.
    airflow.wait_for_dag("train_model", patience=120)


def choose(stack: StackUnderTest, **lines: object) -> None:
    """Sets these keys of stack.env, and no other ones of a repository."""
    text = re.sub(r"^(DAGS_GIT_\w+|CA_BUNDLE)=.*\n", "", stack.instance.settings_file.read_text(), flags=re.MULTILINE)
    stack.instance.settings_file.write_text(text + "".join(f"{key}={value}\n" for key, value in lines.items()))


def give(stack: StackUnderTest, name: str, text: str) -> None:
    """Writes a secret as the operator does."""
    path = stack.instance.secrets / name
    path.unlink(missing_ok=True)
    path.write_text(text)
    owner = stack.instance.secrets.stat()
    os.chown(path, owner.st_uid, owner.st_gid)


def assert_refused(stack: StackUnderTest, code: str, *texts: str) -> None:
    """`make up` says so, and neither a file nor a container is another one afterwards."""
    before, planned = ids(stack), stack.instance.env_file.read_bytes()
    said = stack.make("up")
    assert f"error[{code}]" in said.output, said.output
    assert "Error 3" in said.output, said.output
    for text in texts:
        assert text in said.output, said.output
    assert git_server.TOKEN not in said.output
    assert ids(stack) == before
    assert stack.instance.env_file.read_bytes() == planned


def word_of(airflow: Airflow, run_id: str) -> str:
    """What the DAG's task returned."""
    state = airflow.follow(DAG_ID, run_id, patience=120)
    assert state == "success", airflow.task_log(DAG_ID, run_id, "word")
    return str(airflow.xcom(DAG_ID, run_id, "word"))


def version(airflow: Airflow) -> str | None:
    """The commit that a new run of the DAG will have."""
    path = f"/dags/{DAG_ID}"
    return airflow.call("GET", path)["bundle_version"] if airflow.has(f"/api/v2{path}") else None


@pytest.mark.parametrize(
    ("lines", "code", "text"),
    [
        ({"DAGS_GIT_REF": "v9"}, "E-DAGS-GIT-REF", "it has: main"),
        ({"DAGS_GIT_URL": "file:///usr"}, "E-DAGS-GIT", "there is no repository"),
        ({"DAGS_GIT_URL": "file:///no/such/folder"}, "E-DAGS-GIT", "is not a directory"),
        ({"DAGS_GIT_URL": "https://127.0.0.1:9/x.git"}, "E-DAGS-GIT", "does not answer"),
        ({"DAGS_GIT_URL": "ssh://git@127.0.0.1/x.git"}, "E-DAGS-GIT-LOGIN", "secrets/dags_git_key"),
        ({"DAGS_GIT_URL": "git@127.0.0.1:x.git"}, "E-SETTING", "ssh://user@host/path"),
    ],
)
def test_a_repository_that_will_not_do_is_refused(
    stack: StackUnderTest, repository: Repository, lines: dict[str, str], code: str, text: str
) -> None:
    choose(stack, **{"DAGS_GIT_URL": f"file://{repository.bare}", **lines})
    assert_refused(stack, code, text)


def test_dags_come_from_a_folder(stack: StackUnderTest, airflow: Airflow, repository: Repository) -> None:
    """The DAG processor and the worker are made anew, and nobody else."""
    before = ids(stack)
    choose(stack, DAGS_GIT_URL=f"file://{repository.bare}", DAGS_GIT_SUBDIR="pipelines")
    said = stack.make("up")
    assert said.code == 0, said.output
    after = ids(stack)
    # Compose starts the jobs, which have ended, at each `up`.
    changed = {name for name in after if after[name] != before[name]} - set(JOBS)
    assert changed == {"airflow-dag-processor", "airflow-worker"}
    found = airflow.wait_for_dag(DAG_ID)
    assert (found["bundle_name"], found["relative_fileloc"]) == ("dags-git", "from_git.py")


def test_a_run_keeps_the_version_that_it_began_with(
    stack: StackUnderTest, airflow: Airflow, repository: Repository
) -> None:
    """A commit is known within seconds, though it does not change the DAG's own file; the run from before it
    executes the code from before it."""
    former = version(airflow)
    earlier = airflow.trigger(DAG_ID)
    commit = repository.commit("pipelines/git_words.py", 'WORD = "second"\n')
    started = time.monotonic()
    wait_until(lambda: version(airflow) == commit, SEEN_S, "the commit known to Airflow")
    stack.timings["a commit, until new runs have it"] = time.monotonic() - started
    later = airflow.trigger(DAG_ID)
    airflow.set_paused(DAG_ID, False)
    assert (word_of(airflow, earlier), word_of(airflow, later)) == ("first", "second")
    versions = [airflow.call("GET", f"/dags/{DAG_ID}/dagRuns/{one}")["bundle_version"] for one in (earlier, later)]
    assert versions == [former, commit]


def test_one_process_runs_it_as_well(stack: StackUnderTest, airflow: Airflow) -> None:
    """`make dag-test`, from the same copy."""
    airflow.set_paused(DAG_ID, True)
    said = stack.make("dag-test", f"DAG={DAG_ID}")
    assert said.code == 0, said.output[-3000:]
    airflow.set_paused(DAG_ID, False)


@pytest.fixture(scope="module")
def host(stack: StackUnderTest, repository: Repository) -> Iterator[Path]:
    """A Git host beside the stack, which wants a login; its certificate."""
    path = repository.bare.with_name("host.pem")
    certificate(path, HOST)
    name = f"{PROJECT}-git"
    # With these labels it goes with the stack if the tests are ended, and is none of its services.
    labels = (f"com.docker.compose.project={PROJECT}", "com.docker.compose.oneoff=True")
    started = run(
        *("docker", "run", "--detach", "--rm", "--name", name, "--memory", "256m"),
        *(word for label in labels for word in ("--label", label)),
        *("--network", f"{PROJECT}_frontend", "--network-alias", HOST),
        *("--volume", f"{repository.bare}:/srv/dags.git:ro", "--volume", f"{path}:/host.pem:ro"),
        *("--volume", f"{ROOT}/tests/git_server.py:/git_server.py:ro"),
        stack.inspect("airflow-worker")["Config"]["Image"],
        *("python3", "/git_server.py", "/srv", "/host.pem", str(PORT)),
    )
    assert started.code == 0, started.output
    try:
        wait_until(lambda: "ready" in run("docker", "logs", name).output, 30, "the Git host listening")
        yield path
    finally:
        run("docker", "rm", "--force", name)


@pytest.mark.parametrize(
    ("token", "trusted", "code"),
    [
        ("", True, "E-DAGS-GIT-LOGIN"),
        ("not-the-token", True, "E-DAGS-GIT-LOGIN"),
        (git_server.TOKEN, False, "E-DAGS-GIT"),
    ],
)
def test_a_host_that_refuses_us_is_named(
    stack: StackUnderTest, host: Path, token: str, trusted: bool, code: str
) -> None:
    """Without a token, with another one, and with nobody who vouches for its certificate."""
    if token:
        give(stack, "dags_git_token", token)
    choose(stack, DAGS_GIT_URL=URL, DAGS_GIT_SUBDIR="pipelines", **({"CA_BUNDLE": host} if trusted else {}))
    assert_refused(stack, code, "certificate" if not trusted else "does not accept these credentials")


def test_dags_come_from_a_host_behind_a_login(
    stack: StackUnderTest, airflow: Airflow, repository: Repository, host: Path
) -> None:
    """The token is the DAG processor's alone; the copy of the former repository is gone."""
    give(stack, "dags_git_token", git_server.TOKEN)
    choose(stack, DAGS_GIT_URL=URL, DAGS_GIT_SUBDIR="pipelines", CA_BUNDLE=host)
    said = stack.make("up")
    assert said.code == 0, said.output
    commit = repository.commit("pipelines/git_words.py", 'WORD = "third"\n')
    wait_until(lambda: version(airflow) == commit, 2 * SEEN_S, "the commit known to Airflow")
    assert word_of(airflow, airflow.trigger(DAG_ID)) == "third"
    for service in ("airflow-dag-processor", "airflow-worker"):
        assert len(stack.exec(service, "ls", "/var/lib/dag-bundles").output.split()) == 1, service
    assert git_server.TOKEN not in stack.python("airflow-worker", "import os; print(os.environ)").output
    for service in ("airflow-dag-processor", "airflow-worker"):
        shown = str(stack.inspect(service)) + run("docker", "logs", stack.container(service)).output
        assert git_server.TOKEN not in shown, service
    look = f"grep -rslF {git_server.TOKEN} /var/lib/dag-bundles /var/lib/dag-source"
    assert stack.exec("airflow-worker", *look.split()).output == ""


def test_tasks_run_while_the_repository_does_not_answer(stack: StackUnderTest, airflow: Airflow, host: Path) -> None:
    """Also in a worker that has no checkout yet; and `make up` does not refuse what it has accepted."""
    assert host.exists()
    assert run("docker", "rm", "--force", f"{PROJECT}-git").code == 0
    stack.exec("airflow-worker", "sh", "-c", "rm -rf /var/lib/dag-bundles/*/dags-git")
    assert word_of(airflow, airflow.trigger(DAG_ID)) == "third"
    said: Run = stack.make("up")
    assert said.code == 0, said.output
    assert f"warning: {URL} does not answer" in said.output, said.output
