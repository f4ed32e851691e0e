"""DAGs from a Git repository: Airflow's own Git bundle, which takes a commit as a whole.

Airflow reads a DAG file again when that file has changed, and otherwise ten minutes later (min_file_process_interval).
A commit that changes a module which the DAG files import would reach new runs so late: a run has the version that its
DAG's file was last read at.
"""

from __future__ import annotations

import contextlib
import os

from airflow.providers.git.bundles.git import GitDagBundle


class CommitBundle(GitDagBundle):
    """Every DAG file counts as changed by every commit."""

    def refresh(self) -> None:
        former = self.get_current_version()
        super().refresh()
        if self.get_current_version() != former:
            for path in self.path.rglob("*"):
                if path.suffix in (".py", ".zip"):
                    # A link that leads out of the repository may not be ours to touch.
                    with contextlib.suppress(OSError):
                        os.utime(path)
