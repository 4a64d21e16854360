"""The language of ``pomona registry search``: from text to a tree of comparisons, by a grammar.

Nothing here knows a database. What is typed ends in the tree as values, and :mod:`pomona.storage.conditions` hands
these to the database as bound parameters.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import Literal, NoReturn, get_args

from lark import Lark, Token, Tree
from lark.exceptions import UnexpectedInput, UnexpectedToken

from pomona.errors import ConfigError
from pomona.storage.values import is_storable

MAX_LENGTH = 4000
MAX_COMPARISONS = 64
MAX_VALUES = 500
MAX_DEPTH = 20
MAX_RANKINGS = 8

GRAMMAR = r"""
filter: disjunction?
order: ranking (_COMMA ranking)*

?disjunction: conjunction (_OR conjunction)*
?conjunction: term (_AND term)*
?term: comparison | negation | _OPEN disjunction _CLOSE
negation: _NOT term
comparison: field (OPERATOR | LIKE | ILIKE) value
          | field IN _OPEN value (_COMMA value)* _CLOSE
ranking: field (ASC | DESC)?

field: NAME (_DOT (NAME | QUOTED))*
?value: STRING | NUMBER

_AND.1: /AND\b/i
_OR.1: /OR\b/i
_NOT.1: /NOT\b/i
LIKE.1: /LIKE\b/i
ILIKE.1: /ILIKE\b/i
IN.1: /IN\b/i
ASC.1: /ASC\b/i
DESC.1: /DESC\b/i
OPERATOR: /!=|<=|>=|=|<|>/
NAME: /[A-Za-z_][A-Za-z0-9_]*/
QUOTED: /`(?:[^`]|``)+`/
STRING: /'(?:[^']|'')*'/
NUMBER: /[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?/
_DOT: "."
_COMMA: ","
_OPEN: "("
_CLOSE: ")"
%ignore /[ \t\r\n\f]+/
"""

Operator = Literal["=", "!=", "<", "<=", ">", ">=", "LIKE", "ILIKE", "IN"]

_OPERATORS: dict[str, Operator] = {name: name for name in get_args(Operator)}
_WORDS = {
    "NAME": "a field",
    "QUOTED": "a key",
    "_NOT": "NOT",
    "_OPEN": "(",
    "STRING": "a string in single quotes",
    "NUMBER": "a number",
    "OPERATOR": "=, !=, <, <=, >, >=",
    "LIKE": "LIKE",
    "ILIKE": "ILIKE",
    "IN": "IN",
    "ASC": "ASC",
    "DESC": "DESC",
    "_COMMA": "a comma",
    "_AND": "AND",
    "_OR": "OR",
    "_CLOSE": ")",
    "$END": "the end",
}
_SNIPPET = 60


@dataclass(frozen=True, slots=True)
class Field:
    """What is compared: ``rank``, or ``metrics.accuracy`` with the key ``accuracy``.

    Attributes:
        name: What stands before the first dot.
        key: What stands after it, without backticks; ``None`` where there is no dot.
        position: Where it begins in the text, from 0.
    """

    name: str
    key: str | None
    position: int


@dataclass(frozen=True, slots=True)
class Value:
    """A string without its quotes, or the digits of a number."""

    text: str
    is_string: bool
    position: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """A field against one value, or against several of which one must be equal (``IN``)."""

    field: Field
    operator: Operator
    values: tuple[Value, ...]
    position: int


@dataclass(frozen=True, slots=True)
class Negation:
    """True where what it holds is not."""

    of: "Expression"


@dataclass(frozen=True, slots=True)
class Junction:
    """All of several, or any of them."""

    kind: Literal["all", "any"]
    of: tuple["Expression", ...]


Expression = Comparison | Negation | Junction


@dataclass(frozen=True, slots=True)
class Ranking:
    """A field to order by, and which way."""

    field: Field
    descending: bool


def parse_filter(text: str) -> Expression | None:
    """Return what a filter says; ``None`` for one that is empty, which every version satisfies.

    Raises:
        ConfigError: It cannot be read, or is longer, deeper or of more comparisons than is allowed. The message names
            the position, a note shows it.
    """
    tree = _parse(text, start="filter", what="filter")
    if not tree.children:
        return None
    _limit_size(text, tree)
    return _expression(text, _only(tree), depth=1)


def parse_order(text: str) -> list[Ranking]:
    """Return what an order says; nothing for one that is empty.

    Raises:
        ConfigError: It cannot be read, or has more fields than is allowed.
    """
    if not text.strip(" \t\r\n\f"):
        return []
    rankings = _parse(text, start="order", what="order").children
    if len(rankings) > MAX_RANKINGS:
        refuse(text, 0, f"expected at most {MAX_RANKINGS} fields to order by, got {len(rankings)}", what="order")
    return [_ranking(item) for item in rankings if isinstance(item, Tree)]


def refuse(text: str, position: int, problem: str, *, what: str = "filter") -> NoReturn:
    """Raise the one error of this language.

    Raises:
        ConfigError: Always; its note shows the text with a caret under the position.
    """
    error = ConfigError(f"the {what} cannot be used, at character {position + 1}: {problem}")
    error.add_note(_pointer(text, position))
    raise error


@cache
def _parser() -> Lark:
    return Lark(GRAMMAR, parser="lalr", start=["filter", "order"], maybe_placeholders=False)


def _parse(text: str, *, start: str, what: str) -> Tree[Token]:
    if len(text) > MAX_LENGTH:
        refuse(text, MAX_LENGTH, f"expected at most {MAX_LENGTH} characters, got {len(text)}", what=what)
    for position, letter in enumerate(text):
        if not is_storable(letter):
            refuse(text, position, f"expected a character that can be stored, got U+{ord(letter):04X}", what=what)
    try:
        return _parser().parse(text, start=start)
    except UnexpectedInput as error:
        position, expected = _failure(text, error)
    refuse(text, position, f"expected {_listed(expected)}, got {_found(text, position)}", what=what)


def _failure(text: str, error: UnexpectedInput) -> tuple[int, set[str]]:
    token = error.token if isinstance(error, UnexpectedToken) else None
    position = len(text) if token is not None and token.type == "$END" else error.pos_in_stream
    return position or 0, set(error.interactive_parser.accepts())  # type: ignore[no-untyped-call]


def _listed(expected: set[str]) -> str:
    if {"NAME", "QUOTED"} <= expected:
        return "a key, in backticks if it is no plain word"
    words = [word for name, word in _WORDS.items() if name in expected]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _found(text: str, position: int) -> str:
    if position >= len(text):
        return "the end"
    if text[position] in "'`":
        return f"a {text[position]} that is never closed"
    word = re.compile(r"\w{1,30}|.", re.DOTALL).match(text, position)
    hint = "; strings stand in single quotes" if text[position] == '"' else ""
    return f"{word.group() if word else ''!r}{hint}"


def _limit_size(text: str, tree: Tree[Token]) -> None:
    comparisons = list(tree.find_data("comparison"))
    if len(comparisons) > MAX_COMPARISONS:
        refuse(text, 0, f"expected at most {MAX_COMPARISONS} comparisons, got {len(comparisons)}")
    values = sum(len(item.children) - 2 for item in comparisons)
    if values > MAX_VALUES:
        refuse(text, 0, f"expected at most {MAX_VALUES} values, got {values}")


def _expression(text: str, tree: Tree[Token], *, depth: int) -> Expression:
    if depth > MAX_DEPTH:
        refuse(text, 0, f"expected at most {MAX_DEPTH} levels of NOT, AND and OR in each other, got more")
    parts = [item for item in tree.children if isinstance(item, Tree)]
    match tree.data:
        case "comparison":
            return _comparison(tree)
        case "negation":
            return Negation(_expression(text, parts[0], depth=depth + 1))
        case kind:
            below = tuple(_expression(text, part, depth=depth + 1) for part in parts)
            return Junction("all" if kind == "conjunction" else "any", below)


def _comparison(tree: Tree[Token]) -> Comparison:
    operator, *values = (item for item in tree.children if isinstance(item, Token))
    return Comparison(
        field=_field(_only(tree)),
        operator=_OPERATORS[operator if operator.type == "OPERATOR" else operator.type],
        values=tuple(_value(token) for token in values),
        position=_start(operator),
    )


def _ranking(tree: Tree[Token]) -> Ranking:
    direction = [item.type for item in tree.children if isinstance(item, Token)]
    return Ranking(_field(_only(tree)), descending=direction == ["DESC"])


def _field(tree: Tree[Token]) -> Field:
    name, *keys = (item for item in tree.children if isinstance(item, Token))
    return Field(name.lower(), ".".join(map(_bare, keys)) if keys else None, _start(name))


def _bare(key: Token) -> str:
    return key[1:-1].replace("``", "`") if key.type == "QUOTED" else str(key)


def _value(token: Token) -> Value:
    if token.type == "STRING":
        return Value(token[1:-1].replace("''", "'"), is_string=True, position=_start(token))
    return Value(str(token), is_string=False, position=_start(token))


def _start(token: Token) -> int:
    return token.start_pos or 0


def _only(tree: Tree[Token]) -> Tree[Token]:
    return next(item for item in tree.children if isinstance(item, Tree))


def _pointer(text: str, position: int) -> str:
    """Return the text around a position on one line, and under it a caret."""
    first = max(0, position - _SNIPPET // 2)
    before, after = _shown(text[first:position]), _shown(text[position : first + _SNIPPET])
    return f"{before}{after}\n{' ' * sum(map(_width, before))}^"


def _shown(text: str) -> str:
    return "".join(letter if letter.isprintable() and _width(letter) else " " for letter in text)


def _width(letter: str) -> int:
    if unicodedata.combining(letter):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1
