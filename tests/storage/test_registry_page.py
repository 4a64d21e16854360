"""``docs/registry.md`` tells the truth: of the views' columns, the queries, the grammar and the diagram."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.storage.filling import database

from pomona.storage.blobs import BlobStore
from pomona.storage.diagram import er_diagram, redrawn
from pomona.storage.fields import FIELDS
from pomona.storage.filters import GRAMMAR
from pomona.storage.records import NewSubmission, NewVersion
from pomona.storage.registry import Registry
from pomona.storage.tables import metadata

PAGE = (Path(__file__).parents[2] / "docs" / "registry.md").read_text(encoding="utf-8")
BASE = "b" * 64
VIEWS = ("adapter_versions", "lineage", "rounds", "submissions", "alias_moves")
QUERIES = re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def connection(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[sa.Connection]:
    """Two adapters with three rounds each, one of them failed; notes on some versions."""
    folder = tmp_path_factory.mktemp("page")
    with database(request.param, folder, request) as engine:
        registry = Registry(engine, BlobStore(folder / "blobs"))
        registry.add_base_model(BASE, "tiny-base", "a test")
        for adapter in ("demo", "other"):
            _fill(registry, adapter)
        registry.set_alias("demo", "champion", 1)
        registry.set_alias("demo", "champion", 3)
        registry.set_alias("demo", "best", 3)
        registry.remove_alias("demo", "best")
        registry.set_alias("demo", "also", 3)
        registry.set_tag("demo/3", "site", "b")
        with engine.connect() as connection:
            yield connection


def _fill(registry: Registry, adapter: str) -> None:
    run_id = f"run-{adapter}"
    registry.start_run(run_id=run_id, adapter=adapter, base_sha256=BASE, settings_json="{}")
    for number in (1, 2, 3):
        parent = f"{adapter}/{number - 1}" if number > 1 else None
        registry.open_round(run_id, number, parent=parent, cohort=["anna", "bert"])
        if adapter == "demo":
            registry.record_submission(_submission(run_id, number, "anna" if number == 2 else "bert"))
        registry.publish_round(_version(adapter, number))
    registry.open_round(run_id, 4, parent=f"{adapter}/3", cohort=["anna"])
    registry.record_submission(_submission(run_id, 4, "late"))
    registry.fail_round(run_id, 4, "nobody answered")


def _submission(run_id: str, number: int, client: str) -> NewSubmission:
    return NewSubmission(
        run_id=run_id,
        round_number=number,
        client=client,
        rank=4,
        alpha=8.0,
        num_examples=100,
        nonce=f"{run_id}-{number}",
        status="late" if client == "late" else "accepted",
        payload=f"{run_id}{number}".encode(),
    )


def _version(adapter: str, number: int) -> NewVersion:
    client = "anna" if number == 2 else "bert"
    return NewVersion(
        run_id=f"run-{adapter}",
        round_number=number,
        adapter=adapter,
        payload=f"{adapter}{number}".encode(),
        base_sha256=BASE,
        rank=2,
        exactness="exact",
        metrics={"accuracy": [0.5, 0.9, 0.7][number - 1], "loss": float("nan")},
        weights={client: 1.0} if adapter == "demo" else {},
        bytes_up=20,
    )


def described(view: str) -> list[str]:
    _, _, section = PAGE.partition(f"\n### {view}\n")
    table, *_ = section.split("\n#")
    return re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)


def test_every_view_is_on_the_page(connection: sa.Connection) -> None:
    assert sorted(sa.inspect(connection).get_view_names()) == sorted(VIEWS)
    assert re.findall(r"^### (\w+)$", PAGE, re.MULTILINE) == list(VIEWS)


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_has_the_columns_that_the_page_describes(connection: sa.Connection, view: str) -> None:
    columns = [column["name"] for column in sa.inspect(connection).get_columns(view)]
    assert columns == described(view)
    assert connection.execute(sa.text(f"SELECT * FROM {view}")).all()


def test_the_views_say_what_was_done(connection: sa.Connection) -> None:
    def rows(query: str) -> list[tuple[object, ...]]:
        return [tuple(row) for row in connection.execute(sa.text(query))]

    assert rows("SELECT ref, aliases, tags ->> 'site', rank FROM adapter_versions WHERE name = 'demo' ORDER BY 1") == [
        ("demo/1", None, None, 2),
        ("demo/2", None, None, 2),
        ("demo/3", "also, champion", "b", 2),
    ]
    assert rows("SELECT metrics ->> 'loss' FROM adapter_versions WHERE ref = 'demo/1'") == [(None,)]
    assert rows("SELECT child, parent, kind, coefficient FROM lineage WHERE child_name = 'demo' ORDER BY 1") == [
        ("demo/2", "demo/1", "parent", 1.0),
        ("demo/3", "demo/2", "parent", 1.0),
    ]
    assert rows(
        "SELECT round, state, parent, published, accepted, late, bytes_up FROM rounds WHERE name = 'demo' ORDER BY 1"
    ) == [
        (1, "committed", None, "demo/1", 1, 0, 20),
        (2, "committed", "demo/1", "demo/2", 1, 0, 20),
        (3, "committed", "demo/2", "demo/3", 1, 0, 20),
        (4, "failed", "demo/3", None, 0, 1, 0),
    ]
    assert rows("SELECT client, status, published, weight FROM submissions WHERE run_id = 'run-demo' ORDER BY id") == [
        ("bert", "accepted", "demo/1", 1.0),
        ("anna", "accepted", "demo/2", 1.0),
        ("bert", "accepted", "demo/3", 1.0),
        ("late", "late", None, None),
    ]
    assert rows("SELECT alias, version, previous FROM alias_moves WHERE name = 'demo' ORDER BY moved_at") == [
        ("champion", 1, None),
        ("champion", 3, 1),
        ("best", 3, None),
        ("best", None, 3),
        ("also", 3, None),
    ]


def test_the_queries_on_the_page_answer(connection: sa.Connection) -> None:
    best, ancestry, touched, counted, moved = (
        [tuple(row) for row in connection.execute(sa.text(query))] for query in QUERIES
    )
    assert best == [("demo", "demo/2", 0.9), ("other", "other/2", 0.9)]
    assert ancestry == [(0, "demo/3"), (1, "demo/2"), (2, "demo/1")]
    assert touched == [("demo/2",), ("demo/3",)]
    assert counted == [("run-demo", 3, 3, 0, 60), ("run-other", 3, 0, 0, 60)]
    assert [row[1:] for row in moved] == [(3, 1)]


def test_the_fields_on_the_page_are_those_that_can_be_searched() -> None:
    _, _, section = PAGE.partition("\n## Searching\n")
    rows = re.findall(r"^\| `([\w.]+)` \| (\w+) \|", section.split("\n## ")[0], re.MULTILINE)
    assert dict(rows) == FIELDS


def test_the_grammar_on_the_page_is_the_grammar() -> None:
    assert f"```lark\n{GRAMMAR.strip()}\n```" in PAGE


def test_the_diagram_on_the_page_is_of_the_tables() -> None:
    assert redrawn(PAGE) == PAGE, "run `make diagram`"


def test_the_diagram_has_every_table_column_and_reference() -> None:
    drawn = er_diagram()
    for table in metadata.tables.values():
        (block,) = re.findall(rf"^    {table.name} {{\n(.*?)^    }}", drawn, re.DOTALL | re.MULTILINE)
        assert [line.split()[1] for line in block.splitlines()] == [column.name for column in table.columns]
        for key in table.foreign_key_constraints:
            assert f"{key.referred_table.name} |" in drawn
            assert f'o{{ {table.name} : "{", ".join(key.column_keys)}"' in drawn


@settings(deadline=None)
@given(st.text(max_size=40))
def test_a_page_without_marks_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a page with the marks"):
        redrawn(text)
