"""The language: what it means, and the one error that everything else ends in."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pomona.errors import ConfigError
from pomona.storage import filters
from pomona.storage.filters import Comparison, Field, Junction, Negation, Ranking, Value, parse_filter, parse_order

PIECES = "name rank metrics.acc tags.`a` AND OR NOT LIKE IN ( ) ' '' ` . , = != < 1 -2e3 DESC \\ % ; -- \x00 \ud800 字"


def comparison(text: str) -> Comparison:
    found = parse_filter(text)
    assert isinstance(found, Comparison)
    return found


def caught(text: str, *, order: bool = False) -> ConfigError:
    parse = parse_order if order else parse_filter
    with pytest.raises(ConfigError) as error:
        parse(text)
    return error.value


def test_and_binds_closer_than_or_and_not_closest() -> None:
    found = parse_filter("rank = 1 OR NOT rank = 2 AND rank = 3")
    assert isinstance(found, Junction)
    assert (found.kind, len(found.of)) == ("any", 2)
    both = found.of[1]
    assert isinstance(both, Junction)
    assert (both.kind, [type(item) for item in both.of]) == ("all", [Negation, Comparison])


def test_parentheses_bind_closest() -> None:
    found = parse_filter("((rank = 1) OR rank = 2) AND rank = 3")
    assert isinstance(found, Junction)
    assert (found.kind, len(found.of)) == ("all", 2)


@pytest.mark.parametrize("text", ["", "  ", "\n\t"])
def test_an_empty_filter_says_nothing(text: str) -> None:
    assert parse_filter(text) is None
    assert parse_order(text) == []


@pytest.mark.parametrize(
    ("text", "name", "key"),
    [
        ("rank = 1", "rank", None),
        ("Rank=1", "rank", None),
        ("metrics.accuracy = 1", "metrics", "accuracy"),
        ("metrics.val.accuracy = 1", "metrics", "val.accuracy"),
        ("metrics.`val/top-1` = 1", "metrics", "val/top-1"),
        ("tags.`a``b` = 'x'", "tags", "a`b"),
        ("tags.not = 'x'", "tags", "not"),
        ("tags.in IN ('x')", "tags", "in"),
        ("android = 1", "android", None),
    ],
)
def test_a_field_has_a_name_and_perhaps_a_key(text: str, name: str, key: str | None) -> None:
    assert comparison(text).field == Field(name, key, 0)


def test_values_are_strings_and_numbers() -> None:
    found = comparison("name in ('it''s', '', 12, -1.5e3, '--')")
    assert found.operator == "IN"
    assert [(item.text, item.is_string) for item in found.values] == [
        ("it's", True),
        ("", True),
        ("12", False),
        ("-1.5e3", False),
        ("--", True),
    ]


@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=200))
def test_a_quoted_string_is_read_back(text: str) -> None:
    quoted = "'" + text.replace("'", "''") + "'"
    assert comparison(f"name = {quoted}").values == (Value(text, is_string=True, position=7),)


def test_an_order_names_fields_and_directions() -> None:
    assert parse_order("metrics.accuracy DESC, created_at, name asc") == [
        Ranking(Field("metrics", "accuracy", 0), descending=True),
        Ranking(Field("created_at", None, 23), descending=False),
        Ranking(Field("name", None, 35), descending=False),
    ]


@pytest.mark.parametrize(
    ("text", "position", "expected"),
    [
        ("name LKE 'x'", 6, "expected =, !=, <, <=, >, >=, LIKE, ILIKE or IN, got 'LKE'"),
        ("name = champion", 8, "expected a string in single quotes or a number, got 'champion'"),
        ('name = "x"', 8, "got '\"'; strings stand in single quotes"),
        ("name = 'x", 8, "got a ' that is never closed"),
        ("tags.`x = 'x'", 6, "got a ` that is never closed"),
        ("metrics. = 1", 10, "expected a key, in backticks if it is no plain word, got '='"),
        ("name = 'x' name", 12, "expected AND, OR or the end, got 'name'"),
        ("(name = 'x'", 12, "expected ), got the end"),
        ("name =", 7, "expected a string in single quotes or a number, got the end"),
        ("rank == 4", 7, "expected a string in single quotes or a number, got '='"),
        ("name IN ()", 10, "expected a string in single quotes or a number, got ')'"),
        ("name IN 'x'", 9, "expected (, got"),
        (")", 1, "expected a field, NOT, ( or the end, got ')'"),
        ("rank = 1 AND", 13, "expected a field, NOT or (, got the end"),
        ("name = 'x';", 11, "expected AND, OR or the end, got ';'"),
        ("name LIKE 'x' -- y", 15, "got '-'"),
        ("name = 'x\x00'", 10, "expected a character that can be stored, got U+0000"),
        ("name = '\ud800'", 9, "got U+D800"),
    ],
)
def test_an_error_says_where_and_what_was_expected(text: str, position: int, expected: str) -> None:
    error = caught(text)
    assert f"the filter cannot be used, at character {position}: " in str(error)
    assert expected in str(error)


def test_an_order_has_errors_of_its_own() -> None:
    assert "the order cannot be used, at character 6: expected" in str(caught("name UP", order=True))
    assert "at most 8 fields" in str(caught(", ".join(["name"] * 9), order=True))


def test_a_caret_points_at_it() -> None:
    (note,) = caught("name LKE 'x'").__notes__
    assert note == "name LKE 'x'\n     ^"


def test_the_caret_stands_right_in_a_long_text_and_after_wide_letters() -> None:
    (note,) = caught("rank = 1 OR " * 50 + "name LKE 'x'" + " OR rank = 1" * 10).__notes__
    line, caret = note.split("\n")
    assert line[caret.index("^") :].startswith("LKE")
    assert len(line) <= 60
    (note,) = caught("name = '字字' x").__notes__
    assert note.split("\n")[1] == " " * 14 + "^"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x" * 4001, "at most 4000 characters, got 4001"),
        (" OR ".join(["rank = 1"] * 65), "at most 64 comparisons, got 65"),
        (f"rank IN ({','.join('1' * 501)})", "at most 500 values, got 501"),
        ("NOT " * 30 + "rank = 1", "at most 20 levels"),
        ("(rank = 1 AND (rank = 2 OR " * 15 + "rank = 1" + "))" * 15, "at most 20 levels"),
    ],
    ids=["length", "comparisons", "values", "nots", "levels"],
)
def test_what_is_too_much_is_refused(text: str, expected: str) -> None:
    assert expected in str(caught(text))


def test_parentheses_alone_cost_no_depth() -> None:
    assert isinstance(parse_filter("(" * 1900 + "rank = 1" + ")" * 1900), Comparison)
    assert "expected" in str(caught("(" * 4000))


@settings(deadline=None)
@given(
    st.one_of(
        st.text(st.characters(), max_size=80), st.lists(st.sampled_from(PIECES.split(" ")), max_size=30).map(" ".join)
    )
)
def test_any_text_is_read_or_refused_with_the_one_error(text: str) -> None:
    for parse in (parse_filter, parse_order):
        error = refused(parse, text)
        if error is not None:
            (note,) = error.__notes__
            line, caret = note.split("\n")
            assert (line.isprintable(), caret.strip(), "\n" in str(error)) == (True, "^", False)


def refused(parse: Callable[[str], object], text: str) -> ConfigError | None:
    try:
        parse(text)
    except ConfigError as error:
        return error
    return None


def test_every_terminal_has_a_word_for_people() -> None:
    unnamed = {terminal.name for terminal in filters._parser().terminals} - filters._WORDS.keys()
    assert {name for name in unnamed if not name.startswith("__IGNORE")} == {"_DOT"}
