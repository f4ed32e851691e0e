"""An MLflow artifact store plugin: S3 that is reached through the tracking server only, as a stream.

MLflow's own S3 store tells clients (by /server-info, since 3.17) that they may fetch from S3
directly, by URLs signed for the server's S3 endpoint. In this stack that endpoint is on an internal
network: a client would try for hours. There is no switch for it; MLflow asks whether the store's
class can sign URLs. This one cannot: it is the same store behind the plain interface.

It also takes an upload block by block, as it comes, and gives a download out as it is read
(mlstack_server.py): MLflow's own server has the whole artifact in a file first, both ways.

Registered for the scheme `proxied-s3` by the entry point group `mlflow.artifact_repository`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import mimetypes
import os
import posixpath
import tempfile
import threading
from collections.abc import AsyncIterable, AsyncIterator
from pathlib import Path
from typing import Any, BinaryIO

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError
from mlflow.entities import FileInfo
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR
from mlflow.store.artifact.artifact_repo import ArtifactRepository, StreamUploadMixin
from mlflow.store.artifact.s3_artifact_repo import BOTO_TO_MLFLOW_ERROR, S3ArtifactRepository

SCHEME = "proxied-s3"
BLOCK = 8 << 20
"""Bytes of a part of an upload. An upload of N blocks holds three of them: one fills, two are on their way."""
SMALL_PARTS, PARTS_OF_A_SIZE = 5000, 500
"""After SMALL_PARTS (42 GB) the blocks grow by one BLOCK, and again after each PARTS_OF_A_SIZE: S3 takes 10,000
parts, which is then 310 GB."""
STREAMS = 6
"""Uploads that a process streams at once, 24 MiB each; what comes beside them is put into a file first."""
PIECE = 1 << 20
"""Bytes of a download that are read at a time."""

_streams = threading.BoundedSemaphore(STREAMS)


@functools.cache
def s3_client() -> Any:
    """One client for the process: to make one takes 0.3 s of CPU, and MLflow makes a new one every five minutes.

    Payloads are not signed: that would be a SHA-256 of everything, on a network that nobody else is on.
    """
    return boto3.client(
        "s3",
        endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"],
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": "path", "payload_signing_enabled": False},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            max_pool_connections=32,
        ),
    )


class _Store(S3ArtifactRepository):
    """MLflow's store with our client."""

    def _get_s3_client(self) -> Any:
        return s3_client()


class ProxiedS3ArtifactRepository(ArtifactRepository, StreamUploadMixin):
    """`proxied-s3://bucket/path`: like `s3://bucket/path`, without signed URLs, and with streams."""

    def __init__(self, artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None) -> None:
        super().__init__(artifact_uri, tracking_uri, registry_uri)
        self._s3 = _Store(
            artifact_uri.replace(f"{SCHEME}://", "s3://", 1), tracking_uri=tracking_uri, registry_uri=registry_uri
        )

    def log_artifact(self, local_file: str, artifact_path: str | None = None) -> None:
        """Uploads a file."""
        self._s3.log_artifact(local_file, artifact_path)

    def log_artifacts(self, local_dir: str, artifact_path: str | None = None) -> None:
        """Uploads a directory."""
        self._s3.log_artifacts(local_dir, artifact_path)

    def log_artifact_from_stream(
        self, stream: BinaryIO, artifact_file_name: str, artifact_path: str | None = None
    ) -> None:
        """Uploads what a file-like object gives (asked for where no event loop runs)."""

        async def pieces() -> AsyncIterator[bytes]:
            while piece := stream.read(PIECE):
                yield piece

        asyncio.run(self.log_artifact_from_async_stream(pieces(), artifact_file_name, artifact_path))

    async def log_artifact_from_async_stream(
        self, chunks: AsyncIterable[bytes], artifact_file_name: str, artifact_path: str | None = None
    ) -> None:
        """Uploads what arrives, while it arrives. Where it breaks off, nothing is left in the store."""
        if not _streams.acquire(blocking=False):
            await self._through_a_file(chunks, artifact_file_name, artifact_path)
            return
        try:
            upload = _Upload(*self._place(posixpath.join(artifact_path or "", posixpath.basename(artifact_file_name))))
            await upload.run(chunks)
        finally:
            _streams.release()

    async def _through_a_file(self, chunks: AsyncIterable[bytes], name: str, artifact_path: str | None) -> None:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, posixpath.basename(name))
            with path.open("wb") as file:
                async for chunk in chunks:
                    await asyncio.to_thread(file.write, chunk)
            await asyncio.to_thread(self.log_artifact, str(path), artifact_path)

    async def open(self, path: str) -> tuple[int, AsyncIterator[bytes]]:
        """The length of an artifact, bytes, and its pieces. Raises MlflowException where there is none."""
        bucket, key = self._place(path)
        try:
            answer = await asyncio.to_thread(s3_client().get_object, Bucket=bucket, Key=key)
        except ClientError as error:
            raise _as_mlflow_says(error) from error
        return answer["ContentLength"], _pieces(answer["Body"])

    def list_artifacts(self, path: str | None = None) -> list[FileInfo]:
        """The files and directories below a path."""
        found: list[FileInfo] = self._s3.list_artifacts(path)
        return found

    def _download_file(self, remote_file_path: str, local_path: str) -> None:
        self._s3._download_file(remote_file_path, local_path)

    def delete_artifacts(self, artifact_path: str | None = None) -> None:
        """Deletes a file or a directory."""
        self._s3.delete_artifacts(artifact_path)

    def _place(self, path: str) -> tuple[str, str]:
        bucket, root = self._s3.parse_s3_compliant_uri(self._s3.artifact_uri)
        return bucket, posixpath.join(root, path)


class _Upload:
    """One object on its way: put whole where it is one block, else in parts, two of them at once."""

    def __init__(self, bucket: str, key: str) -> None:
        self._place = {"Bucket": bucket, "Key": key}
        self._type = _content_type(key)
        self._s3 = s3_client()
        self._id = ""
        self._parts: list[asyncio.Task[dict[str, Any]]] = []

    async def run(self, chunks: AsyncIterable[bytes]) -> None:
        """Uploads all chunks. Raises what the source or the store raised, after the parts were taken back."""
        try:
            await self._send(chunks)
        except BaseException as error:
            await asyncio.shield(self._take_back())
            if isinstance(error, ClientError):
                raise _as_mlflow_says(error) from error
            raise

    async def _send(self, chunks: AsyncIterable[bytes]) -> None:
        block = bytearray()
        async for chunk in chunks:
            block += chunk
            grown = max(0, len(self._parts) - SMALL_PARTS + PARTS_OF_A_SIZE) // PARTS_OF_A_SIZE
            if len(block) >= BLOCK * (1 + grown):
                await self._part(block)
                block = bytearray()
        if not self._parts:
            await asyncio.to_thread(self._s3.put_object, **self._place, **self._type, Body=block)
            return
        if block:
            await self._part(block)
        done = [{"PartNumber": number, **await part} for number, part in enumerate(self._parts, 1)]
        await asyncio.to_thread(
            self._s3.complete_multipart_upload, **self._place, UploadId=self._id, MultipartUpload={"Parts": done}
        )

    async def _part(self, block: bytearray) -> None:
        if not self._parts:
            begun = await asyncio.to_thread(self._s3.create_multipart_upload, **self._place, **self._type)
            self._id = begun["UploadId"]
        elif len(self._parts) > 1:
            await self._parts[-2]
        self._parts.append(asyncio.create_task(self._put(len(self._parts) + 1, block)))

    async def _put(self, number: int, block: bytearray) -> dict[str, Any]:
        answer = await asyncio.to_thread(
            self._s3.upload_part, **self._place, UploadId=self._id, PartNumber=number, Body=block
        )
        return {"ETag": answer["ETag"]}

    async def _take_back(self) -> None:
        # A part that lands after the abort would stay for ever.
        await asyncio.gather(*self._parts, return_exceptions=True)
        if self._id:
            with contextlib.suppress(ClientError):
                await asyncio.to_thread(self._s3.abort_multipart_upload, **self._place, UploadId=self._id)


async def _pieces(body: Any) -> AsyncIterator[bytes]:
    """Reads one piece ahead of the one that is being sent."""
    ahead = asyncio.create_task(asyncio.to_thread(body.read, PIECE))
    try:
        while piece := await ahead:
            ahead = asyncio.create_task(asyncio.to_thread(body.read, PIECE))
            yield piece
    finally:
        # Not awaited: whoever went away in the middle has us cancelled. In a thread: it waits for the one that reads.
        loop = asyncio.get_running_loop()
        ahead.add_done_callback(lambda _: loop.run_in_executor(None, body.close))


def _content_type(key: str) -> dict[str, str]:
    kind, encoding = mimetypes.guess_type(key)
    return {name: value for name, value in (("ContentType", kind), ("ContentEncoding", encoding)) if value}


def _as_mlflow_says(error: ClientError) -> MlflowException:
    code = error.response.get("Error", {}).get("Code", "")
    return MlflowException(
        f"the object store answered: {error}", error_code=BOTO_TO_MLFLOW_ERROR.get(code, INTERNAL_ERROR)
    )
