"""What files are cut into, and every way in which they do not fit what was learned before."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from pomona.coordinator.streams import Past, check_stream, load_stream
from pomona.errors import ConfigError, DataError, PomonaError


def write(path: Path, labels: Sequence[str], *, tasks: Sequence[object] = ()) -> str:
    rows = [{"text": f"{path.stem} {i}", "label": label} for i, label in enumerate(labels)]
    for row, task in zip(rows, tasks, strict=bool(tasks)):
        row["task"] = task  # type: ignore[assignment]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def train(tmp_path: Path) -> str:
    return write(tmp_path / "train.jsonl", "abcdabcd")


@pytest.fixture
def test(tmp_path: Path) -> str:
    return write(tmp_path / "test.jsonl", "abcd")


def test_classes_come_in_an_order_drawn_by_seed(train: str, test: str) -> None:
    streams = [load_stream(train, test, classes_per_task=2, seed=seed) for seed in range(6)]
    assert all(sorted("".join(task.classes) for task in stream.tasks) != [] for stream in streams)
    assert len({tuple(task.classes for task in stream.tasks) for stream in streams}) > 1
    assert streams[0].sha256() == load_stream(train, test, classes_per_task=2, seed=0).sha256()
    assert len({stream.sha256() for stream in streams}) > 1
    assert [len(streams[0].train), len(streams[0].test)] == [8, 4]


def test_a_column_says_what_is_learned_together(tmp_path: Path, test: str) -> None:
    numbered = write(tmp_path / "numbered.jsonl", "abcd", tasks=[2, 1, 1, 2])
    found = load_stream(numbered, test, classes_per_task=None, seed=0).tasks
    assert [task.classes for task in found] == [("b", "c"), ("a", "d")]


def test_without_test_file_texts_are_held_out_by_their_hash(tmp_path: Path) -> None:
    path = write(tmp_path / "all.jsonl", "ab" * 100)
    stream = load_stream(path, None, classes_per_task=1, seed=0)
    assert len(stream.train) + len(stream.test) == 200
    assert 10 < len(stream.test) < 60
    assert not set(stream.train.texts) & set(stream.test.texts)
    assert stream.test.texts != load_stream(path, None, classes_per_task=1, seed=1).test.texts


def test_a_file_too_small_to_hold_rows_out_is_told_of_the_test_file(tmp_path: Path) -> None:
    for labels, says in {
        "a": "has 1 rows, and none is held out to score by; add rows or name another file by --test",
        "ab" * 20 + "c": r"has no rows of task . \('c'\) to score it by; add some, or name a file .* by --test",
    }.items():
        path = write(tmp_path / "small.jsonl", labels)
        with pytest.raises(DataError, match=says):
            load_stream(path, None, classes_per_task=1, seed=0)


def test_the_hash_is_of_what_is_learned_not_of_the_file(tmp_path: Path, train: str, test: str) -> None:
    first = load_stream(train, test, classes_per_task=2, seed=0).sha256()
    moved = Path(train).rename(tmp_path / "elsewhere.jsonl")
    assert load_stream(str(moved), test, classes_per_task=2, seed=0).sha256() == first
    moved.write_text(moved.read_text().replace("train 3", "train three"))
    assert load_stream(str(moved), test, classes_per_task=2, seed=0).sha256() != first


@pytest.mark.parametrize(
    ("rows", "tasks", "per_task", "error", "says"),
    [
        ("", (), 2, DataError, "is empty: expected at least one row"),
        ("abcd", (1, 1, 2, 2), 2, ConfigError, "has a column 'task', and --classes-per-task 2 was given"),
        ("abcd", (), None, ConfigError, "expected --classes-per-task, or a column 'task' in"),
        ("aabb", (1, 2, 2, 2), None, DataError, "class 'a' is in the tasks '1' and '2'"),
        ("abe", (), 1, DataError, "has no rows of task . \\('e'\\) to score it by"),
    ],
)
def test_what_is_no_stream_is_refused(
    tmp_path: Path,
    test: str,
    rows: str,
    tasks: Sequence[object],
    per_task: int | None,
    error: type[PomonaError],
    says: str,
) -> None:
    path = write(tmp_path / "rows.jsonl", rows, tasks=tasks)
    with pytest.raises(error, match=says):
        load_stream(path, test, classes_per_task=per_task, seed=0)


@pytest.mark.parametrize(
    ("past", "relearn", "says"),
    [
        (Past(classes=("a", "b", "z"), tasks=2), (), "classes that were learned before: 'a', 'b'; drop their rows"),
        (Past(classes=("z",), forgotten=("c",), tasks=1), (), "'c'; drop their rows.* by --relearn c"),
        (Past(), ("e",), "'e' is to be learned again, but .* has no such class"),
    ],
)
def test_a_stream_that_does_not_fit_the_past_is_refused(
    train: str, test: str, past: Past, relearn: Sequence[str], says: str
) -> None:
    stream = load_stream(train, test, classes_per_task=2, seed=0)
    with pytest.raises(DataError, match=says):
        check_stream(stream, past, relearn=relearn)


def test_what_was_forgotten_may_be_asked_for_again(train: str, test: str) -> None:
    stream = load_stream(train, test, classes_per_task=2, seed=0)
    check_stream(stream, Past(classes=("z",), forgotten=("c",), tasks=1), relearn=["c"])


def test_test_rows_may_be_of_classes_of_the_past_but_of_no_others(tmp_path: Path, train: str) -> None:
    held_out = write(tmp_path / "held out.jsonl", "abcdz")
    stream = load_stream(train, held_out, classes_per_task=2, seed=0)
    check_stream(stream, Past(classes=("y", "z"), tasks=1))
    check_stream(stream, Past(classes=("y",), forgotten=("z",), tasks=1))
    with pytest.raises(DataError, match="unknown label 'z' at example 5"):
        check_stream(stream, Past())


def test_one_class_is_nothing_to_tell_apart(tmp_path: Path) -> None:
    only = write(tmp_path / "only.jsonl", "aaaa")
    stream = load_stream(only, only, classes_per_task=1, seed=0)
    with pytest.raises(DataError, match="has the single class 'a'; expected at least two"):
        check_stream(stream, Past())
    check_stream(stream, Past(classes=("b",), tasks=1))
