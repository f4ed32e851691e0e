"""Memory budgets for the tasks of a Celery worker: see guard.py for how, docs/memory.md for why."""
