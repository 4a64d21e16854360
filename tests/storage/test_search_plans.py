"""How a search is carried out: by which index, and that what it finds does not depend on it."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.storage.filling import Entry, database, fill

from pomona.storage import search as searching
from pomona.storage.registry import Registry
from pomona.storage.search import search

LONG = "x" * 201
VALUES = ["a", "b", "x" * 200, LONG, LONG + "y"]
FILTERS = [
    *(f"tags.site {operator} '{value}'" for operator in ("=", "!=", "<", ">=") for value in VALUES),
    "tags.site LIKE 'x%'",
    "tags.site LIKE '%y'",
    "tags.site ILIKE 'X%' AND metrics.accuracy > 0.4",
    f"tags.site IN ('a', '{LONG}')",
    "NOT tags.site = 'a'",
    f"NOT tags.site = '{LONG}' OR alias = 'champion'",
    "metrics.accuracy > 0.2 AND metrics.accuracy < 0.8 AND base_model = 'tiny'",
    "NOT (metrics.accuracy >= 0.5 AND tags.site != 'b')",
    "alias LIKE 'c%' OR metrics.accuracy = 0.5",
]
ORDERS = [
    "",
    "metrics.accuracy DESC",
    "metrics.accuracy",
    "tags.site, rank DESC",
    "rank, metrics.accuracy DESC",
    "round",
]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def connection(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[sa.Connection]:
    """Forty versions with values of tags around the length that indexes hold, and many that are alike."""
    entries = [
        Entry(
            rank=1 + place % 3,
            metrics={} if place % 7 == 0 else {"accuracy": None if place % 11 == 0 else place % 5 / 5},
            tags={} if place % 6 == 0 else {"site": VALUES[place % len(VALUES)], "other": "a"},
            aliases=["champion"] if place == 17 else [],
        )
        for place in range(40)
    ]
    with database(request.param, tmp_path_factory.mktemp("plans"), request) as engine, engine.begin() as connection:
        fill(connection, entries)
        yield connection


def pages(connection: sa.Connection, text: str, order_by: str, limit: int) -> list[int]:
    found: list[int] = []
    token: str | None = None
    while True:
        page = search(connection, text, order_by=order_by, limit=limit, page_token=token)
        found += [item.id for item in page.versions]
        token = page.next_page_token
        if token is None:
            return found


@settings(deadline=None, max_examples=60)
@given(text=st.sampled_from(FILTERS), order_by=st.sampled_from(ORDERS), limit=st.sampled_from([1, 3, 7, 100]))
def test_gathering_first_and_asking_one_by_one_find_the_same(
    connection: sa.Connection, text: str, order_by: str, limit: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        gathered = pages(connection, text, order_by, limit)
        patch.setattr(searching, "_FEW", 0)
        asked = pages(connection, text, order_by, limit)
        patch.setattr(searching, "_FEW", 8)
        mixed = pages(connection, text, order_by, limit)
    assert gathered == asked == mixed
    assert len(set(gathered)) == len(gathered)


@pytest.mark.parametrize("value", VALUES)
def test_long_values_are_found_as_short_ones_are(connection: sa.Connection, value: str) -> None:
    expected = [place + 1 for place in range(40) if place % 6 and VALUES[place % len(VALUES)] == value]
    assert sorted(pages(connection, f"tags.site = '{value}'", "", 100)) == expected


def plan(home: Path, text: str, order_by: str, *, few: bool) -> str:
    """Return how SQLite carries out a search, in a registry that is almost empty: it knows what a full one is like."""
    engine = sa.create_engine(f"sqlite:///{home / 'registry.db'}")
    query, _ = searching.statement(
        text, order_by=order_by, dialect="sqlite", measured=bool(order_by), few=lambda _: few
    )
    compiled = query.limit(101).compile(dialect=engine.dialect, compile_kwargs={"literal_binds": True})
    with engine.connect() as connection:
        lines = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {compiled}".replace("%%", "%")).all()
    engine.dispose()
    return "\n".join(str(line[3]) for line in lines)


@pytest.mark.parametrize(
    ("text", "order_by", "few", "expected"),
    [
        ("tags.site = 'a'", "", True, "ix_tag_short \\(key=\\? AND value=\\?\\)"),
        ("tags.site = 'a'", "", True, "SEARCH version USING INTEGER PRIMARY KEY"),
        (
            "tags.site = 'a'",
            "",
            False,
            "SEARCH tag_1 USING INDEX sqlite_autoindex_tag_1 \\(version_id=\\? AND key=\\?\\)",
        ),
        ("", "metrics.accuracy DESC", True, "^SEARCH metric_1 USING COVERING INDEX ix_metric_key_value_version_id"),
        ("metrics.loss > 0.5", "metrics.accuracy DESC", False, "^SEARCH metric_2? ?.*ix_metric_key_value_version_id"),
        (
            "name = 'demo'",
            "metrics.accuracy DESC",
            True,
            "^SEARCH version USING (COVERING )?INDEX sqlite_autoindex_version",
        ),
        ("", "rank", True, "ix_version_rank"),
        ("sha256 = 'a'", "", True, "ix_version_blob_sha256"),
    ],
)
@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_sqlite_takes_the_index(
    registry: Registry, home: Path, text: str, order_by: str, few: bool, expected: str
) -> None:
    found = plan(home, text, order_by, few=few)
    assert re.search(expected, found, re.MULTILINE), found
