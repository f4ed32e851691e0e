"""The operator's choices: stack.env, read strictly.

Every key has a default, a section and a sentence; `make init` writes them as a commented file.
Unknown keys and malformed values are refused by name, all of them at once.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from stack.errors import StackError

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_size(text: str) -> int:
    """Bytes of a size such as `6g`, `6GiB`, `512m` or `6442450944`; ValueError for anything else."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if not match:
        raise ValueError("not a size: write a number and a unit, such as 6g or 6144m")
    return int(float(match[1]) * _UNITS[match[2]])


def _size(value: Any) -> int | None:
    if value in ("", "auto", None):
        return None
    return value if isinstance(value, int) else parse_size(str(value))


def parse_cpus(value: Any) -> float | None:
    """A number of CPUs, or None for `auto`; ValueError for anything else."""
    if value in ("", "auto", None):
        return None
    try:
        number = float(value)
    except ValueError:
        raise ValueError("not a number of CPUs: write 2 or 1.5, or leave it empty") from None
    if not 0.5 <= number <= 1024:
        raise ValueError("must be between 0.5 and 1024")
    return number


def _port(value: Any) -> int:
    if not re.fullmatch(r"\d+", str(value)) or not 1 <= int(value) <= 65535:
        raise ValueError("not a port: write a whole number from 1 to 65535")
    return int(value)


def _address(value: str) -> str:
    try:
        return str(ipaddress.IPv4Address(value))
    except ValueError:
        raise ValueError("not an IPv4 address: write 127.0.0.1, or another of 127.0.0.0/8") from None


def _loopback(value: str) -> str:
    # Decision: nothing listens beyond loopback without TLS in front; see docs/security.md.
    if not ipaddress.IPv4Address(value).is_loopback:
        raise ValueError(
            "only loopback addresses so far: logins would cross the network in the clear. "
            "Use an SSH tunnel (docs/security.md)"
        )
    return value


def _matching(pattern: str, hint: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(hint)
        return value

    return AfterValidator(check)


# Nothing in it that Compose, Airflow's configuration or a shell would read as something else, and no password.
_GIT_PATH = r"[A-Za-z0-9._~+%@-]+(/[A-Za-z0-9._~+%@-]+)*/?"
_GIT_HOST = r"[A-Za-z0-9][A-Za-z0-9.-]*(:\d{1,5})?"
_GIT_URL = "|".join(
    [
        "",
        rf"https://([A-Za-z0-9._-]+@)?{_GIT_HOST}/{_GIT_PATH}",
        rf"ssh://[A-Za-z0-9._-]+@{_GIT_HOST}/{_GIT_PATH}",
        rf"file:///{_GIT_PATH}",
    ]
)
_GIT_NAME = r"[A-Za-z0-9_][A-Za-z0-9._+-]*(/[A-Za-z0-9_][A-Za-z0-9._+-]*)*"


Size = Annotated[int | None, BeforeValidator(_size)]
Port = Annotated[int, BeforeValidator(_port)]
Address = Annotated[str, AfterValidator(_address), AfterValidator(_loopback)]


class Settings(BaseModel):
    """Every key of stack.env. Field titles are the sections of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    stack_name: Annotated[
        str, _matching(r"[a-z0-9][a-z0-9_-]{0,30}", "lower-case letters, digits, - and _ only, at most 31")
    ] = Field(
        "mlstack", title="The stack", description="Name of the Compose project: prefix of containers and volumes."
    )
    stack_memory: Size = Field(
        None,
        title="The stack",
        description="Memory for the whole stack, such as 8g. Empty: what the host has, less a reserve.",
    )
    stack_cpus: Annotated[float | None, BeforeValidator(parse_cpus)] = Field(
        None, title="The stack", description="CPUs to plan for. Empty: those of the host."
    )
    worker_memory: Size = Field(
        None,
        title="The stack",
        description="Memory for the Celery worker, which runs the tasks. Empty: what the others cannot use.",
    )
    task_memory: Size = Field(
        None,
        title="The stack",
        description="Memory for each task that does not ask for more itself, such as 400m. Empty: an equal share.",
    )
    retry_with_more_memory: Literal["on", "off"] = Field(
        "on", title="The stack", description="on: the retry of a task that ran out of memory gets twice as much."
    )
    admin_user: Annotated[
        str,
        _matching(
            r"(?!(?:airflow|serving)$)[A-Za-z0-9][A-Za-z0-9._-]{0,63}",
            "letters, digits, dot, - and _ only, at most 64; not airflow or serving, which are the stack's own logins",
        ),
    ] = Field(
        "admin", title="The stack", description="First login of Airflow and of MLflow; set before the first `make up`."
    )

    bind_address: Address = Field(
        "127.0.0.1", title="Addresses", description="Where the web pages listen. Loopback only; see docs/security.md."
    )
    airflow_port: Port = Field(8080, title="Addresses", description="Airflow's web pages and REST API.")
    mlflow_port: Port = Field(5000, title="Addresses", description="MLflow's web pages, tracking and artifact API.")
    flower: Literal["on", "off"] = Field(
        "off", title="Addresses", description="Flower, the monitor of the Celery queue: on or off."
    )
    flower_port: Port = Field(5555, title="Addresses", description="Flower's web pages, where it is on.")
    serving: Literal["on", "off"] = Field(
        "off", title="Addresses", description="Predictions over HTTP from a registered model: on or off."
    )
    serving_port: Port = Field(5002, title="Addresses", description="The predictions' HTTP API, where it is on.")

    serving_model: Annotated[
        str, _matching(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", "letters, digits, dot, - and _ only, at most 64")
    ] = Field(
        "tumour-classifier", title="The served model", description="The registered model that answers, by its name."
    )
    serving_alias: Annotated[
        str, _matching(r"[A-Za-z][A-Za-z0-9_-]{0,63}", "a letter, then letters, digits, - and _ only, at most 64")
    ] = Field(
        "champion",
        title="The served model",
        description="Its version with this alias answers; moving the alias moves the answers.",
    )

    dags_dir: str = Field(
        "./dags", title="Your code", description="Your DAGs; seen by Airflow within seconds of a change."
    )
    dags_git_url: Annotated[
        str,
        _matching(
            _GIT_URL,
            "write https://host/path, ssh://user@host/path or file:///folder; a token belongs into "
            "secrets/dags_git_token, a key into secrets/dags_git_key (docs/operate.md)",
        ),
    ] = Field(
        "",
        title="Your code",
        description="A Git repository to take DAGs from instead: https://, ssh:// or file:/// (docs/operate.md).",
    )
    dags_git_ref: Annotated[str, _matching(_GIT_NAME, "not the name of a branch or tag")] = Field(
        "main", title="Your code", description="The branch or tag of that repository."
    )
    dags_git_subdir: Annotated[
        str, _matching(rf"|{_GIT_NAME}", "not a folder in the repository: write its path, such as team/dags")
    ] = Field("", title="Your code", description="The folder of that repository with the DAGs. Empty: all of it.")
    plugins_dir: str = Field(
        "./plugins", title="Your code", description="Your Airflow plugins; read at the next `make restart`."
    )

    image_prefix: Annotated[
        str,
        _matching(
            r"[a-z0-9][a-z0-9._-]*(:\d+)?(/[a-z0-9][a-z0-9._-]*)*",
            "not an image prefix: write name or registry.example.com:5000/team",
        ),
    ] = Field("mlstack", title="Images", description="Prefix of the image names; a registry of yours for `make push`.")
    image_source: Literal["build", "pull"] = Field(
        "build",
        title="Images",
        description="build: made here from Debian, PyPI and Go modules. pull: from IMAGE_PREFIX.",
    )
    base_image: str = Field(
        "debian:trixie-slim",
        title="Images",
        description="Debian 13 base. Where no registry gives the default, it is bootstrapped from the Debian mirror.",
    )

    install_engine: Literal["auto", "never"] = Field(
        "auto",
        title="Host and network",
        description="auto: as root on Debian or Ubuntu, a missing Docker Engine is installed and started.",
    )
    apt_mirror: str = Field(
        "", title="Host and network", description="Debian mirror for the images. Empty: Debian's own."
    )
    pip_index_url: str = Field("", title="Host and network", description="Python package index. Empty: PyPI.")
    goproxy: str = Field("", title="Host and network", description="Go module proxy. Empty: Go's default.")
    ca_bundle: str = Field(
        "",
        title="Host and network",
        description="CA certificates (PEM) for the builds and DAGS_GIT_URL. Empty: the host's own bundle.",
    )

    @property
    def host(self) -> str:
        """What the pages' addresses begin with: a second stack may have the same ports at another loopback address."""
        return "localhost" if self.bind_address == "127.0.0.1" else self.bind_address

    @property
    def airflow_url(self) -> str:
        """Where Airflow listens, as seen from this host."""
        return f"http://{self.host}:{self.airflow_port}"

    @property
    def mlflow_url(self) -> str:
        """Where MLflow listens, as seen from this host."""
        return f"http://{self.host}:{self.mlflow_port}"

    @property
    def serving_url(self) -> str:
        """Where the predictions' API listens, where it is on, as seen from this host."""
        return f"http://{self.host}:{self.serving_port}"

    @property
    def opted(self) -> tuple[str, ...]:
        """The opt-in services that are on: names of Compose profiles, and of what the memory plan counts for them."""
        return tuple(name for name, state in (("flower", self.flower), ("serving", self.serving)) if state == "on")

    @property
    def ports(self) -> dict[str, int]:
        """Key -> port of every page and API that is published."""
        found = {"AIRFLOW_PORT": self.airflow_port, "MLFLOW_PORT": self.mlflow_port}
        if self.flower == "on":
            found["FLOWER_PORT"] = self.flower_port
        if self.serving == "on":
            found["SERVING_PORT"] = self.serving_port
        return found


DEFAULTS = Settings.model_construct(**{name: field.default for name, field in Settings.model_fields.items()})


def parse(text: str, source: str = "stack.env") -> Settings:
    """Settings of a stack.env's text. Raises StackError (E-SETTING) that names every bad line."""
    known = {name.upper(): name for name in Settings.model_fields}
    values: dict[str, str] = {}
    problems: list[str] = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        key, separator, value = line.partition("=")
        key = key.strip()
        if not separator:
            problems.append(f"line {number}: {line!r} is not KEY=value")
        elif key not in known:
            near = difflib.get_close_matches(key.upper(), known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"line {number}: unknown key {key}{hint}")
        elif known[key] in values:
            problems.append(f"line {number}: {key} is set twice")
        else:
            values[known[key]] = value.strip().strip("'\"")
    settings = DEFAULTS
    try:
        # An empty line takes the default.
        settings = Settings.model_validate({key: value for key, value in values.items() if value})
    except ValidationError as error:
        problems += [
            f"{str(problem['loc'][0]).upper()}={_shown(problem['input'])}: "
            f"{problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()
        ]
    ports = settings.ports
    if len(set(ports.values())) != len(ports):
        problems.append("ports must differ: " + ", ".join(f"{key}={port}" for key, port in ports.items()))
    if problems:
        raise StackError(
            "E-SETTING",
            f"{source} has {len(problems)} setting(s) that cannot be used",
            why="\n".join(problems),
            fix=f"correct {source}; an empty or commented line takes the default",
        )
    return settings


def _shown(value: Any) -> str:
    """A value as an error may show it: without the password of an address."""
    return re.sub(r"(//[^/@:]*):[^/@]*@", r"\1:...@", str(value))


def load(path: Path) -> Settings:
    """Settings of a file; the defaults where there is none."""
    if not path.exists():
        return DEFAULTS
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise StackError(
            "E-SETTING", f"{path} cannot be read", why=str(error), fix="make it a readable text file, or remove it"
        ) from error


def render_defaults() -> str:
    """The text of a fresh stack.env: every key, commented out, with its meaning, in sections."""
    lines = [
        "# Your choices for this stack. Every line is optional: what is commented out is the default.",
        "# After a change: make up",
    ]
    section = None
    for name, field in Settings.model_fields.items():
        if field.title != section:
            section = field.title
            lines += ["", f"## {section}"]
        default = "" if field.default is None else field.default
        lines += [f"# {field.description}", f"#{name.upper()}={default}"]
    return "\n".join(lines) + "\n"
