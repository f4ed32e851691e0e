"""The one exception of the stack's programs, and the one place that catches it.

Exit codes, the same for every program: 0 done, 1 failed, 2 usage, 3 a precondition is unmet and
nothing was changed, 4 a bounded wait ran out.
"""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NoReturn


class Exit(IntEnum):
    """Exit codes of every program in scripts/."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    PRECONDITION = 3
    TIMED_OUT = 4


class StackError(Exception):
    """Something the operator must know: what, why, how to mend it, what was changed.

    `code` is the anchor in docs/errors.md (`E-PORT` stands at `#e-port`).
    """

    def __init__(
        self,
        code: str,
        what: str,
        *,
        why: str,
        fix: str,
        changed: str = "nothing",
        exit_code: Exit = Exit.PRECONDITION,
    ) -> None:
        super().__init__(what)
        self.code = code
        self.what = what
        self.why = why
        self.fix = fix
        self.changed = changed
        self.exit_code = exit_code

    def __str__(self) -> str:
        def indented(text: str) -> str:
            return text.strip().replace("\n", "\n       ")

        return (
            f"error[{self.code}]: {self.what}\n"
            f"  why: {indented(self.why)}\n"
            f"  fix: {indented(self.fix)}\n"
            f"  changed: {self.changed}. more: docs/errors.md#{self.code.lower()}"
        )


def run_main(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Runs a program's `main` with the process's arguments and exits with its code.

    A request to end and a closed terminal count as Ctrl-C. A KeyboardInterrupt may bring words of its own.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        # Ignored under nohup, and so it stays.
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    try:
        code = main(sys.argv[1:])
    except StackError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    except OSError as error:
        told = StackError(
            "E-OS",
            f"the system refused something: {error}",
            why="the disk, or this user's share of it, is full"
            if error.errno in (errno.ENOSPC, errno.EDQUOT)
            else "the message is the operating system's own",
            fix="mend that (`df -h` and `docker system df` show what is full), then run the same command again",
            changed="what was done before that stays",
            exit_code=Exit.FAILED,
        )
        print(told, file=sys.stderr)
        code = told.exit_code
    except KeyboardInterrupt as error:
        words = str(error) or "nothing is lost, run the same command again to go on"
        print(f"\ninterrupted: {words}", file=sys.stderr)
        code = 130
    sys.exit(code)
