"""DAGs from a Git repository (DAGS_GIT_URL) in place of the mounted folder.

Airflow's own Git bundle does the work (dockerfiles/airflow/dagsource). Only the DAG processor asks the repository, and
only it has the credentials. It keeps a copy, which the worker takes its versions from: users' tasks hold no token, and
start while the repository does not answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from stack import images
from stack.console import say
from stack.errors import Exit, StackError
from stack.process import capture
from stack.settings import Settings

BUNDLE = "dags-git"
CONNECTION = "dags_git"
REFRESH_S = 10
"""Seconds between two looks at the repository."""
STORAGE = PurePosixPath("/var/lib/dag-bundles")
"""Where a service has its own copy and checkouts."""
SOURCE = PurePosixPath("/var/lib/dag-source")
"""Where the others see what the DAG processor has there."""
MOUNTED = PurePosixPath("/srv/dags.git")
"""Where a folder of this host is in the containers; dockerfiles/airflow/gitconfig trusts it."""
CA = PurePosixPath("/run/git-ca.pem")
KNOWN_HOSTS = PurePosixPath("/run/secrets/dags_git_known_hosts")
GIVEN = ("dags_git_token", "dags_git_key", "dags_git_known_hosts")
"""Secrets that the operator writes, where the repository needs them."""
SECRETS = (*GIVEN, "conn_dags_git")
"""All secrets that concern the repository, and so nobody but the DAG processor."""


def scheme(settings: Settings) -> str:
    """How the repository is reached: https, ssh, file; empty where there is none."""
    return urlsplit(settings.dags_git_url).scheme


def overlays(settings: Settings) -> tuple[str, ...]:
    """The Compose files that the repository needs beside the others."""
    if not settings.dags_git_url:
        return ()
    more = {
        "https": ["compose/overlays/git-https.yaml"] if images.ca_bundle(settings) else [],
        "ssh": ["compose/overlays/git-ssh.yaml"],
        "file": ["compose/overlays/git-folder.yaml"],
    }
    return ("compose/overlays/git.yaml", *more[scheme(settings)])


def variables(settings: Settings) -> dict[str, str]:
    """What these Compose files refer to; the same settings give the same."""
    if not settings.dags_git_url:
        return {}
    # In a storage that was made for another repository or branch, Airflow would go on with that one, or fail.
    key = hashlib.sha256(f"{settings.dags_git_url} {settings.dags_git_ref}".encode()).hexdigest()[:12]
    copy = SOURCE / key / BUNDLE
    found = {
        "DAG_BUNDLES": _bundles(settings, _address(settings)),
        "DAG_BUNDLES_COPY": _bundles(settings, f"file://{copy / 'bare'}"),
        "DAG_BUNDLE_STORAGE": str(STORAGE / key),
        "DAG_COPY": str(copy / "tracking_repo" / settings.dags_git_subdir),
    }
    if scheme(settings) == "file":
        found["DAGS_GIT_FOLDER"] = str(_folder(settings))
    if scheme(settings) == "https" and (bundle := images.ca_bundle(settings)):
        found["DAGS_GIT_CA"] = str(Path(bundle).resolve())
    return found


def _address(settings: Settings) -> str:
    """The repository, as the DAG processor sees it."""
    return f"file://{MOUNTED}" if scheme(settings) == "file" else settings.dags_git_url


def _folder(settings: Settings) -> Path:
    return Path(urlsplit(settings.dags_git_url).path)


def _bundles(settings: Settings, address: str) -> str:
    """Airflow's dag_bundle_config_list."""
    words: dict[str, str | int] = {
        "repo_url": address,
        "tracking_ref": settings.dags_git_ref,
        "git_conn_id": CONNECTION,
        "refresh_interval": REFRESH_S,
    }
    if settings.dags_git_subdir:
        words["subdir"] = settings.dags_git_subdir
    return json.dumps([{"name": BUNDLE, "classpath": "dagsource.CommitBundle", "kwargs": words}])


def connection(settings: Settings, given: Mapping[str, str]) -> str:
    """Airflow's connection to the repository, as JSON. Raises StackError (E-DAGS-GIT-LOGIN, E-DAGS-GIT) where a
    secret is missing without which no attempt can succeed."""
    document: dict[str, object] = {"conn_type": "git"}
    if scheme(settings) == "https" and "dags_git_token" in given:
        document |= {"login": _user(settings), "password": given["dags_git_token"]}
    if scheme(settings) == "ssh":
        if "dags_git_key" not in given:
            raise StackError(
                "E-DAGS-GIT-LOGIN",
                f"there is no key for {settings.dags_git_url}",
                why="ssh logs in with a key; secrets/dags_git_key does not exist",
                fix="write a private key without a passphrase to secrets/dags_git_key, and its public half to the "
                "repository's host (a deploy key that may only read)",
            )
        if "dags_git_known_hosts" not in given:
            raise StackError(
                "E-DAGS-GIT",
                f"the host key of {urlsplit(settings.dags_git_url).hostname} is not known",
                why="whoever answered in that host's place could run code in Airflow; "
                "secrets/dags_git_known_hosts does not exist",
                fix=f"ssh-keyscan {_scan(settings)} > secrets/dags_git_known_hosts, and compare that with what the "
                "host's owner publishes",
            )
        document["extra"] = {
            "private_key": given["dags_git_key"] + "\n",
            "strict_host_key_checking": "yes",
            "known_hosts_file": str(KNOWN_HOSTS),
        }
    return json.dumps(document)


def _user(settings: Settings) -> str:
    """The login's name: what stands in the address, or what any host takes beside a token."""
    return urlsplit(settings.dags_git_url).username or "git"


def _scan(settings: Settings) -> str:
    parts = urlsplit(settings.dags_git_url)
    return f"-p {parts.port} {parts.hostname}" if parts.port else str(parts.hostname)


def check_folder(settings: Settings) -> None:
    """Raises StackError (E-DAGS-GIT) where a repository on this host is not there."""
    if scheme(settings) == "file" and not _folder(settings).is_dir():
        raise StackError(
            "E-DAGS-GIT",
            f"DAGS_GIT_URL={settings.dags_git_url}: {_folder(settings)} is not a directory",
            why="it is mounted into the DAG processor",
            fix="correct DAGS_GIT_URL in stack.env",
        )


def check(
    settings: Settings, given: Mapping[str, str], image: str, *, accepted: bool = False, changed: str = "nothing"
) -> None:
    """Asks the repository for the branch or tag, in Airflow's image, with the credentials that Airflow will have.

    Raises StackError: E-DAGS-GIT-LOGIN, E-DAGS-GIT-REF, or E-DAGS-GIT for anything else. A repository that was
    `accepted` before and does not answer now is only told: an outage of its host must not keep the stack down.
    """
    question = {
        "url": _address(settings),
        "ref": settings.dags_git_ref,
        "user": _user(settings),
        "token": given.get("dags_git_token", "") if scheme(settings) == "https" else "",
        "key": given.get("dags_git_key", "") + "\n" if scheme(settings) == "ssh" else "",
        "known_hosts": given.get("dags_git_known_hosts", "") + "\n",
    }
    # On standard input: an argument or a variable would show the secrets to everybody on this host.
    told = capture(_command(settings, image), timeout=90, stdin=json.dumps(question))
    answer = json.loads(told.out)
    if not answer["problem"]:
        return
    if accepted and answer["problem"] == "unreachable":
        say(f"warning: {settings.dags_git_url} does not answer ({_first(answer['said'])}); DAGs stay as they were")
        return
    raise _error(settings, answer["problem"], answer["said"], answer["refs"], changed)


def _command(settings: Settings, image: str) -> list[str]:
    """`docker run` for dags-git-check: on the network of the DAG processor, once that is there."""
    network = f"{settings.stack_name}_frontend"
    if capture(["docker", "network", "inspect", network], timeout=30, check=False).code != 0:
        network = "bridge"
    mounts = []
    if scheme(settings) == "file":
        mounts = ["--mount", f"type=bind,source={_folder(settings)},target={MOUNTED},readonly"]
    elif bundle := variables(settings).get("DAGS_GIT_CA"):
        mounts = ["--mount", f"type=bind,source={bundle},target={CA},readonly", "--env", f"GIT_SSL_CAINFO={CA}"]
    return [
        *("docker", "run", "--rm", "--interactive", "--network", network, "--sysctl", "net.ipv4.tcp_syn_retries=2"),
        *("--read-only", "--tmpfs", "/tmp:size=1m,mode=1777", "--memory", "256m", "--pids-limit", "64"),
        *("--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
        *(*mounts, "--entrypoint", "dags-git-check", image),
    ]


def _first(text: str) -> str:
    return (text.splitlines() or ["it said nothing"])[0]


def _error(settings: Settings, problem: str, said: str, refs: list[str], changed: str) -> StackError:
    """What is wrong with the repository, as the operator must hear it."""
    url, ref = settings.dags_git_url, settings.dags_git_ref
    login = "secrets/dags_git_key" if scheme(settings) == "ssh" else "secrets/dags_git_token"
    code, what, fix = {
        "login": (
            "E-DAGS-GIT-LOGIN",
            f"{url} does not accept these credentials, or asks for some",
            f"rm -f {login} (make up made it read-only), write what may read that repository to it anew "
            "(docs/operate.md), then run the same command again",
        ),
        "ref": (
            "E-DAGS-GIT-REF",
            f"{url} has no branch or tag {ref}",
            "correct DAGS_GIT_REF in stack.env, or push it",
        ),
        "host-key": (
            "E-DAGS-GIT",
            f"{url}: the host shows another key than secrets/dags_git_known_hosts has",
            "find out why; if it is meant: rm -f secrets/dags_git_known_hosts (make up made it read-only), and write "
            "the new key to it",
        ),
        "certificate": (
            "E-DAGS-GIT",
            f"{url}: the certificate is signed by nobody whom this host knows",
            "name the file with that CA's certificate in CA_BUNDLE in stack.env",
        ),
        "unreachable": (
            "E-DAGS-GIT",
            f"{url} does not answer",
            "see that its host can be reached from containers of this host, or correct DAGS_GIT_URL in stack.env",
        ),
    }.get(
        problem,
        (
            "E-DAGS-GIT",
            f"there is no repository at {url}, or none that may be read",
            "correct DAGS_GIT_URL in stack.env; some hosts say so of a private one, too, until there is a login. "
            "A folder must be readable for everybody",
        ),
    )
    if problem == "ref":
        said = f"it has: {', '.join(refs[:20])}" if refs else "it is empty"
    exit_code = Exit.PRECONDITION if changed == "nothing" else Exit.FAILED
    return StackError(code, what, why=said or "git gave no reason", fix=fix, changed=changed, exit_code=exit_code)
