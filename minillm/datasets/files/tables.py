"""Rows of tables: .parquet, read by pyarrow, and .csv."""

import csv
import datetime
import io
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import BinaryIO

from minillm.base.errors import UserError

PARQUET = b"PAR1"  # the first bytes of a parquet file
SEPARATORS = {".csv": ",", ".tsv": "\t"}
LONGEST_FIELD = 1 << 26  # bytes of one field of a .csv
ROWS_AT_ONCE = 256
AS_TEXT = (datetime.date, datetime.time, datetime.timedelta, uuid.UUID)  # what JSON has no kind for


def parquet_rows(path: Path, column: str | None = None) -> Iterator[tuple[dict, float]]:
    """(row, share of the file read by then) of each row, its values as JSON has them; column: read this one alone.

    Raises UserError without pyarrow, ValueError with the reason for a file that is damaged or lacks the column.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f'{path}: reading parquet needs pyarrow; pip install -e ".[parquet]"') from None
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        _refuse_repeated(names)
        if column is not None and column not in names:
            raise ValueError(f"column {column!r} is missing (its columns: {', '.join(names)}; choose with --field)")
        number = 0
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=None if column is None else [column]):
            for row in batch.to_pylist():
                number += 1
                yield as_json(row), number / file.metadata.num_rows
    except ArrowException as error:
        raise ValueError(f"not a whole parquet file ({str(error).splitlines()[0]})") from None


def _refuse_repeated(names: Sequence[str]) -> None:
    """Raises ValueError for a name of two columns, of which a row would keep the last; those without a name may be."""
    for name, times in Counter(names).items():
        if name and times > 1:
            raise ValueError(f"{times} columns are named {name!r}; rename or take out all but one")


def as_json(value: object) -> object:
    """A value of a table as JSON has it, at any depth.

    Bytes are text, which Spark, Hive and Impala write without saying so; one that is not UTF-8 becomes the surrogate
    U+DC00 + byte. A decimal is a number, or a text where no float is exactly it.
    """
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, Decimal):
        if value == int(value):
            return int(value)
        number = float(value)
        return number if Decimal(repr(number)) == value else str(value)
    return str(value) if isinstance(value, AS_TEXT) else value


def csv_rows(stream: BinaryIO, separator: str, names: Sequence[str] | None = None) -> Iterator[dict | UserError]:
    """Each row of a .csv in UTF-8 as an object, by the names in its first line, or what is wrong with the row.

    A byte that is not UTF-8 becomes the surrogate U+DC00 + byte. Raises ValueError with the reason for a broken file.

    names: those of the columns where the first line is a row already.
    """
    csv.field_size_limit(LONGEST_FIELD)
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    reader = csv.DictReader(text, names, delimiter=separator, strict=True)
    try:
        _refuse_repeated(reader.fieldnames or ())
        for row in reader:
            has_more = None in row
            yield UserError(f"more fields than the {len(reader.fieldnames)} names of columns") if has_more else row
    except csv.Error as error:
        raise ValueError(f"after line {reader.line_num} comes no row of a .csv ({error})") from None
