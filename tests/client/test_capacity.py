"""A rank by what the machine has: the arithmetic, and one real measurement."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomona.batches import Encoded
from pomona.client import capacity
from pomona.client.capacity import Budget, choose_rank, rank_for_memory, rank_for_time, steps_of
from pomona.errors import ConfigError
from pomona.lora_model import AdaptedModel
from pomona.settings import TrainingSettings

TRAINING = TrainingSettings(batch_size=4, max_steps=10)


@pytest.fixture(scope="module")
def model(tiny_bert: Path) -> AdaptedModel:
    return AdaptedModel(tiny_bert, task="classification", labels=("a", "b"))


@pytest.fixture
def data(model: AdaptedModel) -> Encoded:
    return model.encode(["a b", "c d"] * 8, ["a", "b"] * 8, max_length=8)


def bytes_for(model: AdaptedModel, rank: int) -> int:
    return 20 * rank * sum(out + in_ for out, in_ in model.manifest.layers.values())


def test_without_a_limit_the_run_decides(model: AdaptedModel, data: Encoded) -> None:
    chosen = choose_rank(model, data, training=TRAINING, min_rank=1, max_rank=12, budget=Budget())
    assert chosen.rank == 12
    assert "no rank above 12" in chosen.reason


def test_memory_decides_where_it_is_short(model: AdaptedModel, data: Encoded) -> None:
    chosen = choose_rank(
        model, data, training=TRAINING, min_rank=1, max_rank=64, budget=Budget(memory_share=0.25),
        free_bytes=lambda: 4 * bytes_for(model, 7) + 3,
    )  # fmt: skip
    assert chosen.rank == 7
    assert "25% of that" in chosen.reason


@given(free=st.integers(0, 2**40), out=st.integers(1, 10**4), in_=st.integers(1, 10**4))
def test_the_rank_fits_and_the_next_would_not(free: int, out: int, in_: int) -> None:
    rank = rank_for_memory({"x": (out, in_)}, free_bytes=free)
    assert 20 * rank * (out + in_) <= free
    assert rank == 4096 or free < 20 * (rank + 1) * (out + in_)


def test_layers_of_other_ranks_take_other_memory() -> None:
    training = TrainingSettings.model_validate({"rank_pattern": {"x": 2.0}})
    assert rank_for_memory({"x": (30, 20)}, free_bytes=8000, training=training) == 4
    assert rank_for_memory({"x": (30, 20)}, free_bytes=8000) == 8


@given(first=st.floats(0.001, 100), more=st.floats(0, 100), rank=st.integers(2, 500), seconds=st.floats(0.001, 300))
def test_the_line_is_kept_to(first: float, more: float, rank: int, seconds: float) -> None:
    found = rank_for_time(seconds=seconds, at_rank_1=first, at_rank=(rank, first + more))
    assert 0 <= found <= rank
    if found:
        assert first + (found - 1) * more / (rank - 1) <= seconds * (1 + 1e-9) + 1e-9
    if found < rank:
        assert first + found * more / (rank - 1) > seconds * (1 - 1e-9) - 1e-9


def test_time_decides_where_it_is_short(model: AdaptedModel, data: Encoded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps of 0.1 s, and 0.01 s more for each rank above 1: 1.161 s allow rank 20."""
    monkeypatch.setattr(capacity, "_step_s", lambda _m, _d, _t, rank: 0.1 + 0.01 * (rank - 1))
    chosen = choose_rank(model, data, training=TRAINING, min_rank=1, max_rank=64, budget=Budget(round_s=1.161))
    assert chosen.rank == 20
    assert "a round of 4 steps takes 0.4 s at rank 1" in chosen.reason


def test_what_no_rank_fits_says_so(model: AdaptedModel, data: Encoded) -> None:
    with pytest.raises(ConfigError, match=r"can train rank 3, the run needs at least 4: .* GB are free"):
        choose_rank(
            model, data, training=TRAINING, min_rank=4, max_rank=8, budget=Budget(memory_share=1.0),
            free_bytes=lambda: bytes_for(model, 3),
        )  # fmt: skip


def test_a_real_measurement_tells_a_long_round_from_a_short_one(model: AdaptedModel, data: Encoded) -> None:
    long = TRAINING.model_copy(update={"local_epochs": 1000, "max_steps": 0})
    generous = choose_rank(model, data, training=long, min_rank=1, max_rank=4, budget=Budget(round_s=1e6))
    assert generous.rank == 4
    with pytest.raises(ConfigError, match=r"can train rank 0, .* a round of 4000 steps takes .* may take 0.001 s"):
        choose_rank(model, data, training=long, min_rank=1, max_rank=4, budget=Budget(round_s=1e-3))


def test_steps_are_those_that_training_takes() -> None:
    assert steps_of(TrainingSettings(batch_size=4, local_epochs=2), 9) == 6
    assert steps_of(TrainingSettings(batch_size=4, local_epochs=2, max_steps=5), 9) == 5
