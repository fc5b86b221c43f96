"""Reads a table with the class of each image file: CSV and JSON Lines files as data sets and competitions have them."""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from metagmvae.pipelines.files import parse_json
from metagmvae.pipelines.records import DataError, printable

COLUMNS = {
    "file": ("file", "filename", "filepath", "path", "image", "imagename", "imagepath", "imageid", "imgname", "id"),
    "label": ("label", "labels", "class", "classname", "classid", "category", "target", "species", "diagnosis", "dx"),
    "split": ("split", "set", "subset", "partition"),
}
"""Names of the columns; case, spaces, `-` and `_` are ignored. `split` may be missing."""
DELIMITERS = ",;\t"
JSON_LINES = (".jsonl", ".ndjson")
SHOWN = 3
"""Names that an error shows."""


class LabelRow(NamedTuple):
    """What a table says of an image file."""

    label: str
    split: str = ""
    """Content of the column `split`; empty without such a column."""
    group: str = ""
    """Content of the column of groups, such as the patient; empty if none is asked for."""


def read_labels(path: str | Path, names: Sequence[str], groups: str | None = None) -> dict[str, LabelRow]:
    """Class and split of image files, from a table with a heading and the columns `file` and `label` (`COLUMNS`).

    A row names a file by its path in the folder, by its name without the folder, or by that without the suffix. The two
    ways in which Unicode writes a letter with an accent are equal.

    Args:
        path: the table, UTF-8, with commas, semicolons or tabs between the columns; or `.jsonl`, an object a line.
        names: paths of the image files in their folder.
        groups: name of the column with the group of each image; None: there is none.

    Returns:
        The row of each file that has one, by the path of the file.

    Raises:
        DataError: the table cannot be read, lacks a column, or has a row without a class, a group or a file; or two
            rows give one file different classes.
    """
    rows = _rows(Path(path))
    places = dict(_columns(path, rows[0]))
    if groups is not None:
        places["group"] = _column(path, rows[0], groups)
    found: dict[str, LabelRow] = {}
    files, missing = _by_name(names), []
    for number, row in _numbered(path, rows):
        given = _label_row(path, number, row, rows[0], places, groups)
        file = row[places["file"]].strip()
        matches = files.get(_composed(file.replace("\\", "/").removeprefix("./")), [])
        if len(matches) > 1:
            both = " and ".join(map(printable, sorted(matches)[:2]))
            raise DataError(f"{path}: row {number}: {printable(file)} is {both}; give paths in the folder")
        if not matches:
            missing.append(printable(file))
            continue
        if found.setdefault(matches[0], given) != given:
            what = f"class or {printable(groups)}" if groups else "class"
            both = f"{printable(file)} another {what} than a row before"
            raise DataError(f"{path}: row {number} gives {both}; remove one")
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        shown = ", ".join(missing[:SHOWN]) + more
        raise DataError(f"{path}: {len(missing)} of {len(rows) - 1} rows name no image of the folder ({shown})")
    return found


def read_row_labels(path: str | Path, count: int, groups: str | None = None) -> list[LabelRow]:
    """Rows of a table of vectors, in their order.

    Args:
        path: table with a heading and the column `label`, one row for each vector; else as in `read_labels`.
        count: number of vectors.
        groups: as in `read_labels`.

    Raises:
        DataError: the table cannot be read, lacks a column, has another number of rows, or a row without a class or a
            group.
    """
    rows = _rows(Path(path))
    places = dict(_columns(path, rows[0], ("label", "split")))
    if groups is not None:
        places["group"] = _column(path, rows[0], groups)
    if len(rows) - 1 != count:
        raise DataError(f"{path}: {len(rows) - 1:,} rows for {count:,} vectors; give one for each, in their order")
    return [_label_row(path, number, row, rows[0], places, groups) for number, row in _numbered(path, rows)]


def _label_row(
    path: str | Path,
    number: int,
    row: Sequence[str],
    heading: Sequence[str],
    places: Mapping[str, int],
    groups: str | None,
) -> LabelRow:
    """What a row says.

    Raises:
        DataError: it has another number of columns than the heading, or no class or group.
    """
    if len(row) != len(heading):
        raise DataError(f"{path}: row {number} has {len(row)} columns, but the heading has {len(heading)}")
    label, split, group = (row[places[key]].strip() if key in places else "" for key in ("label", "split", "group"))
    if not label or (groups and not group):
        what = printable(groups) if groups and label else "class"
        name = f" ({printable(row[places['file']].strip())})" if "file" in places else ""
        raise DataError(f"{path}: row {number}{name} has no {what}; complete or remove it")
    return LabelRow(label, split, group)


def plain_name(name: str) -> str:
    """Name of a column or array as `COLUMNS` has it: without case, spaces, `-` and `_`."""
    return "".join(character for character in name.casefold() if character not in " _-")


def _rows(path: Path) -> list[list[str]]:
    """The heading and the rows of a CSV or JSON Lines file."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() in JSON_LINES:
                return _json_rows(path, file)
            heading = file.readline()
            delimiter = max(DELIMITERS, key=heading.count)
            file.seek(0)
            rows = [row for row in csv.reader(file, delimiter=delimiter, strict=True) if any(map(str.strip, row))]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is no CSV file in UTF-8 ({error}); save it as CSV UTF-8") from error
    if len(rows) < 2:
        raise DataError(f"{path}: has no rows below a heading; give a CSV file with the columns file and label")
    return rows


def _numbered(path: str | Path, rows: Sequence[list[str]]) -> Iterable[tuple[int, list[str]]]:
    """Rows below the heading with their numbers in the file, whose first row is the heading of a CSV file."""
    return enumerate(rows[1:], start=1 if Path(path).suffix.lower() in JSON_LINES else 2)


def _json_rows(path: Path, lines: Iterable[str]) -> list[list[str]]:
    """Rows of JSON objects, one a line, as `metadata.jsonl` of Hugging Face has them; a missing value is empty."""
    objects = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            found = parse_json(line, f"{path}: line {number}")
            if not isinstance(found, dict):
                raise DataError(f"{path}: line {number} is no JSON object; write {{…}} with the keys file and label")
            objects.append(found)
    heading = list(dict.fromkeys(key for found in objects for key in found))
    rows = [["" if (value := found.get(key)) is None else str(value) for key in heading] for found in objects]
    if not rows:
        raise DataError(f"{path}: has no lines; write objects with the keys file and label")
    return [heading, *rows]


def _columns(path: str | Path, heading: Sequence[str], meanings: Sequence[str] = tuple(COLUMNS)) -> Mapping[str, int]:
    """Place of each column by its meaning."""
    plain = list(map(plain_name, heading))
    places = {}
    for meaning in meanings:
        matching = [place for place, name in enumerate(plain) if name in COLUMNS[meaning]]
        if len(matching) > 1:
            exact = [place for place in matching if plain[place] == meaning]
            matching = exact or matching
        if len(matching) > 1 or (not matching and meaning != "split"):
            columns = ", ".join(map(printable, heading))
            kind = "several columns" if matching else "no column"
            raise DataError(f"{path}: {kind} of {columns} can be {meaning}; name it {meaning} in the heading")
        if matching:
            places[meaning] = matching[0]
    return places


def _column(path: str | Path, heading: Sequence[str], name: str) -> int:
    """Place of the column of a name; case, spaces, `-` and `_` are ignored."""
    matching = [place for place, column in enumerate(heading) if plain_name(column) == plain_name(name)]
    if len(matching) != 1:
        columns = ", ".join(map(printable, heading))
        kind = "several columns are" if matching else "no column is"
        raise DataError(f"{path}: {kind} named {printable(name)} among {columns}; name the column of the groups")
    return matching[0]


def _composed(name: str) -> str:
    """Accents as file systems and tables may both write them: macOS separates them from their letters."""
    return unicodedata.normalize("NFC", name)


def _by_name(names: Sequence[str]) -> dict[str, list[str]]:
    """Files by their path, and by shorter forms that no path has: the name, and the name without the suffix."""
    files: dict[str, list[str]] = {}
    for short in (str, lambda path: path.name, lambda path: path.stem):
        counts: dict[str, list[str]] = {}
        for name in names:
            counts.setdefault(_composed(short(PurePosixPath(name))), []).append(name)
        files = counts | files
    return files
