"""DAGs from a Git repository: what follows from the settings, and what is said of a repository that will not do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from stack import compose, dags, preflight, secrets, settings
from stack.errors import Exit, StackError
from stack.instance import ROOT, Instance
from stack.settings import DEFAULTS, Settings
from tests.support import script
from tests.unit.test_preflight import HOST

HTTPS = settings.parse("DAGS_GIT_URL=https://git.example/team/dags.git")
SSH = settings.parse("DAGS_GIT_URL=ssh://git@git.example:2222/team/dags.git\nDAGS_GIT_REF=v1\nDAGS_GIT_SUBDIR=a/b")
KEY = {"dags_git_key": "-----BEGIN-----\nx\n-----END-----", "dags_git_known_hosts": "git.example ssh-ed25519 A"}


def folder(path: Path) -> Settings:
    return settings.parse(f"DAGS_GIT_URL=file://{path}")


def bundle(text: str) -> dict[str, object]:
    """The one entry of a dag_bundle_config_list."""
    (one,) = json.loads(text)
    assert (one["name"], one["classpath"]) == ("dags-git", "dagsource.CommitBundle")
    words: dict[str, object] = one["kwargs"]
    return words


def test_without_a_repository_nothing_is_different() -> None:
    assert dags.variables(DEFAULTS) == {}
    assert compose.files(DEFAULTS) == compose.FILES
    assert "conn_dags_git" not in secrets.derived_names()


def test_the_dag_processor_asks_the_repository_and_the_others_its_copy() -> None:
    """The copy is where Airflow puts it below the storage; branch and folder are the same for both."""
    found = dags.variables(SSH)
    asked, copied = bundle(found["DAG_BUNDLES"]), bundle(found["DAG_BUNDLES_COPY"])
    assert asked["repo_url"] == "ssh://git@git.example:2222/team/dags.git"
    key = found["DAG_BUNDLE_STORAGE"].rpartition("/")[2]
    assert copied["repo_url"] == f"file:///var/lib/dag-source/{key}/dags-git/bare"
    assert found["DAG_COPY"] == f"/var/lib/dag-source/{key}/dags-git/tracking_repo/a/b"
    assert {**asked, "repo_url": ""} == {**copied, "repo_url": ""}
    assert (asked["tracking_ref"], asked["subdir"]) == ("v1", "a/b")
    assert "subdir" not in bundle(dags.variables(HTTPS)["DAG_BUNDLES"])


def test_a_folder_of_this_host_is_seen_under_another_name(tmp_path: Path) -> None:
    found = dags.variables(folder(tmp_path))
    assert bundle(found["DAG_BUNDLES"])["repo_url"] == "file:///srv/dags.git"
    assert found["DAGS_GIT_FOLDER"] == str(tmp_path)
    trusted = re.findall(r"directory = (\S+)", (ROOT / "dockerfiles/airflow/gitconfig").read_text(encoding="utf-8"))
    assert trusted == ["/srv/dags.git", "/srv/dags.git/.git"]


def test_another_repository_or_branch_has_another_storage() -> None:
    """Airflow would go on with the old one. Another folder of the same branch needs none."""

    def storage(**changed: str) -> str:
        return dags.variables(HTTPS.model_copy(update=changed))["DAG_BUNDLE_STORAGE"]

    assert storage() == storage() == storage(dags_git_subdir="x")
    assert len({storage(), storage(dags_git_ref="v2"), storage(dags_git_url="https://git.example/other")}) == 3


def test_the_connection_holds_what_the_repository_needs() -> None:
    assert json.loads(dags.connection(HTTPS, {})) == {"conn_type": "git"}
    token = {"dags_git_token": "t"}
    assert json.loads(dags.connection(HTTPS, token)) == {"conn_type": "git", "login": "git", "password": "t"}
    named = settings.parse("DAGS_GIT_URL=https://x-token-auth@git.example/a")
    assert json.loads(dags.connection(named, token))["login"] == "x-token-auth"
    extra = json.loads(dags.connection(SSH, KEY | token))["extra"]
    assert extra["strict_host_key_checking"] == "yes"
    # ssh refuses a key whose last line has no end.
    assert extra["private_key"] == KEY["dags_git_key"] + "\n"


@pytest.mark.parametrize(
    ("lost", "code"), [("dags_git_key", "E-DAGS-GIT-LOGIN"), ("dags_git_known_hosts", "E-DAGS-GIT")]
)
def test_what_ssh_cannot_do_without_is_missed_before_anything_is_asked(tmp_path: Path, lost: str, code: str) -> None:
    with pytest.raises(StackError) as refused:
        dags.connection(SSH, {name: text for name, text in KEY.items() if name != lost})
    assert refused.value.code == code
    assert f"secrets/{lost}" in refused.value.why
    assert [error.code for error in preflight.before_engine(HOST, SSH, Instance(tmp_path))] == ["E-DAGS-GIT-LOGIN"]


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (error,) = preflight.before_engine(HOST, folder(tmp_path / "none"), Instance(tmp_path))
    assert (error.code, "is not a directory" in error.what) == ("E-DAGS-GIT", True)
    assert preflight.before_engine(HOST, folder(tmp_path), Instance(tmp_path)) == []


def test_the_credentials_come_and_go_with_the_setting(tmp_path: Path) -> None:
    """What the operator wrote stays; the copy that Airflow gets goes."""
    directory = tmp_path / "secrets"
    secrets.ensure(directory, DEFAULTS, list(secrets.PRIMARY))
    (directory / "dags_git_token").write_text("t\n")
    assert secrets.ensure(directory, HTTPS, []) == ["conn_dags_git"]
    assert json.loads((directory / "conn_dags_git").read_text())["password"] == "t"
    assert secrets.ensure(directory, HTTPS, []) == []
    assert secrets.ensure(directory, DEFAULTS, []) == []
    assert not (directory / "conn_dags_git").exists()
    assert (directory / "dags_git_token").exists()


def test_a_damaged_secret_of_the_operators_is_told(tmp_path: Path) -> None:
    (tmp_path / "dags_git_token").write_text(" \n")
    with pytest.raises(StackError, match="dags_git_token is empty"):
        secrets.given(tmp_path)


class Docker:
    """A `docker` that keeps what it is given, and prints an answer."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        script(
            folder / "docker",
            '[ "$1" = run ] || exit 1\n'
            f"echo \"$@\" > '{folder}/words'\ncat > '{folder}/question'\ncat '{folder}/answer'",
        )
        monkeypatch.setenv("PATH", str(folder), prepend=":")

    def answers(self, problem: str, said: str = "", refs: tuple[str, ...] = ()) -> None:
        answer = json.dumps({"problem": problem, "said": said, "refs": refs})
        (self._folder / "answer").write_text(answer)

    @property
    def words(self) -> str:
        return (self._folder / "words").read_text()

    @property
    def question(self) -> dict[str, str]:
        found: dict[str, str] = json.loads((self._folder / "question").read_text())
        return found


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Docker:
    return Docker(tmp_path, monkeypatch)


def test_secrets_go_to_the_check_by_standard_input(docker: Docker) -> None:
    """No argument holds them; each scheme takes only its own."""
    docker.answers("")
    dags.check(HTTPS, {"dags_git_token": "the-token", **KEY}, "airflow:tag")
    assert "the-token" not in docker.words
    assert (docker.question["token"], docker.question["key"]) == ("the-token", "")
    dags.check(SSH, {"dags_git_token": "the-token", **KEY}, "airflow:tag")
    assert (docker.question["token"], docker.question["key"]) == ("", KEY["dags_git_key"] + "\n")
    assert docker.question["ref"] == "v1"


def test_a_folder_is_mounted_for_the_check(docker: Docker, tmp_path: Path) -> None:
    docker.answers("")
    dags.check(folder(tmp_path), {}, "airflow:tag")
    assert f"source={tmp_path},target=/srv/dags.git,readonly" in docker.words
    assert docker.question["url"] == "file:///srv/dags.git"


@pytest.mark.parametrize(
    ("problem", "code", "text"),
    [
        ("login", "E-DAGS-GIT-LOGIN", "does not accept these credentials"),
        ("ref", "E-DAGS-GIT-REF", "has no branch or tag main"),
        ("host-key", "E-DAGS-GIT", "another key"),
        ("certificate", "E-DAGS-GIT", "certificate"),
        ("unreachable", "E-DAGS-GIT", "does not answer"),
        ("repository", "E-DAGS-GIT", "no repository"),
    ],
)
def test_each_problem_is_named(docker: Docker, problem: str, code: str, text: str) -> None:
    docker.answers(problem, "fatal: as git says it", ("dev", "v1"))
    with pytest.raises(StackError, match=text) as refused:
        dags.check(HTTPS, {}, "airflow:tag")
    assert (refused.value.code, refused.value.exit_code) == (code, Exit.PRECONDITION)
    assert refused.value.why == ("it has: dev, v1" if problem == "ref" else "fatal: as git says it")


@pytest.mark.parametrize(
    ("problem", "asked", "name"),
    [
        ("login", HTTPS, "dags_git_token"),
        ("login", SSH, "dags_git_key"),
        ("host-key", SSH, "dags_git_known_hosts"),
    ],
)
def test_how_to_mend_a_secret_works_for_one_that_is_there(
    docker: Docker, problem: str, asked: Settings, name: str
) -> None:
    """`make up` has made it read-only: a shell's `>` is refused."""
    docker.answers(problem)
    with pytest.raises(StackError) as refused:
        dags.check(asked, KEY, "airflow:tag")
    assert f"rm -f secrets/{name} " in refused.value.fix


def test_an_outage_does_not_keep_down_what_was_accepted_before(
    docker: Docker, capsys: pytest.CaptureFixture[str]
) -> None:
    """A branch that is gone, or a token that is not good any more, does."""
    docker.answers("unreachable", "fatal: Connection refused")
    dags.check(HTTPS, {}, "airflow:tag", accepted=True)
    assert "warning: https://git.example/team/dags.git does not answer" in capsys.readouterr().err
    for problem in ("login", "ref"):
        docker.answers(problem)
        with pytest.raises(StackError):
            dags.check(HTTPS, {}, "airflow:tag", accepted=True)


def test_after_the_images_were_made_it_is_a_failure(docker: Docker) -> None:
    docker.answers("ref")
    with pytest.raises(StackError) as refused:
        dags.check(HTTPS, {}, "airflow:tag", changed="the images")
    assert (refused.value.exit_code, refused.value.changed) == (Exit.FAILED, "the images")
