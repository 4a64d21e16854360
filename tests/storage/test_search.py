"""A search finds what a slow reading of the records finds, on both databases, and is nothing but bound parameters."""

import base64
import json
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.dialects import postgresql, sqlite
from tests.storage.filling import NOW, Entry, base_sha256, database, fill

from pomona.errors import ConfigError
from pomona.storage.fields import FIELDS
from pomona.storage.records import SearchPage, Version
from pomona.storage.registry import Registry
from pomona.storage.search import search, statement

HOSTILE = [
    "'; DROP TABLE version; --",
    "%",
    "_",
    "\\",
    "a\\%",
    "*?[",
    "]",
    "/* x */",
    ":p",
    "%(x)s",
    "?",
    "\N{PILE OF POO}",
]
NAMES = ["demo", "Demo", "legal-de", "legal_de", "z"]
METRICS = ["accuracy", "val/f1", "select"]
TAGS = ["site", "a`b", "note"]

slow_machines = settings(deadline=None, max_examples=50)

Test = Callable[[Version], bool]
Reach = Callable[[Version], Sequence[object]]

text_values = st.one_of(
    st.sampled_from([*NAMES, *HOSTILE, "a", "B", "bern", "", "É", "é"]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=6),
)
numbers = st.one_of(st.sampled_from([0.0, 0.5, 0.7, 1.0]), st.floats(allow_nan=False, allow_infinity=False))
moments = st.sampled_from([NOW + timedelta(seconds=delta / 2) for delta in range(-3, 4)])

entries = st.builds(
    Entry,
    name=st.sampled_from(NAMES),
    rank=st.integers(1, 6),
    kind=st.sampled_from(["round", "import"]),
    exactness=st.sampled_from(["exact", "truncated"]),
    retained_energy=st.sampled_from([0.25, 0.5, 1.0]),
    bytes=st.sampled_from([1, 2**40]),
    sha256=st.sampled_from(["a" * 64, "b" * 64]),
    base_model=st.sampled_from(["tiny", "Large"]),
    created_at=moments,
    metrics=st.dictionaries(st.sampled_from(METRICS), st.one_of(st.none(), numbers), max_size=3),
    tags=st.dictionaries(st.sampled_from(TAGS), text_values, max_size=3),
)


@st.composite
def registries(draw: st.DrawFn) -> list[Entry]:
    """Return versions; some are of a run, some have aliases that no other version has."""
    made = draw(st.lists(entries, max_size=8))
    aliases = iter(["champion", "best", "b", "c"])
    result = []
    for place, entry in enumerate(made, start=1):
        of_run = draw(st.booleans())
        taken = [alias for _, alias in zip(range(draw(st.integers(0, 2))), aliases, strict=False)]
        run_id, number = (f"run-{entry.name}", place) if of_run else (None, None)
        result.append(replace(entry, run_id=run_id, round=number, aliases=taken))
    return result


@dataclass(frozen=True)
class Subject:
    """A field as it is typed, how to read its values off a record, and values worth comparing it with."""

    typed: str
    read: Reach
    values: st.SearchStrategy[object]


def plain(typed: str, attribute: str, values: st.SearchStrategy[object]) -> Subject:
    def read(version: Version) -> Sequence[object]:
        value = getattr(version, attribute)
        return [] if value is None else [value]

    return Subject(typed, read, values)


def keyed(typed: str, attribute: str, key: str, values: st.SearchStrategy[object]) -> Subject:
    def read(version: Version) -> Sequence[object]:
        held: Mapping[str, object] = getattr(version, attribute)
        value = held.get(key)
        return [] if value is None or (isinstance(value, float) and math.isnan(value)) else [value]

    return Subject(typed, read, values)


def quoted_key(key: str) -> str:
    return f"`{key.replace('`', '``')}`"


small = st.integers(-1, 8)
SUBJECTS = [
    plain("name", "adapter", text_values),
    plain("version", "number", small),
    plain("rank", "rank", small),
    plain("kind", "kind", st.sampled_from(["round", "import"])),
    plain("exactness", "exactness", st.sampled_from(["exact", "truncated"])),
    plain("retained_energy", "retained_energy", numbers),
    plain("run_id", "run_id", st.sampled_from(["run-demo", "run-z"])),
    plain("round", "round_number", small),
    plain("bytes", "bytes", st.sampled_from([1, 2**40, 2**63 - 1])),
    plain("sha256", "sha256", st.sampled_from(["a" * 64, "b"])),
    plain("base_model", "base_model", st.sampled_from(["tiny", "Large", "T"])),
    plain("base_sha256", "base_sha256", st.sampled_from([base_sha256("tiny"), "0"])),
    plain("created_at", "created_at", moments),
    Subject("alias", lambda version: version.aliases, st.sampled_from(["champion", "best", "b"])),
    *(keyed(f"metrics.{quoted_key(key)}", "metrics", key, numbers) for key in METRICS),
    *(keyed(f"tags.{quoted_key(key)}", "tags", key, text_values) for key in TAGS),
]
COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def literal(value: object) -> str:
    match value:
        case str():
            return "'" + value.replace("'", "''") + "'"
        case datetime():
            return f"'{value.astimezone(timezone(timedelta(hours=2))).isoformat()}'"
        case _:
            return repr(value)


def like(pattern: str, value: str, *, ignore_case: bool) -> bool:
    """The slow meaning of LIKE: a regular expression, made letter by letter."""
    if ignore_case:
        pattern, value = (re.sub("[A-Z]", lambda found: found.group().lower(), each) for each in (pattern, value))
    special = {"%": ".*", "_": "."}
    pieces = re.findall(r"\\.|[^\\]", pattern, re.DOTALL)
    wanted = "".join(special.get(piece) or re.escape(piece[-1]) for piece in pieces)
    return re.fullmatch(wanted, value, re.DOTALL) is not None


@st.composite
def comparisons(draw: st.DrawFn) -> tuple[str, Test]:
    subject = draw(st.sampled_from(SUBJECTS))
    values = draw(st.lists(subject.values, min_size=1, max_size=3))
    value = values[0]
    kinds = [*COMPARE, "IN"] + (["LIKE", "ILIKE"] if isinstance(value, str) else [])
    match draw(st.sampled_from(kinds)):
        case "IN":
            typed = ", ".join(map(literal, values))
            return f"{subject.typed} in ({typed})", lambda v: any(item in values for item in subject.read(v))
        case "LIKE" | "ILIKE" as kind:
            start = draw(st.sampled_from(["", "%", "_", r"\\", r"\%"]))
            pattern = start + re.sub(r"\\*$", "", str(value)) + draw(st.sampled_from(["", "%"]))
            return f"{subject.typed} {kind} {literal(pattern)}", lambda v: any(
                like(pattern, str(item), ignore_case=kind == "ILIKE") for item in subject.read(v)
            )
        case symbol:
            compare = COMPARE[symbol]
            return f"{subject.typed} {symbol} {literal(value)}", lambda v: any(
                compare(item, value) for item in subject.read(v)
            )


def negated(inner: tuple[str, Test]) -> tuple[str, Test]:
    return f"NOT ({inner[0]})", lambda version: not inner[1](version)


def joined(parts: list[tuple[str, Test]], word: str) -> tuple[str, Test]:
    combine = all if word == "AND" else any
    return f" {word} ".join(f"({text})" for text, _ in parts), lambda v: combine(test(v) for _, test in parts)


searches = st.recursive(
    comparisons(),
    lambda inner: st.one_of(
        inner.map(negated),
        st.builds(joined, st.lists(inner, min_size=2, max_size=3), st.sampled_from(["AND", "OR"])),
    ),
    max_leaves=5,
)
ORDERABLE = [subject for subject in SUBJECTS if subject.typed != "alias"]
orders = st.lists(st.tuples(st.sampled_from(ORDERABLE), st.booleans()), max_size=3)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[sa.Engine]:
    with database(request.param, tmp_path_factory.mktemp("search"), request) as engine:
        yield engine


@contextmanager
def filled(engine: sa.Engine, entries: Sequence[Entry]) -> Iterator[sa.Connection]:
    """Lend a transaction that sees these versions and leaves nothing."""
    with engine.connect() as connection:
        transaction = connection.begin()
        fill(connection, entries)
        yield connection
        transaction.rollback()


def find(
    connection: sa.Connection, text: str = "", order: str = "", limit: int = 1000, token: str | None = None
) -> SearchPage:
    return search(connection, text, order_by=order, limit=limit, page_token=token)


def everything(connection: sa.Connection) -> list[Version]:
    return list(find(connection).versions)


@slow_machines
@given(registries(), searches)
def test_it_finds_what_a_slow_reading_finds(engine: sa.Engine, entries: list[Entry], asked: tuple[str, Test]) -> None:
    text, test = asked
    with filled(engine, entries) as connection:
        found = find(connection, text).versions
        expected = [version.ref for version in everything(connection) if test(version)]
    assert [version.ref for version in found] == expected


@slow_machines
@given(registries(), orders, st.integers(1, 4))
def test_it_orders_as_sorting_does_and_pages_make_the_whole(
    engine: sa.Engine, entries: list[Entry], order: list[tuple[Subject, bool]], limit: int
) -> None:
    typed = ", ".join(f"{subject.typed}{' DESC' if descending else ''}" for subject, descending in order)
    with filled(engine, entries) as connection:
        expected = everything(connection)
        for subject, descending in reversed(order):
            having = [version for version in expected if subject.read(version)]
            having.sort(key=lambda version, read=subject.read: read(version)[0], reverse=descending)  # type: ignore[misc]
            expected = having + [version for version in expected if not subject.read(version)]
        pages, token = [find(connection, "", typed, limit)], None
        while token := pages[-1].next_page_token:
            pages.append(find(connection, "", typed, limit, token))
    assert [version.ref for page in pages for version in page.versions] == [version.ref for version in expected]
    assert all(len(page.versions) == limit for page in pages[:-1])


def test_pages_do_not_shift_when_others_publish(engine: sa.Engine) -> None:
    before = [Entry(metrics={"accuracy": place / 10}) for place in range(6)]
    with filled(engine, before) as connection:
        first = find(connection, "", "metrics.accuracy DESC", 3)
        columns = (
            "adapter_name, blob_sha256, bytes, base_sha256, rank, kind, exactness, retained_energy, recipe, created_at"
        )
        copied = f"INSERT INTO version (id, version, {columns}) SELECT 99, 99, {columns} FROM version WHERE id = 1"
        connection.execute(sa.text(copied))
        connection.execute(sa.text("INSERT INTO metric (version_id, key, value) VALUES (99, 'accuracy', 0.9)"))
        second = find(connection, "", "metrics.accuracy DESC", 10, first.next_page_token)
    assert [version.number for version in first.versions] == [6, 5, 4]
    assert [version.number for version in second.versions] == [3, 2, 1]


def test_the_newest_comes_first_unless_it_is_said_otherwise(engine: sa.Engine) -> None:
    with filled(engine, [Entry(name="b"), Entry(name="a"), Entry(name="b")]) as connection:
        assert [version.ref for version in find(connection).versions] == ["b/2", "a/1", "b/1"]
        assert [version.ref for version in find(connection, order="name").versions] == ["a/1", "b/2", "b/1"]


def test_not_is_always_the_rest(engine: sa.Engine) -> None:
    with filled(engine, [Entry(metrics={"accuracy": None}), Entry(), Entry(metrics={"accuracy": 0.9})]) as connection:
        assert [v.number for v in find(connection, "metrics.accuracy > 0.5").versions] == [3]
        assert [v.number for v in find(connection, "NOT metrics.accuracy > 0.5").versions] == [2, 1]
        assert [v.number for v in find(connection, "metrics.accuracy != 0.5").versions] == [3]


def test_a_day_is_midnight_in_utc(engine: sa.Engine) -> None:
    days = [datetime(2026, 3, day, tzinfo=UTC) for day in (1, 2, 3)]
    with filled(engine, [Entry(created_at=day) for day in days]) as connection:
        assert [v.number for v in find(connection, "created_at > '2026-03-02'").versions] == [3]
        assert [v.number for v in find(connection, "created_at <= '2026-03-02T01:00:00+01:00'").versions] == [2, 1]


@pytest.mark.parametrize(
    ("text", "position", "expected"),
    [
        ("nme = 'x'", 1, "expected a field, got 'nme'; did you mean name?"),
        ("metric.accuracy > 1", 1, "did you mean metrics?"),
        ("zzzzz = 1", 1, "there are name, version, rank"),
        ("metrics > 1", 1, "expected metrics.KEY, got 'metrics' alone"),
        ("rank.x > 1", 1, "expected 'rank' alone"),
        ("rank = 'x'", 8, "expected a whole number, got the string 'x'"),
        ("rank = 1.5", 8, "expected a whole number, got 1.5"),
        ("rank = 9223372036854775808", 8, "expected a whole number"),
        ("metrics.a > 1e999", 13, "expected a number, got 1e999"),
        ("metrics.a > 'x'", 13, "expected a number, got the string 'x'"),
        ("name = 3", 8, "expected a string in single quotes, got 3"),
        ("name LIKE 3", 11, "expected a string in single quotes, got 3"),
        ("rank LIKE '1%'", 6, "expected =, !=, <, <=, >, >= or IN for rank, got LIKE"),
        ("created_at > 'soon'", 14, "expected a moment such as '2026-03-01'"),
        ("created_at > '0001-01-01T00:00:00+14:00'", 14, "expected a moment"),
        ("created_at > 2026", 14, "expected a moment"),
        (r"name LIKE 'a\'", 11, "expected a character after the last backslash"),
    ],
)
def test_what_cannot_be_compared_is_refused_where_it_stands(text: str, position: int, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        statement(f"rank = 1 OR {text}", order_by="", dialect="sqlite")
    assert f"at character {position + 12}: " in str(error.value)
    assert expected in str(error.value)
    assert error.value.__notes__[0].endswith("^")


def test_what_a_version_has_several_times_orders_nothing() -> None:
    with pytest.raises(ConfigError, match=r"the order cannot be used, at character 7: .*has once, got 'alias'"):
        statement("", order_by="name, alias", dialect="sqlite")


PIECES = [
    "name",
    "rank",
    "metrics.a",
    "created_at",
    "AND",
    "OR",
    "NOT",
    "LIKE",
    "=",
    "<",
    "(",
    ")",
    "IN",
    ",",
    "7",
    "'x'",
]


@slow_machines
@given(
    st.one_of(
        st.text(st.characters(), max_size=60), st.lists(st.sampled_from([*PIECES, *HOSTILE]), max_size=20).map(" ".join)
    )
)
def test_any_text_finds_something_or_is_the_one_error(engine: sa.Engine, text: str) -> None:
    with filled(engine, [Entry(name="x")]) as connection:
        for asked in ({"text": text}, {"order": text}, {"token": text}, {"text": f"name LIKE {literal(text)}"}):
            refused(connection, **asked)
        assert connection.scalar(sa.text("SELECT count(*) FROM version")) == 1


def refused(connection: sa.Connection, *, text: str = "", order: str = "", token: str | None = None) -> None:
    with suppress(ConfigError):
        find(connection, text, order, token=token)


@pytest.mark.parametrize("dialect", [sqlite.dialect(), postgresql.dialect()], ids=["sqlite", "postgresql"])  # type: ignore[no-untyped-call]
@slow_machines
@given(typed=st.lists(text_values, min_size=5, max_size=5), number=st.floats(allow_nan=False, allow_infinity=False))
def test_nothing_that_is_typed_is_text_of_the_statement(dialect: sa.Dialect, typed: list[str], number: float) -> None:
    """Whatever the values are, the statement's text is the same, and they are its parameters."""

    def compiled(values: Sequence[str], number: float) -> tuple[str, list[object]]:
        name, like, tag, key, alias = values
        like = like.replace("\\", "")
        text = (
            f"name = {literal(name)} OR name LIKE {literal(like)} OR tags.{quoted_key(key or 'k')} < {literal(tag)} "
            f"OR alias IN ({literal(alias)}, 'b') OR metrics.{quoted_key(key or 'k')} >= {number!r}"
        )
        order = f"tags.{quoted_key(key or 'k')} DESC"
        query, _ = statement(text, order_by=order, dialect=dialect.name)
        result = query.limit(7).compile(dialect=dialect, compile_kwargs={"render_postcompile": True})
        return str(result), list(result.params.values())

    text, parameters = compiled(typed, number)
    assert text == compiled(["", "", "", "", ""], 0.5)[0]
    assert {typed[0], typed[2], typed[3] or "k", typed[4], number, 7} <= set(parameters)


@pytest.mark.parametrize("limit", [0, -1, 1001])
def test_a_limit_has_limits(engine: sa.Engine, limit: int) -> None:
    with filled(engine, []) as connection, pytest.raises(ConfigError, match="expected a limit of 1 to 1000"):
        find(connection, limit=limit)


def token_of(content: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")


def test_a_token_is_of_its_search_only(engine: sa.Engine) -> None:
    with filled(engine, [Entry(), Entry()]) as connection:
        token = find(connection, "rank = 4", "name", 1).next_page_token
        assert token is not None
        assert [v.number for v in find(connection, "rank = 4", "name", 1, token).versions] == [1]
        for text, order in (("rank = 5", "name"), ("rank = 4", "name DESC"), ("", "")):
            with pytest.raises(ConfigError, match="belongs to another search"):
                find(connection, text, order, 1, token)


def test_a_forged_token_is_refused_or_names_a_place(engine: sa.Engine) -> None:
    order = "name, rank, retained_energy, created_at"
    with filled(engine, [Entry(), Entry()]) as connection:
        token = find(connection, "", order, 1).next_page_token or ""
        content = json.loads(base64.urlsafe_b64decode(token + "=="))
        after: list[object] = content["after"]
        for place, bad in [
            (0, 7),
            (0, "a\x00"),
            (0, "\ud800"),
            (1, "x"),
            (1, True),
            (1, 2**63),
            (1, 0.5),
            (2, math.inf),
            (2, math.nan),
            (2, 10**400),
            (2, [1]),
            (3, "soon"),
            (3, 7),
            (4, None),
        ]:
            forged = token_of(content | {"after": [*after[:place], bad, *after[place + 1 :]]})
            with pytest.raises(ConfigError, match="expected a page token"):
                find(connection, "", order, 1, forged)
        for bad in (
            "",
            "x",
            "[" * 9000,
            token_of([]),
            token_of({}),
            token_of(content | {"after": after[1:]}),
            "a" * 10**6,
        ):
            with pytest.raises(ConfigError, match="expected a page token"):
                find(connection, "", order, 1, str(bad))
        nowhere = token_of(content | {"after": [None, None, None, None, 0]})
        assert find(connection, "", order, 1, nowhere).versions == []


def test_the_registry_searches(registry: Registry, publish: Callable[..., Version]) -> None:
    for number in (1, 2, 3):
        publish(number)
    registry.set_tag("demo/2", "site", "b")
    text = "metrics.accuracy > 0.51 AND run_id = 'run-1'"
    page = registry.search(text, order_by="metrics.accuracy", limit=1)
    assert [(version.ref, version.tags) for version in page.versions] == [("demo/2", {"site": "b"})]
    rest = registry.search(text, order_by="metrics.accuracy", page_token=page.next_page_token)
    assert ([version.ref for version in rest.versions], rest.next_page_token) == (["demo/3"], None)
    assert registry.search("NOT name LIKE 'd%'") == SearchPage(versions=[], next_page_token=None)


def test_every_field_is_searched_here() -> None:
    assert {re.sub(r"`.*`", "KEY", subject.typed) for subject in SUBJECTS} == set(FIELDS)
