"""A version holds what is new in it; a chain of versions gives back every state, bit for bit."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pomona.coordinator.increments import NOTHING, State, apply_increment, collect, encode_increment
from pomona.errors import PayloadError
from pomona.storage.learned import NewLearned
from pomona.storage.opening import open_registry
from pomona.storage.records import Parent
from pomona.storage.registry import Registry

NAMES = st.sampled_from(["head.weight", "tasks.1.a", "tasks.1.b", "classes.plant.total"])
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.int64])


@st.composite
def states(draw: st.DrawFn) -> State:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tensors = {
        name: torch.randn(draw(st.integers(1, 3)), 2, generator=generator).to(draw(DTYPES))
        for name in draw(st.sets(NAMES))
    }
    return State(tensors, {"classes": draw(st.lists(st.text("ab", max_size=2), max_size=2))})


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@given(states(), states())
@settings(deadline=None, max_examples=40)
def test_an_increment_makes_one_state_of_another(before: State, after: State) -> None:
    payload = encode_increment(before, after)
    found = apply_increment(before, payload, source="demo/2")
    assert same(found.tensors, after.tensors)
    assert found.facts == after.facts
    assert found.sha256() == after.sha256()
    assert payload == encode_increment(State(dict(reversed(list(before.tensors.items()))), before.facts), after)


def test_nan_and_negative_zero_stay_as_they_are() -> None:
    before = State({"x": torch.tensor([0.0, float("nan")])})
    after = State({"x": torch.tensor([-0.0, float("nan")])})
    found = apply_increment(before, encode_increment(before, after), source="demo/2")
    assert found.tensors["x"].view(torch.int32).tolist() == after.tensors["x"].view(torch.int32).tolist()


def test_an_increment_that_does_not_make_the_state_that_it_says_is_refused() -> None:
    one, other = State({"x": torch.ones(2)}), State({"x": torch.zeros(2)})
    payload = bytearray(encode_increment(one, other))
    payload[-1] ^= 1
    with pytest.raises(PayloadError, match="demo/2 was learned on another version"):
        apply_increment(one, bytes(payload), source="demo/2")


def test_what_could_not_be_read_again_is_not_written() -> None:
    with pytest.raises(PayloadError, match="16 MiB beside them, got 1 and 17 MiB; use shorter labels"):
        encode_increment(NOTHING, State({"x": torch.ones(1)}, {"classes": ["a" * (17 << 20)]}))


def test_an_increment_on_another_state_is_refused() -> None:
    one, other = State({"x": torch.ones(2)}), State({"x": torch.ones(2), "y": torch.ones(1)})
    payload = encode_increment(one, other)
    with pytest.raises(PayloadError, match="demo/2 was learned on another version"):
        apply_increment(State({"x": torch.zeros(2)}), payload, source="demo/2")
    with pytest.raises(PayloadError, match="the bytes of demo/2 are nothing that was learned"):
        apply_increment(one, b"what ever else", source="demo/2")


@pytest.mark.parametrize("wrong", [torch.ones(2, dtype=torch.float16), torch.ones(0)])
def test_what_could_not_be_read_back_is_not_written(wrong: Tensor) -> None:
    with pytest.raises(ValueError, match="x should be float32, float64 or int64 and not empty"):
        encode_increment(NOTHING, State({"x": wrong}))
    with pytest.raises(ValueError, match="the facts should be JSON"):
        encode_increment(NOTHING, State({"x": torch.ones(1)}, {"path": Path()}))


def publish(registry: Registry, before: State, after: State, *, on: str | None) -> str:
    return publish_bytes(registry, encode_increment(before, after), on=on)


def publish_bytes(registry: Registry, payload: bytes, *, on: str | None) -> str:
    new = NewLearned(
        adapter="demo",
        payload=payload,
        base_sha256="b" * 64,
        base_model="tiny",
        base_source="a test",
        rank=2,
        kind="task",
        parents=[Parent(ref=on, kind="task")] if on else [],
    )
    return registry.publish_learned(new).ref


def test_a_registry_keeps_no_tensor_twice(tmp_path: Path) -> None:
    """Each of ten tasks adds statistics; the size of a version does not grow with the versions before it."""
    state, ref = NOTHING, None
    with open_registry(tmp_path) as registry:
        for number in range(1, 11):
            statistics = torch.randn(64, 64, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
            grown = State({**state.tensors, f"tasks.{number}": statistics}, {"tasks": number})
            ref, state = publish(registry, state, grown, on=ref), grown
            assert collect(registry, ref).sha256() == state.sha256()
        sizes = [version.bytes for version in registry.versions("demo")]
        assert max(sizes) < 1.02 * min(sizes)
        assert collect(registry, "demo/4").facts == {"tasks": 4}
        assert sorted(collect(registry, "demo/4").tensors) == [f"tasks.{i}" for i in range(1, 5)]


def test_reading_a_version_hashes_what_it_knows_once_however_many_it_was_learned_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, ref = NOTHING, None
    with open_registry(tmp_path) as registry:
        for number in range(6):
            grown = State({**state.tensors, f"tasks.{number}": torch.ones(4)}, {})
            ref, state = publish(registry, state, grown, on=ref), grown
        hashed: list[int] = []
        sha256 = State.sha256

        def counted(self: State) -> str:
            hashed.append(len(self.tensors))
            return sha256(self)

        monkeypatch.setattr(State, "sha256", counted)
        assert same(collect(registry, "demo/6").tensors, state.tensors)
    assert hashed == [0, 6]


@pytest.mark.parametrize("place", [1, 2])
def test_a_version_on_another_than_its_lineage_says_is_refused(tmp_path: Path, place: int) -> None:
    """In the middle and at the end of what a version was learned on."""
    one, two, three = (State({"x": torch.full((2,), float(number))}) for number in (1, 2, 3))
    made = [(NOTHING, one), (one, two), (two, three)]
    made[place] = (State({"x": torch.zeros(2), "y": torch.ones(1)}), made[place][1])
    with open_registry(tmp_path) as registry:
        ref = None
        for before, after in made:
            ref = publish(registry, before, after, on=ref)
        with pytest.raises(PayloadError, match=f"demo/{place + 1} was learned on another version"):
            collect(registry, "demo/3")


def test_a_last_state_of_another_hash_is_refused(tmp_path: Path) -> None:
    """Bytes that say of themselves what they are not."""
    one, two = State({"x": torch.ones(2)}), State({"x": torch.zeros(2)})
    payload = encode_increment(NOTHING, one).replace(one.sha256().encode(), two.sha256().encode())
    with open_registry(tmp_path) as registry:
        publish_bytes(registry, payload, on=None)
        with pytest.raises(PayloadError, match="demo/1 was learned on another version"):
            collect(registry, "demo/1")


def test_a_version_is_learned_on_one_other(tmp_path: Path) -> None:
    one, other = State({"x": torch.ones(1)}), State({"x": torch.zeros(1)})
    with open_registry(tmp_path) as registry:
        publish(registry, NOTHING, one, on=None)
        publish(registry, NOTHING, other, on=None)
        new = NewLearned(
            adapter="demo",
            payload=encode_increment(one, other),
            base_sha256="b" * 64,
            base_model="tiny",
            base_source="a test",
            rank=2,
            kind="task",
            parents=[Parent(ref="demo/1", kind="task"), Parent(ref="demo/2", kind="task")],
        )
        registry.publish_learned(new)
        with pytest.raises(PayloadError, match="expected demo/3 to be learned on one version, got demo/1, demo/2"):
            collect(registry, "demo/3")
        assert collect(registry, "demo/2").tensors["x"].tolist() == [0.0]
