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


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "") -> "Table":
    """Return a table of values; whatever they hold is shown, never interpreted."""
    from rich.table import Table  # noqa: PLC0415

    result = Table(title=plain(title) if title else None, title_justify="left")
    for column in columns:
        result.add_column(column, overflow="fold")
    for row in rows:
        result.add_row(*map(cell, row))
    return result


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "") -> None:
    """Print a table."""
    console().print(table(columns, rows, title=title))


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
