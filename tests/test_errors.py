"""Every error has a number of its own, and both pages that explain the numbers are complete."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pomona import errors
from pomona.cli.output import INTERRUPTED
from pomona.errors import PomonaError

PAGE = (Path(__file__).parents[1] / "docs" / "errors.md").read_text(encoding="utf-8")
NAMED = re.compile(r"([A-Z][A-Za-z]+) \((\d+)\)")


def family(root: type[PomonaError] = PomonaError) -> Iterator[type[PomonaError]]:
    yield root
    for child in root.__subclasses__():
        yield from family(child)


ALL = [kind for kind in family() if kind.__module__ == errors.__name__]
every_error = pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)


def tree() -> dict[str, tuple[int, str]]:
    """The tree in the module's docstring: name to number and parent."""
    found: dict[str, tuple[int, str]] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if match := NAMED.search(line):
            name, number = match.groups()
            depth = match.start() // 4
            path[depth:] = [name]
            found[name] = int(number), path[depth - 1] if depth else ""
    return found


def test_the_numbers_are_unique_and_those_of_success_and_usage_are_free() -> None:
    numbers = [kind.exit_code for kind in ALL]
    assert len(set(numbers)) == len(numbers)
    assert all(1 <= number < 126 and number != 2 for number in numbers)  # the shell uses 126 and above


@every_error
def test_an_error_sets_its_own_number(kind: type[PomonaError]) -> None:
    assert "exit_code" in vars(kind)


@every_error
def test_an_error_says_what_it_means(kind: type[PomonaError]) -> None:
    assert inspect.getdoc(kind)


@every_error
def test_the_page_explains_an_error_and_says_what_to_do(kind: type[PomonaError]) -> None:
    assert f"\n| {kind.exit_code} | [{kind.__name__}](#{kind.exit_code}-{kind.__name__.lower()}) |" in PAGE
    _, _, section = PAGE.partition(f"\n## {kind.exit_code} {kind.__name__}\n")
    text, *_ = section.split("\n## ")
    assert text.strip()
    assert kind is PomonaError or "**Do:**" in text


def test_the_page_explains_nothing_else() -> None:
    headings = re.findall(r"^## (\d+) (\w+)$", PAGE, flags=re.MULTILINE)
    assert headings == [(str(kind.exit_code), kind.__name__) for kind in sorted(ALL, key=lambda k: k.exit_code)]


def test_the_page_explains_the_number_of_an_interrupt() -> None:
    assert INTERRUPTED not in {kind.exit_code for kind in ALL}
    assert f"\n| {INTERRUPTED} | |" in PAGE
    assert f"\n## {INTERRUPTED}\n" in PAGE


def test_the_tree_of_the_module_is_the_tree_of_the_classes() -> None:
    assert tree() == {
        kind.__name__: (kind.exit_code, "" if kind is PomonaError else kind.__mro__[1].__name__) for kind in ALL
    }
