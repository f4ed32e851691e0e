"""A service's API as the programs ask it: what goes wrong is an error that the operator can use."""

from __future__ import annotations

from typing import Any

import httpx

from stack.errors import Exit, StackError


class Client(httpx.Client):
    """An httpx.Client for a service of the stack. Raises StackError (E-NO-STACK) where no answer comes: of
    exit code 3 at the first question, before which nothing can have been changed, else of 1."""

    def __init__(self, service: str, url: str, **words: Any) -> None:
        # A proxy of the host's environment has no business with the stack's passwords.
        super().__init__(base_url=url, timeout=30, trust_env=False, **words)
        self._service = service
        self._answered = False

    def send(self, request: httpx.Request, **words: Any) -> httpx.Response:
        """As httpx does it."""
        try:
            answer = super().send(request, **words)
        except httpx.HTTPError as error:
            raise StackError(
                "E-NO-STACK",
                f"{self._service} does not answer at {self.base_url}",
                why=f"{type(error).__name__}: {error}",
                fix="make up, then make status",
                changed="nothing by this call",
                exit_code=Exit.FAILED if self._answered else Exit.PRECONDITION,
            ) from error
        self._answered = True
        return answer


def good(answer: httpx.Response, code: str, service: str, fix: str) -> httpx.Response:
    """The answer itself. Raises StackError with the status and what was said, where it is an error."""
    if answer.is_error:
        raise StackError(
            code,
            f"{service} answered {answer.status_code} to {answer.request.method} {answer.request.url.path}",
            why=answer.text[:500],
            fix=fix,
            exit_code=Exit.FAILED,
        )
    return answer
