"""Where the files of one running stack are.

The clone itself is the default instance. Tests and CI use others (STACK_DIR names one), so that
several stacks, each with its own project name, ports, secrets and volumes, stand side by side.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The clone."""

VAR = ROOT / "var"
"""What the programs keep in the clone: the virtual environment, screenshots, test instances."""


@dataclass(frozen=True)
class Instance:
    """The directory of one stack: its choices (stack.env), its plan (.env), its secrets."""

    directory: Path

    @property
    def settings_file(self) -> Path:
        """The operator's choices."""
        return self.directory / "stack.env"

    @property
    def env_file(self) -> Path:
        """The generated plan, in the form that Compose reads."""
        return self.directory / ".env"

    @property
    def secrets(self) -> Path:
        """The directory of the generated secrets, one file each."""
        return self.directory / "secrets"


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all; one that is there keeps its mode and, where we may give it away, its owner.

    Raises OSError, as on a full disk: then the file is as it was.
    """
    # What a link points to is written, not the link.
    path = path.resolve()
    # Two writers do not share a folder; and a new file in it has the mode that any new file of this user has.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.new-") as own:
        partial = Path(own) / path.name
        partial.write_text(text, encoding="utf-8")
        if path.exists():
            before = path.stat()
            with contextlib.suppress(PermissionError):
                os.chown(partial, before.st_uid, before.st_gid)
            partial.chmod(stat.S_IMODE(before.st_mode))
        partial.replace(path)


def current() -> Instance:
    """The instance that STACK_DIR names, or the clone itself."""
    named = os.environ.get("STACK_DIR")
    return Instance(Path(named).resolve() if named else ROOT)
