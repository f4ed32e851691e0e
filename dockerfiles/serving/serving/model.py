"""A model in memory: loaded whole, tried once, and asked from several threads."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd

from serving.inputs import FROM_JSON, Column, Table
from serving.registry import Version

log = logging.getLogger(__name__)

DTYPES: dict[str, str] = {
    "double": "float64",
    "float": "float32",
    "long": "int64",
    "integer": "int32",
    "boolean": "bool",
    "string": "object",
    "binary": "object",
    "datetime": "datetime64[ns]",
}


class UnfitError(Exception):
    """A model that can be loaded and cannot be served."""


@dataclass(frozen=True)
class Model:
    """A version of the model that can answer."""

    version: Version
    columns: tuple[Column, ...]
    outputs: Any
    """What it answers with, as its signature says; None where that does not."""
    function: Callable[[Any], Any]

    def predict(self, table: Table) -> list[Any]:
        """A prediction for each row. Raises what the model raises."""
        rows = len(next(iter(table.values())))
        told = _plain(self.function(self._frame(table)))
        if len(told) != rows:
            raise UnfitError(f"it answered {len(told)} times to {rows} rows")
        return told

    def schema(self) -> dict[str, Any]:
        """What it takes and gives, for programs."""
        inputs = [{"name": one.name, "type": one.type, "required": one.required} for one in self.columns]
        return {
            "model": self.version.model,
            "version": self.version.number,
            "run_id": self.version.run_id,
            "inputs": inputs,
            "outputs": self.outputs,
        }

    def _frame(self, table: Table) -> Any:
        return pd.DataFrame({one.name: _array(table[one.name], one) for one in self.columns})


def load(version: Version) -> Model:
    """Brings a version into memory and asks it once, with its input example if it has one.

    Raises whatever stands in the way: a download, a package that is missing here, a signature that cannot be served.
    """
    with tempfile.TemporaryDirectory() as folder:
        loaded = mlflow.pyfunc.load_model(f"models:/{version.model}/{version.number}", dst_path=folder)
    metadata: Any = loaded.metadata
    # The model as it is: what MLflow puts before it holds each request against the signature once more.
    function = getattr(loaded._model_impl, metadata.flavors["python_function"].get("predict_fn", "predict"))
    signature = metadata.signature
    outputs = json.loads(signature.outputs.to_json()) if signature is not None and signature.outputs else None
    made = Model(version, _columns(signature), outputs, function)
    example = loaded.input_example
    if isinstance(example, pd.DataFrame) and {one.name for one in made.columns} <= set(example.columns):
        made.predict({one.name: example[one.name].tolist() for one in made.columns})
    else:
        log.info("version %s has no input example with its columns: its first request will be slower", version.number)
    return made


def _columns(signature: Any) -> tuple[Column, ...]:
    if signature is None or signature.inputs is None:
        raise UnfitError("it has no signature: log it with one (infer_signature)")
    specs = list(signature.inputs)
    # A tensor's type is numpy's and has no name among these; so has a nested one.
    types = [getattr(one.type, "name", "") for one in specs]
    if not all(one.name and kind in FROM_JSON for one, kind in zip(specs, types, strict=True)):
        raise UnfitError(f"its signature is not one of named columns of plain types: {signature.inputs}")
    return tuple(Column(one.name, kind, bool(one.required)) for one, kind in zip(specs, types, strict=True))


def _array(values: list[Any], column: Column) -> Any:
    kind = DTYPES[column.type]
    if kind in ("int64", "int32", "bool") and None in values:
        # As pandas has it: whole numbers of which some are missing are not whole numbers.
        kind = "object" if kind == "bool" else "float64"
    return np.array(values, dtype=kind)


def _plain(told: Any) -> list[Any]:
    """What a model answered, in Python's own types."""
    if isinstance(told, pd.DataFrame):
        return list(told.to_dict("records"))
    if isinstance(told, np.ndarray | pd.Series):
        return list(told.tolist())
    return list(told)
