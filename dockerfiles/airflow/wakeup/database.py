"""Triggers in the metadata database that notify the scheduler.

Of what it would find in its next round: a run that was created, or cleared; a task instance that ended,
or was cleared, or that a trigger or a person's answer resumes (an answer may be there before the task has
parked itself). Not of a task's way from one to the other, which it wrote itself.
"""

from __future__ import annotations

import sqlalchemy

CHANNEL = "stack_wakeup"

REMOVE = f"DROP FUNCTION IF EXISTS {CHANNEL}() CASCADE"
INSTALL = (
    f"CREATE FUNCTION {CHANNEL}() RETURNS trigger LANGUAGE plpgsql AS "
    f"$$ BEGIN PERFORM pg_notify('{CHANNEL}', ''); RETURN NULL; END $$",
    f"CREATE TRIGGER {CHANNEL}_new AFTER INSERT ON dag_run FOR EACH STATEMENT EXECUTE FUNCTION {CHANNEL}()",
    f"CREATE TRIGGER {CHANNEL}_cleared AFTER UPDATE OF state ON dag_run FOR EACH ROW "
    f"WHEN (NEW.state = 'queued' AND OLD.state IS DISTINCT FROM NEW.state) EXECUTE FUNCTION {CHANNEL}()",
    f"CREATE TRIGGER {CHANNEL}_done AFTER UPDATE OF state ON task_instance FOR EACH ROW "
    "WHEN (OLD.state IS DISTINCT FROM NEW.state AND (NEW.state IS NULL "
    "OR OLD.state IN ('running', 'deferred', 'awaiting_input') OR NEW.state NOT IN ('scheduled', 'queued', 'running')))"
    f" EXECUTE FUNCTION {CHANNEL}()",
)


def remove(url: str) -> None:
    """Takes the triggers away: a migration may change a column that they name."""
    _execute(url, REMOVE)


def install(url: str) -> None:
    """Sets the triggers, in place of earlier ones."""
    _execute(url, REMOVE, *INSTALL)


def _execute(url: str, *statements: str) -> None:
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(sqlalchemy.text(statement))
    engine.dispose()
