"""The helpers inside the images, and venv.sh, run for real."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from stack.instance import ROOT
from tests.support import script

BASE = ROOT / "dockerfiles/base"


def ask(*words: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs a helper with an environment of PATH and what is given."""
    variables = {"PATH": os.environ["PATH"], **more}
    return subprocess.run(words, env=variables, capture_output=True, text=True, check=False, timeout=20)


def changed_copy(source: Path, target: Path, old: str, new: str) -> Path:
    """A copy that looks elsewhere: the paths in the image are not ours to write on this host."""
    text = source.read_text(encoding="utf-8")
    assert old in text, f"{source} has changed: {old} is not in it"
    target.write_text(text.replace(old, new), encoding="utf-8")
    target.chmod(0o755)
    return target


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        code = 503 if self.path == "/down" else 401 if self.headers.get("X-Key") != "k" and self.path == "/key" else 200
        self.send_response(code)
        self.end_headers()
        self.wfile.write(b'{"status": "healthy"}')

    def log_message(self, *_: object) -> None:
        """Says nothing."""


class Server(HTTPServer):
    def handle_error(self, *_: object) -> None:
        """Says nothing: a probe that has seen a bad status hangs up on the rest of the answer."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with Server(("127.0.0.1", 0), Answer) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield str(running.server_port)
        running.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["/", "healthy"], 0),
        (["/"], 0),
        (["/", '"status": +"(healthy|fine)"'], 0),
        (["/", "^nothing$"], 1),
        (["/down"], 1),
        (["/down", "healthy"], 1),
        (["/key"], 1),
        (["/key", "healthy", "HEADER"], 0),
        (["/", "healthy", "no-such-file"], 1),
    ],
)
def test_http_probe(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int) -> None:
    """200 with the pattern is healthy; another status, another body or no login is not."""
    monkeypatch.chdir(tmp_path)
    Path("HEADER").write_text("X-Key: k")
    done = ask(BASE / "http-probe", server, *words)
    assert done.returncode == code, done


def test_http_probe_of_nothing() -> None:
    """A port that nobody listens on: bound, so that nobody else takes it meanwhile."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        assert ask(BASE / "http-probe", str(held.getsockname()[1]), "/").returncode != 0


def test_http_probe_of_a_server_that_says_nothing(tmp_path: Path) -> None:
    """It gives up by itself: a probe that hangs must not outlive its interval."""
    probe = changed_copy(BASE / "http-probe", tmp_path / "probe", "-t 8 status", "-t 0.2 status")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert ask(probe, str(silent.getsockname()[1]), "/").returncode != 0


def test_with_secrets_refuses_a_missing_file() -> None:
    done = ask(BASE / "with-secrets", "echo", "started", X_FILE="/run/secrets/no-such")
    assert (done.returncode, done.stdout) == (3, "")
    assert "error[E-SECRET]: X_FILE names /run/secrets/no-such" in done.stderr


def test_with_secrets_leaves_other_variables_alone() -> None:
    """Only variables that point into /run/secrets are ours."""
    code = "import os; print('SSL_CERT' in os.environ)"
    assert ask(BASE / "with-secrets", sys.executable, "-c", code, SSL_CERT_FILE="/etc/hosts").stdout == "False\n"


def test_with_secrets_exports_and_becomes_the_command(tmp_path: Path) -> None:
    """The content, whatever characters it has, under the name without _FILE; the command's own code."""
    script = changed_copy(BASE / "with-secrets", tmp_path / "with-secrets", "/run/secrets/", f"{tmp_path}/")
    content = "a b'c\"d$HOME`x`\\n=#ü\nsecond line"
    (tmp_path / "one").write_text(content + "\n", encoding="utf-8")
    (tmp_path / "two").write_text("2")
    code = "import os, sys; sys.stdout.write(os.environ['ONE'] + '|' + os.environ['TWO']); sys.exit(5)"
    done = ask(script, sys.executable, "-c", code, ONE_FILE=f"{tmp_path}/one", TWO_FILE=f"{tmp_path}/two")
    assert (done.returncode, done.stdout) == (5, f"{content}|2"), done


def test_with_secrets_refuses_an_empty_file(tmp_path: Path) -> None:
    script = changed_copy(BASE / "with-secrets", tmp_path / "with-secrets", "/run/secrets/", f"{tmp_path}/")
    (tmp_path / "empty").touch()
    done = ask(script, "echo", "started", X_FILE=f"{tmp_path}/empty")
    assert (done.returncode, done.stdout) == (3, "")
    assert "missing, empty or unreadable" in done.stderr


def test_emptied_deletes_what_is_there_and_nothing_else(tmp_path: Path) -> None:
    """Whatever it is, hidden or closed; where a link points to stays, and the folder itself."""
    folder, other = tmp_path / "a folder", tmp_path / "other"
    (folder / "venv/bin").mkdir(parents=True)
    other.mkdir()
    (other / "kept").touch()
    other.chmod(0o500)
    for name in (".hidden", "-rf", "two\nlines", "venv/bin/python"):
        (folder / name).touch()
    (folder / "link").symlink_to(other)
    (folder / "venv/kept").symlink_to(other / "kept")
    os.mkfifo(folder / "pipe")
    (folder / "closed/inner").mkdir(parents=True)
    (folder / "closed/inner").chmod(0)
    (folder / "closed").chmod(0)
    done = ask(
        BASE / "emptied", folder, sys.executable, "-c", "import sys; print(sys.argv[1:]); sys.exit(5)", "a b", "*"
    )
    assert (done.returncode, done.stdout, done.stderr) == (5, "['a b', '*']\n", "")
    assert list(folder.iterdir()) == []
    assert list(other.iterdir()) == [other / "kept"]
    assert other.stat().st_mode & 0o777 == 0o500


def test_emptied_starts_nevertheless(tmp_path: Path) -> None:
    """With a folder that it cannot empty, here because it does not exist."""
    done = ask(BASE / "emptied", tmp_path / "none", "echo", "started")
    assert (done.returncode, done.stdout) == (0, "started\n")
    assert done.stderr == f"not all of {tmp_path / 'none'} could be deleted\n"


def test_worker_probe(tmp_path: Path) -> None:
    """Healthy with a fresh heartbeat; not without one, and not with an old one."""
    beat = tmp_path / "beat"
    probe = changed_copy(
        ROOT / "dockerfiles/airflow/worker-probe", tmp_path / "probe", "/dev/shm/celery-heartbeat", str(beat)
    )
    assert ask(probe).returncode == 1
    beat.touch()
    assert ask(probe).returncode == 0
    old = beat.stat().st_mtime - 60
    os.utime(beat, (old, old))
    assert ask(probe).returncode == 1


def test_the_worker_touches_what_its_probe_reads() -> None:
    """Two files name the heartbeat: they name the same one."""
    path = "/dev/shm/celery-heartbeat"
    for name in ("worker-probe", "taskguard/preload.py"):
        assert path in (ROOT / "dockerfiles/airflow" / name).read_text(encoding="utf-8"), name


@pytest.fixture
def bare_host(tmp_path: Path) -> Path:
    """A clone with venv.sh and one lock, and a PATH that has a few commands but no python3."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copy(ROOT / "scripts/venv.sh", tmp_path / "scripts/venv.sh")
    (tmp_path / "x.lock").write_text("# nothing\n")
    for name in ("sh", "dirname", "tr", "cmp", "id"):
        found = shutil.which(name)
        assert found, name
        (tmp_path / "bin" / name).symlink_to(found)
    return tmp_path


def venv(clone: Path, **more: str) -> subprocess.CompletedProcess[str]:
    words = [str(clone / "bin/sh"), "scripts/venv.sh", "x.lock"]
    variables = {"PATH": str(clone / "bin"), **more}
    return subprocess.run(words, cwd=clone, env=variables, capture_output=True, text=True, check=False)


def test_a_host_without_python_is_refused_unchanged(bare_host: Path) -> None:
    done = venv(bare_host)
    assert done.returncode == 3, done
    assert "error[E-PYTHON]: python3 is not installed" in done.stderr
    assert not (bare_host / "var").exists()


def test_an_old_python_is_refused_unchanged(bare_host: Path) -> None:
    """The first question that venv.sh asks it is its version; this one's answer is no."""
    script(bare_host / "bin/python3", '[ "$1" = --version ] && echo "Python 3.8.1"; exit 1')
    done = venv(bare_host)
    assert done.returncode == 3, done
    assert "Python 3.8.1 is too old" in done.stderr
    assert not (bare_host / "var").exists()


def test_packages_that_cannot_be_had_are_refused_with_pips_words(bare_host: Path) -> None:
    (bare_host / "x.lock").write_text("nowhere==1.0 --hash=sha256:" + "0" * 64 + "\n")
    done = venv(bare_host, PATH=os.environ["PATH"], PIP_NO_INDEX="1")
    assert done.returncode == 3, done
    assert "No matching distribution" in done.stderr
    assert "error[E-PIP]: the packages of x.lock could not be installed" in done.stderr
    assert not (bare_host / "var/venv/.x.lock").exists()


@pytest.mark.parametrize("stamped", [False, True])
def test_an_environment_that_is_not_whole_is_made_anew(bare_host: Path, stamped: bool) -> None:
    """Its Python finds no pip: after Ctrl-C as it was made, or, once complete, as the host's Python is another one."""
    made = bare_host / "var/venv"
    subprocess.run(["python3", "-m", "venv", "--without-pip", made], check=True)
    if stamped:
        shutil.copy(bare_host / "x.lock", made / ".x.lock")
    # Of another lock, whose packages are gone with the rest.
    (made / ".y.lock").touch()
    done = venv(bare_host, PATH=os.environ["PATH"])
    assert done.returncode == 0, done
    assert subprocess.run([made / "bin/python", "-c", "import pip"], check=False).returncode == 0
    assert ((made / ".x.lock").exists(), (made / ".y.lock").exists()) == (True, False)


@contextlib.contextmanager
def prepared_elsewhere(clone: Path) -> Iterator[None]:
    """Another command prepares var/venv."""
    (clone / "var").mkdir()
    with (clone / "var/venv.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_one_at_a_time_prepares_the_environment(bare_host: Path) -> None:
    """Two commands that find it missing, while a third prepares it: they say that they wait; then one of them makes it,
    the other finds it made."""
    words = ["sh", "scripts/venv.sh", "x.lock"]
    with contextlib.ExitStack() as children:
        with prepared_elsewhere(bare_host):
            running = [
                children.enter_context(subprocess.Popen(words, cwd=bare_host, stderr=subprocess.PIPE, text=True))
                for _ in range(2)
            ]
            for child in running:
                assert child.stderr
                assert child.stderr.readline() == "--> waiting for another command that prepares var/venv\n"
        said = [child.communicate(timeout=120)[1] for child in running]
    assert [child.returncode for child in running] == [0, 0], said
    assert sorted(said) == ["", "--> preparing the Python environment var/venv\n"]
    assert (bare_host / "var/venv/.x.lock").exists()


def test_the_wait_for_another_has_an_end(bare_host: Path) -> None:
    changed_copy(ROOT / "scripts/venv.sh", bare_host / "scripts/venv.sh", "flock -w 900", "flock -w 0.1")
    with prepared_elsewhere(bare_host):
        done = venv(bare_host, PATH=os.environ["PATH"])
    assert done.returncode == 4, done
    assert "error[E-PIP]: another command has prepared var/venv" in done.stderr
    assert not (bare_host / "var/venv").exists()


def test_a_host_without_flock_does_not_wait(bare_host: Path) -> None:
    """macOS has none. The environment is made nevertheless, here by a `python3` that only copies a file."""
    for name in ("mkdir", "cp", "true"):
        (bare_host / "bin" / name).symlink_to(shutil.which(name) or name)
    for name, body in {
        "id": "echo 1000",
        "python3": f'[ "$2" != venv ] || {{ mkdir -p "$4/bin"; cp {bare_host}/bin/true "$4/bin/python"; }}',
    }.items():
        script(bare_host / "bin" / name, body)
    with prepared_elsewhere(bare_host):
        done = venv(bare_host)
    assert (done.returncode, done.stderr) == (0, "--> preparing the Python environment var/venv\n")
    assert (bare_host / "var/venv/.x.lock").exists()


def test_apt_waits_for_whoever_installs_something(bare_host: Path) -> None:
    """A fresh host's own upgrades hold the lock for minutes."""
    for name, body in {
        "python3": '[ "$2" != "import ensurepip, venv" ]',
        "id": "echo 0",
        "apt-get": f'echo "$*" >> {bare_host}/told; exit 1',
    }.items():
        script(bare_host / "bin" / name, body)
    assert "python3-venv could not be installed" in venv(bare_host).stderr
    told = (bare_host / "told").read_text().splitlines()
    assert len(told) == 2
    assert all("-o DPkg::Lock::Timeout=300" in line for line in told)


def test_a_current_environment_is_left_alone(bare_host: Path) -> None:
    """Only its own Python is asked, and pip is not run: `make` calls it before every verb."""
    (bare_host / "var/venv/bin").mkdir(parents=True)
    script(bare_host / "var/venv/bin/python", '[ "$3" = "import pip" ]')
    shutil.copy(bare_host / "x.lock", bare_host / "var/venv/.x.lock")
    done = venv(bare_host)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
