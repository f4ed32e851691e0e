"""Task logs for the API server, from the object store a piece at a time (`[logging] logging_config_class`).

Airflow's own reading of a log in S3 takes it whole, as text, and then as text with four bytes a character: more than
a hundred MiB for the longest log there is (taskguard.output), in a service that has room for little more.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from airflow.config_templates.airflow_local_settings import DEFAULT_LOGGING_CONFIG, DEFAULT_REMOTE_CONN_ID
from airflow.providers.amazon.aws.log.s3_task_handler import S3RemoteLogIO

__all__ = ["DEFAULT_LOGGING_CONFIG", "DEFAULT_REMOTE_CONN_ID", "REMOTE_TASK_LOG"]

PIECE = 64 * 1024
"""Bytes read at a time; a line that is longer takes as much as it has."""


class StreamedLogs(S3RemoteLogIO):
    """Airflow's logs in S3, with the interface by which Airflow reads in pieces where there is one."""

    def stream(self, relative_path: str, ti: Any) -> tuple[list[str], list[Generator[str, None, None]]]:
        """Where the logs of an attempt are, and the lines of each."""
        bucket, prefix = self.hook.parse_s3_url(f"{self.remote_base}/{relative_path}")
        keys = sorted(self.hook.list_keys(bucket_name=bucket, prefix=prefix))
        return [f"s3://{bucket}/{key}" for key in keys], [self._lines(bucket, key) for key in keys]

    def _lines(self, bucket: str, key: str) -> Generator[str, None, None]:
        try:
            body = self.hook.get_conn().get_object(Bucket=bucket, Key=key)["Body"]
            for line in body.iter_lines(PIECE):
                yield line.decode("utf-8", errors="replace")
        except Exception as error:  # The other attempts' lines, and the page, are worth more than this one's.
            self.log.exception("Could not read the log s3://%s/%s", bucket, key)
            yield f"Could not read logs from s3://{bucket}/{key} with error: {error}"


REMOTE_TASK_LOG = StreamedLogs.from_config()
