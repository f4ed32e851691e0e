"""Where the files of one running stack are.

The clone itself is the default instance. Tests and CI use others (STACK_DIR names one), so that
several stacks, each with its own project name, ports, secrets and volumes, stand side by side.
"""

from __future__ import annotations

import os
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


def current() -> Instance:
    """The instance that STACK_DIR names, or the clone itself."""
    named = os.environ.get("STACK_DIR")
    return Instance(Path(named).resolve() if named else ROOT)
