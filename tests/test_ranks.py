"""Which rank each layer has, where layers differ."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomona.errors import ConfigError
from pomona.ranks import check_pattern, fits, layer_rank
from pomona.run_file import parse_settings
from pomona.settings import RunSettings, TrainingSettings

QUERY = "encoder.layer.0.attention.self.query"
OUTPUT = "encoder.layer.0.attention.output.dense"
DENSE = "encoder.layer.0.intermediate.dense"
LAYERS = (QUERY, OUTPUT, DENSE)


def test_without_a_pattern_every_layer_has_the_rank_of_its_client() -> None:
    assert [layer_rank((), name, 7) for name in LAYERS] == [7, 7, 7]


@pytest.mark.parametrize("turned", [False, True])
def test_the_longest_name_that_fits_counts(*, turned: bool) -> None:
    """Not the first, nor the largest factor: a general entry would undo a special one."""
    pattern = (("dense", 4.0), ("output.dense", 0.5), ("query", 2.0))
    ranks = [layer_rank(pattern[::-1] if turned else pattern, name, 8) for name in LAYERS]
    assert ranks == [16, 4, 32]


@pytest.mark.parametrize(
    ("name", "module", "expected"),
    [
        ("query", QUERY, True),
        ("self.query", QUERY, True),
        (QUERY, QUERY, True),
        ("uery", QUERY, False),
        ("self", QUERY, False),
        ("elf.query", QUERY, False),
        (f"bert.{QUERY}", QUERY, False),
        ("", QUERY, False),
    ],
)
def test_a_name_fits_whole_parts_at_the_end(name: str, module: str, *, expected: bool) -> None:
    assert fits(name, module) is expected


@given(st.floats(1e-6, 16.0), st.integers(1, 4096))
def test_a_rank_is_the_nearest_to_its_share_and_at_least_one(factor: float, rank: int) -> None:
    found = layer_rank((("query", factor),), QUERY, rank)
    assert found >= 1
    assert found == 1 or abs(found - factor * rank) <= 0.5


@given(st.floats(1e-6, 16.0), st.integers(1, 4095))
def test_a_larger_client_has_no_smaller_layer(factor: float, rank: int) -> None:
    """Nested subspaces, and the part that is taken over from the global adapter, rely on it."""
    pattern = (("query", factor),)
    assert layer_rank(pattern, QUERY, rank) <= layer_rank(pattern, QUERY, rank + 1)


def test_a_name_that_fits_no_layer_is_refused() -> None:
    """A misspelt name would leave its layers at the full rank, in silence."""
    check_pattern((("query", 0.5), ("output.dense", 2.0)), LAYERS)
    check_pattern((), LAYERS)
    with pytest.raises(ConfigError) as refused:
        check_pattern((("query", 0.5), ("qurey", 2.0)), LAYERS)
    assert str(refused.value) == (
        "training.rank_pattern names 'qurey', which no adapted layer ends with; they end with dense, query"
    )


def test_a_table_of_the_run_file_is_a_pattern() -> None:
    text = 'name = "a"\n[training.rank_pattern]\n"output.dense" = 2\nquery = 0.5\n'
    training = parse_settings(text, source="run.toml").training
    assert training.rank_pattern == (("output.dense", 2.0), ("query", 0.5))
    assert [training.layer_rank(name, 8) for name in LAYERS] == [4, 16, 8]


def test_a_pattern_travels_as_json_and_can_be_hashed() -> None:
    """Clients get their settings as JSON; models are cached by what was asked."""
    training = TrainingSettings.model_validate({"rank_pattern": {"query": 0.5, "dense": 2.0}})
    again = TrainingSettings.model_validate_json(training.model_dump_json())
    assert again == training
    assert hash(again) == hash(training)
    run = RunSettings(name="a", training=training)
    assert RunSettings.model_validate_json(run.model_dump_json()) == run


def test_the_order_of_a_table_does_not_matter() -> None:
    one, other = (
        TrainingSettings.model_validate({"rank_pattern": dict(pairs)})
        for pairs in ([("query", 0.5), ("dense", 2.0)], [("dense", 2.0), ("query", 0.5)])
    )
    assert one == other
