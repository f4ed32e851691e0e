"""Which logins are the stack's own, and what is said of one that may be left behind."""

from __future__ import annotations

import pytest

from stack import settings
from stack.answers import Client
from stack.errors import StackError
from stack.people import ROLES, People


@pytest.mark.parametrize("name_of_the_first", ["ada", "Ada"])
def test_the_first_login_is_not_removed(name_of_the_first: str) -> None:
    """Whatever the case of its letters: Airflow finds it by either."""
    people = object.__new__(People)
    people.settings = settings.parse(f"ADMIN_USER={name_of_the_first}")
    for verb in (people.remove, lambda name: people.add(name, ROLES["user"])):
        with pytest.raises(StackError, match="the stack's own login"):
            verb("ada")


def test_the_reason_is_told_and_what_may_be_left_where_nothing_can_be_taken_back() -> None:
    """Airflow refused, and then MLflow did not answer any more."""
    people = object.__new__(People)
    # A port that nobody listens on.
    people._mlflow = Client("MLflow", "http://127.0.0.1:9")
    refused = StackError("E-AIRFLOW-API", "refused", why="so", fix="none")
    people._take_back("ada", refused)
    assert "make user-remove NAME=ada" in refused.changed
    with pytest.raises(StackError, match="does not answer"):
        people._take_back("ada", KeyboardInterrupt())
