"""Every command, argument and option says what it is for."""

from collections.abc import Iterator

import click
import pytest
import typer

from pomona.cli import app


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    for name, inner in command.commands.items() if isinstance(command, click.Group) else ():
        yield from commands(inner, (*path, name))


FOUND = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("path", FOUND, ids=" ".join)
def test_everything_is_explained(path: tuple[str, ...]) -> None:
    command = FOUND[path]
    assert command.help
    assert [each.name for each in command.params if not getattr(each, "help", None)] == []
