"""Secrets are made once, kept, and damage is noticed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from urllib.parse import urlparse

import pytest

from stack import lifecycle, secrets
from stack.errors import StackError
from stack.instance import Instance
from stack.settings import DEFAULTS


@pytest.fixture
def made(tmp_path: Path) -> Path:
    directory = tmp_path / "secrets"
    written = secrets.ensure(directory, DEFAULTS, secrets.check(directory, data_exists=False))
    assert set(written) == {*secrets.PRIMARY, *secrets.derived_names()}
    return directory


def test_a_second_run_writes_nothing(made: Path) -> None:
    before = {path: path.read_bytes() for path in made.iterdir()}
    assert secrets.ensure(made, DEFAULTS, secrets.check(made, data_exists=True)) == []
    assert {path: path.read_bytes() for path in made.iterdir()} == before


def test_modes(made: Path) -> None:
    """Nobody else enters the directory; in it, containers of any uid may read."""
    assert made.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in made.iterdir()} == {0o444}


def test_no_two_are_alike_and_none_is_short(made: Path) -> None:
    values = [(made / name).read_text() for name in secrets.PRIMARY]
    assert len(set(values)) == len(values)
    assert min(map(len, values)) >= 32


def test_passwords_need_no_quoting_anywhere(made: Path) -> None:
    """Letters and digits only: nothing that a URL, a shell, an ini file or argparse reads otherwise."""
    for name in secrets.PRIMARY:
        value = (made / name).read_text()
        assert value.isalnum() or name == "fernet_key", name


def test_urls_carry_the_passwords_unharmed(made: Path) -> None:
    url = urlparse((made / "airflow_db_url").read_text().replace("+psycopg2", ""))
    assert url.password == (made / "airflow_db_password").read_text()


def test_derived_files_follow_a_changed_primary(made: Path) -> None:
    (made / "redis_password").chmod(0o600)
    (made / "redis_password").write_text("another" * 6)
    assert set(secrets.ensure(made, DEFAULTS, [])) == {"redis_acl", "broker_url"}
    assert "another" not in (made / "redis_acl").read_text()


def test_derived_files_are_a_function_of_the_primary_ones(made: Path) -> None:
    """Rendered twice they are alike, and they are what stands in the files."""
    primary = {name: (made / name).read_text() for name in secrets.PRIMARY}
    first = secrets.derive(primary, DEFAULTS)
    assert secrets.derive(primary, DEFAULTS) == first
    assert {name: (made / name).read_text() for name in first} == first


def test_a_changed_file_keeps_its_inode(made: Path) -> None:
    """A running container sees the inode that was mounted, not the name."""
    before = (made / "redis_acl").stat().st_ino
    (made / "redis_password").chmod(0o600)
    (made / "redis_password").write_text("another" * 6)
    assert "redis_acl" in secrets.ensure(made, DEFAULTS, [])
    assert (made / "redis_acl").stat().st_ino == before


def test_modes_are_mended(made: Path) -> None:
    """After a restore from a backup, whatever modes that gave."""
    (made / "jwt_secret").chmod(0o600)
    (made / "broker_url").chmod(0o640)
    made.chmod(0o755)
    assert secrets.ensure(made, DEFAULTS, []) == []
    test_modes(made)


def test_what_is_no_secret_is_left_alone(made: Path) -> None:
    """A person's own files and folders, and what links lead to; nor do containers follow a change of theirs."""
    own = [made / "old" / "jwt_secret", made / "notes", made.parent / "elsewhere"]
    own[0].parent.mkdir()
    for path in own:
        path.touch(0o600)
    (made / "link").symlink_to(own[2])
    before = [path.stat().st_mode for path in (made / "old", *own)]
    digest = lifecycle._digest(made, only=secrets.names())
    assert secrets.ensure(made, DEFAULTS, secrets.check(made, data_exists=True)) == []
    assert [path.stat().st_mode for path in (made / "old", *own)] == before
    own[1].write_text("more")
    assert lifecycle._digest(made, only=secrets.names()) == digest


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_under_sudo_secrets_are_handed_over_and_nothing_else(made: Path) -> None:
    instance = Instance(made.parent)
    others = [made / "notes", made.parent / "elsewhere"]
    for path in (instance.settings_file, instance.env_file, *others):
        path.touch()
    (made / "link").symlink_to(others[1])
    os.chown(made.parent, 12345, 12345)
    lifecycle._hand_over(instance)
    assert {path.stat().st_uid for path in secrets.files(made)} == {12345}
    assert {path.stat().st_uid for path in others} == {0}


@pytest.mark.parametrize("name", ["jwt_secret", "broker_url", "dags_git_token"])
def test_a_link_in_a_secrets_place_is_refused(made: Path, name: str) -> None:
    """Modes, owners and contents would go to what it leads to."""
    (made / name).unlink(missing_ok=True)
    (made.parent / "elsewhere").write_text("x")
    (made / name).symlink_to(made.parent / "elsewhere")
    with pytest.raises(StackError, match=f"{name} cannot be read: it is a link") as refused:
        secrets.check(made, data_exists=True)
    assert refused.value.code == "E-SECRET"


def test_the_redis_acl_holds_no_password(made: Path) -> None:
    """Its hash only, and nobody gets in without one."""
    acl = (made / "redis_acl").read_text()
    assert (made / "redis_password").read_text() not in acl
    assert hashlib.sha256((made / "redis_password").read_bytes()).hexdigest() in acl
    assert "user default off" in acl


@pytest.mark.parametrize("content", [b"", b"  \n", b"\xff\xfe", b"a\0b"])
def test_damage_is_refused(made: Path, content: bytes) -> None:
    """Empty, not text, or with a NUL: never replaced in silence."""
    victim = made / "jwt_secret"
    victim.chmod(0o600)
    victim.write_bytes(content)
    for data_exists in (True, False):
        with pytest.raises(StackError, match="jwt_secret") as refused:
            secrets.check(made, data_exists=data_exists)
        assert refused.value.code == "E-SECRET"


@pytest.mark.parametrize(
    ("content", "fresh_only"),
    [
        (b"CorrectHorse12\r\n", False),
        (b"CorrectHorse12 ", False),
        (b"Correct\tHorse12\n", False),
        (b"TooShort\n", True),
        (b"Correct Horse12\n", None),
    ],
)
def test_a_first_password_of_ones_own(made: Path, content: bytes, *, fresh_only: bool | None) -> None:
    """Refused where a container would read another one than we do, or MLflow would not take it: before anything is
    made with it. A short one may be in use, MLflow's rule is younger than some stacks."""
    path = made / "admin_password"
    path.chmod(0o600)
    path.write_bytes(content)
    for data_exists in (True, False):
        if fresh_only is None or (fresh_only and data_exists):
            assert secrets.check(made, data_exists=data_exists) == []
            continue
        with pytest.raises(StackError, match="admin_password cannot be used") as refused:
            secrets.check(made, data_exists=data_exists)
        assert refused.value.code == "E-SECRET"


KEY = "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="
OWN = [
    *(("airflow_db_password", f"LongEnough{character}12", False) for character in "@/%[]"),
    ("mlflow_auth_db_password", "Long:+=$Enough #12", True),
    *(("redis_password", f"LongEnough{character}12", False) for character in "@/?#%[]"),
    ("postgres_password", "Any/thing@all", True),
    ("flower_password", "one,two", False),
    ("flower_password", "one/two", True),
    ("minio_root_password", "seven77", False),
    ("pipelines_s3_secret", "seven77", False),
    ("pipelines_s3_secret", "eight/8+", True),
    ("mlflow_airflow_password", "ElevenOnly1", False),
    ("jwt_secret", "any/thing+of=base64", True),
    ("fernet_key", KEY, True),
    ("fernet_key", f"{KEY},{KEY}", True),
    ("fernet_key", "a-passphrase", False),
    ("fernet_key", KEY[:-4], False),
    ("fernet_key", f"{KEY},", False),
]


@pytest.mark.parametrize(("name", "text", "usable"), OWN)
def test_a_secret_of_ones_own_that_no_service_could_use(made: Path, name: str, text: str, *, usable: bool) -> None:
    """Refused before a cluster is made with it; where there is data it is left to its services, as before."""
    (made / name).chmod(0o600)
    (made / name).write_text(f"{text}\n")
    assert secrets.check(made, data_exists=True) == []
    if usable:
        assert secrets.check(made, data_exists=False) == []
        return
    with pytest.raises(StackError, match=f"{name} cannot be used") as refused:
        secrets.check(made, data_exists=False)
    assert refused.value.code == "E-SECRET"
    assert text not in str(refused.value)


def test_what_another_has_made_meanwhile_stays(made: Path) -> None:
    """Two `make up` at the same moment: the one that comes later has the other's secrets."""
    before = {path: path.read_bytes() for path in made.iterdir()}
    assert secrets.ensure(made, DEFAULTS, list(secrets.PRIMARY)) == []
    assert {path: path.read_bytes() for path in made.iterdir()} == before


def test_removing_them_leaves_what_is_no_secret(made: Path) -> None:
    (made / "notes").touch()
    (made / ".jwt_secret.new").touch()
    for name in ("broker_url", "fernet_key"):
        (made / name).unlink()
    (made / "broker_url").mkdir()
    (made / "fernet_key").symlink_to(made / "notes")
    secrets.remove(made)
    assert [path.name for path in made.iterdir()] == ["notes"]
    (made / "notes").unlink()
    secrets.remove(made)
    assert not made.exists()
    secrets.remove(made)


def test_a_directory_in_a_secrets_place_is_refused(made: Path) -> None:
    """What the engine makes of a missing file that it was told to mount."""
    (made / "jwt_secret").unlink()
    (made / "jwt_secret").mkdir()
    with pytest.raises(StackError, match="cannot be read"):
        secrets.check(made, data_exists=False)


def test_a_lost_secret_is_refused_only_where_there_is_data(made: Path) -> None:
    (made / "fernet_key").unlink()
    assert secrets.check(made, data_exists=False) == ["fernet_key"]
    with pytest.raises(StackError, match="fernet_key") as refused:
        secrets.check(made, data_exists=True)
    assert refused.value.code == "E-SECRET-LOST"
    assert not (made / "fernet_key").exists()


def test_a_stack_older_than_a_secret_gets_it(made: Path) -> None:
    """Where nothing was written with it: only those, each by its name, and the others stay as they are."""
    before = {path: path.read_bytes() for path in made.iterdir() if path.name not in secrets.RENEWABLE}
    for name in secrets.RENEWABLE:
        (made / name).unlink()
    missing = secrets.check(made, data_exists=True)
    assert set(missing) == secrets.RENEWABLE < set(secrets.PRIMARY)
    assert set(secrets.ensure(made, DEFAULTS, missing)) == secrets.RENEWABLE
    assert {path: path.read_bytes() for path in before} == before
