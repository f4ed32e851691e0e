"""stack.env is read strictly, and every mistake is told by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stack import settings
from stack.errors import StackError


def refused(text: str) -> str:
    with pytest.raises(StackError) as error:
        settings.parse(text)
    assert error.value.code == "E-SETTING"
    return error.value.why


@pytest.mark.parametrize(
    ("text", "size"),
    [("6g", 6 * 2**30), ("6GiB", 6 * 2**30), ("512m", 2**29), ("1.5g", 3 * 2**29), ("1048576", 2**20), (" 2T ", 2**41)],
)
def test_sizes(text: str, size: int) -> None:
    assert settings.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "g", "six", "6 gigs", "-1g", "6g6", "9" * 400])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        settings.parse_size(text)


@pytest.mark.parametrize(("key", "nearest"), [("AIRFLOW_PROT", "AIRFLOW_PORT"), ("stack_memroy", "STACK_MEMORY")])
def test_an_unknown_key_is_answered_with_the_nearest(key: str, nearest: str) -> None:
    assert f"unknown key {key}; did you mean {nearest}?" in refused(f"{key}=1")


@pytest.mark.parametrize("value", ["0", "70000", "http", "80 80", "-1", "8080.0"])
def test_bad_ports(value: str) -> None:
    assert f"AIRFLOW_PORT={value}" in refused(f"AIRFLOW_PORT={value}")


@pytest.mark.parametrize("value", ["0.0.0.0", "10.0.0.1"])
def test_addresses_beyond_loopback_are_refused(value: str) -> None:
    assert "only loopback" in refused(f"BIND_ADDRESS={value}")


@pytest.mark.parametrize("value", ["localhost", "::1", "127.0.0"])
def test_what_is_no_address_is_refused(value: str) -> None:
    assert "not an IPv4 address" in refused(f"BIND_ADDRESS={value}")


@pytest.mark.parametrize(("value", "host"), [("127.0.0.1", "localhost"), ("127.0.0.2", "127.0.0.2")])
def test_the_pages_are_where_they_listen(value: str, host: str) -> None:
    found = settings.parse(f"BIND_ADDRESS={value}")
    assert found.bind_address == value
    assert found.airflow_url == f"http://{host}:8080"
    assert found.mlflow_url == f"http://{host}:5000"


def test_equal_ports_are_refused() -> None:
    assert "must differ" in refused("AIRFLOW_PORT=5000")
    assert "must differ" in refused("FLOWER=on\nFLOWER_PORT=8080")
    settings.parse("FLOWER=off\nFLOWER_PORT=8080")
    assert "SERVING_PORT=5000" in refused("SERVING=on\nSERVING_PORT=5000")
    settings.parse("SERVING=off\nSERVING_PORT=5000")


def test_all_mistakes_are_told_at_once() -> None:
    why = refused("AIRFLOW_PORT=x\nNO_SUCH=1\nnonsense\nSTACK_MEMORY=lots\nFLOWER=off\nFLOWER=on")
    for part in ("AIRFLOW_PORT=x", "NO_SUCH", "'nonsense'", "STACK_MEMORY=lots", "FLOWER is set twice"):
        assert part in why, part


def test_the_fresh_file_is_the_defaults_and_documents_every_key() -> None:
    text = settings.render_defaults()
    assert settings.parse(text) == settings.DEFAULTS
    for name in settings.Settings.model_fields:
        assert re.search(rf"^# .+\n#{name.upper()}=", text, re.MULTILINE), name


def test_the_fresh_file_uncommented_is_the_defaults_too() -> None:
    """Every shown default is a value that is accepted."""
    text = re.sub(r"^#([A-Z_]+=)", r"\1", settings.render_defaults(), flags=re.MULTILINE)
    assert settings.parse(text) == settings.DEFAULTS


def test_quotes_and_spaces_around_values() -> None:
    assert settings.parse(" STACK_NAME = 'mine' ").stack_name == "mine"


@pytest.mark.parametrize("line", ["FLOWER=yes", "SERVING=true", "FLOWER=ON", "IMAGE_SOURCE=maybe", "INSTALL_ENGINE=1"])
def test_a_choice_is_one_of_its_words(line: str) -> None:
    """Nothing is guessed: a word that is not offered is refused, and the offered ones are told."""
    assert re.search(rf"{line}: Input should be '\w+' or '\w+'", refused(line))


@pytest.mark.parametrize("value", ["0", "0.1", "many", "nan", "-2", "5000"])
def test_bad_cpus(value: str) -> None:
    assert f"STACK_CPUS={value}" in refused(f"STACK_CPUS={value}")


@pytest.mark.parametrize(
    "line",
    [
        *("STACK_NAME=My Stack", "STACK_NAME=-x", "ADMIN_USER=a b", "IMAGE_PREFIX=Upper/x"),
        *("SERVING_MODEL=a/b", "SERVING_ALIAS=@champion"),
        # The stack's own logins in MLflow: the first login would be theirs.
        *("ADMIN_USER=serving", "ADMIN_USER=airflow"),
    ],
)
def test_names_that_others_would_refuse_later(line: str) -> None:
    """What Compose, a URL or a registry cannot take is refused here, by its own line."""
    assert line in refused(line)


@pytest.mark.parametrize(
    "value",
    [
        "https://git.example/team/dags.git",
        "https://me@git.example:8443/My%20Team/_git/dags/",
        "ssh://git@git.example:2222/~me/dags.git",
        "file:///srv/git/dags.git",
    ],
)
def test_addresses_of_repositories(value: str) -> None:
    assert settings.parse(f"DAGS_GIT_URL={value}").dags_git_url == value


@pytest.mark.parametrize(
    "value",
    [
        *("http://git.example/x", "git@git.example:x", "ssh://git.example/x", "/srv/git", "file://srv/git", "file:///"),
        *("https://git.example", "https://-x/y", "ext::sh", "https://git.example/$HOME", "https://git.example/a'b"),
        "https://me:hidden@git.example/x",
    ],
)
def test_what_is_no_address_of_a_repository(value: str) -> None:
    """In the clear, in a form that says less, or with what .env or Airflow would read as something else. A password
    is not repeated."""
    why = refused(f"DAGS_GIT_URL={value}")
    assert "write https://host/path" in why
    assert "hidden" not in why


@pytest.mark.parametrize("line", ["DAGS_GIT_REF=-x", "DAGS_GIT_SUBDIR=/x", "DAGS_GIT_SUBDIR=a/../.."])
def test_bad_names_in_a_repository(line: str) -> None:
    assert line in refused(line)


def test_an_empty_line_is_the_default() -> None:
    """A folder that is no name would be the clone itself."""
    empty = "".join(f"{key.upper()}=\n" for key in settings.Settings.model_fields)
    assert settings.parse(f"{empty}# a comment\n\n") == settings.DEFAULTS
    assert settings.parse("STACK_CPUS=auto") == settings.DEFAULTS


def test_a_missing_file_is_the_defaults_and_an_unreadable_one_is_refused(tmp_path: Path) -> None:
    """The message names the file; bytes that are no text do not end in a stack trace."""
    path = tmp_path / "stack.env"
    assert settings.load(path) == settings.DEFAULTS
    path.write_text("MLFLOW_PORT=5050\n")
    assert settings.load(path).mlflow_port == 5050
    path.write_bytes(b"MLFLOW_PORT=\xff\n")
    with pytest.raises(StackError, match=re.escape(f"{path} cannot be read")):
        settings.load(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(StackError, match=re.escape(f"{path} cannot be read")):
        settings.load(path)
