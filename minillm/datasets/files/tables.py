"""Rows of tables: .parquet, read by pyarrow, and .csv."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from minillm.base.errors import UserError

PARQUET = b"PAR1"  # the first bytes of a parquet file
SEPARATORS = {".csv": ",", ".tsv": "\t"}
LONGEST_FIELD = 1 << 26  # bytes of one field of a .csv
ROWS_AT_ONCE = 256


def parquet_rows(path: Path, column: str | None = None) -> Iterator[tuple[dict, float]]:
    """(row, share of the file read by then) of each row; column: read this one alone.

    Raises UserError without pyarrow, ValueError with the reason for a file that is damaged or lacks the column.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f'{path}: reading parquet needs pyarrow; pip install -e ".[parquet]"') from None
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if column is not None and column not in names:
            raise ValueError(f"column {column!r} is missing (its columns: {', '.join(names)}; choose with --field)")
        number = 0
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=None if column is None else [column]):
            for row in batch.to_pylist():
                number += 1
                yield row, number / file.metadata.num_rows
    except ArrowException as error:
        raise ValueError(f"not a whole parquet file ({str(error).splitlines()[0]})") from None


def csv_rows(stream: BinaryIO, separator: str, names: Sequence[str] | None = None) -> Iterator[dict]:
    """Each row of a .csv in UTF-8 as an object, by the names in its first line. Raises ValueError with the reason.

    names: those of the columns where the first line is a row already.
    """
    csv.field_size_limit(LONGEST_FIELD)
    text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
    reader = csv.DictReader(text, names, delimiter=separator, strict=True)
    try:
        for number, row in enumerate(reader, 1):
            if None in row:
                raise ValueError(f"row {number} has more fields than the {len(reader.fieldnames)} names of columns")
            yield row
    except csv.Error as error:
        raise ValueError(f"after line {reader.line_num} comes no row of a .csv ({error})") from None
