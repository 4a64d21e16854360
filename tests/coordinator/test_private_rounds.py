"""Rounds under client-level privacy: what they sum, what they cost, and what of a client they write down."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.coordinator.grid import Answer, InProcessGrid, Node, Reply, honest

from pomona.adapters import AdapterWeights
from pomona.client.trainer import Profile
from pomona.coordinator.beginning import begin_run
from pomona.coordinator.enrolment import Roster
from pomona.coordinator.federation import run_federation
from pomona.coordinator.private_strategy import PrivateStrategy
from pomona.errors import ConfigError, PrivacyBudgetExhausted
from pomona.manifest import AdapterManifest
from pomona.privacy.dylora import rank_of_round
from pomona.privacy.plan import plan_of
from pomona.privacy.randomness import SecureRandom
from pomona.settings import RunSettings
from pomona.storage.opening import open_registry
from pomona.storage.registry import Registry
from pomona.wire import decode_update, decode_weights, encode_update

pytestmark = pytest.mark.usefixtures("quick_polls")

RUN = "run-1"
NOTHING = {"noise_multiplier": 1e-12, "clip": 1e3, "epsilon": 1e30}
MECHANISMS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "dp-lora": ({"strategy": "fedit", "rank": 4, "max_rank": 8}, {}),
    "dp-dylora": ({"strategy": "fedit", "rank": 4, "max_rank": 8}, {"ranks": [4, 4]}),
    "ffa": ({"strategy": "ffa", "rank": 4, "max_rank": 8}, {}),
    "ffa-nested": ({"strategy": "ffa-nested", "max_rank": 8}, {}),
}

MakeProfile = Callable[..., Profile]
MakeSettings = Callable[..., RunSettings]


@pytest.fixture
def make_settings(tiny_bert: Path, toy_data: Path) -> MakeSettings:
    """Return a maker of settings: sections as keywords, over small defaults."""

    def make(
        *, rounds: int = 2, privacy: Mapping[str, object] | None = None, deadline_s: float = 30.0, **aggregation: object
    ) -> RunSettings:
        defaults: dict[str, object] = {
            "name": "toy",
            "rounds": rounds,
            "seed": 3,
            "model": {"base": str(tiny_bert), "max_length": 16},
            "data": {"source": str(toy_data)},
            "cohort": {"join_timeout_s": 5.0, "round_deadline_s": deadline_s, "min_clients": 3},
            "training": {"batch_size": 8, "max_steps": 2, "learning_rate": 1e-2},
            "aggregation": aggregation or MECHANISMS["dp-lora"][0],
        }
        if privacy is not None:
            base = {"unit": "client", "population": "toys", "population_size": 3, "epsilon": 1e30, "delta": 1e-3}
            defaults["privacy"] = {**base, **privacy}
        return RunSettings.model_validate(defaults)

    return make


def federate(nodes: list[Node], settings: RunSettings, registry: Registry, *, lasting: bool = False) -> None:
    run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN, lasting=lasting)


def weights_of(registry: Registry, ref: str) -> AdapterWeights:
    return decode_weights(registry.payload(ref))[0]


def numbers(weights: AdapterWeights) -> dict[str, torch.Tensor]:
    products = {name: each.b.double() @ each.a.double() for name, each in weights.layers.items()}
    return products | {name: head.double() for name, head in weights.heads.items()}


# What is summed


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_with_no_noise_and_no_clip_a_round_is_what_it_is_without_privacy(
    mechanism: str, tmp_path: Path, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    """The same clients, seeds and equal weights: two rounds of the strategy itself are the oracle."""
    aggregation, privacy = MECHANISMS[mechanism]
    found = {}
    for name, given in (("plain", None), ("private", {**NOTHING, **privacy})):
        with open_registry(tmp_path / name) as registry:
            nodes = [Node(make_profile(i, count=3, rank=8 if i else 4)) for i in range(3)]
            federate(nodes, make_settings(privacy=given, **aggregation), registry)
            found[name] = numbers(weights_of(registry, "toy/2"))
            assert {version.metrics["accuracy"] for version in registry.versions("toy")}
    assert found["plain"].keys() == found["private"].keys()
    for name, tensor in found["plain"].items():
        torch.testing.assert_close(found["private"][name], tensor, rtol=1e-4, atol=1e-5)
        assert float(tensor.abs().max()) > 1e-4, "or nothing was compared"


def test_dylora_trains_one_rank_a_round_and_leaves_the_other_components(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    nodes = [Node(make_profile(i, count=3, rank=4)) for i in range(3)]
    settings = make_settings(rounds=4, privacy={**NOTHING, "ranks": [1, 4]}, strategy="fedit", rank=4, max_rank=4)
    federate(nodes, settings, registry)
    drawn = [rank_of_round((1, 4), seed=3, round_number=number) for number in (1, 2, 3, 4)]
    assert len(set(drawn)) > 1, "or the seed is a bad one for this test"
    assert [request.rank for request, _ in nodes[0].asked] == drawn
    assert [request.rank for request, _ in nodes[2].asked] == drawn
    for number in (2, 3, 4):
        before, after = weights_of(registry, f"toy/{number - 1}"), weights_of(registry, f"toy/{number}")
        for name, each in after.layers.items():
            assert each.rank == 4
            rank = drawn[number - 1]
            torch.testing.assert_close(each.a[rank:], before.layers[name].a[rank:])
            torch.testing.assert_close(each.b[:, rank:], before.layers[name].b[:, rank:])
            assert not torch.equal(each.a[:rank], before.layers[name].a[:rank])


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_client_moves_the_release_by_no_more_than_the_bound(
    mechanism: str, tmp_path: Path, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    """Two runs that differ in one client's presence, with next to no noise; what it sends is far above the bound."""
    aggregation, privacy = MECHANISMS[mechanism]
    found, bound = [], 0.01
    for name, present in (("with", True), ("without", False)):
        with open_registry(tmp_path / name) as registry:
            nodes = [Node(make_profile(i, count=3, rank=8)) for i in range(3)]
            if not present:
                nodes[2].trains = lambda _request, _answer: None
            settings = make_settings(
                rounds=1, privacy={**NOTHING, "clip": bound, **privacy}, deadline_s=2.0, **aggregation
            )
            federate(nodes, settings, registry)
            weights = weights_of(registry, "toy/1")
            scale = 2.0 if mechanism != "ffa-nested" else 1.0  # alpha_per_rank, folded into B
            parts = [part for each in weights.layers.values() for part in (each.b / scale, each.a)]
            if mechanism == "ffa-nested":
                parts = [each.b @ each.a for each in weights.layers.values()]
            found.append(torch.cat([part.double().flatten() for part in (*parts, *weights.heads.values())]))
    moved = float((found[0] - found[1]).norm())
    assert moved <= bound / 3 * (1 + 1e-3)
    assert moved >= bound / 3 * 0.99, "it is clipped, not dropped"


def silent(_request: str, _answer: Answer) -> Reply:
    return None


def spread(registry: Registry, settings: RunSettings) -> float:
    """Return the standard deviation of what a round without any answer changed, over the one that is promised."""
    run = registry.run(RUN)
    assert run.state == "finished"
    weights = weights_of(registry, "toy/1")
    moves = torch.cat([(each.b / 2.0).double().flatten() for each in weights.layers.values()])
    plan = plan_of(settings)
    return float(moves.std()) / (plan.update_noise_multiplier * plan.clip / plan.divisor)


def test_noise_of_the_right_size_is_released_where_nobody_answers(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    settings = make_settings(rounds=1, privacy={"noise_multiplier": 2.0, "clip": 0.5, "sample_rate": 0.5}, deadline_s=1)
    nodes = [Node(make_profile(i, count=3), trains=silent) for i in range(3)]
    federate(nodes, settings, registry)
    found = spread(registry, settings)
    moves = sum(each.b.numel() for each in weights_of(registry, "toy/1").layers.values())
    assert abs(found - 1.0) < 5.0 / np.sqrt(2 * moves) < 0.2, "and 2/3 or 3/2 of it would be found out"


def test_coins_are_tossed_over_all_that_are_enrolled_whoever_is_connected(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    tossed = []
    real = SecureRandom.chosen

    def chosen(self: SecureRandom, count: int, rate: float) -> NDArray[np.bool_]:
        tossed.append((count, rate))
        real(self, count, rate)
        return np.array([False, True, True][:count])

    monkeypatch.setattr(SecureRandom, "chosen", chosen)
    nodes = [Node(make_profile(i, count=3)) for i in range(3)]
    nodes[2].leaves_after = 1
    settings = make_settings(privacy={"sample_rate": 0.7, "noise_multiplier": 1.0, "population_size": 30})
    settings = settings.model_copy(update={"cohort": settings.cohort.model_copy(update={"round_deadline_s": 1.0})})
    federate(nodes, settings, registry)
    assert tossed == [(3, 0.7), (3, 0.7)]
    assert [len(node.asked) for node in nodes[:2]] == [0, 2]


def moves_of(registry: Registry, rounds: int) -> torch.Tensor:
    """Return what each round changed in every number, ``(rounds, numbers)``; the first round starts from B = 0."""
    flat = [
        torch.cat([(each.b / 2.0).double().flatten() for each in weights_of(registry, f"toy/{number}").layers.values()])
        for number in range(1, rounds + 1)
    ]
    return torch.stack(flat).diff(dim=0, prepend=torch.zeros(1, len(flat[0]), dtype=torch.float64))


def test_banded_noise_takes_back_noise_of_the_rounds_before(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    """Nobody answers, so all that moves is ``C^-1 Z``: its covariance over rounds is ``C^-1 C^-T``, within 5 sigma."""
    rounds, bands = 4, 2
    privacy = {"noise_multiplier": 3.0, "clip": 0.5, "bands": bands}
    settings = make_settings(rounds=rounds, privacy=privacy, deadline_s=0.5)
    federate([Node(make_profile(i, count=3), trains=silent) for i in range(3)], settings, registry)
    plan = plan_of(settings)
    assert plan.factorization is not None
    assert plan.divisor == 1.5
    rows = [plan.factorization.row(number) for number in range(1, rounds + 1)]
    matrix = np.array(
        [[row[i - j] if 0 <= i - j < len(row) else 0.0 for j in range(rounds)] for i, row in enumerate(rows)]
    )
    expected = np.linalg.inv(matrix) @ np.linalg.inv(matrix).T
    moves = moves_of(registry, rounds).numpy() / (3.0 * 0.5 / 1.5)
    found, tolerance = moves @ moves.T / moves.shape[1], 5.0 * np.sqrt(2.0 / moves.shape[1]) * expected.max()
    assert np.abs(found - expected).max() < tolerance
    assert np.abs(expected - np.diag(np.diag(expected))).max() > 1.5 * tolerance, "independent noise is found out"
    assert [row.releases for row in registry.ledger("toys") if row.state == "reserved"] == [2, 0, 0, 0]


def test_in_a_banded_run_a_client_is_asked_in_rounds_that_are_far_enough_apart(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    settings = make_settings(rounds=6, privacy={**NOTHING, "bands": 3, "population_size": 5})
    nodes = [Node(make_profile(i, count=5)) for i in range(5)]
    federate(nodes, settings, registry)
    asked = [[request.round_number for request, _ in node.asked] for node in nodes]
    assert all(len(rounds) == 2 and rounds[1] - rounds[0] == 3 for rounds in asked), asked
    assert len({rounds[0] for rounds in asked}) > 1, "they take turns"


# What is spent, and what is written down


def test_each_round_is_paid_before_and_settled_after(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    settings = make_settings(privacy={"noise_multiplier": 1.0})
    federate([Node(make_profile(i, count=3)) for i in range(3)], settings, registry)
    rows = registry.ledger("toys")
    assert [(row.state, row.round, row.attempt) for row in rows] == [
        ("reserved", 1, 1), ("released", 1, 1), ("reserved", 2, 1), ("released", 2, 1),
    ]  # fmt: skip
    for version, reserved, released in zip(registry.versions("toy"), rows[::2], rows[1::2], strict=True):
        assert released.release_sha256 == version.sha256
        told = version.recipe["privacy"]
        assert isinstance(told, dict)
        assert (told["ledger_seq"], told["ledger_sha256"]) == (reserved.seq, reserved.sha256)
        assert told["plan_sha256"] == plan_of(settings).sha256
    assert rows[-1].epsilon == pytest.approx(plan_of(settings).epsilon_after(2))


def test_nothing_of_a_client_is_written_down(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    federate([Node(make_profile(i, count=3)) for i in range(3)], make_settings(privacy={}), registry)
    assert registry.submissions(RUN) == []
    for each in registry.rounds(RUN):
        assert (each.cohort, each.accepted, each.bytes_up, each.bytes_down, each.seconds) == ((), 0, 0, 0, 30.0)
    assert {each.num_examples for each in registry.clients(RUN)} == {1}
    assert "train_loss" not in registry.resolve("toy/2").metrics
    told = [record.getMessage() for record in caplog.records if record.name.startswith("pomona.coordinator")]
    assert told
    assert not [line for line in told if "client-" in line]


@pytest.mark.parametrize("answers", [True, False])
def test_a_round_lasts_until_its_deadline_whoever_answers(
    answers: bool, registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    nodes = [Node(make_profile(i, count=3), trains=honest if answers else silent) for i in range(3)]
    federate(nodes, make_settings(rounds=1, privacy={}, deadline_s=4.0), registry, lasting=True)
    (only,) = registry.rounds(RUN)
    assert only.closed_at is not None
    assert (only.closed_at - only.opened_at).total_seconds() >= 4.0


def test_a_round_that_is_tried_again_has_noise_that_takes_back_none_from_before(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    """Else whoever has both could take the noise of one off the other."""
    settings = make_settings(rounds=2, privacy={"noise_multiplier": 3.0, "bands": 2})
    invitation = begin_run(registry, settings, run_id=RUN)
    manifest = AdapterManifest(base_sha256="b" * 64, layers={"query": (600, 600)}, heads={})
    strategy = PrivateStrategy(
        settings=settings, plan=plan_of(settings), invitation=invitation, manifest=manifest, registry=registry,
        roster=Roster(), weights=AdapterWeights(),
    )  # fmt: skip
    rows = [strategy._correlated(number, fresh=fresh) for number, fresh in ((1, False), (2, False), (2, True))]
    flat = [torch.cat([each.flatten() for each in row.values()]) for row in rows if row is not None]
    found = torch.corrcoef(torch.stack(flat))
    tolerance = 5.0 / np.sqrt(len(flat[0]))
    assert tolerance < 0.1
    assert float(found[0, 1]) < -tolerance, "the second round takes some back"
    assert float(found[2, :2].abs().max()) < tolerance, "tried again, it takes back none"


def test_a_run_that_costs_more_than_the_budget_is_refused_before_anybody_is_asked(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    wanted = {"epsilon": 8.0, "population_size": 100}
    first = [Node(make_profile(i, count=3)) for i in range(3)]
    federate(first, make_settings(privacy=wanted, deadline_s=5.0), registry)
    second = [Node(make_profile(i, count=3)) for i in range(3)]
    with pytest.raises(PrivacyBudgetExhausted, match="has spent epsilon"):
        run_federation(InProcessGrid(second), make_settings(privacy=wanted), registry, run_id="run-2")
    assert not any(node.asked or node.invited for node in second)
    assert len(registry.versions("toy")) == 2


def test_a_run_does_not_go_on_under_another_plan(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(privacy={"noise_multiplier": 1.0})
    federate([Node(make_profile(i, count=3)) for i in range(3)], settings, registry)
    monkeypatch.setattr("pomona.privacy.plan.library", lambda: "opacus 99")
    with pytest.raises(ConfigError, match="begun under the plan"):
        federate([Node(make_profile(i, count=3)) for i in range(3)], settings, registry)


def test_a_population_takes_no_more_members_than_its_plan_is_for(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    nodes = [Node(make_profile(i, count=5)) for i in range(5)]
    federate(nodes, make_settings(privacy={}), registry)
    kept = [each for each in registry.clients(RUN) if not each.excluded]
    assert len(kept) == 3
    assert {each.excluded for each in registry.clients(RUN)} == {
        "", "the population is full: it has the 3 members that its plan is for",
    }  # fmt: skip


# Updates that are not what was asked for


def test_what_is_not_an_update_counts_as_zero_and_ends_nothing(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    nodes = [Node(make_profile(i, count=3)) for i in range(3)]
    nodes[0].trains = lambda _request, answer: (answer[0], answer[1], answer[2][:-8])
    nodes[1].trains = lambda _request, _answer: ("refusal", '{"name": "client-1", "error": "canary"}', b"")
    nodes[2].trains = lambda _request, _answer: OSError("canary")
    federate(nodes, make_settings(rounds=1, privacy={"noise_multiplier": 1e-9, "clip": 1.0}), registry)
    weights = weights_of(registry, "toy/1")
    assert all(float(each.b.abs().max()) < 1e-6 for each in weights.layers.values())
    assert "canary" not in caplog.text
    assert registry.run(RUN).state == "finished"


def test_whether_an_update_counts_depends_on_nobody_else(
    tmp_path: Path, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    """A nonce that another client has used would throw an update out, and one client would move two shares."""
    found = []
    for name, tamper in (("own", honest), ("another's", with_a_common_nonce)):
        with open_registry(tmp_path / name) as registry:
            nodes = [Node(make_profile(i, count=3), trains=tamper) for i in range(3)]
            federate(nodes, make_settings(rounds=1, privacy=NOTHING), registry)
            found.append(numbers(weights_of(registry, "toy/1")))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-6)


def with_a_common_nonce(_request: str, answer: Answer) -> Reply:
    return answer[0], answer[1], encode_update(replace(decode_update(answer[2]), nonce="a" * 32))
