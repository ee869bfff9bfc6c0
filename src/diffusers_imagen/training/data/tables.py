"""Checks of tables of rows: errors name the file and the line, which the readers of `datasets` do not."""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow
from datasets.exceptions import DatasetsError
from pyarrow import parquet

from ...utils.errors import one_line
from ...utils.images import BadImage, check_regular


class EmptyTable(ValueError):
    """A table without rows."""


def check_table(path: str) -> None:
    """Check that a .jsonl, .csv or .parquet file can be read completely.

    Raises:
        ValueError: If it cannot; names the file and its line.
    """
    check = {".jsonl": _check_jsonl, ".csv": _check_csv, ".parquet": _check_parquet}.get(Path(path).suffix.lower())
    if check is None:
        return
    try:
        check_regular(path)
    except (OSError, BadImage) as error:
        raise ValueError(f"'{path}' cannot be read: {error}.") from error
    check(path)


def find_fault(folder: str, files: list[str]) -> None:
    """Check tables in a folder, to find one that cannot be read.

    Raises:
        ValueError: For the first one; names the file and its line.
    """
    for file in files:
        check_table(os.path.join(folder, file))


def find_damage(folder: str, files: list[str]) -> None:
    """Check tables like `find_fault`, and also read Parquet files completely; called after an error.

    Raises:
        ValueError: For the first damaged file; names it.
    """
    find_fault(folder, files)
    for path in (os.path.join(folder, file) for file in files if file.endswith(".parquet")):
        try:
            for _ in parquet.ParquetFile(path).iter_batches():
                pass
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"'{path}' is damaged: {one_line(error)}") from None


def innermost(error: BaseException) -> str:
    """Return the message of an error that `datasets` wraps in others, in one line."""
    while isinstance(error, DatasetsError) and error.__cause__ is not None:
        error = error.__cause__
    kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
    return kind + one_line(error)


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Iterate over the lines, with their numbers."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"'{path}', line {number} is not in UTF-8: {error.reason}.") from None


def _check_jsonl(path: str) -> None:
    rows = 0
    for number, line in _lines(path):
        if not line.strip():
            continue
        if rows == 0 and line.lstrip().startswith("["):
            return  # one array of all rows, which `datasets` supports too
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"'{path}', line {number} is not JSON: {error.msg} at column {error.colno}.") from None
        except RecursionError:
            raise ValueError(f"'{path}', line {number} is JSON that is nested too deeply.") from None
        if not isinstance(row, dict):
            raise ValueError(
                f"'{path}', line {number} has a JSON {type(row).__name__}, but should have an object, one row per "
                "line."
            )
        rows += 1
    if rows == 0:
        raise EmptyTable(f"'{path}' is empty")


def _check_csv(path: str) -> None:
    rows = csv.reader((line for _, line in _lines(path)), strict=True)
    header, count = None, 0
    try:
        for row in rows:
            header = header or row
            if len(row) > len(header):
                raise ValueError(
                    f"'{path}', line {rows.line_num} has {len(row)} values, but the first line names {len(header)} "
                    "columns: text with commas should be in quotes."
                )
            count += 1
    except csv.Error as error:
        if "field limit" in str(error):  # a long text, which is valid
            return
        raise ValueError(f"'{path}', line {rows.line_num} is not CSV: {error}.") from None
    if count < 2:
        raise EmptyTable(f"'{path}' is empty")


def _check_parquet(path: str) -> None:
    try:
        rows = parquet.read_metadata(path).num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"'{path}' is not a Parquet file, or incomplete: {one_line(error)}") from None
    if rows == 0:  # which `datasets` cannot read
        raise ValueError(f"'{path}' has no rows: remove it")
