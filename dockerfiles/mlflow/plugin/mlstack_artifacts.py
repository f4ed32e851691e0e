"""An MLflow artifact store plugin: S3 that is reached through the tracking server only.

MLflow's own S3 store tells clients (by /server-info, since 3.17) that they may fetch from S3
directly, by URLs signed for the server's S3 endpoint. In this stack that endpoint is on an internal
network: a client would try for hours. There is no switch for it; MLflow asks whether the store's
class can sign URLs. This one cannot: it is the same store behind the plain interface.

Registered for the scheme `proxied-s3` by the entry point group `mlflow.artifact_repository`.
"""

from __future__ import annotations

from mlflow.entities import FileInfo
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository

SCHEME = "proxied-s3"


class ProxiedS3ArtifactRepository(ArtifactRepository):
    """`proxied-s3://bucket/path`: like `s3://bucket/path`, without signed URLs."""

    def __init__(self, artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None) -> None:
        super().__init__(artifact_uri, tracking_uri, registry_uri)
        self._s3 = S3ArtifactRepository(
            artifact_uri.replace(f"{SCHEME}://", "s3://", 1), tracking_uri=tracking_uri, registry_uri=registry_uri
        )

    def log_artifact(self, local_file: str, artifact_path: str | None = None) -> None:
        """Uploads a file."""
        self._s3.log_artifact(local_file, artifact_path)

    def log_artifacts(self, local_dir: str, artifact_path: str | None = None) -> None:
        """Uploads a directory."""
        self._s3.log_artifacts(local_dir, artifact_path)

    def list_artifacts(self, path: str | None = None) -> list[FileInfo]:
        """The files and directories below a path."""
        found: list[FileInfo] = self._s3.list_artifacts(path)
        return found

    def _download_file(self, remote_file_path: str, local_path: str) -> None:
        self._s3._download_file(remote_file_path, local_path)

    def delete_artifacts(self, artifact_path: str | None = None) -> None:
        """Deletes a file or a directory."""
        self._s3.delete_artifacts(artifact_path)
