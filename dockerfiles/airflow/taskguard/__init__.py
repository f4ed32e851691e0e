"""What the Celery worker needs to run tasks safely on little memory."""
