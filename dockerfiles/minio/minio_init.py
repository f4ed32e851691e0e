#!/usr/bin/env python3
"""Prepares the object store: buckets, and for each an identity that may use it and little else.

Changes nothing that is as it should be; sets an identity's secret and policy again at every run, so
that the generated secrets are always the ones in force. One policy file a bucket:
/etc/minio/<identity>.json.

Exit: 0 done, 1 the store refused or did not answer (the message says what).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import urllib3
from minio import Minio, MinioAdmin
from minio.credentials import StaticProvider
from minio.error import MinioAdminException, S3Error

# Identity (also its policy's name) -> bucket. The environment has S3_<IDENTITY>_SECRET for each.
IDENTITIES = {
    "mlflow": "mlflow",
    "airflow-logs": "airflow-logs",
    "pipelines": "pipelines",
    "serving": "predictions",
}
# Adds objects and can look at nothing: it is known once the store says so, and not that it knows nobody of the name.
WRITE_ONLY = {"serving"}
POLICIES = Path("/etc/minio")
PATIENCE_S = 30
ANSWER_S = 10


def main() -> int:
    """Creates what is missing and returns the exit code."""
    endpoint = os.environ["MINIO_ENDPOINT"]
    user, password = os.environ["MINIO_ROOT_USER"], os.environ["MINIO_ROOT_PASSWORD"]
    # Any method: everything here may be said twice, and a POST has been seen to go unanswered on a busy first start.
    retries = urllib3.Retry(4, backoff_factor=0.2, allowed_methods=None)
    pool = urllib3.PoolManager(timeout=ANSWER_S, retries=retries)
    store = Minio(endpoint=endpoint, access_key=user, secret_key=password, secure=False, http_client=pool)
    admin = MinioAdmin(endpoint=endpoint, credentials=StaticProvider(user, password), secure=False, http_client=pool)
    try:
        for identity, bucket in IDENTITIES.items():
            if not store.bucket_exists(bucket_name=bucket):
                store.make_bucket(bucket_name=bucket)
                print(f"created bucket {bucket}")
            secret = os.environ[f"S3_{identity.upper().replace('-', '_')}_SECRET"]
            admin.user_add(access_key=identity, secret_key=secret)
            admin.policy_add(policy_name=identity, policy_file=str(POLICIES / f"{identity}.json"))
            _attach(admin, identity)
            known = Minio(endpoint=endpoint, access_key=identity, secret_key=secret, secure=False, http_client=pool)
            _prove(known, identity, bucket)
            print(f"identity {identity} may use bucket {bucket}")
    except (S3Error, MinioAdminException) as error:
        print(f"error[E-STORE]: the object store refused: {error}", file=sys.stderr)
        print("  fix: a wrong root password means that secrets/ and the volume do not belong together", file=sys.stderr)
        return 1
    except urllib3.exceptions.HTTPError as error:
        print(f"error[E-STORE]: the object store did not answer, five times: {error}", file=sys.stderr)
        print("  fix: `make logs S=minio` says what it was doing; then `make up` again", file=sys.stderr)
        return 1
    return 0


def _attach(admin: MinioAdmin, identity: str) -> None:
    """Gives an identity its policy; the store answers an error where it has it already."""
    try:
        admin.attach_policy(policies=[identity], user=identity)
    except MinioAdminException as error:
        if "PolicyChangeAlreadyApplied" not in str(error):
            raise


def _prove(client: Minio, identity: str, bucket: str) -> None:
    """Returns once the store knows the identity, by its secret: it takes a moment. It can list its bucket then."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            next(iter(client.list_objects(bucket_name=bucket)), None)
            return
        except S3Error as error:
            if identity in WRITE_ONLY and error.code == "AccessDenied":
                return
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
