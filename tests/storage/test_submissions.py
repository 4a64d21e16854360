"""A group of updates: recorded as one by one would be, in no more statements, and without reading what others sent."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError
from tests.storage.conftest import BASE

from pomona.errors import VersionConflict
from pomona.storage import submissions
from pomona.storage import tables as t
from pomona.storage.records import NewSubmission, NewVersion, Submission
from pomona.storage.registry import Registry

_RUNS = count()


def _update(run_id: str, client: str, number: int, nonce: str, payload: bytes, status: str) -> NewSubmission:
    return NewSubmission(
        run_id=run_id,
        round_number=number,
        client=client,
        rank=4,
        alpha=8.0,
        num_examples=10,
        nonce=nonce,
        status=status,  # type: ignore[arg-type]
        payload=payload,
        spectrum={"norm": 0.1},
    )


updates = st.tuples(
    st.sampled_from(["anna", "bert", "carl"]),
    st.sampled_from([1, 2, 3, 9]),  # open, open, failed, none
    st.sampled_from(["n1", "n2", "n3"]),
    st.sampled_from([b"x", b"y"]),
    st.sampled_from(["accepted", "accepted", "rejected", "late"]),
)


def _three_rounds(registry: Registry) -> str:
    run_id = f"group-{next(_RUNS)}"
    registry.start_run(run_id=run_id, adapter="demo", base_sha256=BASE, settings_json="{}")
    for number in (1, 2, 3):
        registry.open_round(run_id, number, parent=None, cohort=[])
    registry.fail_round(run_id, 3, "nobody answered")
    return run_id


def _facts(answer: object) -> object:
    if isinstance(answer, Submission):
        return answer.client, answer.round_number, answer.nonce, answer.sha256, answer.status, answer.spectrum
    return type(answer)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(updates, max_size=12), st.lists(updates, max_size=3))
def test_a_group_is_recorded_as_round_after_round_one_by_one(
    registry: Registry, group: list[tuple[str, int, str, bytes, str]], before: list[tuple[str, int, str, bytes, str]]
) -> None:
    together, alone = _three_rounds(registry), _three_rounds(registry)
    for run_id in (together, alone):
        for each in before:
            registry.record_submissions([_update(run_id, *each)])
    answers = registry.record_submissions([_update(together, *each) for each in group])
    order = sorted(range(len(group)), key=lambda place: group[place][1])
    expected = {place: registry.record_submissions([_update(alone, *group[place])])[0] for place in order}
    assert list(map(_facts, answers)) == [_facts(expected[place]) for place in range(len(group))]
    assert list(map(_facts, registry.submissions(together))) == list(map(_facts, registry.submissions(alone)))
    same = [answers.index(each) for each in answers if isinstance(each, Submission)]
    assert same == [
        [_facts(one) for one in answers].index(_facts(each)) for each in answers if isinstance(each, Submission)
    ], "the same update has one receipt"
    assert registry.broken_audit() == []


@contextmanager
def statements(registry: Registry) -> Iterator[list[str]]:
    seen: list[str] = []

    def note(_c: object, _cursor: object, statement: str, *_others: object) -> None:
        seen.append(statement)

    event.listen(registry._engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(registry._engine, "before_cursor_execute", note)


def test_a_group_takes_as_many_statements_as_one_update(registry: Registry, backend: str) -> None:
    """Each would be a journey to the database: a hundred of them would take longer than the disk."""
    registry.open_round("run-1", 1, parent=None, cohort=[])
    taken = {}
    for size in (1, 16):
        new = [_update("run-1", f"c{size}-{i}", 1, f"n{size}-{i}", b"x", "accepted") for i in range(size)]
        with statements(registry) as seen:
            registry.record_submissions(new)
        taken[size] = len(seen)
    inserts = 15 if backend == "sqlite" else 0  # SQLite returns keys in order one by one, and is no journey away
    assert taken[16] == taken[1] + inserts, taken


def test_a_nonce_is_looked_for_by_an_index(registry: Registry, backend: str) -> None:
    """A run of 2,000 rounds of 100 clients would be read through for every update."""
    if backend == "postgresql":
        registry.open_round("run-1", 1, parent=None, cohort=[])
        for i in range(3):
            registry.record_submissions(
                [_update("run-1", f"c{i}-{j}", 1, f"n{i}-{j}", b"x", "accepted") for j in range(300)]
            )
    dialect = registry._engine.dialect
    query = submissions._USED_NONCES.params(in_run="run-1", of_nonces=["n1-1", "n1-2"])
    compiled = query.compile(dialect=dialect, compile_kwargs={"literal_binds": True})
    explain = "EXPLAIN QUERY PLAN " if backend == "sqlite" else "EXPLAIN "
    with registry._engine.connect() as connection:
        if backend == "postgresql":
            connection.exec_driver_sql("SET enable_seqscan = off")
        plan = " ".join(str(tuple(row)) for row in connection.exec_driver_sql(explain + str(compiled)))
    assert "uq_submission_nonce" in plan, plan


def test_what_is_in_quarantine_does_not_come_back_under_its_nonce(
    registry: Registry, make_version: Callable[..., NewVersion]
) -> None:
    """It was taken in once; a client that a defence set aside could send it until it counts."""
    registry.open_round("run-1", 1, parent=None, cohort=["anna", "bert"])
    for client in ("anna", "bert"):
        registry.record_submission(_update("run-1", client, 1, f"of-{client}", b"x", "accepted"))
    registry.publish_round(make_version(weights={"anna": 1.0}, quarantined={"bert": "far from all others"}))
    registry.open_round("run-1", 2, parent="demo/1", cohort=["anna", "bert"])
    with pytest.raises(VersionConflict, match="nonce of 'bert'"):
        registry.record_submission(_update("run-1", "bert", 2, "of-bert", b"y", "accepted"))
    with registry._engine.begin() as connection, pytest.raises(IntegrityError):
        connection.execute(
            sa.insert(t.submission),
            submissions._row(_update("run-1", "bert", 2, "of-bert", b"y", "accepted"), "0" * 64),
        )
