"""How every command prints: a table for people, one JSON document for machines, one line for an error."""

import dataclasses
import json
import math
import signal
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pomona.errors import PomonaError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_json(value: object) -> None:
    """Print one JSON document; records become objects, moments ISO 8601, NaN and infinities null."""
    typer.echo(json.dumps(_jsonable(value), indent=2, allow_nan=False, default=_leaf))


def print_json_line(value: object) -> None:
    """Print one JSON document on one line, so that it is the last line of what a long command prints."""
    typer.echo(json.dumps(_jsonable(value), allow_nan=False, default=_leaf))


def plain(value: object) -> str:
    """Return text that can do nothing to a terminal: no control characters, no markup, one line."""
    from rich.markup import escape  # noqa: PLC0415

    return escape(one_line(str(value)))


def cell(value: object) -> str:
    """Return a value as a table shows it: short numbers, minutes, a dash for nothing."""
    match value:
        case None | "":
            return "-"
        case float():
            return f"{value:.4g}"
        case datetime():
            return f"{value:%Y-%m-%d %H:%M}"
        case _:
            return plain(value)


def console(*, stderr: bool = False) -> "Console":
    """Return a console that writes to where the streams point now."""
    from rich.console import Console  # noqa: PLC0415

    return Console(file=sys.stderr if stderr else sys.stdout, highlight=False)


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    title: str = "",
    drop: Sequence[str] = (),
    longest: int | None = None,
) -> "Table":
    """Return a table of values; whatever they hold is shown, never interpreted.

    Args:
        columns: Their headers.
        rows: The values.
        title: What it is a table of.
        drop: Headers of columns to leave out, one after another, until the others fit the terminal.
        longest: Cut text that has more characters than this.
    """
    from rich.table import Table  # noqa: PLC0415

    cells = [[cell(_cut(value, longest)) for value in row] for row in rows]
    needed = [_room(column, [row[at] for row in cells]) for at, column in enumerate(columns)]
    kept, width = _fitting(columns, [least for least, _ in needed], drop, console().width)
    result = Table(title=plain(title) if title else None, title_justify="left", caption_justify="left")
    for at, share in zip(kept, _shares([needed[at] for at in kept], width), strict=True):
        result.add_column(columns[at], overflow="fold", width=share)
    for row in cells:
        result.add_row(*(row[at] for at in kept))
    if len(kept) < len(columns):
        left_out = ", ".join(column for at, column in enumerate(columns) if at not in kept)
        result.caption = f"no room for: {left_out}"
    return result


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    title: str = "",
    drop: Sequence[str] = (),
    longest: int | None = None,
) -> None:
    """Print a table; of one without rows only the title, on one line."""
    listed = list(rows)
    if listed:
        console().print(table(columns, listed, title=title, drop=drop, longest=longest))
    else:
        console().print(plain(title), soft_wrap=True)


def counted(count: int, noun: str) -> str:
    """Return how many there are: ``1 run``, ``2 runs``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


_FRAME, _PADDING = 1, 3  # characters of a table, and of each of its columns, that hold no text
_UNBROKEN = 24  # longest text that stays on one line
_WORD = 14  # longer words of longer texts may be broken


def _cut(value: object, longest: int | None) -> object:
    if longest is None or not isinstance(value, str) or len(line := one_line(value)) <= longest:
        return value
    return f"{line[: longest - 3]}..."


def _room(column: str, cells: Sequence[str]) -> tuple[int, int]:
    """Return the width in which no header, date, name or other word of a column breaks, and that of the whole text."""
    from rich.text import Text  # noqa: PLC0415

    texts = [Text.from_markup(each) for each in cells]
    whole = max([len(column), *(each.cell_len for each in texts)])
    words = [word.cell_len for each in texts for word in each.split()]
    least = whole if whole <= _UNBROKEN else min(_WORD, max([len(column), *words]))
    return max(least, len(column)), whole


def _fitting(
    columns: Sequence[str], least: Sequence[int], drop: Sequence[str], width: int
) -> tuple[list[int], int | None]:
    """Return which columns to show, and how much room their text has; ``None`` if it is too little all the same."""
    kept = list(range(len(columns)))
    for candidate in (None, *drop):
        kept = [at for at in kept if columns[at] != candidate]
        room = width - _FRAME - _PADDING * len(kept)
        if sum(least[at] for at in kept) <= room:
            return kept, room
    return kept, None


def _shares(needed: Sequence[tuple[int, int]], width: int | None) -> list[int | None]:
    """Return the width of each column: what it needs, and of what is left over as much as it can use."""
    if width is None:
        return [None] * len(needed)
    shares = [least for least, _ in needed]
    left = width - sum(shares)
    wants = sorted(range(len(needed)), key=lambda at: needed[at][1] - needed[at][0])
    for place, at in enumerate(wants):
        more = min(needed[at][1] - needed[at][0], left // (len(wants) - place))
        shares[at] += more
        left -= more
    return list(shares)


INTERRUPTED = 128 + signal.SIGINT


@contextmanager
def exit_on_error(*, as_json: bool = False) -> Iterator[None]:
    """Turn an error of this project, or an interrupt, into one line on stderr and its exit code; let bugs through.

    Args:
        as_json: Print the error as a JSON document on stdout too.
    """
    try:
        yield
    except PomonaError as error:
        if as_json:
            print_json_line({"error": error_facts(error)})
        from rich.text import Text  # noqa: PLC0415

        line = Text(f"error: {one_line(str(error))}", style="red")
        console(stderr=True).print(line, soft_wrap=True)
        for note in getattr(error, "__notes__", ()):
            shown = "\n".join(f"  {_printable(line)}" for line in note.split("\n"))
            console(stderr=True).print(Text(shown), soft_wrap=True)
        raise SystemExit(error.exit_code) from error
    except KeyboardInterrupt as interrupt:
        typer.echo(f"interrupted{f': {interrupt}' if str(interrupt) else ''}", err=True)
        raise SystemExit(INTERRUPTED) from interrupt


@contextmanager
def told_when_interrupted(hint: str) -> Iterator[None]:
    """Let an interrupt carry what to do next, which :func:`exit_on_error` prints."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(hint) from interrupt


def error_facts(error: PomonaError) -> dict[str, object]:
    """Return what machines are told about an error."""
    return {"code": error.exit_code, "type": type(error).__name__, "message": str(error)}


def one_line(text: str) -> str:
    """Return text on one line, without control characters."""
    return _printable(" ".join(text.split()))


def _printable(line: str) -> str:
    return "".join(letter for letter in line if unicodedata.category(letter)[0] != "C")


def _jsonable(value: object) -> object:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): _jsonable(item) for key, item in value.items()}
        case list() | tuple():
            return [_jsonable(item) for item in value]
        case _ if dataclasses.is_dataclass(value):
            return {item.name: _jsonable(getattr(value, item.name)) for item in dataclasses.fields(value)}
        case _:
            return value


def _leaf(value: object) -> str:
    match value:
        case datetime():
            return value.isoformat()
        case Path():
            return str(value)
        case _:
            raise TypeError(f"cannot print {type(value).__name__} as JSON")
