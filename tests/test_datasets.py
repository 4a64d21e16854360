"""What is read is what the file says, and every bad file is refused with its place and its fault."""

import csv
import io
import json
import os
import pickle
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pomona.datasets import (
    MAX_LINE_BYTES,
    Dataset,
    Example,
    Split,
    Task,
    check_labels,
    class_names,
    load_dataset,
    split_of,
)
from pomona.errors import DataError

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_csv_file_keeps_its_order_its_columns_and_what_is_quoted(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'user,text,label\nann,"one, ""two""\nthree",x\n\n,four,y\n')
    dataset = load_dataset(path, split=None)
    assert list(dataset) == [Example('one, "two"\nthree', "x"), Example("four", "y")]
    assert dataset.columns == {"user": ("ann", ""), "label": ("x", "y")}
    assert dataset.source == str(path)


def test_a_jsonl_file_reads_like_the_csv_file(tmp_path: Path) -> None:
    rows = [
        '{"text": "one", "label": 7, "user": 12}',
        "",
        '{"label": "y", "text": "zwei ß", "site": null, "split": "test"}',
    ]
    dataset = load_dataset(write(tmp_path, "a.JSONL", "\n".join(rows)), split=None)
    assert list(dataset) == [Example("one", "7"), Example("zwei ß", "y")]
    assert dataset.columns == {"label": ("7", "y"), "user": ("12", ""), "site": ("", "")}


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path, name: str) -> None:
    content = "text,label\none,x\n" if name == "a.csv" else '{"text": "one", "label": "x"}\n'
    dataset = load_dataset(write(tmp_path, name, b"\xef\xbb\xbf" + content.encode()), split=None)
    assert list(dataset) == [Example("one", "x")]


def test_carriage_returns_end_lines_too(tmp_path: Path) -> None:
    dataset = load_dataset(write(tmp_path, "a.csv", "text,label\r\none,x\r\ntwo,y\r\n"), split=None)
    assert list(dataset) == [Example("one", "x"), Example("two", "y")]


def test_causal_lm_needs_no_labels(tmp_path: Path) -> None:
    dataset = load_dataset(write(tmp_path, "a.csv", "text\none\n"), split=None, task="causal-lm")
    assert list(dataset) == [Example("one", "")]
    assert dataset.columns == {}


def test_causal_lm_keeps_labels_as_a_column_only() -> None:
    dataset = load_dataset("wordnet-nouns", split="test", task="causal-lm")
    assert set(dataset.labels) == {""}
    assert len(set(dataset.columns["label"])) == 24


def test_the_split_column_of_a_file_decides(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "text,label,split\none,x,test\ntwo,y,train\nthree,z,validation\n")
    assert [load_dataset(path, split=split).texts for split in SPLITS] == [("two",), ("three",), ("one",)]
    assert len(load_dataset(path, split=None)) == 3


def test_without_a_split_column_the_text_decides(tmp_path: Path) -> None:
    texts = [f"text number {i}" for i in range(200)]
    path = write(tmp_path, "a.csv", "text,label\n" + "".join(f"{text},x\n" for text in texts))
    for seed in (0, 1):
        parts = [load_dataset(path, split=split, seed=seed) for split in SPLITS]
        for split, part in zip(SPLITS, parts, strict=True):
            assert part.texts == tuple(text for text in texts if split_of(text, seed=seed) == split)
        assert sum(map(len, parts)) == 200
    assert load_dataset(path, split="test").texts != load_dataset(path, split="test", seed=1).texts


def test_the_split_of_a_text_has_the_promised_shares() -> None:
    counts = Counter(split_of(f"text number {i}") for i in range(20_000))
    for split, share in zip(SPLITS, (0.7, 0.15, 0.15), strict=True):
        assert counts[split] / 20_000 == pytest.approx(share, abs=0.01)  # four standard deviations


def test_the_split_of_a_text_never_changes() -> None:
    assert [split_of(text) for text in ("a", "b", "c", "d", "e", "f", "g", "ß")] == [
        "train",
        "train",
        "train",
        "train",
        "train",
        "validation",
        "train",
        "test",
    ]


printable = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), min_size=1).filter(str.strip)
names = printable.filter(lambda label: "\0" not in label)


@given(st.lists(st.tuples(printable, names, printable), min_size=1, max_size=8))
@settings(deadline=None)
def test_whatever_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str]]
) -> None:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([("text", "label", "user"), *rows])
    folder = tmp_path_factory.mktemp("written")
    lines = [json.dumps({"text": text, "label": label, "user": user}) for text, label, user in rows]
    for path in (write(folder, "a.csv", buffer.getvalue()), write(folder, "a.jsonl", "\n".join(lines))):
        dataset = load_dataset(path, split=None)
        expected = [(text, label.strip(), user) for text, label, user in rows]
        assert list(zip(dataset.texts, dataset.labels, dataset.columns["user"], strict=True)) == expected


def test_white_space_around_a_label_makes_no_class_of_its_own(tmp_path: Path) -> None:
    for name, content in {
        "a.csv": "text,label\none, food\ntwo,food\t\nthree,food\u00a0\nfour,sea food\n",
        "a.jsonl": "\n".join(
            json.dumps({"text": "one", "label": label}) for label in (" food", "food\n", "food\u2003", "sea food")
        ),
    }.items():
        dataset = load_dataset(write(tmp_path, name, content), split=None)
        assert dataset.labels == dataset.columns["label"] == ("food", "food", "food", "sea food")


def test_a_field_may_be_longer_than_the_csv_module_likes_and_its_limit_stays(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    text = "a" * (before + 1)
    assert load_dataset(write(tmp_path, "a.csv", f"text,label\n{text},x\n"), split=None).texts == (text,)
    assert csv.field_size_limit() == before


def test_a_subset_takes_every_column_along() -> None:
    dataset = Dataset(("one", "two", "three"), ("x", "y", "z"), {"user": ("a", "b", "c")}, "here")
    assert dataset.subset([2, 0]) == Dataset(("three", "one"), ("z", "x"), {"user": ("c", "a")}, "here")
    assert len(dataset.subset([])) == 0
    with pytest.raises(IndexError):
        dataset.subset([3])


def test_a_dataset_can_be_sent_to_another_process() -> None:
    dataset = Dataset(("one",), ("x",), {"user": ("a",)}, "here")
    assert pickle.loads(pickle.dumps(dataset)) == dataset


def test_columns_of_unequal_length_are_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match=re.escape("expected columns of one length, got the lengths [1, 2]")):
        Dataset(("one",), ("x", "y"), {}, "here")


def test_class_names_are_distinct_and_sorted() -> None:
    assert class_names(Dataset(("1", "2", "3"), ("b", "a", "b"), {}, "here")) == ("a", "b")


def test_an_unknown_label_is_named_with_its_place_and_the_closest_one() -> None:
    dataset = Dataset(("1", "2", "3"), ("plant", "animl", "oops"), {}, "notes.csv")
    known = ["plant", "animal", *(f"class {i}" for i in range(120))]
    with pytest.raises(DataError) as caught:
        check_labels(dataset, known)
    message = str(caught.value)
    assert message.startswith(
        "notes.csv: unknown label 'animl' at example 2 of 3 (did you mean 'animal'?); "
        "known labels: 'plant', 'animal', 'class 0'"
    )
    assert message.endswith("'class 97', ... (122 in all)")
    check_labels(dataset, [*known, "animl", "oops"])


HEADER = "text,label\n"
LONG = "a" * MAX_LINE_BYTES
BAD_CSV = {
    "empty file": ("", "a.csv is empty: expected at least one row"),
    "header alone": (HEADER, "a.csv is empty: expected at least one row"),
    "no label": (
        "text,lable\none,x\n",
        "a.csv line 1: expected the columns text and label, got 'text', 'lable'",
    ),
    "no text": ("body,label\n", "a.csv line 1: expected the columns text and label, got 'body', 'label'"),
    "column twice": (
        "text,label,label\n",
        "a.csv line 1: expected distinct columns, got 'text', 'label', 'label'",
    ),
    "too few fields": (HEADER + "one,x\ntwo\n", "a.csv line 3: expected 2 fields ('text', 'label'), got 1"),
    "too many fields": (
        HEADER + '"a\nb",x\none, two,x\n',
        "a.csv line 4: expected 2 fields ('text', 'label'), got 3",
    ),
    "open quote": (HEADER + 'one,x\n"two,y\n', "a.csv line 3 is not CSV: unexpected end of data"),
    "text after a quote": (HEADER + '"one"two,x\n', "a.csv line 2 is not CSV"),
    "empty text": (HEADER + " ,x\n", "a.csv line 2: the text is empty"),
    "empty label": (HEADER + "one,x\ntwo,\n", "a.csv line 3: the label is empty"),
    "blank label": (HEADER + "one,x\ntwo,\u00a0 \n", "a.csv line 3: the label is empty"),
    "latin 1": (b"text,label\nna\xefve,x\n", "a.csv line 2 is not UTF-8 at byte 2"),
    "utf-16": (HEADER.encode("utf-16"), "a.csv line 1 is not UTF-8 at byte 0"),
    "unknown split": (
        "text,label,split\none,x,dev\n",
        "a.csv line 2: expected a split out of train, validation, test, got 'dev'",
    ),
    "long line": (HEADER + f"{LONG},x\n", f"a.csv line 2 is longer than {MAX_LINE_BYTES} bytes"),
    "long field": (
        HEADER + '"' + f"{LONG[2:]}\n" * 2 + '",x\n',
        "a.csv line 2 is not CSV: field larger than",
    ),
}
BAD_JSONL = {
    "empty file": ("\n", "a.jsonl is empty: expected at least one row"),
    "no json": (
        '{"text": "one", "label": "x"}\n{"text"\n',
        "a.jsonl line 2 is not JSON: Expecting ':' delimiter at character 8",
    ),
    "no object": ('["one", "x"]\n', "a.jsonl line 1: expected a JSON object, got list"),
    "key twice": (
        '{"text": "one", "text": "two", "label": "x"}',
        "a.jsonl line 1 is not JSON: the key 'text' comes twice",
    ),
    "no label": ('{"text": "one"}', "a.jsonl line 1: expected the columns text and label, got 'text'"),
    "text is a number": ('{"text": 1, "label": "x"}', "a.jsonl line 1: expected a string as text, got int"),
    "label is a boolean": (
        '{"text": "one", "label": true}',
        "a.jsonl line 1: expected a string as label, got bool",
    ),
    "label is null": (
        '{"text": "one", "label": null}',
        "a.jsonl line 1: expected a string as label, got NoneType",
    ),
    "split is null": (
        '{"text": "one", "label": "x", "split": null}',
        "a.jsonl line 1: expected a split out of train, validation, test, got None",
    ),
    "half a pair": (
        '{"text": "\\ud83d", "label": "x"}',
        "a.jsonl line 1: the text holds half a surrogate pair",
    ),
    "nul in a label": ('{"text": "a\\u0000b", "label": "x\\u0000"}', "a.jsonl line 1: the label holds a NUL character"),
    "deep nesting": ("[" * 200_000, "a.jsonl line 1 is not JSON"),
    "long line": (f'{{"text": "{LONG}"}}', f"a.jsonl line 1 is longer than {MAX_LINE_BYTES} bytes"),
}


@pytest.mark.parametrize(("content", "message"), BAD_CSV.values(), ids=BAD_CSV)
def test_a_bad_csv_file_is_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = write(tmp_path, "a.csv", content)
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}/{message}")):
        load_dataset(path, split=None)


@pytest.mark.parametrize(("content", "message"), BAD_JSONL.values(), ids=BAD_JSONL)
def test_a_bad_jsonl_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = write(tmp_path, "a.jsonl", content)
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}/{message}")):
        load_dataset(path, split=None)


def test_causal_lm_names_the_one_column_it_needs(tmp_path: Path) -> None:
    task: Task = "causal-lm"
    with pytest.raises(DataError, match="line 1: expected the columns text, got 'body'"):
        load_dataset(write(tmp_path, "a.csv", "body\none\n"), split=None, task=task)


def test_a_split_without_examples_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "text,label,split\none,x,train\n")
    with pytest.raises(DataError, match=r"a\.csv has 1 rows but none in split 'test'"):
        load_dataset(path, split="test")


@pytest.mark.parametrize("name", ["gone.csv", "file.csv/below.csv"])
def test_a_missing_file_is_named_with_what_there_could_be(tmp_path: Path, name: str) -> None:
    write(tmp_path, "file.csv", HEADER)
    with pytest.raises(DataError, match=r"no data file '.*'; expected wordnet-nouns or a \.csv or \.jsonl file"):
        load_dataset(tmp_path / name, split=None)


def test_a_misspelt_name_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"ends in \.csv or \.jsonl, got 'wordnet-noun'"):
        load_dataset("wordnet-noun", split=None)


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a directory or a pipe; name one \.csv or \.jsonl file"):
        load_dataset(tmp_path, split=None)


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.csv")
    with pytest.raises(DataError, match="is a directory or a pipe"):
        load_dataset(tmp_path / "a.csv", split=None)


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ends in \.csv or \.jsonl, got '.*a\.parquet'"):
        load_dataset(write(tmp_path, "a.parquet", "PAR1"), split=None)


def test_an_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    path = write(tmp_path, "a.csv", HEADER)
    monkeypatch.setattr(Path, "open", refuse)  # file modes do not stop root
    with pytest.raises(DataError, match=r"cannot read the data file .*a\.csv: .*Permission denied"):
        load_dataset(path, split=None)


def test_a_name_too_long_for_the_file_system_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the data file"):
        load_dataset(tmp_path / ("a" * 300 + ".csv"), split=None)


def test_no_message_quotes_a_text(tmp_path: Path) -> None:
    for name, row in {"a.csv": "secret,secret,secret", "b.csv": '"secret', "c.csv": "secret,"}.items():
        with pytest.raises(DataError) as caught:
            load_dataset(write(tmp_path, name, f"{HEADER}{row}\n"), split=None)
        assert "secret" not in str(caught.value)
    with pytest.raises(DataError) as caught:
        load_dataset(write(tmp_path, "d.jsonl", '{"text": "secret", "label": secret}'), split=None)
    assert "secret" not in str(caught.value)
