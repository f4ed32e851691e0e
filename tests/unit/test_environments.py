"""install-environments, without its resolver: what is linked where."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import program


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A site-packages folder: a module, a package, and two packages that share a folder."""
    image = tmp_path / "image"
    for name in (
        "single.py",
        "__pycache__/x.pyc",
        "pack/__init__.py",
        "pack/deep/a.py",
        "shared/b.py",
        "shared/c.py",
    ):
        (image / name).parent.mkdir(parents=True, exist_ok=True)
        (image / name).write_text(name)
    return image


def parts(*names: str) -> list[tuple[str, ...]]:
    return [Path(name).parts for name in names]


def test_a_folder_is_linked_whole_where_there_is_none(image: Path, tmp_path: Path) -> None:
    here = tmp_path / "site"
    here.mkdir()
    program("install-environments").link(parts("pack/__init__.py", "pack/deep/a.py", "single.py"), image, here)
    assert {path.name: path.is_symlink() for path in here.iterdir()} == {"pack": True, "single.py": True}
    assert (here / "pack/deep/a.py").read_text() == "pack/deep/a.py"


def test_a_folder_of_ones_own_gets_the_missing_files(image: Path, tmp_path: Path) -> None:
    """Two packages in one folder, one of them another version than the image's: each file is the right one."""
    here = tmp_path / "site"
    (here / "shared").mkdir(parents=True)
    (here / "shared/b.py").write_text("its own")
    program("install-environments").link(parts("shared/b.py", "shared/c.py", "shared/trimmed.py"), image, here)
    assert (here / "shared/b.py").read_text() == "its own"
    assert (here / "shared/c.py").is_symlink()
    assert not (here / "shared/trimmed.py").is_symlink()
    assert (image / "shared/b.py").read_text() == "shared/b.py"


def test_uv_gets_the_index_and_the_certificates(tmp_path: Path) -> None:
    variables = program("install-environments").variables
    (tmp_path / "ca.pem").touch()
    found = variables({"PIP_INDEX_URL": ""}, tmp_path / "ca.pem")
    assert not {"UV_DEFAULT_INDEX", "SSL_CERT_FILE"} & found.keys()
    (tmp_path / "ca.pem").write_text("certificates")
    found = variables({"PIP_INDEX_URL": "https://index.example/simple"}, tmp_path / "ca.pem")
    assert found["UV_DEFAULT_INDEX"] == "https://index.example/simple"
    assert found["SSL_CERT_FILE"] == str(tmp_path / "ca.pem")


def test_packages_are_named_as_the_resolver_writes_them(tmp_path: Path) -> None:
    about = tmp_path / "ruamel.yaml_X-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: Ruamel.yaml_X\nVersion: 1.0\n")
    assert list(program("install-environments").installed(tmp_path)) == ["ruamel-yaml-x==1.0"]
