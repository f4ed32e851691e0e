"""What MLflow says of the alias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

NOBODY = frozenset({"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"})
"""How MLflow says that the model, or the alias, is not there. Name and alias are as they must be, by the settings:
no other parameter's value can be invalid."""


@dataclass(frozen=True)
class Version:
    """A version of a registered model. One that was deleted and made again under its number is another."""

    model: str
    number: str
    run_id: str
    created: int


class Registry:
    """MLflow's model registry, asked for one alias of one model."""

    def __init__(self, model: str, alias: str) -> None:
        self.model = model
        self.alias = alias
        self._client = MlflowClient()

    def champion(self) -> Version | None:
        """The version that has the alias; None where nobody has. Raises MlflowException where MLflow does not say."""
        try:
            found: Any = self._client.get_model_version_by_alias(self.model, self.alias)
        except MlflowException as error:
            if error.error_code in NOBODY or (error.error_code == "PERMISSION_DENIED" and not self._exists()):
                return None
            raise
        return Version(self.model, str(found.version), found.run_id or "", int(found.creation_timestamp))

    def size(self, version: Version) -> int:
        """Bytes of a version's files. Raises what its download would."""
        root = f"models:/{version.model}/{version.number}"

        def below(uri: str) -> int:
            found: Any = mlflow.artifacts.list_artifacts(artifact_uri=uri)
            return sum(below(f"{root}/{one.path}") if one.is_dir else int(one.file_size) for one in found)

        return below(root)

    def _exists(self) -> bool:
        """Whether there is the model: of one that is not there, MLflow says that its versions may not be read."""
        try:
            self._client.get_registered_model(self.model)
        except MlflowException as error:
            if error.error_code in NOBODY:
                return False
            raise
        return True
