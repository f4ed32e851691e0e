"""What a client reads of MLflow's answers is what MLflow's own JSON says."""

from __future__ import annotations

import json
import time

import httpx
from mlflow import MlflowClient

from tests.support import StackUnderTest

COMPARED = """
import json
from google.protobuf.descriptor import FieldDescriptor
from mlflow.protos import model_registry_pb2, service_pb2
from mlflow.server import auth, handlers
from mlflow.utils.proto_json_utils import message_to_json as theirs
import mlstack_json

NUMBERS = [0, 1, -1, 2**53 + 1, 2**62 + 1, -(2**63)]
FLOATS = [0.1, float("nan"), float("inf"), float("-inf"), 1e-300, -0.0]

def fill(message, turn, depth):
    # Something in each field, another in each turn.
    for field in message.DESCRIPTOR.fields:
        if field.message_type and field.message_type.full_name.startswith("google.protobuf."):
            continue
        if field.message_type and field.message_type.GetOptions().map_entry:
            entry = field.message_type.fields_by_name
            if entry["value"].message_type is None and entry["key"].type == FieldDescriptor.TYPE_STRING:
                for number in range(3):
                    getattr(message, field.name)[f"k {number}"] = value(entry["value"], turn + number)
        elif field.message_type:
            if depth:
                for number in range(3 if field.is_repeated else 1):
                    inner = getattr(message, field.name)
                    fill(inner.add() if field.is_repeated else inner, turn + number, depth - 1)
        elif field.is_repeated:
            getattr(message, field.name).extend(value(field, turn + number) for number in range(3))
        else:
            setattr(message, field.name, value(field, turn))

def value(field, turn):
    if field.cpp_type in (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64):
        chosen = NUMBERS[turn % len(NUMBERS)]
        return abs(chosen) if field.cpp_type == FieldDescriptor.CPPTYPE_UINT64 else chosen
    if field.cpp_type in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return FLOATS[turn % len(FLOATS)]
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return field.enum_type.values[turn % len(field.enum_type.values)].number
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return bool(turn % 2)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return bytes([turn % 256, 255])
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return ["", "plain", "line\\nbreak", "\\u00fc \\u2603 \\u2028", chr(34) + "{}"][turn % 5]
    return turn % 100

def messages(module):
    for descriptor in module.DESCRIPTOR.message_types_by_name.values():
        yield getattr(module, descriptor.name)
        if "Response" in descriptor.nested_types_by_name:
            yield getattr(module, descriptor.name).Response

compared, different = 0, []
for kind in (*messages(service_pb2), *messages(model_registry_pb2)):
    for turn in range(6):
        message = kind()
        fill(message, turn, 4)
        compared += 1
        if repr(json.loads(theirs(message))) != repr(json.loads(mlstack_json.message_to_json(message))):
            different.append(kind.DESCRIPTOR.full_name)
mlstack_json.install()
used = all(one.message_to_json is mlstack_json.message_to_json for one in (handlers, auth))
print(json.dumps({"compared": compared, "different": sorted(set(different)), "used": used}))
"""


def test_clients_read_the_same_json(stack: StackUnderTest) -> None:
    """Each message of the tracking and the registry API, filled with numbers beyond 53 bits, no numbers, bytes, maps
    and text of any kind, as MLflow writes it and as we do."""
    told = stack.exec("mlflow", "with-secrets", "python3", "-c", COMPARED)
    assert told.code == 0, told.output
    (line,) = [line for line in told.output.splitlines() if line.startswith('{"compared"')]
    found = json.loads(line)
    assert found["compared"] > 1000
    assert found["different"] == []
    assert found["used"]


def test_the_server_answers_with_it(stack: StackUnderTest, tracking: MlflowClient) -> None:
    """An answer of the running server is compact; a number of 64 bits is one."""
    experiment = tracking.create_experiment(f"json-{time.time_ns()}")
    address = f"{stack.mlflow_url}/api/2.0/mlflow/experiments/get"
    login = ("admin", stack.secret("admin_password"))
    answer = httpx.get(address, params={"experiment_id": experiment}, auth=login, timeout=30)
    assert "\n" not in answer.text
    assert isinstance(answer.json()["experiment"]["creation_time"], int)
