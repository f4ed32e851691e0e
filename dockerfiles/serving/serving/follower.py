"""Follows the alias: what MLflow names is loaded beside the model that answers, and takes its place when it can.

All of what is known is one object, which is replaced and never changed. A request takes it once, so that it is
answered by one model from beginning to end.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from serving.model import Model
    from serving.registry import Version

log = logging.getLogger(__name__)

POLL_S = 3.0
RETRY_S = 60.0
"""A version that could not be loaded is tried again so much later."""
LARGEST = 40 << 20
"""Bytes of a model's files. They are in memory while it is loaded, as the old model is; the kernel would end both
(docs/memory.md has the figures)."""
STALLED_S = 300.0
"""No look takes so long: a call to MLflow is given up after a minute, and the download of a model is several."""


class TooLargeError(Exception):
    """A model that is not even downloaded."""


class Alias(Protocol):
    """Who has the alias, and how large that is."""

    @property
    def model(self) -> str: ...
    @property
    def alias(self) -> str: ...
    def champion(self) -> Version | None: ...
    def size(self, version: Version) -> int: ...


@dataclass(frozen=True)
class Failure:
    """A version that has the alias and cannot be loaded."""

    version: Version
    error: str
    again: float
    """When to try it again, by the monotonic clock."""


@dataclass(frozen=True)
class State:
    """What is known."""

    model: Model | None = None
    reason: str = "MLflow has not been asked yet"
    """Why there is no model."""
    failure: Failure | None = None
    unreachable: str = ""
    """What MLflow's last answer was instead of one."""

    @property
    def why(self) -> str:
        """Why there is no model, and whether that may have changed without being heard of."""
        return f"{self.reason}; MLflow does not answer: {self.unreachable}" if self.unreachable else self.reason


class Follower:
    """A thread that keeps `state` current."""

    def __init__(self, registry: Alias, load: Callable[[Version], Model]) -> None:
        self.state = State()
        self.failures = 0
        """How often a version could not be loaded."""
        self._registry = registry
        self._load = load
        self._turned = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)

    @property
    def stalled(self) -> bool:
        """Whether the thread hangs, or has ended."""
        return time.monotonic() - self._turned > STALLED_S

    def start(self) -> None:
        """Begins to follow."""
        self._thread.start()

    def stop(self) -> None:
        """Ends soon; what is being loaded is left where it is."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.look()
            except Exception:
                log.exception("the follower met what it does not know, and goes on")
            self._turned = time.monotonic()
            self._stop.wait(POLL_S)

    def look(self) -> None:
        """Asks MLflow once, and does what follows from it."""
        try:
            version = self._registry.champion()
        except Exception as error:
            if not self.state.unreachable:
                log.warning("MLflow does not say who has the alias; the model stays as it is: %s", _brief(error))
            self.state = replace(self.state, unreachable=_brief(error))
            return
        if self.state.unreachable:
            log.info("MLflow answers again")
            self.state = replace(self.state, unreachable="")
        if version is None:
            self._nobody()
        elif self.state.model is not None and self.state.model.version == version:
            self.state = State(model=self.state.model)
        elif not self._is_too_early(version):
            self._take(version)

    def _nobody(self) -> None:
        """Whoever takes the alias away means it: nobody answers."""
        name, alias = self._registry.model, self._registry.alias
        if self.state.model is not None:
            log.warning("nobody has the alias %s of %s any more: no predictions", alias, name)
        self.state = State(reason=f"no version of {name} has the alias {alias}")

    def _is_too_early(self, version: Version) -> bool:
        failure = self.state.failure
        return failure is not None and failure.version == version and time.monotonic() < failure.again

    def _take(self, version: Version) -> None:
        former = self.state.model
        try:
            size = self._registry.size(version)
            if size > LARGEST:
                raise TooLargeError(f"it has {size / 2**20:.1f} MiB of files, {LARGEST >> 20} MiB are the most")
            model = self._load(version)
        except Exception as error:
            self.failures += 1
            kept = f"version {former.version.number} goes on answering" if former else "nobody answers"
            log.exception("version %s of %s cannot be loaded; %s", version.number, version.model, kept)
            failure = Failure(version, _brief(error), time.monotonic() + RETRY_S)
            reason = f"version {version.number} has the alias and cannot be loaded: {failure.error}"
            self.state = replace(self.state, failure=failure, reason=reason)
            return
        self.state = State(model=model)
        was = f", not version {former.version.number} any more" if former else ""
        log.info("version %s of %s answers%s", version.number, version.model, was)
        del former
        _settle()


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def _settle() -> None:
    """What is in memory now stays: the garbage collector need not look through it in the middle of a request."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
