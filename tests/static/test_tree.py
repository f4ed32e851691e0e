"""Rules over every file of the tree."""

from __future__ import annotations

import re
import subprocess

import pytest

from stack.instance import ROOT
from tests.static.test_tools import tracked

TEXT = [name for name in tracked() if not name.endswith(".png")]


def test_error_codes_are_documented() -> None:
    """Every code that a program prints has its section in docs/errors.md, and no section is left over."""
    used = set()
    for name in tracked("scripts", "dockerfiles", "bench/*.py"):
        used |= set(re.findall(r"\bE-[A-Z]+(?:-[A-Z]+)*\b", (ROOT / name).read_text(encoding="utf-8")))
    documented = set(re.findall(r"^## (E-[A-Z-]+)$", (ROOT / "docs/errors.md").read_text(), re.MULTILINE))
    assert len(used) > 20
    assert used == documented


def test_git_leaves_passwords_out_and_nothing_that_is_tracked() -> None:
    """Choices, plan, secrets, and the files that `make user` is documented to fill; no pattern covers a source."""
    names = ["stack.env", ".env", "ada.env", "secrets/admin_password"]
    words = ["git", "-C", str(ROOT), "check-ignore", *names]
    assert subprocess.run(words, capture_output=True, text=True, check=False).stdout.split() == names
    words = ["git", "-C", str(ROOT), "ls-files", "--cached", "--ignored", "--exclude-per-directory=.gitignore"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == ""


def test_nothing_names_a_registry_or_a_machine() -> None:
    """Package sources are the clients' own defaults or settings; paths are the reader's own."""
    # Put together here, so that this file does not name them either.
    hosts = [
        "deb.debian" + ".org",
        "pypi" + ".org",
        "files.pythonhosted" + ".org",
        "proxy.golang" + ".org",
        "sum.golang" + ".org",
        "docker" + ".io/",
        "docker" + ".com/",
        "ghcr" + ".io",
        "quay" + ".io",
        "npmjs" + ".org",
        "archive.ubuntu" + ".com",
    ]
    pattern = re.compile("|".join([*map(re.escape, hosts), r"(?<![\w.])/(?:work|root)/(?!\.cache|go/)"]))
    assert len(TEXT) > 60
    found = [
        f"{name}:{number}: {line.strip()}"
        for name in TEXT
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert found == []


def test_dockerfiles_pull_no_frontend() -> None:
    """A `# syntax=` line would fetch from a registry, which need not exist."""
    files = tracked("*Dockerfile*")
    assert len(files) >= 6
    for name in files:
        assert not re.search(r"^#\s*syntax\s*=", (ROOT / name).read_text(), re.MULTILINE | re.IGNORECASE), name


def test_images_do_not_depend_on_the_modes_of_the_clone() -> None:
    """A clone has modes by its umask: what a service reads gets its own. What only a build reads, root reads."""
    copies = 0
    for name in tracked("dockerfiles/*/Dockerfile"):
        for stage in re.split(r"^FROM ", (ROOT / name).read_text(), flags=re.MULTILINE)[1:]:
            if "build" not in stage.splitlines()[0].partition(" AS ")[2]:
                for line in re.findall(r"^COPY (?!--from=).*", stage, re.MULTILINE):
                    copies += 1
                    assert line.startswith("COPY --chmod=0"), (name, line)
    assert copies >= 15


def test_locks_are_complete() -> None:
    """Each requirements file has a lock: its pins in it, every entry with a version and hashes."""
    sources = tracked("*requirements.in", "*uv.in")
    assert len(sources) == 8
    for source in sources:
        lock = (ROOT / source.replace(".in", ".lock")).read_text()
        entries = re.split(r"\n(?=[A-Za-z0-9])", lock.strip())
        for entry in entries:
            if not entry.startswith("#"):
                assert re.match(r"[\w.\-\[\]]+==\S+", entry), (source, entry[:80])
                assert "--hash=sha256:" in entry, (source, entry[:80])
        wanted = re.findall(r"^([A-Za-z][\w.-]*)(?:\[\S+\])?(==\S+)?$", (ROOT / source).read_text(), re.MULTILINE)
        assert wanted, source
        for package, pin in wanted:
            entry = re.escape(f"{package.lower()}{pin}") + (r"(?![\w.])" if pin else "==")
            assert re.search(rf"^{entry}", lock, re.MULTILINE), (source, package, pin)


def test_versions_agree() -> None:
    """What is said twice is said alike: MLflow's client and server, Postgres's major."""

    def found(pattern: str, name: str) -> str:
        match = re.search(pattern, (ROOT / name).read_text(), re.MULTILINE)
        assert match, (pattern, name)
        return match[1]

    server = found(r"^mlflow==(\S+)", "dockerfiles/mlflow/requirements.in")
    for client in (
        "dockerfiles/airflow/requirements.in",
        "dockerfiles/serving/requirements.in",
        "tests/requirements.in",
    ):
        assert found(r"^mlflow-skinny==(\S+)", client) == server
    assert found(r"^mlflow-skinny==(\S+)", "dags/environments/xgboost.txt") == server
    assert found(r"^mlflow==(\S+)", "examples/requirements.in") == server
    said = re.findall(r"mlflow==?(\d[\d.]*\d)", (ROOT / "docs/operate.md").read_text())
    assert said == [server, server]
    assert found(r"^ARG VERSION=(\S+)", "dockerfiles/postgres/Dockerfile") == found(
        r"^readonly major=(\S+)", "dockerfiles/postgres/postgres-server"
    )


def test_models_are_served_with_what_they_were_made_with() -> None:
    """What stores and loads a model has one version in both images: another one warns, or refuses."""

    def locked(image: str) -> dict[str, str]:
        text = (ROOT / f"dockerfiles/{image}/requirements.lock").read_text()
        return dict(re.findall(r"^([A-Za-z][\w.-]*)==([^\s;]+)", text, re.MULTILINE))

    made, served = locked("airflow"), locked("serving")
    for package in ("scikit-learn", "skops", "pandas", "numpy", "scipy", "xgboost-cpu"):
        assert served[package] == made[package], package


MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = re.findall(r"^([a-zA-Z0-9_-]+):(?!=)", MAKEFILE, re.MULTILINE)
PUBLIC = [name for name in TARGETS if name not in ("venv", "test-venv")]


def test_recipes_are_one_line() -> None:
    """The Makefile is a table of contents: a target, its sentence, one line."""
    assert len(PUBLIC) >= 18
    for name in TARGETS:
        block = re.search(rf"^{name}:.*\n((?:\t.*\n?)*)", MAKEFILE, re.MULTILINE)
        assert block, name
        assert len(block[1].splitlines()) == 1, name


def test_every_target_is_phony() -> None:
    """A file named like a target must not make `make` believe that the work is done."""
    phony = re.search(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)
    assert phony
    assert sorted(phony[1].split()) == sorted(TARGETS)


@pytest.mark.parametrize("target", ["venv", "test-venv"])
def test_inner_targets_can_be_read(target: str) -> None:
    """What the others build on is readable for make, too, and stays out of `make help`."""
    dry = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert dry.returncode == 0, dry.stderr
    assert "scripts/venv.sh" in dry.stdout


@pytest.mark.parametrize("target", PUBLIC)
def test_targets(target: str) -> None:
    """Each target is in `make help`, and make itself can read its recipe."""
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(rf"^  make {target} +\S", listed, re.MULTILINE)
    dry = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert dry.returncode == 0, dry.stderr
    for script in re.findall(r"scripts/\S+\.(?:py|sh)", dry.stdout):
        assert (ROOT / script).is_file(), (target, script)


def test_commands_in_the_docs_exist() -> None:
    """Every `make x` that README and docs mention is a target."""
    names = ["README.md", *tracked("docs/*.md")]
    assert len(names) >= 6
    for name in names:
        for target in re.findall(r"`(?:STACK_DIR=\S+ )?make ([a-z-]+)", (ROOT / name).read_text()):
            assert target in PUBLIC, (name, target)


def test_links_in_the_docs_lead_somewhere() -> None:
    for name in ["README.md", *tracked("docs/*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / name).read_text()):
            assert ((ROOT / name).parent / link).exists(), (name, link)
