"""Which logins are the stack's own."""

from __future__ import annotations

import pytest

from stack import settings
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
