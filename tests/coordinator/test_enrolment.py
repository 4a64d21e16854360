"""Who is asked, and who is let in."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pomona import __version__
from pomona.coordinator.enrolment import Introduction, Roster, choose_cohort
from pomona.protocol import Enrolled, Invitation, Refusal
from pomona.settings import CohortSettings, TrainingSettings

BASE = "b" * 64
TRAINING = TrainingSettings(alpha_per_rank=2.0, rslora=True)

NAMES = st.lists(st.from_regex(r"[a-z][a-z0-9]{0,5}", fullmatch=True), unique=True, max_size=30)
SEEDS = st.integers(0, 2**40)


@given(NAMES, st.integers(1, 40), SEEDS, st.integers(1, 100))
@settings(deadline=None)
def test_a_cohort_of_a_size_has_that_size(names: list[str], size: int, seed: int, number: int) -> None:
    """Too many would be asked, or a name twice, or one that is not there."""
    cohort = choose_cohort(names, CohortSettings(size=size), seed=seed, round_number=number)
    assert len(cohort) == min(size, len(names))
    assert set(cohort) <= set(names)
    assert cohort == sorted(set(cohort))


@given(NAMES.filter(bool), st.floats(0, 1, exclude_min=True), SEEDS, st.integers(1, 100))
@settings(deadline=None)
def test_a_share_is_that_share_and_at_least_one(names: list[str], fraction: float, seed: int, number: int) -> None:
    cohort = choose_cohort(names, CohortSettings(fraction=fraction), seed=seed, round_number=number)
    assert 1 <= len(cohort) <= len(names)
    assert abs(len(cohort) - fraction * len(names)) <= 0.5 or len(cohort) == 1
    assert set(cohort) <= set(names)


@given(NAMES, SEEDS, st.integers(1, 100))
@settings(deadline=None)
def test_without_a_limit_all_are_asked(names: list[str], seed: int, number: int) -> None:
    assert choose_cohort(names, CohortSettings(), seed=seed, round_number=number) == sorted(names)


@given(st.permutations([f"c{i}" for i in range(12)]), SEEDS, st.integers(1, 100))
@settings(deadline=None)
def test_the_order_in_which_clients_appear_does_not_matter(names: list[str], seed: int, number: int) -> None:
    """The same run on another day would ask other clients."""
    one = choose_cohort(names, CohortSettings(size=5), seed=seed, round_number=number)
    other = choose_cohort(set(names), CohortSettings(size=5), seed=seed, round_number=number)
    assert one == other


def test_nobody_is_there() -> None:
    for cohort in (CohortSettings(), CohortSettings(fraction=0.5), CohortSettings(size=3)):
        assert choose_cohort([], cohort, seed=0, round_number=1) == []


def test_rounds_ask_different_clients_and_everybody_in_turn() -> None:
    """A fixed choice would leave the data of all others out for ever."""
    names = [f"c{i}" for i in range(10)]
    counts = dict.fromkeys(names, 0)
    for number in range(1, 401):
        for name in choose_cohort(names, CohortSettings(fraction=0.3), seed=1, round_number=number):
            counts[name] += 1
    assert sum(counts.values()) == 1200
    assert all(80 < count < 160 for count in counts.values()), counts
    by_seed = {tuple(choose_cohort(names, CohortSettings(size=3), seed=s, round_number=1)) for s in range(20)}
    assert len(by_seed) > 10


def invitation(*, max_rank: int = 16) -> Invitation:
    return Invitation(
        run_id="run-1",
        pomona_version=__version__,
        task="classification",
        base="",
        base_sha256=BASE,
        max_length=16,
        labels=("a", "b"),
        max_rank=max_rank,
    )


def introduce(roster: Roster, node: int, *, online: set[int], **changes: object) -> Introduction:
    facts = {"name": "anna", "rank": 4, "num_examples": 10, "base_sha256": BASE, "pomona_version": __version__}
    json = Enrolled.model_validate({**facts, **changes}).model_dump_json()
    return roster.introduce(node, "enrolled", json, invitation=invitation(), training=TRAINING, online=online)


def test_what_a_client_said_is_kept() -> None:
    """Its weight and scale in every round come from here."""
    roster = Roster()
    assert introduce(roster, 1, online={1}) == Introduction("anna", rank=4, num_examples=10)
    member = roster.members["anna"]
    assert (member.rank, member.alpha, member.rslora, member.num_examples) == (4, 8.0, True, 10)
    assert member.scale == 4.0
    assert roster.present({1, 2}) == ["anna"]
    assert roster.present({2}) == []


def test_each_node_is_invited_once() -> None:
    roster = Roster()
    assert roster.newcomers({3, 1, 2}) == [1, 2, 3]
    introduce(roster, 1, online={1, 2, 3})
    roster.introduce(
        2,
        "refusal",
        Refusal(name="bert", error="no").model_dump_json(),
        invitation=invitation(),
        training=TRAINING,
        online={1, 2, 3},
    )
    assert roster.newcomers({1, 2, 3}) == [3]
    assert roster.lost(3).excluded == "it did not answer the invitation"
    assert roster.newcomers({1, 2, 3}) == [3], "it may have been away for a moment"
    assert roster.unreadable(3, "nonsense") == Introduction("node-3", excluded="nonsense")
    assert roster.newcomers({1, 2, 3}) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pomona_version": "9"}, f"it runs pomona 9, the coordinator {__version__}"),
        ({"base_sha256": "c" * 64}, "its base model has sha256 cccccccccccc, the run's bbbbbbbbbbbb"),
        ({"rank": 17}, "its rank 17 is above max_rank=16"),
    ],
)
def test_who_does_not_fit_is_left_out(changes: dict[str, object], reason: str) -> None:
    roster = Roster()
    assert introduce(roster, 1, online={1}, **changes).excluded == reason
    assert roster.members == {}
    assert roster.present({1}) == []


def test_a_name_passes_on_only_when_its_node_is_gone() -> None:
    """Two processes under one name would take turns, or an impostor would take over."""
    roster = Roster()
    introduce(roster, 1, online={1, 2})
    assert introduce(roster, 2, online={1, 2}).excluded.startswith("another connected client has that name")
    assert roster.nodes == {"anna": 1}
    assert roster.newcomers({1, 2}) == []
    assert roster.newcomers({2}) == [2], "its name is free now"
    assert introduce(roster, 3, online={2, 3}).excluded == ""
    assert roster.nodes == {"anna": 3}
    assert roster.newcomers({2, 3}) == []


def test_a_client_cannot_change_its_number_of_examples() -> None:
    """Its weight in the sum would grow between rounds."""
    roster = Roster()
    introduce(roster, 1, online={1})
    excluded = introduce(roster, 2, online={2}, num_examples=11).excluded
    assert excluded == "it enrolled with 10 examples and now has 11; let it join under another name"
    assert roster.members["anna"].num_examples == 10
    assert roster.nodes == {"anna": 1}


def test_a_client_may_come_back_with_another_rank() -> None:
    """It measured its machine again, or was given another; its weight in the sum stays."""
    roster = Roster()
    introduce(roster, 1, online={1})
    assert introduce(roster, 2, online={2}, rank=7).excluded == ""
    assert (roster.members["anna"].rank, roster.members["anna"].alpha) == (7, 14.0)
    assert roster.nodes == {"anna": 2}


def test_a_node_without_a_name_is_called_by_its_number() -> None:
    roster = Roster()
    answer = roster.introduce(7, "enrolled", "{}", invitation=invitation(), training=TRAINING, online={7})
    assert (answer.name, answer.rank) == ("node-7", 0)
    assert answer.excluded == "its answer is malformed: name: Field required"
    untold = Refusal(name="", error="why not").model_dump_json()
    told = roster.introduce(8, "refusal", untold, invitation=invitation(), training=TRAINING, online={8})
    assert told == Introduction("node-8", excluded="why not")
