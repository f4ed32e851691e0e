"""The images: which are due, building them, pushing and pulling them.

A tag is the software's version and a digest of everything that the image is made from, so that
`make up` knows without building whether an image is current.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from stack import engine
from stack.console import Step, say
from stack.errors import Exit, StackError
from stack.host import Host
from stack.instance import ROOT, VAR
from stack.process import OUT_OF_TIME, capture, stream
from stack.settings import DEFAULTS, Settings

DOCKERFILES = ROOT / "dockerfiles"
BAKE_FILE = DOCKERFILES / "docker-bake.hcl"
IMAGES = ("postgres", "redis", "minio", "minio-init", "mlflow", "airflow", "serving")
"""The names of the images, and of their targets in docker-bake.hcl."""

BOOTSTRAPPED = "stack-debian:trixie"
"""The base image that we make ourselves where no registry answers."""

# A cold build of everything took 11 minutes on 2 cores; slower machines get six times that.
_BUILD_TIMEOUT_S = 4000
_TRANSFER_TIMEOUT_S = 1800
_CA_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
)


@dataclass(frozen=True)
class Source:
    """What an image is made from: its folder, and the file and pattern that tell its version."""

    folder: str
    version_file: str
    version_pattern: str


SOURCES: Mapping[str, Source] = {
    "postgres": Source("postgres", "Dockerfile", r"^ARG VERSION=(\S+)"),
    "redis": Source("redis", "Dockerfile", r"^ARG VERSION=(\S+)"),
    "minio": Source("minio", "go.mod", r"github.com/minio/minio v[\d.]+-(\d{8})"),
    "minio-init": Source("minio", "requirements.lock", r"^minio==(\S+)"),
    "mlflow": Source("mlflow", "requirements.lock", r"^mlflow==(\S+)"),
    "airflow": Source("airflow", "requirements.lock", r"^apache-airflow-core==(\S+)"),
    "serving": Source("serving", "requirements.lock", r"^mlflow-skinny==(\S+)"),
}


def version(image: str) -> str:
    """The version of the software in an image, read from what pins it."""
    source = SOURCES[image]
    text = (DOCKERFILES / source.folder / source.version_file).read_text(encoding="utf-8")
    match = re.search(source.version_pattern, text, re.MULTILINE)
    if not match:
        raise ValueError(f"{source.folder}/{source.version_file} does not name the version of {image}")
    return match[1]


def tags(settings: Settings) -> dict[str, str]:
    """Image -> tag: version and digest of the sources. The same sources give the same tags anywhere."""
    base = list(_files(DOCKERFILES / "base"))
    found = {}
    for image in IMAGES:
        files = base + list(_files(DOCKERFILES / SOURCES[image].folder))
        if image == "airflow":
            files += [user_requirements(settings), *user_environments(settings)]
        digest = hashlib.sha256(settings.base_image.encode())
        for path in files:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        found[image] = f"{version(image)}-{digest.hexdigest()[:10]}"
    return found


def user_requirements(settings: Settings) -> Path:
    """The operator's own requirements file. Raises StackError (E-DAGS-DIR) where it is missing."""
    path = (ROOT / settings.dags_dir).resolve() / "requirements.txt"
    if not path.is_file():
        raise StackError(
            "E-DAGS-DIR",
            f"{path} does not exist",
            why="DAGS_DIR must hold your DAGs and a requirements.txt (an empty one will do)",
            fix=f"touch '{path}', or correct DAGS_DIR in stack.env",
        )
    return path


def user_environments(settings: Settings) -> list[Path]:
    """The operator's files for environments of their own (dags/environments/NAME.txt); there need not be any."""
    return sorted((ROOT / settings.dags_dir).resolve().glob("environments/[!.]*.txt"))


def _files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def name(settings: Settings, image: str, tag: str) -> str:
    """The full name of an image."""
    return f"{settings.image_prefix}/{image}:{tag}"


def needed(settings: Settings, wanted: Mapping[str, str]) -> dict[str, str]:
    """Of these images those that the settings have run: the one of an opt-in service only where that is on."""
    return {image: tag for image, tag in wanted.items() if image != "serving" or settings.serving == "on"}


def missing(settings: Settings, wanted: Mapping[str, str]) -> list[str]:
    """The images that this engine does not have."""
    return [
        image
        for image, tag in wanted.items()
        if capture(["docker", "image", "inspect", name(settings, image, tag)], timeout=30, check=False).code != 0
    ]


def ensure(host: Host, settings: Settings, wanted: Mapping[str, str]) -> list[str]:
    """Builds or pulls what is missing; returns the images that it made."""
    due = missing(settings, needed(settings, wanted))
    if not due:
        return []
    if settings.image_source == "pull":
        pull(settings, {image: wanted[image] for image in due})
    else:
        build(host, settings, {image: wanted[image] for image in due})
    return due


def ca_bundle(settings: Settings) -> str:
    """The CA bundle for the builds: the setting's, or the host's own; empty if there is none."""
    if settings.ca_bundle:
        path = Path(settings.ca_bundle).expanduser()
        try:
            pem = "BEGIN CERTIFICATE" in path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            pem = False
        if not pem:
            raise StackError(
                "E-CA-BUNDLE",
                f"CA_BUNDLE={settings.ca_bundle} is not a readable file of PEM certificates",
                why="every download of the build would fail with a TLS error",
                fix="name the file that holds your company's CA certificates, or leave CA_BUNDLE empty",
            )
        return str(path.resolve())
    return next((path for path in _CA_BUNDLES if Path(path).is_file()), "")


def build(host: Host, settings: Settings, wanted: Mapping[str, str]) -> None:
    """Builds images. Raises StackError (E-BUILD) with the build's last lines."""
    bundle = ca_bundle(settings)
    if not bundle:
        VAR.mkdir(exist_ok=True)
        empty = VAR / "no-ca.pem"
        empty.touch()
        bundle = str(empty)
    variables = {
        "BASE_IMAGE": base_image(host, settings),
        "CA_BUNDLE": bundle,
        "APT_MIRROR": settings.apt_mirror,
        "PIP_INDEX_URL": settings.pip_index_url,
        "GOPROXY": settings.goproxy,
        "DAGS_DIR": str(user_requirements(settings).parent),
        # Buildx 0.20 and later read nothing outside the working directory else: not the CA bundle, not the DAGs.
        "BUILDX_BAKE_ENTITLEMENTS_FS": "0",
    }
    words = ["docker", "buildx", "bake", "--file", str(BAKE_FILE), "--progress", "plain", "--load"]
    for image, tag in wanted.items():
        words += ["--set", f"{image}.tags={name(settings, image, tag)}"]
        words += ["--set", f"{image}.labels.org.opencontainers.image.version={version(image)}"]
        words += ["--set", f"{image}.labels.org.opencontainers.image.title=mlstack {image}"]
    log = VAR / "build.log"
    VAR.mkdir(exist_ok=True)
    # One of an earlier run with sudo would be root's; the directory is not.
    log.unlink(missing_ok=True)
    with (
        Step(f"building {', '.join(wanted)} (first time: about 10 minutes on 2 CPUs)") as progress,
        log.open("w") as out,
    ):
        stages: dict[str, str] = {}

        def on_line(line: str) -> None:
            out.write(line + "\n")
            heading = re.match(r"#(\d+) \[([^\]]+)\]", line)
            if heading:
                stages[heading[1]] = heading[2]
            text = re.match(r"#(\d+) [\d.]+ (.+)", line)
            if text and text[1] in stages:
                progress.update(f"[{stages[text[1]]}] {text[2]}"[:110])
            elif heading:
                progress.update(f"[{heading[2]}]")

        code = stream([*words, *wanted], timeout=_BUILD_TIMEOUT_S, on_line=on_line, cwd=DOCKERFILES, env=variables)
    if code != 0:
        raise StackError(
            "E-BUILD",
            f"building the images failed (code {code})",
            why=_build_error(log.read_text(encoding="utf-8", errors="replace")),
            fix=f"mend what the lines above say (all of it: {log}), then run the same command again",
            changed="finished parts are kept in the build cache",
            exit_code=Exit.FAILED,
        )


def _build_error(log: str) -> str:
    """The part of a build's log that says why: from the failed step's heading on."""
    lines = log.splitlines()
    starts = [number for number, line in enumerate(lines) if line == "------"]
    return "\n".join(lines[starts[0] :][:40] if starts else lines[-20:])


def base_image(host: Host, settings: Settings) -> str:
    """The name of a base image that this engine has: pulled, or, in place of the default one, bootstrapped.

    Raises StackError (E-BASE-IMAGE).
    """
    wanted = settings.base_image

    def here(name: str) -> bool:
        return capture(["docker", "image", "inspect", name], timeout=30, check=False).code == 0

    if here(wanted):
        return wanted
    # One that the operator names is asked for each time; Debian's own, once it did not come, is made here for good.
    if wanted == DEFAULTS.base_image and here(BOOTSTRAPPED):
        return BOOTSTRAPPED
    with Step(f"pulling {wanted}"):
        pulled = capture(["docker", "pull", "--quiet", wanted], timeout=300, check=False)
        if pulled.code == 0:
            return wanted
    if wanted != DEFAULTS.base_image:
        # Named for what is in it, or to know where it comes from: another one is not what was asked for.
        raise StackError(
            "E-BASE-IMAGE",
            f"BASE_IMAGE={wanted} could not be pulled",
            why=pulled.err.strip()[-400:],
            fix="correct BASE_IMAGE in stack.env, or docker login to its registry; then run the same command again",
            changed="no image; what `make up` has written (settings, secrets) stays",
            exit_code=Exit.TIMED_OUT if pulled.code == OUT_OF_TIME else Exit.FAILED,
        )
    reason = (pulled.err.strip().splitlines() or ["no answer"])[-1]
    say(f"no registry gave {wanted} ({reason[:160]}): taking a base image that is made from the Debian mirror")
    if not here(BOOTSTRAPPED):
        bootstrap_base(host, settings)
    return BOOTSTRAPPED


def bootstrap_base(host: Host, settings: Settings) -> None:
    """Makes a Debian 13 base image with mmdebstrap. Raises StackError (E-BASE-IMAGE) where we may not."""
    if not host.root or host.os_id not in ("debian", "ubuntu"):
        raise StackError(
            "E-BASE-IMAGE",
            f"no registry gave {settings.base_image}",
            why="a base image can be made from the Debian mirror only as root on Debian or Ubuntu",
            fix="set BASE_IMAGE in stack.env to a Debian 13 image of your registry, or run `make build` as root once",
            changed="no image; what `make up` has written (settings, secrets) stays",
            exit_code=Exit.FAILED,
        )
    if capture(["mmdebstrap", "--version"], timeout=15, check=False).code != 0:
        engine.apt_install("mmdebstrap", "debian-archive-keyring")
    VAR.mkdir(exist_ok=True)
    archive = VAR / "base.tar"
    unneeded = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
    with Step("making a base image with mmdebstrap") as progress:
        code = stream(
            [
                "mmdebstrap",
                "--variant=minbase",
                "--include=ca-certificates",
                *(f"--dpkgopt=path-exclude={pattern}" for pattern in unneeded),
                "--dpkgopt=path-include=/usr/share/doc/*/copyright",
                "trixie",
                archive,
                *([settings.apt_mirror] if settings.apt_mirror else []),
            ],
            timeout=900,
            on_line=lambda line: progress.update(line[:100]),
            env={"TMPDIR": os.environ.get("TMPDIR", "/var/tmp")},
        )
        if code == 0:
            code = capture(["docker", "import", archive, BOOTSTRAPPED], timeout=300, check=False).code
        archive.unlink(missing_ok=True)
    if code != 0:
        raise StackError(
            "E-BASE-IMAGE",
            "the base image could not be made from the Debian mirror",
            why=f"mmdebstrap ended with code {code}",
            fix="see that this host reaches its Debian mirror (or set APT_MIRROR), then run the same command again",
            exit_code=Exit.FAILED,
        )


def push(settings: Settings, wanted: Mapping[str, str]) -> None:
    """Pushes the images to IMAGE_PREFIX. Raises StackError (E-REGISTRY)."""
    _transfer("push", settings, wanted, fix="docker login to it, and see that IMAGE_PREFIX in stack.env names it")


def pull(settings: Settings, wanted: Mapping[str, str]) -> None:
    """Pulls the images from IMAGE_PREFIX. Raises StackError (E-REGISTRY)."""
    _transfer("pull", settings, wanted, fix="docker login to it; `make push` must have run with the same sources")


def _transfer(verb: str, settings: Settings, wanted: Mapping[str, str], *, fix: str) -> None:
    for image, tag in wanted.items():
        full = name(settings, image, tag)
        with Step(f"docker {verb} {full}"):
            done = capture(["docker", verb, "--quiet", full], timeout=_TRANSFER_TIMEOUT_S, check=False)
        if done.code != 0:
            raise StackError(
                "E-REGISTRY",
                f"docker {verb} {full} failed",
                why=done.err.strip()[-400:],
                fix=fix,
                changed="images before this one are done",
                exit_code=Exit.TIMED_OUT if done.code == OUT_OF_TIME else Exit.FAILED,
            )
