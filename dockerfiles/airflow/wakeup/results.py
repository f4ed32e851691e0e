"""What the worker reports of a task's end, as data.

Celery keeps it pickled, and the scheduler reads it: code in a task, which can write there as the worker can, would
run in the scheduler, which has the keys that the worker must not have. The scheduler and the worker keep it as JSON.

tests/stack/test_upstream.py notices when this is no longer as assumed here.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from celery.backends.database.models import Task
from kombu.utils.json import dumps
from sqlalchemy import PickleType

log = logging.getLogger(__name__)


class Json:
    """In place of the `pickle` module."""

    @staticmethod
    def dumps(value: Any, _protocol: int) -> bytes:
        """A result, which Celery has made of plain types before."""
        text: str = dumps(value)
        return text.encode()

    @staticmethod
    def loads(stored: bytes) -> Any:
        """None where it is something else: nobody needs the result of a task that has ended, its state is apart."""
        try:
            return json.loads(stored)
        except ValueError:
            log.warning("a result that is not JSON is not read: %r", stored[:40])
            return None


def keep_as_json() -> None:
    """For this process, before it reads or writes the first one."""
    Task.__table__.c.result.type = PickleType(pickler=Json)
