"""Rules that every service of the Compose files keeps, read from `docker compose config`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from stack import compose, dags, images, plan, secrets, settings
from stack.compose import JOBS
from stack.instance import ROOT, Instance

WEB = {"airflow-apiserver", "mlflow", "flower", "serving"}
# Not the default, so that an address that somebody writes into a file is seen.
ADDRESS = "127.0.0.2"
# `docker compose config` fills in "service_started" where no condition is written: the files are read.
FILES = sorted(ROOT.glob("compose/*.yaml"))


@pytest.fixture(scope="session")
def merged(tmp_path_factory: pytest.TempPathFactory) -> compose.Compose:
    """All files, for an instance in a directory with a space, opt-in services included."""
    instance = Instance(tmp_path_factory.mktemp("an instance"))
    chosen = settings.parse(f"FLOWER=on\nSERVING=on\nBIND_ADDRESS={ADDRESS}")
    values = compose.environment(
        instance, chosen, plan.make_plan(plan.load_sizing(), 8192, 2), dict.fromkeys(images.IMAGES, "tag")
    )
    values |= {"SECRETS_DIGEST": "a", "CONFIG_DIGEST": "b"}
    instance.env_file.write_text(compose.render_environment(values))
    return compose.Compose(instance)


@pytest.fixture(scope="session")
def config(merged: compose.Compose) -> dict[str, Any]:
    return merged.config()


def written(file: str, section: str) -> set[str]:
    """A section's keys as the file has them: `docker compose config` leaves out what nobody uses."""
    return set(yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))[section])


@pytest.fixture(scope="session")
def services(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = config["services"]
    assert len(found) == 14
    return found


def test_compose_accepts_the_files(merged: compose.Compose) -> None:
    """Not a word, on stderr either: Compose only warns of a variable that is not set, and goes on without."""
    done = merged.capture("config", "--quiet", check=False)
    assert (done.code, done.out, done.err) == (0, "", "")


def test_every_file_is_merged() -> None:
    """A file in compose/ that nobody hands to Compose would be dead; common.yaml is taken over by `extends`."""
    assert {ROOT / name for name in compose.FILES} == {*FILES, ROOT / "compose.yaml"} - {ROOT / "compose/common.yaml"}


def test_every_value_is_used(merged: compose.Compose) -> None:
    """What `make init` writes into .env is what the files refer to, and what Compose itself reads."""
    text = "".join(file.read_text(encoding="utf-8") for file in [ROOT / "compose.yaml", *FILES])
    named = set(re.findall(r"\$\{(\w+)", text))
    assert len(named) > 40
    assert named == {name for name in merged.values if not name.startswith("COMPOSE_")}


def test_what_is_left_in_a_volume_of_temporary_files_goes_at_each_start(services: dict[str, dict[str, Any]]) -> None:
    begun = {
        name: one["command"][:2]
        for name, one in services.items()
        if any(mount["target"] == "/tmp" and mount["type"] == "volume" for mount in one.get("volumes", []))
    }
    assert begun == {"airflow-worker": ["emptied", "/tmp"], "mlflow": ["emptied", "/tmp"]}


SCHEMES = {
    "https": "https://git.example/team/dags.git",
    "ssh": "ssh://git@git.example/team/dags.git",
    "file": "file:///srv/git/dags.git",
}


@pytest.fixture(scope="module", params=SCHEMES)
def git(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> compose.Compose:
    """All files, for DAGs from a Git repository."""
    instance = Instance(tmp_path_factory.mktemp("an instance"))
    (instance.directory / "ca.pem").write_text("BEGIN CERTIFICATE")
    chosen = settings.parse(f"DAGS_GIT_URL={SCHEMES[request.param]}\nCA_BUNDLE={instance.directory}/ca.pem\nFLOWER=on")
    values = compose.environment(
        instance, chosen, plan.make_plan(plan.load_sizing(), 8192, 2), dict.fromkeys(images.IMAGES, "tag")
    )
    values |= {"SECRETS_DIGEST": "a", "CONFIG_DIGEST": "b", "DAGS_GIT_DIGEST": "c"}
    instance.env_file.write_text(compose.render_environment(values))
    return compose.Compose(instance)


def test_git_every_value_is_set_and_used(git: compose.Compose) -> None:
    """As without a repository: not a word from Compose, and nothing in .env that nobody reads."""
    done = git.capture("config", "--quiet", check=False)
    assert (done.code, done.out, done.err) == (0, "", "")
    files = [Path(name) for name in git.values["COMPOSE_FILE"].split(":")]
    text = "".join(file.read_text(encoding="utf-8") for file in [*files, ROOT / "compose/common.yaml"])
    assert set(re.findall(r"\$\{(\w+)", text)) == {name for name in git.values if not name.startswith("COMPOSE_")}


def test_git_only_the_dag_processor_has_the_credentials(git: compose.Compose) -> None:
    """The others see its copy, and cannot write to it: the DAG processor holds the metadata database's login."""
    services = git.capture("--profile", "*", "config", "--format", "json").out
    copies = {}
    for name, service in json.loads(services)["services"].items():
        mounted = {one["source"] for one in service.get("secrets", [])}
        assert bool(mounted & set(dags.SECRETS)) is (name == "airflow-dag-processor"), name
        for mount in service.get("volumes", []):
            assert mount["type"] == "volume" or mount.get("read_only") is True, (name, mount)
            if mount["source"] == "dag-bundles":
                copies[name] = mount.get("read_only", False)
    assert copies == {"airflow-dag-processor": False, "airflow-worker": True, "airflow-cli": True}


def test_git_every_overlay_is_for_something(git: compose.Compose) -> None:
    used = {Path(name).name for name in git.values["COMPOSE_FILE"].split(":") if "/overlays/" in name}
    assert used - {"git.yaml"} <= {path.name for path in ROOT.glob("compose/overlays/git-*.yaml")}
    assert len(used) == 2
    assert len(list(ROOT.glob("compose/overlays/*.yaml"))) == 1 + len(SCHEMES)


def test_images_are_our_own(services: dict[str, dict[str, Any]]) -> None:
    """Every service runs an image of the bundle, under the operator's prefix, and every image is run.

    Compose neither builds nor pulls it, whatever the command: `docker compose run` has no other way to be told.
    """
    for name, service in services.items():
        assert "build" not in service, name
        assert service["pull_policy"] == "never", name
    assert {service["image"] for service in services.values()} == {f"mlstack/{image}:tag" for image in images.IMAGES}


def test_every_service_is_limited(services: dict[str, dict[str, Any]]) -> None:
    """Memory without swap, a reservation below it, processes, open files, logs."""
    for name, service in services.items():
        assert int(service["mem_limit"]) > int(service["mem_reservation"]) > 0, name
        assert service["memswap_limit"] == service["mem_limit"], name
        assert 0 < service["pids_limit"] <= 4096, name
        assert service["ulimits"]["nofile"], name
        assert service["logging"]["options"] == {"max-size": "10m", "max-file": "3"}, name


def test_every_service_is_confined(services: dict[str, dict[str, Any]]) -> None:
    """No capabilities, no new privileges, a read-only root, an init, a restart policy that fits."""
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert "cap_add" not in service, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["read_only"] is True, name
        assert service["init"] is True, name
        assert service["restart"] == ("no" if name in JOBS else "unless-stopped"), name
        assert not service.get("privileged"), name


def test_every_server_has_a_probe_and_time_to_stop(services: dict[str, dict[str, Any]]) -> None:
    """Probes look often while starting; the stop grace is said, not left to the default of 10 s."""
    for name, service in services.items():
        if name not in JOBS:
            probe = service["healthcheck"]
            assert {"test", "interval", "timeout", "retries", "start_period", "start_interval"} <= set(probe), name
            assert service["stop_grace_period"], name
            assert "inspect" not in str(probe["test"]), name


def test_only_web_pages_are_published_on_loopback(services: dict[str, dict[str, Any]]) -> None:
    published = {name: service["ports"] for name, service in services.items() if service.get("ports")}
    assert set(published) == WEB
    for ports in published.values():
        assert [port["host_ip"] for port in ports] == [ADDRESS]


def test_networks(services: dict[str, dict[str, Any]], config: dict[str, Any]) -> None:
    """Stores are on the internal network alone; whoever is on the other one has a reason to."""
    assert config["networks"]["backend"]["internal"] is True
    outside = {name for name, service in services.items() if "frontend" in service["networks"]}
    assert outside == WEB | {"airflow-worker", "airflow-triggerer", "airflow-dag-processor"}
    assert all("backend" in service["networks"] for service in services.values())


def test_every_dependency_has_a_condition() -> None:
    """Written out in the files: `started` is never what is meant."""
    seen = 0
    for file in FILES:
        for name, service in (yaml.safe_load(file.read_text(encoding="utf-8")).get("services") or {}).items():
            for other, rule in (service.get("depends_on") or {}).items():
                wanted = "service_completed_successfully" if other in JOBS else "service_healthy"
                assert rule == {"condition": wanted}, (name, other)
                seen += 1
    assert seen >= 10


def test_secrets_are_all_made_and_all_used(services: dict[str, dict[str, Any]]) -> None:
    """What the services mount is what Compose declares and what the generator makes.

    A primary secret that nobody mounts must at least go into a derived one: else it is left over.
    """
    mounted = {one["source"] for service in services.values() for one in service.get("secrets", [])}
    made = {*secrets.PRIMARY, *secrets.derived_names()}
    assert mounted == written("compose/secrets.yaml", "secrets")
    assert mounted <= made
    plain = dict.fromkeys(secrets.PRIMARY, "x")
    for name in made - mounted:
        assert name in secrets.PRIMARY, name
        changed = secrets.derive(plain | {name: "y"}, settings.DEFAULTS)
        assert changed != secrets.derive(plain, settings.DEFAULTS), name


def test_environments_hold_paths_not_secrets(services: dict[str, dict[str, Any]]) -> None:
    """What `docker inspect` shows of a secret is the name of its file, and the service mounts that file."""
    for name, service in services.items():
        mounted = {one["source"] for one in service.get("secrets", [])}
        for key, value in (service.get("environment") or {}).items():
            if re.search(r"PASSWORD|SECRET|_KEY(_|$)|CONN|TOKEN|BROKER_URL|RESULT_BACKEND|STORE_URI|PASSPHRASE", key):
                if key in ("AWS_ACCESS_KEY_ID",):
                    continue
                assert key.endswith("_FILE"), (name, key)
            assert not re.search(r"://[^/]*@", str(value)), (name, key)
            if str(value).startswith("/run/secrets/"):
                assert str(value).removeprefix("/run/secrets/") in mounted, (name, key)


def test_the_worker_gets_no_key_of_the_platform(services: dict[str, dict[str, Any]]) -> None:
    forbidden = {"airflow_db_url", "airflow_db_password", "fernet_key", "jwt_secret", "api_secret_key"}
    mounted = {one["source"] for one in services["airflow-worker"]["secrets"]}
    assert forbidden <= {*secrets.PRIMARY, *secrets.derived_names()}, "a name here is not a secret any more"
    assert not mounted & forbidden


def test_the_clone_is_mounted_read_only(services: dict[str, dict[str, Any]]) -> None:
    """Configuration, DAGs and plugins cannot be changed from inside; nothing else of the host is mounted."""
    for name, service in services.items():
        for mount in service.get("volumes", []):
            if mount["type"] == "bind":
                assert mount.get("read_only") is True, (name, mount)
                assert Path(mount["source"]).is_relative_to(ROOT), (name, mount)


def test_volumes_are_grouped_by_the_cost_of_losing_them(config: dict[str, Any]) -> None:
    """Each volume is used, and compose.yaml says above it what its loss would cost."""
    text = (ROOT / "compose.yaml").read_text()
    assert text.index("loses work") < text.index("loses the queue") < text.index("loses nothing")
    used = {
        mount["source"]
        for service in config["services"].values()
        for mount in service.get("volumes", [])
        if mount["type"] == "volume"
    }
    assert used == written("compose.yaml", "volumes")
