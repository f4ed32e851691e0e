"""The store that the predictions are written to."""

from __future__ import annotations

import os
from collections.abc import Callable

import boto3
from botocore.config import Config

BUCKET = "predictions"


def writer() -> Callable[[str, bytes], None]:
    """What puts an object into the bucket, with the identity of the environment; raises where it cannot."""
    client = boto3.client(
        "s3",
        endpoint_url=os.environ["S3_ENDPOINT_URL"],
        # The log itself tries again.
        config=Config(
            connect_timeout=3, read_timeout=10, retries={"total_max_attempts": 2}, s3={"addressing_style": "path"}
        ),
    )

    def put(key: str, body: bytes) -> None:
        client.put_object(Bucket=BUCKET, Key=key, Body=body, ContentType="application/x-ndjson")

    return put
