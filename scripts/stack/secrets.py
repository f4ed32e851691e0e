"""The stack's secrets: made once, one file each, never printed, logged or put on a command line.

*Primary* secrets are random. *Given* ones the operator writes, where a setting needs them. *Derived* ones (URLs,
connection documents, an ACL) are rendered from both at every `make init`, so that each consumer mounts one ready file.

Files are 0444 inside a 0700 directory: the directory keeps other users of the host out, and each
container, whatever its uid, can read the files that are mounted into it. What else is in there is left alone.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import secrets as random
import stat
import string
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

from stack import dags
from stack.errors import StackError
from stack.settings import Settings

_MODE = 0o444
_ALPHABET = string.ascii_letters + string.digits


def _password(length: int = 33) -> str:
    # 33 characters of 62: 196 bits, and none that a URL, an ini file or a command line would read
    # as something else (a leading dash, say).
    return "".join(random.choice(_ALPHABET) for _ in range(length))


def _fernet_key() -> str:
    return base64.urlsafe_b64encode(random.token_bytes(32)).decode()


PRIMARY: Mapping[str, Callable[[], str]] = {
    "admin_password": _password,
    "postgres_password": _password,
    "airflow_db_password": _password,
    "celery_db_password": _password,
    "mlflow_db_password": _password,
    "mlflow_auth_db_password": _password,
    "redis_password": _password,
    "minio_root_password": _password,
    "mlflow_s3_secret": _password,
    "airflow_logs_s3_secret": _password,
    "pipelines_s3_secret": _password,
    "serving_s3_secret": _password,
    "fernet_key": _fernet_key,
    # Signs with SHA-512, and warns in each log of less than its 64 bytes.
    "jwt_secret": partial(_password, 64),
    "api_secret_key": _password,
    "mlflow_flask_secret": _password,
    "mlflow_kek_passphrase": _password,
    "mlflow_airflow_password": _password,
    "mlflow_serving_password": _password,
    "serving_token": _password,
    "flower_password": _password,
}
"""Name -> how to make it. A name is a file in secrets/ and a secret in compose/secrets.yaml."""

SHORTEST = 12
"""Characters of a password in MLflow (`_validate_password` of its server/auth)."""
SHORTEST_S3 = 8
"""Characters of a secret in MinIO."""

RENEWABLE = frozenset({"serving_s3_secret", "mlflow_serving_password", "serving_token"})
"""Made where they are missing, although there is data: `make up` sets them anew in MLflow and in the store, and
nothing was written with them. So a stack gets them that is older than they are."""


def derive(
    primary: Mapping[str, str], settings: Settings, given: Mapping[str, str] = MappingProxyType({})
) -> dict[str, str]:
    """The files that follow from the primary and the given secrets; the same input gives the same bytes."""

    def database(name: str) -> str:
        return f"postgresql+psycopg2://{name}:{primary[f'{name}_db_password']}@postgres:5432/{name}"

    def s3_connection(identity: str) -> str:
        return json.dumps(
            {
                "conn_type": "aws",
                "login": identity,
                "password": primary[f"{identity.replace('-', '_')}_s3_secret"],
                "extra": {
                    "endpoint_url": "http://minio:9000",
                    "region_name": "us-east-1",
                    # A log upload holds its worker slot: an unreachable store must not hold it long.
                    "config_kwargs": {"connect_timeout": 3, "read_timeout": 30, "retries": {"total_max_attempts": 3}},
                },
            }
        )

    redis_hash = hashlib.sha256(primary["redis_password"].encode()).hexdigest()
    login = base64.b64encode(f"airflow:{primary['mlflow_airflow_password']}".encode()).decode()
    return {
        "airflow_db_url": database("airflow"),
        "celery_result_url": f"db+{database('celery')}",
        "mlflow_backend_url": database("mlflow"),
        "mlflow_auth_ini": "\n".join(
            [
                "[mlflow]",
                "default_permission = READ",
                f"database_uri = {database('mlflow_auth')}",
                f"admin_username = {settings.admin_user}",
                "authorization_function = mlflow.server.auth:authenticate_request_basic_auth",
                # A password check costs 50 ms of CPU; a changed one is known everywhere this soon.
                "auth_cache_ttl_seconds = 30",
            ]
        ),
        "mlflow_probe_header": f"Authorization: Basic {login}",
        "redis_acl": "\n".join(
            [
                "user default off",
                # A queue's commands; none that reads or changes the server's configuration.
                f"user airflow on #{redis_hash} ~* &* +@all -@admin -@dangerous +info",
            ]
        ),
        "broker_url": f"redis://airflow:{primary['redis_password']}@redis:6379/0",
        "conn_stack_logs": s3_connection("airflow-logs"),
        "conn_stack_data": s3_connection("pipelines"),
        "flower_basic_auth": f"{settings.admin_user}:{primary['flower_password']}",
        **({"conn_dags_git": dags.connection(settings, given)} if settings.dags_git_url else {}),
    }


def derived_names() -> list[str]:
    """The names of the derived files."""
    from stack.settings import DEFAULTS

    return list(derive(dict.fromkeys(PRIMARY, "x"), DEFAULTS))


def names() -> list[str]:
    """The names of all files that are secrets of the stack; a stack need not have each of them."""
    return [*PRIMARY, *derived_names(), *dags.SECRETS]


def files(directory: Path) -> list[Path]:
    """The secrets that are there, as regular files."""
    paths = [directory / name for name in names()]
    return [path for path in paths if stat.S_ISREG(_mode(path))]


def _mode(path: Path) -> int:
    """A file's kind and mode, not those of what it links to; 0 where it cannot be known."""
    try:
        return path.lstat().st_mode
    except OSError:
        return 0


def given(directory: Path) -> dict[str, str]:
    """The secrets that the operator has written. Raises StackError (E-SECRET) for a damaged one. Changes nothing."""
    found = {name: _read(directory / name) for name in dags.GIVEN}
    return {name: text for name, text in found.items() if text is not None}


def check(directory: Path, *, data_exists: bool) -> list[str]:
    """The primary secrets that are not there yet. Changes nothing.

    Raises StackError: E-SECRET for a file that is empty, unreadable, a link or of no use, E-SECRET-LOST for a missing
    one while volumes of this stack exist, whose data was written with it.
    """
    for path in (directory / name for name in names()):
        if (mode := _mode(path)) and not stat.S_ISREG(mode):
            raise StackError(
                "E-SECRET",
                f"the secret {path} cannot be read: it is {'a link' if stat.S_ISLNK(mode) else 'no file'}",
                why="what it leads to would be written, and get modes and an owner that are meant for a secret"
                if stat.S_ISLNK(mode)
                else "the engine makes a directory of a file that it is told to mount and does not find",
                fix=f"put the file itself in its place; where you have none, see what is in '{path}' and remove it",
            )
    missing = [name for name in PRIMARY if _read(directory / name) is None]
    for name in PRIMARY.keys() - missing:
        _check_form(directory / name, fresh=not data_exists)
    lost = [name for name in missing if name not in RENEWABLE]
    if lost and data_exists:
        raise StackError(
            "E-SECRET-LOST",
            f"secret(s) missing while this stack has data: {', '.join(lost)}",
            why="the data in the volumes was written with them; new ones would not open it",
            fix=f"put them back into {directory} from your backup.\n"
            "Where another directory's stack has this name, give this one a STACK_NAME of its own.\n"
            "Without a backup: `make clean` deletes the data, and the next `make up` begins anew",
        )
    return missing


def _check_form(path: Path, *, fresh: bool) -> None:
    """Raises StackError (E-SECRET) for one that a container reads otherwise than we do (it drops line feeds at the
    end, and nothing else), and, of a fresh stack, for one that a service could not use. Where there is data, it may be
    another's by now, or has proved itself."""
    text = path.read_bytes().decode().rstrip("\n")
    if text != text.strip() or not text.isprintable():
        why = "it begins or ends with a blank, or has a control character in it: a carriage return, say"
    elif not fresh or not (why := _useless(path.name, text)):
        return
    fix = "write it anew, as one line of text"
    if not fresh:
        fix += ".\nA login that was made with it keeps it, blanks and all: change it in the web pages, too"
    raise StackError("E-SECRET", f"the secret {path} cannot be used", why=why, fix=fix)


def _useless(name: str, text: str) -> str:
    """Why a service could not use a primary secret of this text; empty where it can. What may work is not refused,
    however odd: the secrets of a restored stack are there before its data."""
    if name in ("admin_password", "mlflow_airflow_password", "mlflow_serving_password") and len(text) < SHORTEST:
        return f"it has {len(text)} characters; MLflow takes {SHORTEST} or more"
    if (name == "minio_root_password" or name.endswith("_s3_secret")) and len(text) < SHORTEST_S3:
        return f"it has {len(text)} characters; MinIO takes {SHORTEST_S3} or more"
    # What stands in a URL as it is; Flower takes a list of logins.
    special = {"redis_password": "@/?#%[]", "flower_password": ","}.get(name, "@/%[]" if "_db_" in name else "")
    if set(special) & set(text):
        return f"it has one of the characters {special} in it, which mean something else where it is read"
    if name == "fernet_key":
        try:
            # Several, separated by commas, where keys were rotated.
            good = all(len(base64.urlsafe_b64decode(key)) == 32 for key in text.split(","))
        except ValueError:
            good = False
        if not good:
            return "it is no Fernet key: 32 bytes as URL-safe base64, 44 characters"
    return ""


def _read(path: Path) -> str | None:
    """A secret's text; None where there is no such file. Raises StackError (E-SECRET) for a damaged one."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise StackError(
            "E-SECRET",
            f"the secret {path} cannot be read",
            why=str(error),
            fix=f"make it readable: chmod u+r '{path}'; after a run with sudo: chown -R $(id -u) '{path.parent}'",
        ) from error
    if not text or "\x00" in text:
        raise StackError(
            "E-SECRET",
            f"the secret {path} is empty",
            why="a service that starts with it would lock itself out of its own data",
            fix="put its content back from your backup of secrets/; on a stack without data, delete the file",
        )
    return text


def ensure(directory: Path, settings: Settings, missing: list[str]) -> list[str]:
    """Creates the missing primary secrets, renders the derived ones; returns what it wrote."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)
    held = os.open(directory, os.O_RDONLY)
    try:
        # Another `make up`, begun at the same moment, may have made some since, and started with them.
        fcntl.flock(held, fcntl.LOCK_EX)
        return _ensure(directory, settings, [name for name in missing if not (directory / name).exists()])
    finally:
        os.close(held)


def _ensure(directory: Path, settings: Settings, missing: list[str]) -> list[str]:
    written = []
    for name in missing:
        _write(directory / name, PRIMARY[name]())
        written.append(name)
    for path in files(directory):
        # Put back from a backup they may have any mode; containers could not read them.
        if _mode(path) & 0o777 != _MODE:
            path.chmod(_MODE)
    primary = {name: (directory / name).read_text(encoding="utf-8").strip() for name in PRIMARY}
    derived = derive(primary, settings, given(directory) if settings.dags_git_url else {})
    if "conn_dags_git" not in derived:
        # It holds a copy of the token or the key.
        (directory / "conn_dags_git").unlink(missing_ok=True)
    for name, text in derived.items():
        path = directory / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            _write(path, text)
            written.append(name)
    return written


def remove(directory: Path) -> None:
    """Removes the stack's secrets, what has their place, and the directory; what else is in there stays, and it."""
    for path in (directory / name for name in names()):
        _partial(path).unlink(missing_ok=True)
        if stat.S_ISDIR(_mode(path)):
            with contextlib.suppress(OSError):
                path.rmdir()
        else:
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        directory.rmdir()


def _partial(path: Path) -> Path:
    """Where a secret is written before it is complete."""
    return path.with_name(f".{path.name}.new")


def _write(path: Path, text: str) -> None:
    """Writes a secret file, readable by all who may enter its directory.

    An existing file keeps its inode: a bind mount shows a running container the inode, not the name.
    """
    if path.exists():
        path.chmod(0o600)
        path.write_text(text, encoding="utf-8")
    else:
        # Complete before it has its name: an interrupted run leaves no half of a secret.
        _partial(path).write_text(text, encoding="utf-8")
        _partial(path).replace(path)
    path.chmod(_MODE)
