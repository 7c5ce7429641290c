"""Rows of a Parquet file as lines of JSON, in a process of its own and within a fixed memory.

    python -m services.teacher_gateway.prompts.parquet_rows MEMORY MAX_BYTES MAX_ROWS \
        < a.parquet > a.jsonl

Row N becomes line N; one row more than MAX_ROWS is the last, so that whoever reads the lines sees
that there are too many. What the file is refused for stands on stderr, with the exit code 2.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

REFUSED = 2

_COLUMNS = ("prompt", "messages", "tools", "tags", "answer", "response")
_AS_JSON = ("messages", "tools", "tags")
_ROWS_AT_ONCE = 16


class _Refused(Exception):
    """Told to the user as it is."""


class _NoText(Exception):
    """A value of one row is not UTF-8."""


def convert(source: BinaryIO, sink: BinaryIO, max_bytes: int, max_rows: int) -> None:
    """Write each row as a line."""
    written, rows = 0, 0
    parquet = pq.ParquetFile(source, pre_buffer=False, buffer_size=1 << 16)
    there = parquet.schema_arrow.names
    columns = [name for name in _COLUMNS if name in there]
    if not {"prompt", "messages"} & set(columns):
        raise _Refused(
            "expected a Parquet file with a column `prompt` or `messages`, found "
            f"{', '.join(there[:10]) or 'none'}"
        )
    for batch in parquet.iter_batches(_ROWS_AT_ONCE, columns=columns, use_threads=False):
        for number in range(batch.num_rows):
            line = _line(batch.slice(number, 1)) + b"\n"
            written += len(line)
            if written > max_bytes:
                raise _Refused(
                    f"the Parquet file of prompts holds over {max_bytes} bytes: split it over "
                    "several pipelines"
                )
            sink.write(line)
            rows += 1
            if rows > max_rows:
                return


def _line(row: pa.RecordBatch) -> bytes:
    values = {}
    try:
        for name, column in zip(row.schema.names, row.columns, strict=True):
            value = _value(name, column)
            if value is not None:
                values[name] = value
    except (UnicodeDecodeError, _NoText):
        return b"\xff"  # which the reader of lines refuses as what it is
    with contextlib.suppress(UnicodeEncodeError):
        return json.dumps(values, ensure_ascii=False, default=str).encode()
    return json.dumps(values, default=str).encode()


def _value(name: str, column: pa.Array) -> Any:
    value = column.to_pylist(maps_as_pydicts="lossy")[0]
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, str) and name in _AS_JSON:
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return _without_nulls(value)


def _without_nulls(value: Any) -> Any:
    """A struct has every field of every row; those that this row leaves out are null."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def main() -> int:
    memory_bytes, max_bytes, max_rows = map(int, sys.argv[1:])
    limit = resource.RLIMIT_AS
    resource.setrlimit(limit, (memory_bytes, resource.getrlimit(limit)[1]))
    pa.set_cpu_count(1)
    try:
        with os.fdopen(0, "rb") as source, os.fdopen(1, "wb") as sink:
            convert(source, sink, max_bytes, max_rows)
    except _Refused as refused:
        said = str(refused)
    except MemoryError:
        said = (
            f"reading the Parquet file of prompts takes over {memory_bytes >> 20} MiB: write it "
            "with smaller row groups and pages"
        )
    except (pa.ArrowException, OSError, ValueError) as error:
        said = f"the file of prompts is not whole Parquet: {str(error)[:300]}"
    else:
        return 0
    sys.stderr.write(said)
    return REFUSED


if __name__ == "__main__":
    sys.exit(main())
