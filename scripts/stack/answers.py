"""What a service's API answered, as an error that the operator can use."""

from __future__ import annotations

import httpx

from stack.errors import Exit, StackError


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
