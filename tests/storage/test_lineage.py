"""What a version is made of: one parent or several, each of a kind and with a coefficient, on either database."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.exc import IntegrityError
from tests.storage.conftest import BASE, PAYLOAD
from typer.testing import CliRunner

from pomona.cli.registry import app
from pomona.cli.registry_lineage import dot
from pomona.errors import AdapterNotFound, RegistryError
from pomona.storage import submissions
from pomona.storage import tables as t
from pomona.storage.engine import writing
from pomona.storage.records import LineageNode, NewImport, NewVersion, Parent, ParentKind, Submission, Version
from pomona.storage.registry import Registry
from pomona.storage.verification import verify

PAGE = (Path(__file__).parents[2] / "docs" / "registry.md").read_text(encoding="utf-8")
Publish = Callable[..., Version]
Make = Callable[..., NewVersion]


def taken_in(name: str, *parents: Parent, rank: int = 4) -> NewImport:
    return NewImport(
        adapter=name,
        payload=PAYLOAD,
        base_sha256=BASE,
        base_model="tiny-base",
        base_source="a test",
        rank=rank,
        parents=parents,
    )


def edges(registry: Registry, ref: str) -> list[tuple[str, str, float]]:
    return [(each.version.ref, each.kind, each.coefficient) for each in registry.lineage(ref).parents]


@pytest.fixture
def two(registry: Registry, publish: Publish) -> Registry:
    """demo/1 of a round, other/1 from outside."""
    publish(1)
    registry.publish_import(taken_in("other"))
    return registry


def test_the_example_on_the_page_does_what_the_page_says(two: Registry, home: Path) -> None:
    _, _, section = PAGE.partition("\n## Lineage\n")
    (example,) = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    (drawn,) = re.findall(r"```dot\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    names = {"registry": two, "payload": PAYLOAD, "base_sha256": BASE, "NewImport": NewImport, "Parent": Parent}
    exec(example, names)
    assert edges(two, "both") == [("demo/1", "stack", 0.75), ("other/1", "stack", 0.25)]
    assert CliRunner().invoke(app, ["lineage", "both", "--dot", "--home", str(home)]).stdout == drawn
    told = json.loads(CliRunner().invoke(app, ["lineage", "both", "--json", "--home", str(home)]).stdout)
    assert told["versions"][0]["parents"] == [
        {"ref": "demo/1", "kind": "stack", "coefficient": 0.75},
        {"ref": "other/1", "kind": "stack", "coefficient": 0.25},
    ]
    tree = CliRunner().invoke(app, ["lineage", "both", "--home", str(home)]).stdout
    assert "demo/1 stack x 0.75" in tree
    assert "other/1 stack x 0.25" in tree
    described = re.findall(r"^\| `(\w+)` \|", section.split("\n## ")[0], re.MULTILINE)
    assert described == list(get_args(ParentKind))
    assert verify(two).problems == ()


def test_a_round_may_have_more_parents_than_its_clients_trained_on(two: Registry, make_version: Make) -> None:
    parents = [
        Parent(ref="demo@live", kind="parent"),
        Parent(ref="demo/1", kind="forget", coefficient=-0.5),
        Parent(ref="other", kind="merge", coefficient=0.5),
    ]
    two.set_alias("demo", "live", 1)
    two.open_round("run-1", 2, parent="demo/1", cohort=[])
    two.publish_round(replace(make_version(2), parents=parents))
    assert sorted(edges(two, "demo/2")) == [
        ("demo/1", "forget", -0.5),
        ("demo/1", "parent", 1.0),
        ("other/1", "merge", 0.5),
    ]
    assert two.lineage("demo").parents[0].version == two.resolve("demo/1")
    assert verify(two).problems == ()


def test_the_version_that_clients_trained_on_is_not_left_out(two: Registry, make_version: Make) -> None:
    two.open_round("run-1", 2, parent="demo/1", cohort=[])
    with pytest.raises(RegistryError, match="trained on another version than the parents other/1"):
        two.publish_round(replace(make_version(2), parents=[Parent(ref="other/1", kind="merge")]))
    assert two.rounds("run-1", 2)[0].state == "open"
    two.publish_round(make_version(2))
    assert edges(two, "demo/2") == [("demo/1", "parent", 1.0)]


@pytest.mark.parametrize("kind", get_args(ParentKind))
def test_every_kind_can_be_kept(two: Registry, kind: ParentKind) -> None:
    two.publish_import(taken_in("third", Parent(ref="demo/1", kind=kind)))
    assert edges(two, "third") == [("demo/1", kind, 1.0)]


@pytest.mark.parametrize(
    ("parents", "error", "why"),
    [
        ([Parent(ref="nobody/1", kind="merge")], AdapterNotFound, "nobody"),
        ([Parent(ref="third/1", kind="merge")], AdapterNotFound, "third"),
        ([Parent(ref="demo/1", kind="friend")], RegistryError, "of kind parent, round"),  # type: ignore[arg-type]
        ([Parent(ref="demo/1", kind="merge", coefficient=math.nan)], RegistryError, "finite coefficient"),
        ([Parent(ref="demo/1", kind="merge"), Parent(ref="demo", kind="merge")], RegistryError, "demo is named twice"),
    ],
    ids=["unknown", "itself", "kind", "coefficient", "twice"],
)
def test_what_cannot_be_a_parent_is_refused_and_nothing_published(
    two: Registry, parents: list[Parent], error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        two.publish_import(taken_in("third", *parents))
    assert {each.name for each in two.adapters()} == {"demo", "other"}


def test_the_database_knows_the_kinds_too(two: Registry) -> None:
    edge = {"child_id": 2, "parent_id": 1, "kind": "friend", "coefficient": 1.0}
    with pytest.raises(IntegrityError, match="ck_lineage_edge_kind"), writing(two._engine) as connection:
        connection.execute(sa.insert(t.lineage).values(**edge))


def test_a_lineage_reads_what_was_sent_for_its_own_rounds(
    registry: Registry, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first version of a long run, and every export of it, would read all that clients ever sent."""
    for number in (1, 2, 3):
        publish(number)
    read: list[object] = []
    made = submissions.submission

    def note(row: sa.Row[tuple[object, ...]]) -> Submission:
        read.append(row)
        return made(row)

    monkeypatch.setattr(submissions, "submission", note)
    node = registry.lineage("demo/1")
    assert [each.client for each in node.submissions] == ["anna", "bert"]
    assert len(read) == 2
    assert [each.version for each in registry.lineage("demo/2").parents[0].submissions] == ["demo/1", "demo/1"]


@given(st.text())
def test_whatever_a_metric_is_called_the_graph_stays_one_graph(key: str) -> None:
    """Every quoted text ends where it was meant to, and none begins a line of its own."""
    graph = dot(LineageNode(version=version_with(key), kind="", coefficient=1.0, parents=[], submissions=[]))
    lines = graph.split("\n")
    assert len(lines) == 5
    text = r'"(?:[^"\\]|\\.)*"'
    assert re.fullmatch(rf"    {text} \[label={text}\];", lines[3])


def version_with(key: str) -> Version:
    return Version(
        id=1,
        adapter="demo",
        number=1,
        sha256="a" * 64,
        bytes=1,
        base_sha256=BASE,
        base_model="tiny",
        rank=2,
        kind="round",
        exactness="exact",
        retained_energy=1.0,
        run_id=None,
        round_number=None,
        recipe={},
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        metrics={key: 0.5},
        tags={},
        aliases=(),
    )
