"""The guard: one small process beside Celery that knows what every task of this worker takes.

Celery's main process starts it (preload.py) and starts it again if it ends. It admits tasks, limits
them, watches them, ends the one that overruns its budget, writes down why, and ends processes that
their task left behind. It never touches Celery's main process; a pool process only if that hangs long
after its task has ended.

How a task's memory is counted, in bytes beyond what it had when it started:
- the task's own process: anonymous memory (heap, stack) and shared memory;
- Python processes that it forked: their private pages (what they share is counted with the task);
- programs that it started: their anonymous memory.
Files read through the page cache do not count: the kernel takes them back when it needs to.

How it acts when that exceeds the budget: first every process of the task is refused further memory
(RLIMIT_DATA, set from outside), which Python turns into a MemoryError at the very line; if a child
is the hungry one, the children are killed and the operator sees that. What is still there after a
few seconds, or holds while the container fills up, is killed with its whole group.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import resource
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from taskguard import explain, linux, protocol
from taskguard.admission import Admission
from taskguard.explain import Figures
from taskguard.ledger import Instance, Ledger
from taskguard.linux import MIB, Memory, Process

log = logging.getLogger("taskguard")

SLACK = 128 * MIB
"""Address space that a task may reserve beyond its budget between two looks: thread stacks and
allocators reserve more than they touch (8 MiB a thread, 64 MiB an arena)."""
FASTEST_S, SLOWEST_S = 0.05, 0.4
"""Between two looks, while a task grows and while none does."""
FIRST_S = 0.15
"""After a task's start; most small ones are over by then."""
IDLE_S = 60.0
GROWTH = 4 * MIB
"""More than this since the last look is growing."""
PATIENCE_S = 5.0
"""From the refusal of memory to the end by force. A MemoryError needs no time; this is for a task
that sits on its memory."""
CHILD_PATIENCE_S = 10.0
"""From the end of a task's children to the end of the task: its operator should notice."""
ENDING_PATIENCE_S = 60.0
"""For callbacks of a task that has failed already."""
LAST_WORDS = 64 * MIB
"""For them, too, beyond the budget where it is used up: a client that sends a message imports 20 to 40 MiB. Only of
what the container has beyond NEARLY_FULL, and shared by all who end at the moment."""
NEARLY_FULL = 48 * MIB
"""So little left in the container that the one who overran must go now."""
SUPERVISOR_GROWTH = 8 * MIB
"""A pool process grows by what a task sends through it: XComs (bounded by taskguard.xcom) and lines
of its log. Beyond this the task goes, since the pool process must not: what it holds it still writes
to the log, escaped, in several copies (48 MiB of NUL bytes became more than 800 MiB)."""
MAX_PROCESSES = 200
"""Of one task. A bare shell takes 0.7 MiB, two thirds of it the kernel's."""
MAX_LOG = 16 * MIB
"""To read one of 100 MB the API server takes 900. taskguard.output keeps what Python writes below half
of this; what a program writes past Python's streams meets this end."""
WAIT_S = 100.0
"""Below task_queued_timeout (120 s): then a task behind others gives its slot back and comes again, keeping
its place in the queue. The first of the queue stays, or those behind it would take what it waits for, and so
does one that cannot begin anew (listener); they are told again why they wait."""
TICKET_S = 600.0
OF_MEMORY = ("budget", "allocation", "kernel")
"""Kinds of overrun that more memory would mend: these count, and a retry gets more."""
STUCK_S = 300.0
"""A pool process hangs that has not finished this long after its task's process ended, or that was seen
to use no CPU for this long: it tells the API server every few seconds that its task lives."""


@dataclass
class Overrun:
    """A task beyond its budget, and what was done about it."""

    figures: Figures
    since: float
    """Monotonic."""
    patience: float
    final: bool = False
    """Its children were killed: a multiprocessing.Pool would start them again, and wait for ever."""
    told: bool = False
    until: int = 0
    """Bytes that the task may reach for its ending; 0 while it is not known to end."""
    left: int = 0
    """Of these, at the last look."""


@dataclass
class Watch:
    """One busy slot: a pool process, and below it the task that it supervises."""

    supervisor: int
    supervisor_base: Memory
    since: float
    """Monotonic."""
    budget: int
    """MiB."""
    told_at: float = -math.inf
    """Monotonic: when it was told last that it waits."""
    source: str = "the plan's share of each task"
    instance: Instance | None = None
    log: Path | None = None
    leader: int | None = None
    base: Memory = field(default_factory=lambda: Memory(0, 0, 0))
    first_hwm: int = 0
    first_file: int = 0
    declared: int | None = None
    members: dict[int, Process] = field(default_factory=dict)
    details: dict[int, int] = field(default_factory=dict)
    held: list[int] = field(default_factory=list)
    """The task's standard output, open for as long as its process lives: see `_start`."""
    used: int = 0
    peak: int = 0
    largest: tuple[int, str] = (0, "")
    overrun: Overrun | None = None
    killed: bool = False
    ended: bool = False
    """It said itself that it ends."""
    left_at: float | None = None
    ticks: int = 0
    still: float = 0.0
    """Seconds of looks that found the pool process's CPU time unchanged."""
    oom_kills: int = 0
    forget: Callable[[], None] = lambda: None
    """Stops waiting for the pool process's end."""

    @property
    def name(self) -> str:
        return str(self.instance or f"process {self.leader}")

    def close(self) -> None:
        for descriptor in self.details.values():
            os.close(descriptor)
        self.details.clear()
        self.release()

    def release(self) -> None:
        while self.held:
            os.close(self.held.pop())


class Guard:
    """The event loop and its state."""

    def __init__(self, *, capacity: int, default: int, larger_retries: bool, ledger: Path) -> None:
        """`capacity`: MiB that all tasks together may have; `default`: MiB for one that asks for nothing."""
        self.default = default
        self.larger_retries = larger_retries
        self.admission: Admission[int] = Admission(capacity)
        self.ledger = Ledger(ledger)
        self.watches: dict[int, Watch] = {}
        self.links: dict[int, socket.socket] = {}
        self.tickets: dict[Instance, float] = {}
        self.interval = FASTEST_S
        self.looked_at = time.monotonic()
        self.main = os.getppid()
        # Processes and threads of this user on this host, for tasks: all of them as bare shells fit into
        # half of the container, and a fork bomb meets this before the container's pids_limit.
        self.max_user_processes = min(3500, 400 + linux.container().limit // MIB // 2)
        self._selector = selectors.DefaultSelector()
        self._server = protocol.listen()
        self._selector.register(self._server, selectors.EVENT_READ, self._accept)
        self._sweep_at: float | None = None
        self._due = 0.0

    # --- the loop

    def run(self) -> None:
        """Works until its parent is gone."""
        log.info("guarding: %s MiB for tasks, %s MiB for each by default", self.admission.capacity, self.default)
        while os.getppid() == self.main:
            busy = bool(self.watches) or self._sweep_at is not None
            idle = Ledger.COMMIT_S if self.ledger.pending else IDLE_S
            wait = max(0.0, self._due - time.monotonic()) if busy else idle
            for key, _ in self._selector.select(wait):
                key.data(key.fileobj)
            if time.monotonic() >= self._due:
                if busy:
                    self._look()
                self.ledger.write(at_once=not busy)
                self._due = time.monotonic() + self.interval
        self.ledger.close()

    def _accept(self, server: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            link, _ = server.accept()
            link.settimeout(1.0)
            self._selector.register(link, selectors.EVENT_READ, self._serve)

    def _serve(self, link: socket.socket) -> None:
        try:
            message, descriptors = protocol.receive(link)
        except (OSError, ValueError):
            message, descriptors = None, []
        if message is None:
            self._hang_up(link)
            return
        pid = protocol.peer(link)
        try:
            answer = self._handle(str(message.get("op")), message, pid, link, descriptors)
            if answer is not None:
                protocol.send(link, answer)
        except Exception:
            # Whatever it is: without the guard nobody is limited.
            log.exception("a message from process %s could not be served: %s", pid, message)
            self._hang_up(link)

    def _hang_up(self, link: socket.socket) -> None:
        for supervisor in [key for key, one in self.links.items() if one is link]:
            del self.links[supervisor]
            self.admission.waiting.pop(supervisor, None)
        self._selector.unregister(link)
        link.close()

    def _handle(
        self, op: str, message: dict[str, Any], pid: int, link: socket.socket, descriptors: list[int]
    ) -> dict[str, Any] | None:
        if op == "supervise":
            self._supervise(pid, message)
            return None
        if op == "finished":
            self._finish(pid)
            return None
        if op == "status":
            return self._status()
        watch = self._watch_of(pid)
        if watch is None:
            for descriptor in descriptors:
                os.close(descriptor)
            return None if op == "forked" else {}
        if op == "forked":
            (watch.details[pid],) = descriptors
            return None
        if op == "start":
            return self._start(watch, pid, message, descriptors)
        if op == "admit":
            return self._ask(watch, message, link)
        if op == "explain":
            return {"text": self._explain(watch, memory_error=bool(message.get("memory_error")))}
        if op == "end":
            watch.ended = True
            self._measure_at_end(watch)
            return {"peak": watch.peak // MIB}
        raise ValueError(f"unknown message {op!r}")

    def _watch_of(self, pid: int) -> Watch | None:
        """The busy slot that a process belongs to, by its ancestors."""
        for _ in range(64):
            if pid in self.watches:
                return self.watches[pid]
            found = linux.process(pid)
            if found is None or found.parent <= 1:
                return None
            if found.parent == self.main:
                # A pool process that we were not told of: the guard was away then.
                return self._supervise(pid, {})
            pid = found.parent
        return None

    def _on_exit(self, pid: int, act: Callable[[], None]) -> Callable[[], None]:
        """Calls `act` once, when a process ends. Returns what forgets it: pool processes live long, and
        each of their tasks would leave a descriptor open."""
        try:
            descriptor = os.pidfd_open(pid)
        except OSError:
            act()
            return lambda: None
        watching = True

        def forget() -> None:
            nonlocal watching
            if watching:
                watching = False
                self._selector.unregister(descriptor)
                os.close(descriptor)

        def ended(_: Any) -> None:
            forget()
            act()

        self._selector.register(descriptor, selectors.EVENT_READ, ended)
        return forget

    # --- a task's life

    def _supervise(self, pid: int, message: dict[str, Any]) -> Watch:
        """A pool process took a task."""
        self._drop(pid)
        watch = Watch(pid, linux.memory(pid) or Memory(0, 0, 0), time.monotonic(), self.default)
        watch.oom_kills = linux.container().oom_kills
        if "instance" in message:
            watch.instance = Instance.of(message["instance"])
        if message.get("log"):
            watch.log = Path(message["log"])
        self.watches[pid] = watch
        watch.forget = self._on_exit(pid, lambda: self._supervisor_gone(watch))
        return watch

    def _start(self, watch: Watch, pid: int, message: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        """A task's process is there, before it reads its DAG file. Its standard output is held open until
        it has ended: the pool process looks for the end when the last of the task's streams is closed,
        which the kernel does a moment before the end can be seen, and next after min_heartbeat_interval
        (5 s), with a slot that does nothing."""
        watch.release()
        watch.held = descriptors
        watch.leader = pid
        watch.instance = Instance.of(message["instance"])
        watch.base = linux.memory(pid) or Memory(0, 0, 0)
        watch.first_hwm = linux.status(pid, "VmHWM")
        watch.first_file = linux.status(pid, "RssFile")
        self._due = min(self._due, time.monotonic() + FIRST_S)
        self._on_exit(pid, lambda: self._leader_gone(watch))
        with contextlib.suppress(OSError, ValueError):
            resource.prlimit(pid, resource.RLIMIT_NPROC, (self.max_user_processes, resource.RLIM_INFINITY))
        self._limit(watch, pid, watch.base)
        return {"budget": watch.budget}

    def _ask(self, watch: Watch, message: dict[str, Any], link: socket.socket) -> dict[str, Any] | None:
        """A task knows what it wants, and asks to begin. The answer may come much later."""
        if watch.leader is None:
            # Its start was told to a guard that is gone.
            self._start(watch, protocol.peer(link), message, [])
        instance = Instance.of(message["instance"])
        watch.declared = None if message.get("ram") is None else int(message["ram"])
        budget, source = self.default, watch.source
        if watch.declared is not None and watch.declared != self.default:
            budget, source = watch.declared, "from its resources"
        notes = []
        if not self.admission.possible(budget):
            return {"never": explain.never(budget, self.admission.capacity)}
        earlier = self.ledger.last_overrun(instance) if instance.try_number > 1 else None
        if earlier is not None and self.larger_retries:
            larger = min(self.admission.capacity, 2 * earlier)
            if larger > budget:
                notes.append(
                    f"Attempt {instance.try_number}: {earlier} MiB were too little before; "
                    f"this time the budget is {larger} MiB"
                )
                budget, source = larger, f"raised after an overrun with {earlier} MiB"
        watch.budget, watch.source = budget, source
        since = self.tickets.pop(instance, time.monotonic())
        stays = bool(message.get("stays"))
        self.admission.ask(watch.supervisor, budget, since, held=watch.used // MIB, stays=stays)
        self.links[watch.supervisor] = link
        watch.told_at = -math.inf
        self._admit(notes={watch.supervisor: notes})
        return None

    def _door(self, watch: Watch) -> str:
        """Why a task waits."""
        others = sorted(
            ((self.watches[key].name, mib) for key, mib in self.admission.granted.items() if key in self.watches),
            key=lambda pair: -pair[1],
        )
        held = ", ".join(f"{name} {mib}" for name, mib in others[:6])
        ahead = len(self.admission.waiting) - 1
        return (
            f"Waiting for memory: this task needs {watch.budget} MiB, {self.admission.free} of "
            f"{self.admission.capacity} MiB are free; {ahead} other(s) wait. Running: {held or 'none'}"
        )

    def _admit(self, notes: dict[int, list[str]] | None = None) -> None:
        """Lets in who fits, and sends away who has waited long enough or stands in the way."""
        for supervisor in self.admission.admit():
            watch = self.watches[supervisor]
            found = linux.memory(watch.leader) if watch.leader else None
            if watch.leader and found:
                # Before it begins: its first request may be for all of it.
                self._limit(watch, watch.leader, found)
            self._reply(
                supervisor,
                {"granted": watch.budget, "source": watch.source, "notes": (notes or {}).get(supervisor, [])},
            )
        now = time.monotonic()
        late = {key for key in self.admission.behind() if now - self.watches[key].since > WAIT_S}
        blocking = self.admission.in_the_way()
        for supervisor in late | ({blocking} if blocking is not None else set()):
            waiting = self.admission.waiting.pop(supervisor)
            instance = self.watches[supervisor].instance
            if instance:
                self.tickets[instance] = waiting.since
            self._reply(supervisor, {"later": True})
        for supervisor in self.admission.waiting:
            watch = self.watches[supervisor]
            if now - watch.told_at > WAIT_S:
                watch.told_at = now
                with contextlib.suppress(OSError, KeyError):
                    protocol.send(self.links[supervisor], {"wait": self._door(watch)})
        self.tickets = {key: since for key, since in self.tickets.items() if now - since < TICKET_S}

    def _reply(self, supervisor: int, answer: dict[str, Any]) -> None:
        link = self.links.pop(supervisor, None)
        if link is not None:
            with contextlib.suppress(OSError):
                protocol.send(link, answer)

    def _leader_gone(self, watch: Watch) -> None:
        """A task's process has ended, well or not; what it started must not outlive it."""
        watch.left_at = time.monotonic()
        ours = watch.ended or watch.killed or watch.overrun is not None
        if not ours and linux.container().oom_kills > watch.oom_kills:
            self._tell_in_log(watch, self._figures(watch, "kernel"))
        watch.release()
        for pid in watch.members:
            self._kill(pid)
        self._sweep_at = time.monotonic() + FASTEST_S

    def _finish(self, pid: int) -> None:
        """A pool process is done with its task."""
        watch = self.watches.get(pid)
        if watch is None:
            return
        if watch.instance and watch.leader:
            overran = watch.overrun is not None and watch.overrun.told and watch.overrun.figures.kind in OF_MEMORY
            self.ledger.record(watch.instance, watch.peak // MIB, watch.budget, watch.declared, overran)
        self._drop(pid)
        self._sweep_at = time.monotonic() + FASTEST_S

    def _supervisor_gone(self, watch: Watch) -> None:
        if self.watches.get(watch.supervisor) is watch:
            log.error(
                "the pool process %s ended while it supervised %s; the task ends with it",
                watch.supervisor,
                watch.name,
            )
            self._kill_group(watch)
            self._finish(watch.supervisor)

    def _drop(self, pid: int) -> None:
        watch = self.watches.pop(pid, None)
        if watch:
            watch.forget()
            watch.close()
            self.links.pop(pid, None)
            self.admission.leave(pid)
            self._admit()

    # --- looking

    def _look(self) -> None:
        """One look at everything: who takes how much, who must go, who may come."""
        table = linux.processes()
        children: dict[int, list[Process]] = {}
        for one in table.values():
            children.setdefault(one.parent, []).append(one)
        growing = False
        now = time.monotonic()
        # A container that was paused comes back after a long time in which nobody could move.
        passed = min(now - self.looked_at, 2 * SLOWEST_S)
        self.looked_at = now
        for watch in list(self.watches.values()):
            supervisor = table.get(watch.supervisor)
            ticks = supervisor.ticks if supervisor else 0
            watch.still = watch.still + passed if ticks == watch.ticks else 0.0
            watch.ticks = ticks
            watch.members = self._descendants(watch.supervisor, children)
            if len(watch.members) > MAX_PROCESSES or watch.killed:
                # First of all, and without measuring each: this is a race.
                self._kill_group(watch)
        for watch in list(self.watches.values()):
            before = watch.used
            self._measure(watch)
            growing |= watch.used - before > GROWTH or watch.overrun is not None
            self._judge(watch, now)
        self._sweep(children, now)
        self._admit()
        self.interval = FASTEST_S if growing else min(SLOWEST_S, self.interval * 1.5)

    @staticmethod
    def _descendants(pid: int, children: dict[int, list[Process]]) -> dict[int, Process]:
        found: dict[int, Process] = {}
        queue = list(children.get(pid, ()))
        while queue:
            one = queue.pop()
            if not one.zombie:
                found[one.pid] = one
            queue += children.get(one.pid, ())
        return found

    def _measure(self, watch: Watch) -> None:
        members = watch.members
        for pid in [pid for pid in watch.details if pid not in members]:
            os.close(watch.details.pop(pid))
        total, shared, largest = 0, 0, (0, "")
        seen: dict[int, Memory] = {}
        for pid, one in members.items():
            found = linux.memory(pid)
            if found is None:
                continue
            seen[pid] = found
            own = self._own(watch, pid, found)
            known = watch.base.other if pid == watch.leader else 0
            if found.other - known > 16 * MIB:
                shared = max(shared, linux.status(pid, "RssShmem"))
            total += own
            if own >= largest[0]:
                what = "the task's own" if pid == watch.leader else one.name
                largest = (own, f"{what} (pid {pid}, {own // MIB} MiB)")
        watch.used = total + shared
        if watch.used > watch.peak:
            watch.peak, watch.largest = watch.used, largest
        if watch.overrun:
            watch.overrun.left = self._left_to_end(watch, watch.overrun)
        for pid, found in seen.items():
            self._limit(watch, pid, found)

    @staticmethod
    def _own(watch: Watch, pid: int, found: Memory) -> int:
        """A process's part of its task's memory."""
        if pid == watch.leader:
            return max(0, found.anonymous - watch.base.anonymous)
        if pid in watch.details:
            details = linux.read_details(watch.details[pid])
            if details:
                return details.get("Private_Dirty", 0)
            # It has become another program since.
            os.close(watch.details.pop(pid))
        leader = watch.members.get(watch.leader) if watch.leader else None
        if leader is None:
            return max(0, found.anonymous - watch.supervisor_base.anonymous)
        if watch.members[pid].name == leader.name:
            # Forked, and not yet heard of: what it inherited is not its own.
            shared = linux.memory(leader.pid)
            return max(0, found.anonymous - (shared.anonymous if shared else 0))
        return found.anonymous

    def _limit(self, watch: Watch, pid: int, found: Memory) -> None:
        """Refuses a process more memory than its task has left, from its next request on."""
        left = max(0, watch.budget * MIB - watch.used)
        limit = found.data + (watch.overrun.left if watch.overrun else left + SLACK)
        with contextlib.suppress(OSError, ValueError):
            resource.prlimit(pid, resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))

    def _left_to_end(self, watch: Watch, overrun: Overrun) -> int:
        """Bytes that a task may still take for its ending: what is left of its budget, and of LAST_WORDS as much as
        the container has."""
        if not overrun.until:
            return 0
        container = linux.container()
        endings = sum(1 for one in self.watches.values() if one.overrun and one.overrun.until)
        free = max(0, container.limit - container.used - NEARLY_FULL) // max(1, endings)
        own = max(watch.used, watch.budget * MIB)
        return own - watch.used + min(max(0, overrun.until - own), free)

    def _measure_at_end(self, watch: Watch) -> None:
        """The kernel's own high-water mark, for a peak between two looks."""
        if watch.leader is None:
            return
        files = max(0, linux.status(watch.leader, "RssFile") - watch.first_file)
        grown = linux.status(watch.leader, "VmHWM") - watch.first_hwm - files
        watch.peak = max(watch.peak, min(grown, watch.budget * MIB + SLACK))

    def _judge(self, watch: Watch, now: float) -> None:
        if watch.killed:
            return
        if watch.left_at is not None:
            if now - watch.left_at > STUCK_S:
                log.error(
                    "the pool process %s hangs %.0f s after %s ended; it is replaced",
                    watch.supervisor,
                    STUCK_S,
                    watch.name,
                )
                self._kill(watch.supervisor)
            return
        if watch.still > STUCK_S:
            log.error(
                "the pool process %s hangs: no sign of life for %.0f s; it is replaced, and %s ends with it",
                watch.supervisor,
                STUCK_S,
                watch.name,
            )
            self._kill(watch.supervisor)
            return
        kind, detail = self._verdict(watch)
        if kind in ("supervisor", "processes", "log"):
            self._end(watch, self._figures(watch, kind, detail))
        elif kind == "budget" and watch.overrun is None:
            self._refuse(watch, now)
        elif watch.overrun and self._recovered(watch):
            watch.overrun = None
        elif watch.overrun:
            container = linux.container()
            full = kind == "budget" and container.limit - container.used < NEARLY_FULL
            # It was given memory to end with, and took more.
            hungry = 0 < watch.overrun.until < watch.used
            patience = PATIENCE_S if hungry else watch.overrun.patience
            if full or now - watch.overrun.since > patience:
                self._end(watch, watch.overrun.figures)

    @staticmethod
    def _recovered(watch: Watch) -> bool:
        """Whether the task caught the MemoryError and made room."""
        overrun = watch.overrun
        return overrun is not None and not overrun.told and not overrun.final and watch.used < 0.9 * watch.budget * MIB

    def _verdict(self, watch: Watch) -> tuple[str, str]:
        """What a task does wrong, if anything, and the figure for it."""
        supervisor = linux.memory(watch.supervisor)
        if supervisor and supervisor.anonymous - watch.supervisor_base.anonymous > SUPERVISOR_GROWTH:
            return "supervisor", str((supervisor.anonymous - watch.supervisor_base.anonymous) // MIB)
        if len(watch.members) > MAX_PROCESSES:
            return "processes", str(len(watch.members))
        if watch.log:
            with contextlib.suppress(OSError):
                size = watch.log.stat().st_size
                if size > MAX_LOG:
                    return "log", str(size // MIB)
        return ("budget" if watch.used > watch.budget * MIB else ""), ""

    def _refuse(self, watch: Watch, now: float) -> None:
        """Beyond the budget: no more memory for anyone in it; hungry children are killed."""
        leader = linux.memory(watch.leader) if watch.leader else None
        own = self._own(watch, watch.leader, leader) if leader and watch.leader else 0
        by_children = own < watch.used // 2
        patience = CHILD_PATIENCE_S if by_children else PATIENCE_S
        watch.overrun = Overrun(self._figures(watch, "budget"), now, patience, final=by_children)
        log.warning("%s is beyond its budget: %s MiB of %s MiB", watch.name, watch.used // MIB, watch.budget)
        for pid in watch.members:
            found = linux.memory(pid)
            if by_children and pid != watch.leader:
                self._kill(pid)
            elif found:
                self._limit(watch, pid, found)

    # --- ending

    def _figures(self, watch: Watch, kind: str, detail: str = "") -> Figures:
        now = time.monotonic()
        following = min(self.admission.capacity, 2 * watch.budget) if kind in OF_MEMORY else 0
        return Figures(
            kind=kind,
            budget=watch.budget,
            source=watch.source,
            peak=watch.peak // MIB,
            process=watch.largest[1] or "the task's own",
            processes=max(1, len(watch.members)),
            at=datetime.now(tz=timezone.utc).strftime("%H:%M:%S UTC"),
            after_s=now - watch.since,
            free=self.admission.free,
            capacity=self.admission.capacity,
            next_budget=following if self.larger_retries and following > watch.budget else None,
            detail=detail,
        )

    def _explain(self, watch: Watch, *, memory_error: bool) -> str:
        """For a task that is failing: why, if it was memory."""
        if watch.overrun is None and memory_error:
            watch.overrun = Overrun(self._figures(watch, "allocation"), time.monotonic(), ENDING_PATIENCE_S)
        if watch.overrun is None:
            return ""
        watch.overrun.since, watch.overrun.patience = time.monotonic(), ENDING_PATIENCE_S
        # Once: it asks before its callbacks and after them.
        watch.overrun.until = watch.overrun.until or max(watch.budget * MIB, watch.used + LAST_WORDS)
        watch.overrun.left = self._left_to_end(watch, watch.overrun)
        found = linux.memory(watch.leader) if watch.leader else None
        if watch.leader and found:
            self._limit(watch, watch.leader, found)
        return self._tell(watch, watch.overrun.figures)

    def _tell(self, watch: Watch, figures: Figures) -> str:
        text = explain.paragraph(figures)
        if watch.overrun is None:
            watch.overrun = Overrun(figures, time.monotonic(), ENDING_PATIENCE_S)
        if not watch.overrun.told:
            watch.overrun.told = True
            log.warning("%s: %s", watch.name, text)
            if watch.instance and figures.kind in OF_MEMORY:
                self.ledger.record_overrun(watch.instance, watch.budget, watch.peak // MIB, text)
        return text

    def _end(self, watch: Watch, figures: Figures) -> None:
        """Ends a task and all that it started, by force; its log says why."""
        if not (watch.overrun and watch.overrun.told):
            self._tell_in_log(watch, figures)
        watch.killed = True
        self._kill_group(watch)

    def _tell_in_log(self, watch: Watch, figures: Figures) -> None:
        """For a task that cannot say it itself: written before it is killed, since its log is uploaded
        and removed right after."""
        text = self._tell(watch, figures)
        line = {
            "timestamp": datetime.now(tz=timezone.utc).isoformat(),
            "level": "error",
            "event": text,
            "logger": "taskguard",
        }
        if watch.log:
            with contextlib.suppress(OSError), watch.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _kill_group(self, watch: Watch) -> None:
        """The task's process group at once, then whoever left it. Repeated at each look until none is left."""
        groups = {one.group for one in watch.members.values()} | ({watch.leader} if watch.leader else set())
        supervisor = linux.process(watch.supervisor)
        for group in groups - {os.getpgid(0), self.main, supervisor.group if supervisor else self.main}:
            with contextlib.suppress(OSError):
                os.killpg(group, signal.SIGKILL)
        for pid in watch.members:
            self._kill(pid)

    @staticmethod
    def _kill(pid: int) -> None:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)

    def _sweep(self, children: dict[int, list[Process]], now: float) -> None:
        """Ends orphans: in this container PID 1 has one child of its own, Celery's main process."""
        if self.main == 1:
            return
        orphans = [one for one in children.get(1, ()) if one.pid != self.main and not one.zombie]
        for group in {one.group for one in orphans} - {os.getpgid(0), self.main}:
            with contextlib.suppress(OSError):
                os.killpg(group, signal.SIGKILL)
        for one in orphans:
            self._kill(one.pid)
        if orphans:
            names = ", ".join(f"{one.name} (pid {one.pid})" for one in orphans[:5])
            log.warning("ended %s process(es) whose task is gone: %s", len(orphans), names)
        if self._sweep_at is not None and now >= self._sweep_at:
            self._sweep_at = None

    def _status(self) -> dict[str, Any]:
        return {
            "capacity": self.admission.capacity,
            "free": self.admission.free,
            "default": self.default,
            "running": [
                {"task": one.name, "budget": one.budget, "used": one.used // MIB, "peak": one.peak // MIB}
                for one in self.watches.values()
            ][:64],
            "waiting": len(self.admission.waiting),
        }


def main() -> int:
    """Started by preload.py in the worker's container."""
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(levelname)s taskguard: %(message)s")
    linux.die_with_parent(os.getppid(), signal.SIGKILL)
    # Ctrl-C and the container's stop are Celery's to handle; the guard stays until Celery is gone.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    guard = Guard(
        capacity=int(os.environ["TASKGUARD_CAPACITY"]),
        default=int(os.environ["AIRFLOW__OPERATORS__DEFAULT_RAM"]),
        larger_retries=os.environ.get("TASKGUARD_LARGER_RETRIES", "on") == "on",
        ledger=Path(os.environ["TASKGUARD_LEDGER"]),
    )
    guard.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
