"""What a client sent, held against what the model takes: MLflow's scoring protocol.

A request becomes a list of values for each column, in the model's order and of the model's types, or it is refused
with a reason that names the columns. More is refused than MLflow's own server would: columns that the model does
not know, and numbers that are text.
"""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

FORMATS = ("dataframe_split", "dataframe_records", "instances", "inputs")
TOLD = 10
"""So many columns are named in one message."""
ROWS = 10_000
"""Of one request. What is logged waits in memory, and the rows of others with it."""
LARGE = 256 << 10
"""Bytes from which a body is looked at before it is read, and read alone: what many short values become in memory is
up to 32 times as large as they are, and what brackets become 44 times."""
MARK = re.compile(rb'\\.|["\[{]', re.DOTALL)
"""An escaped character, the end of a text or its beginning, a bracket. Each match is short, whatever the body is."""
AROUND = 10
"""Brackets around the rows of a request: no format has more than five."""
YEARS = range(1678, 2262)
"""Moments that NumPy counts in nanoseconds, of which models are made."""

Table = dict[str, list[Any]]
"""Column -> its values, one for each row."""


class RefusedError(Exception):
    """A request that gets no prediction: an HTTP status, a code for programs, a sentence for people."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


@dataclass(frozen=True)
class Column:
    """An input of the model, by MLflow's name of its type."""

    name: str
    type: str
    required: bool = True


class _Missing:
    """Stands where a row has no value of a column."""

    def __repr__(self) -> str:
        return "nothing"


MISSING = _Missing()


def parse(body: bytes, content_type: str, columns: Sequence[Column]) -> Table:
    """The rows of a request as the model takes them. Raises RefusedError."""
    kind = _kind(content_type)
    if kind == "text/csv":
        table = _from_csv(body)
        read = FROM_TEXT
    else:
        table = _from_json(body, columns)
        read = FROM_JSON
    rows = max((len(values) for values in table.values()), default=0)
    if rows == 0:
        raise _malformed("there are no rows")
    if rows > ROWS:
        raise _too_many()
    return _enforce(table, rows, columns, read)


def _kind(content_type: str) -> str:
    kind, _, rest = content_type.partition(";")
    kind = kind.strip().lower()
    words = dict(word.replace(" ", "").lower().partition("=")[::2] for word in rest.split(";"))
    charset = words.get("charset", "utf-8").strip('"')
    if kind not in ("application/json", "text/csv") or charset not in ("utf-8", "utf8"):
        raise RefusedError(415, "CONTENT_TYPE", f"send application/json or text/csv in UTF-8, not {content_type!r}")
    return kind


def _malformed(message: str) -> RefusedError:
    return RefusedError(400, "MALFORMED", message)


def _too_many() -> RefusedError:
    return RefusedError(413, "TOO_LARGE", f"a request has at most {ROWS:,} rows: send its rows in several")


# --- JSON ---


def _from_json(body: bytes, columns: Sequence[Column]) -> Table:
    # A row is a list or an object at the most.
    if len(body) > LARGE and sum(1 for _ in itertools.islice(_opened(body), ROWS + AROUND)) == ROWS + AROUND:
        raise _too_many()
    try:
        document = json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise _malformed(f"this is not JSON: {error}") from None
    if not isinstance(document, dict) or len(document) != 1 or next(iter(document)) not in FORMATS:
        raise _malformed(f"send an object with exactly one of {', '.join(FORMATS)}")
    ((name, content),) = document.items()
    if name == "dataframe_split":
        return _split(content)
    if name == "dataframe_records":
        return _records(content, name, columns)
    if name == "inputs" and isinstance(content, dict):
        return _by_column(content)
    return _instances(content, name, columns)


def _opened(body: bytes) -> Iterator[bytes]:
    """The brackets that begin something; in texts there may be any number of them."""
    inside = False
    for found in MARK.finditer(body):
        if found[0] == b'"':
            inside = not inside
        elif not inside and found[0] in (b"[", b"{"):
            yield found[0]


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no JSON number")


def _split(content: Any) -> Table:
    names: Any
    rows: Any
    names, rows = (content.get("columns"), content.get("data")) if isinstance(content, dict) else (None, None)
    if not _are(str, names) or len(set(names)) != len(names) or not _are(list, rows):
        raise _malformed('dataframe_split has "columns", different names, and "data", a list of rows')
    if any(len(row) != len(names) for row in rows):
        raise _malformed("dataframe_split: each row must have a value for each of its columns")
    return {name: [row[place] for row in rows] for place, name in enumerate(names)}


def _records(content: Any, name: str, columns: Sequence[Column]) -> Table:
    if not _are(dict, content):
        raise _malformed(f"{name} is a list of objects, one for each row")
    names = dict.fromkeys(key for row in content for key in row)
    known = {column.name for column in columns}
    # What the model does not have is refused by its name: a name of its own in each of many rows would be
    # rows times rows values.
    return {key: [row.get(key, MISSING) for row in content] if key in known else [MISSING] for key in names}


def _instances(content: Any, name: str, columns: Sequence[Column]) -> Table:
    """Rows as objects, or as lists of values in the model's order; a single column's values may stand alone."""
    if isinstance(content, list) and content and all(isinstance(row, dict) for row in content):
        return _records(content, name, columns)
    if len(columns) == 1 and isinstance(content, list) and not any(isinstance(row, list | dict) for row in content):
        return {columns[0].name: content}
    if not _are(list, content) or any(len(row) != len(columns) for row in content):
        order = ", ".join(column.name for column in columns)
        raise _malformed(f"{name} is a list of rows: objects, or lists of the values of {order}")
    return {column.name: [row[place] for row in content] for place, column in enumerate(columns)}


def _by_column(content: dict[str, Any]) -> Table:
    table = {name: values if isinstance(values, list) else [values] for name, values in content.items()}
    if len({len(values) for values in table.values()}) > 1:
        raise _malformed("inputs: each column must have the same number of values")
    return table


def _are(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


# --- CSV ---


def _from_csv(body: bytes) -> Table:
    rows: list[list[str]] = []
    try:
        lines = filter(None, csv.reader(io.StringIO(body.decode("utf-8-sig"), newline=""), strict=True))
        names = next(lines, [])
        if len(set(names)) != len(names):
            raise _malformed("CSV: two columns have the same name")
        for row in lines:
            if len(row) != len(names):
                raise _malformed("CSV: each row must have a value for each column of the first line")
            if len(rows) == ROWS:
                raise _too_many()
            rows.append(row)
    except (csv.Error, UnicodeDecodeError) as error:
        raise _malformed(f"this is not CSV: {error}") from None
    # An empty field is no value.
    return {name: [row[place] or None for row in rows] for place, name in enumerate(names)}


# --- The model's columns ---


def _enforce(table: Table, rows: int, columns: Sequence[Column], read: dict[str, Callable[[Any], Any]]) -> Table:
    known = {column.name for column in columns}
    problems = []
    if absent := [column.name for column in columns if column.required and column.name not in table]:
        problems.append(f"columns missing: {_some(absent)}")
    if unknown := [name for name in table if name not in known]:
        problems.append(f"columns that the model does not have: {_some(unknown)}")
    found: Table = {}
    for column in columns:
        values = table.get(column.name)
        if values is None:
            values = [MISSING] * rows
            if column.required:
                continue
        try:
            found[column.name] = [_value(value, column, read[column.type]) for value in values]
        except (TypeError, ValueError):
            problems.append(_wrong(column, values, read[column.type]))
    if problems:
        raise RefusedError(422, "SIGNATURE", "; ".join(problems[:TOLD]))
    return found


def _value(value: Any, column: Column, read: Callable[[Any], Any]) -> Any:
    if value is MISSING:
        if column.required:
            raise ValueError
        value = None
    if value is None and not column.required:
        return None
    return read(value)


def _wrong(column: Column, values: list[Any], read: Callable[[Any], Any]) -> str:
    """Which value of a column is not of its type."""
    for row, value in enumerate(values):
        try:
            _value(value, column, read)
        except (TypeError, ValueError):
            return f"{column.name}: {column.type} expected, got {repr(value)[:40]} in row {row + 1}"
    raise AssertionError("a value was refused a moment ago")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - TOLD} more" if len(names) > TOLD else ""
    return ", ".join((repr(name) if not name.strip() else name)[:100] for name in names[:TOLD]) + more


def _number(value: Any) -> float:
    """A number, or NaN for null: models that know missing values get them as that."""
    if value is None:
        return math.nan
    if type(value) not in (int, float):
        raise TypeError
    try:
        number = float(value)
    except OverflowError:
        raise ValueError from None
    if not math.isfinite(number):
        raise ValueError
    return number


def _single(value: Any) -> float:
    number = _number(value)
    if abs(number) > 3.4028234e38:
        raise ValueError
    return number


def _whole(bits: int) -> Callable[[Any], int]:
    bound = 1 << (bits - 1)

    def read(value: Any) -> int:
        if type(value) is not int:
            raise TypeError
        if not -bound <= value < bound:
            raise ValueError
        return value

    return read


def _boolean(value: Any) -> bool:
    if type(value) is not bool:
        raise TypeError
    return value


def _string(value: Any) -> str:
    if type(value) is not str:
        raise TypeError
    return value


def _binary(value: Any) -> bytes:
    if type(value) is not str:
        raise TypeError
    return base64.b64decode(value, validate=True)


def _moment(value: Any) -> datetime:
    """ISO 8601; a moment with a time zone becomes the same one in UTC."""
    if type(value) is not str:
        raise TypeError
    moment = datetime.fromisoformat(value)
    if moment.year not in YEARS:
        raise ValueError
    return moment.astimezone(timezone.utc).replace(tzinfo=None) if moment.tzinfo else moment


FROM_JSON: dict[str, Callable[[Any], Any]] = {
    "double": _number,
    "float": _single,
    "long": _whole(64),
    "integer": _whole(32),
    "boolean": _boolean,
    "string": _string,
    "binary": _binary,
    "datetime": _moment,
}
"""MLflow's types that can be served -> what reads a JSON value of it; TypeError or ValueError where it is none."""


def _text(read: Callable[[Any], Any], convert: Callable[[str], Any]) -> Callable[[Any], Any]:
    def from_text(text: Any) -> Any:
        if text is None:
            return read(None)
        # Python reads 1_000 as a number; nobody else does.
        if convert in (int, float) and "_" in text:
            raise ValueError
        return read(convert(text))

    return from_text


def _word(text: str) -> bool:
    words = {"true": True, "false": False}
    if text.lower() not in words:
        raise ValueError
    return words[text.lower()]


FROM_TEXT: dict[str, Callable[[Any], Any]] = {
    "double": _text(_number, float),
    "float": _text(_single, float),
    "long": _text(_whole(64), int),
    "integer": _text(_whole(32), int),
    "boolean": _text(_boolean, _word),
    "string": _string,
    "binary": _binary,
    "datetime": _moment,
}
"""The same for a field of CSV."""
