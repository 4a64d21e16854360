"""Labelled texts: the set that ships with the package, and a user's CSV and JSONL files.

Every row is checked when it is read, and every refusal names the file, the line, what was expected and what
came. Texts are private: a message quotes the header, labels and split values, but no text below the header.
"""

import csv
import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from threading import Lock
from typing import IO, Literal, NamedTuple, SupportsIndex, get_args

from pomona.errors import DataError

Split = Literal["train", "validation", "test"]
Task = Literal["classification", "causal-lm"]

WORDNET_NOUNS = "wordnet-nouns"
MAX_LINE_BYTES = 2**20

_SPLITS: tuple[str, ...] = get_args(Split)
_SURROGATE = re.compile("[\ud800-\udfff]")
_FIELD_LIMIT = Lock()

_Cells = tuple[str, dict[str, object]]  # where the row stands, for messages; what it holds
_ReadRows = Callable[[Iterator[str], str, tuple[str, ...]], Iterator[_Cells]]


class _Row(NamedTuple):
    text: str
    label: str
    split: str
    others: dict[str, str]


@dataclass(frozen=True, slots=True)
class Example:
    """One text and its class; the label is empty where the task has none."""

    text: str
    label: str


@dataclass(frozen=True, slots=True)
class Dataset:
    """Texts with their labels, in the order of the source.

    Attributes:
        texts: One per example, never empty.
        labels: One per example; all empty for ``causal-lm``.
        columns: Every other column by name, one value per example, ``""`` where a row has none. Holds
            ``label`` too where the source has it, so that it can name the client for either task.
        source: Where the examples came from, for messages.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    columns: Mapping[str, tuple[str, ...]]
    source: str

    def __post_init__(self) -> None:
        lengths = [len(column) for column in (self.texts, self.labels, *self.columns.values())]
        if len(set(lengths)) != 1:
            raise ValueError(f"expected columns of one length, got the lengths {lengths}")

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[Example]:
        return map(Example, self.texts, self.labels)

    def subset(self, indices: Iterable[SupportsIndex]) -> "Dataset":
        """Return the examples at ``indices``, in that order."""
        chosen = [int(index) for index in indices]
        return Dataset(
            texts=tuple(self.texts[i] for i in chosen),
            labels=tuple(self.labels[i] for i in chosen),
            columns={name: tuple(column[i] for i in chosen) for name, column in self.columns.items()},
            source=self.source,
        )


def split_of(text: str, *, seed: int = 0) -> Split:
    """Return the split a text belongs to: 70 % train, 15 % validation, 15 % test.

    Decided by sha256 of the text alone, so a text stays where it is when rows are added, dropped or
    reordered, and the same text never lies on both sides.

    Args:
        text: The text.
        seed: Another seed gives another split; 0 is the one that the shipped set has.

    Example:
        >>> split_of("a plane figure with three sides")
        'test'
    """
    key = f"{seed}\n{text}" if seed else text
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 100
    return "train" if bucket < 70 else "validation" if bucket < 85 else "test"


def load_dataset(source: str | Path, *, split: Split | None, task: Task = "classification", seed: int = 0) -> Dataset:
    """Load a data set and check every row of it.

    Args:
        source: ``wordnet-nouns`` (ships with the package), a ``.csv`` file with a header, or a ``.jsonl``
            file with one object per line; UTF-8. The columns ``text`` and ``label`` are required, ``split``
            and any others are free. Blank lines are skipped; integer labels in JSON become their digits, and
            white space around a label is no part of it.
        split: The part to return; None: everything. Where the source has no column ``split``,
            :func:`split_of` decides.
        task: ``causal-lm`` needs no labels and returns empty ones.
        seed: For :func:`split_of`; without effect on a source that has a column ``split``.

    Raises:
        DataError: The source is missing, unreadable or malformed, or nothing is left in ``split``.
    """
    name = str(source)
    needed = ("text",) if task == "causal-lm" else ("text", "label")
    with _opened(name) as (stream, read_rows):
        everything = [_checked(*row, needed) for row in read_rows(_lines(stream, name), name, needed)]
    if not everything:
        raise DataError(f"{name} is empty: expected at least one row, got none")
    rows = [row for row in everything if split in (None, row.split or split_of(row.text, seed=seed))]
    if not rows:
        raise DataError(f"{name} has {len(everything)} rows but none in split {split!r}; add rows or name another")
    columns = dict.fromkeys(name for row in rows for name in row.others)
    return Dataset(
        texts=tuple(row.text for row in rows),
        labels=tuple(row.label for row in rows),
        columns={column: tuple(row.others.get(column, "") for row in rows) for column in columns},
        source=name,
    )


def write_jsonl(dataset: Dataset, path: Path) -> None:
    """Write texts and labels as JSONL, one object per line; other columns are left out."""
    rows = (
        json.dumps({"text": text, "label": label}, ensure_ascii=False)
        for text, label in zip(dataset.texts, dataset.labels, strict=True)
    )
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def class_names(dataset: Dataset) -> tuple[str, ...]:
    """Return the distinct labels, sorted."""
    return tuple(sorted(set(dataset.labels)))


def check_labels(dataset: Dataset, labels: Sequence[str]) -> None:
    """Check that every label of ``dataset`` is one of ``labels``.

    Raises:
        DataError: One is not; the message names the first, its position and the closest known label.
    """
    known = set(labels)
    for position, label in enumerate(dataset.labels, start=1):
        if label not in known:
            close = get_close_matches(label, labels, n=1)
            raise DataError(
                f"{dataset.source}: unknown label {_quote(label)} at example {position} of {len(dataset)}"
                f"{f' (did you mean {close[0]!r}?)' if close else ''}; known labels: {_listing(labels, most=100)}"
            )


@contextmanager
def _opened(name: str) -> Iterator[tuple[IO[bytes] | gzip.GzipFile, _ReadRows]]:
    try:
        if name == WORDNET_NOUNS:
            packed = files("pomona.wordnet").joinpath("nouns.csv.gz")
            with packed.open("rb") as file, gzip.open(file) as stream:
                yield stream, _csv_rows
            return
        path = Path(name)
        if path.is_dir() or path.is_fifo():
            raise DataError(f"{name} is a directory or a pipe; name one .csv or .jsonl file")
        if path.suffix.lower() not in _READERS:
            raise DataError(f"expected a data file that ends in .csv or .jsonl, got {name!r}")
        with path.open("rb") as stream:
            yield stream, _READERS[path.suffix.lower()]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"no data file {name!r}; expected {WORDNET_NOUNS} or a .csv or .jsonl file") from error
    except OSError as error:
        raise DataError(f"cannot read the data file {name}: {error}") from error


def _lines(stream: IO[bytes] | gzip.GzipFile, name: str) -> Iterator[str]:
    for number, raw in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b""), start=1):
        if len(raw) > MAX_LINE_BYTES:
            raise DataError(f"{name} line {number} is longer than {MAX_LINE_BYTES} bytes; cut the text")
        try:
            yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{name} line {number} is not UTF-8 at byte {error.start}; convert it") from error


def _csv_rows(lines: Iterator[str], name: str, needed: tuple[str, ...]) -> Iterator[_Cells]:
    reader = csv.reader(lines, strict=True)
    header: list[str] = []
    while True:
        where = f"{name} line {reader.line_num + 1}"
        try:
            with _field_limit():
                fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{where} is not CSV: {error}; look for an unbalanced quote") from error
        if fields and not header:
            header = fields
            _check_columns(header, needed, where)
            if len(set(header)) != len(header):
                raise DataError(f"{where}: expected distinct columns, got {_listing(header)}")
        elif fields and len(fields) != len(header):
            raise DataError(
                f"{where}: expected {len(header)} fields ({_listing(header)}), got {len(fields)}; "
                "a text with commas, quotes or line breaks must be quoted"
            )
        elif fields:
            yield where, dict(zip(header, fields, strict=True))


@contextmanager
def _field_limit() -> Iterator[None]:
    # the csv module keeps one limit for the whole process, and 128 KiB is less than a line may have
    with _FIELD_LIMIT:
        before = csv.field_size_limit(MAX_LINE_BYTES)
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _jsonl_rows(lines: Iterator[str], name: str, needed: tuple[str, ...]) -> Iterator[_Cells]:
    for number, line in enumerate(lines, start=1):
        where = f"{name} line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.rstrip(), object_pairs_hook=_distinct)
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not JSON: {error.msg} at character {error.colno}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
        _check_columns(list(row), needed, where)
        yield where, row


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {_quote(next(key for key in keys if keys.count(key) > 1))} comes twice")
    return row


def _check_columns(columns: Sequence[str], needed: tuple[str, ...], where: str) -> None:
    if not set(needed) <= set(columns):
        raise DataError(f"{where}: expected the columns {' and '.join(needed)}, got {_listing(columns)}")


def _checked(where: str, cells: Mapping[str, object], needed: tuple[str, ...]) -> _Row:
    split = cells.get("split", "")
    if "split" in cells and split not in _SPLITS:
        raise DataError(f"{where}: expected a split out of {', '.join(_SPLITS)}, got {_quote(split)}")
    for column in needed:
        cell = cells[column]
        if column == "label" and type(cell) is int:
            continue
        if not isinstance(cell, str):
            raise DataError(f"{where}: expected a string as {column}, got {type(cell).__name__}")
        if not cell.strip():
            raise DataError(f"{where}: the {column} is empty; fill it in or drop the row")
        if _SURROGATE.search(cell):
            raise DataError(f"{where}: the {column} holds half a surrogate pair, which UTF-8 cannot carry")
        if column == "label" and "\0" in cell:
            raise DataError(f"{where}: the label holds a NUL character, which a database cannot carry; drop it")
    others = {name: _cell(cell) for name, cell in cells.items() if name not in ("text", "split")}
    if "label" in others:
        others["label"] = others["label"].strip()
    label = others["label"] if "label" in needed else ""
    return _Row(str(cells["text"]), label, str(split), others)


def _cell(value: object) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, sort_keys=True)


def _quote(value: object, *, width: int = 40) -> str:
    shown = repr(value)
    return shown if len(shown) <= width else f"{shown[: width - 3]}..."


def _listing(names: Sequence[str], *, most: int = 12) -> str:
    rest = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(map(_quote, names[:most])) + rest


_READERS: dict[str, _ReadRows] = {".csv": _csv_rows, ".jsonl": _jsonl_rows}
