"""XComs of a bearable size.

What a task returns goes through the process that supervises it, the API server and the database,
each of which holds several copies of it. Set as `[core] xcom_backend`, Airflow's own extension point.
"""

from __future__ import annotations

import json
from typing import Any

from airflow.sdk.bases.xcom import BaseXCom

LARGEST_MIB = 1
"""As JSON. The process that supervises the task, the API server and the database hold several copies."""


class XComTooLargeError(ValueError):
    """A task returned more than an XCom may hold."""


class BoundedXCom(BaseXCom):
    """Airflow's XCom, refused beyond LARGEST_MIB in the task that makes it."""

    @staticmethod
    def serialize_value(value: Any, **words: Any) -> Any:
        """As BaseXCom. Raises XComTooLargeError."""
        made = BaseXCom.serialize_value(value, **words)
        size = len(made) if isinstance(made, (str, bytes)) else _size(made)
        if size > LARGEST_MIB * 2**20:
            raise XComTooLargeError(
                f"this XCom has {size / 2**20:.1f} MiB; at most {LARGEST_MIB} MiB are passed between tasks. "
                "Write the data to S3 or MLflow and return its address. More: docs/memory.md#large-results"
            )
        return made


def _size(value: Any) -> int:
    return sum(len(piece) for piece in json.JSONEncoder().iterencode(value))
