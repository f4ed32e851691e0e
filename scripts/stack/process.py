"""The one door for subprocesses: argument lists, bounded, no secret in an argument.

Every call has a time-out. Output is either captured (for facts) or streamed (for people).
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from stack.errors import Exit, StackError

OUT_OF_TIME = 124
"""The code of a command that `capture` gave up, as timeout(1) has it."""


@dataclass(frozen=True)
class Result:
    """What a finished command said."""

    code: int
    out: str
    err: str


def capture(
    command: Sequence[str | Path],
    *,
    timeout: float,
    check: bool = True,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: str | IO[bytes] | None = None,
) -> Result:
    """Runs a command and returns what it printed.

    `timeout` is in seconds; `stdin` is text, or an open file. Raises StackError (E-COMMAND) when the command is
    missing, runs out of time, or, with `check`, exits with another code than 0.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            cwd=cwd,
            env={**os.environ, **env} if env else None,
            input=stdin if isinstance(stdin, str) else None,
            stdin=None if isinstance(stdin, str) else stdin or subprocess.DEVNULL,
            check=False,
        )
    except FileNotFoundError:
        if check:
            raise _failure(words, f"{words[0]} is not installed", "") from None
        return Result(127, "", f"{words[0]}: not found")
    except subprocess.TimeoutExpired:
        if check:
            raise _failure(words, f"no answer within {timeout:g} s", "", Exit.TIMED_OUT) from None
        return Result(OUT_OF_TIME, "", f"no answer within {timeout:g} s")
    if check and done.returncode != 0:
        raise _failure(words, f"it exited {done.returncode}", done.stderr or done.stdout)
    return Result(done.returncode, done.stdout, done.stderr)


def stream(
    command: Sequence[str | Path],
    *,
    timeout: float,
    on_line: Callable[[str], None] | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> int:
    """Runs a command whose output is for a person, line by line, and returns its exit code.

    Without `on_line` the command owns the terminal. With it, stdout and stderr come as lines.
    Raises StackError (E-COMMAND, exit 4) after `timeout` seconds.
    """
    words = [str(word) for word in command]
    child = subprocess.Popen(
        words,
        cwd=cwd,
        env={**os.environ, **env} if env else None,
        stdin=subprocess.DEVNULL if on_line else None,
        stdout=subprocess.PIPE if on_line else None,
        stderr=subprocess.STDOUT if on_line else None,
        text=True,
        errors="replace",
        # The child is a group of its own, so that a time-out ends all of it.
        start_new_session=on_line is not None,
    )
    timed_out = False

    def end(_number: int, _frame: object) -> None:
        # First politely; whoever is left of the group a second later is killed.
        nonlocal timed_out
        _signal_group(child, signal.SIGKILL if timed_out else signal.SIGTERM)
        timed_out = True

    previous = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, timeout, 1.0)
    try:
        if on_line and child.stdout:
            for line in child.stdout:
                on_line(line.rstrip("\n"))
        code = child.wait()
    except BaseException:
        _signal_group(child, signal.SIGTERM)
        try:
            child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            _signal_group(child, signal.SIGKILL)
            child.wait()
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    if timed_out:
        raise _failure(words, f"not done within {timeout:g} s", "", Exit.TIMED_OUT)
    return code


def _signal_group(child: subprocess.Popen[str], number: signal.Signals) -> None:
    """Signals a child and, where it leads a group of its own, what is left of that group."""
    with contextlib.suppress(ProcessLookupError):
        if child.stdout:
            os.killpg(child.pid, number)
        else:
            child.send_signal(number)


def _failure(words: Sequence[str], why: str, output: str, code: Exit = Exit.FAILED) -> StackError:
    tail = "\n".join(output.strip().splitlines()[-15:])
    return StackError(
        "E-COMMAND",
        f"a command failed: {shlex.join(words)[:400]}",
        why=f"{why}\n{tail}" if tail else why,
        fix="read the lines above; the same command can be run by hand",
        changed="what was done before that stays",
        exit_code=code,
    )


class Child:
    """A command in the background, whose end the caller watches; the last lines of its output are kept in memory.

    It is a group of its own: Ctrl-C reaches the caller, who decides.
    """

    def __init__(self, command: Sequence[str | Path], env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [str(word) for word in command],
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._lines: deque[str] = deque(maxlen=100)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        self._lines.extend(self._process.stdout)

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.poll()

    def tail(self, count: int) -> str:
        """The last lines of what it has printed."""
        # Of a command that has ended there is little left to read, unless a child of its holds the pipe.
        self._reader.join(timeout=1)
        return "".join(list(self._lines)[-count:]).strip()

    def stop(self, *, patience: float = 30) -> None:
        """Ends it, with its group: politely, and by force after `patience` seconds."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.poll() is not None:
                return
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self._process.pid, number)
                self._process.wait(timeout=patience)
