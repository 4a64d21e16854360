"""Rounds in which the coordinator sees sums only: what they release, who falls silent, and what it comes to know."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from numpy.typing import NDArray
from scipy import stats
from tests.coordinator.grid import STAGES, Answer, InProcessGrid, Node, Reply, Tamper

from pomona.client.trainer import Profile
from pomona.coordinator.certificate import certify
from pomona.coordinator.federation import run_federation
from pomona.coordinator.simulate import simulate_run
from pomona.coordinator.spending import check_privacy, whole_ledger
from pomona.errors import ConfigError, NotEnoughClients, PrivacyBudgetExhausted
from pomona.logs import configure_logs
from pomona.privacy.plan import plan_of
from pomona.privacy.randomness import SecureRandom
from pomona.privacy.secure_sum import client as client_side
from pomona.privacy.secure_sum import fixed_point
from pomona.privacy.secure_sum.terms import Terms, effective_noise_multiplier
from pomona.protocol import ADVERTISE, MASK, SHARE, UNMASK
from pomona.settings import RunSettings
from pomona.storage.opening import open_registry
from pomona.storage.registry import Registry
from pomona.wire import decode_weights

pytestmark = pytest.mark.usefixtures("quick_polls")

RUN = "run-1"
NOTHING = {"noise_multiplier": 1e-11, "clip": 1e2, "epsilon": 1e30}
FINE = {"trust": "distributed", "accountant": "rdp", "secure_sum": {"fraction_bits": 34, "least_survivors": 2}}
MECHANISMS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "dp-dylora": ({"strategy": "fedit", "rank": 4, "max_rank": 8}, {"ranks": [1, 4]}),
    "ffa": ({"strategy": "ffa", "rank": 4, "max_rank": 8}, {}),
    "ffa-nested": ({"strategy": "ffa-nested", "max_rank": 8}, {}),
}
UNLIKELY = 1e-7  # keys are new in every run of these tests

MakeProfile = Callable[..., Profile]
MakeSettings = Callable[..., RunSettings]
Numbers = dict[str, torch.Tensor]


@pytest.fixture
def make_settings(tiny_bert: Path, toy_data: Path) -> MakeSettings:
    """Return a maker of settings for three clients, nested FFA and a rate at which something is learned."""

    def make(
        *, privacy: Mapping[str, object], rounds: int = 1, clients: int = 3, deadline_s: float = 30.0,
        learning_rate: float = 1e-2, mechanism: str = "ffa-nested",
    ) -> RunSettings:  # fmt: skip
        aggregation, more = MECHANISMS[mechanism]
        base = {"unit": "client", "population": "toys", "population_size": clients, "epsilon": 1e30, "delta": 1e-3}
        return RunSettings.model_validate(
            {
                "name": "toy",
                "rounds": rounds,
                "seed": 3,
                "model": {"base": str(tiny_bert), "max_length": 16},
                "data": {"source": str(toy_data)},
                "cohort": {"join_timeout_s": 1.0, "round_deadline_s": deadline_s, "min_clients": clients},
                "training": {
                    "batch_size": 8, "max_steps": 2, "learning_rate": learning_rate,
                    "head_learning_rate": learning_rate,
                },
                "aggregation": aggregation,
                "privacy": {**base, **more, **privacy},
            }
        )  # fmt: skip

    return make


def nodes_of(make_profile: MakeProfile, count: int, rank: int = 4) -> list[Node]:
    return [Node(make_profile(i, count=count, rank=rank if i else 4)) for i in range(count)]


def federate(nodes: Sequence[Node], settings: RunSettings, registry: Registry) -> None:
    run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN, lasting=False)


def numbers(registry: Registry, ref: str) -> Numbers:
    weights, _ = decode_weights(registry.payload(ref))
    products = {name: each.b.double() @ each.a.double() for name, each in weights.layers.items()}
    return products | {name: head.double() for name, head in weights.heads.items()}


def outcome(home: Path, nodes: Sequence[Node], settings: RunSettings) -> Numbers:
    """Return what the last round of a run gives."""
    with open_registry(home) as registry:
        federate(nodes, settings, registry)
        assert registry.run(RUN).state == "finished"
        return numbers(registry, f"toy/{settings.rounds}")


def assert_same(found: Numbers, expected: Numbers) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def silent_from(stage: str) -> Tamper:
    """Answer until a stage, and from then on nothing."""

    def answer(asked: str, answer: Answer) -> Reply:
        return answer if STAGES.index(asked) < STAGES.index(stage) else None

    return answer


# What is released


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_with_next_to_no_noise_a_run_is_the_central_one(
    mechanism: str, tmp_path: Path, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    """Two rounds of the same mechanism, clients and seeds with a coordinator that sees all are the oracle."""
    found = {}
    for name, privacy in (("central", NOTHING), ("distributed", {**NOTHING, **FINE})):
        settings = make_settings(rounds=2, privacy=privacy, mechanism=mechanism)
        found[name] = outcome(tmp_path / name, nodes_of(make_profile, 3, rank=8), settings)
    assert_same(found["distributed"], found["central"])
    assert all(float(tensor.abs().max()) > 1e-4 for tensor in found["central"].values()), "or nothing was compared"


@pytest.fixture(scope="module")
def without_one() -> dict[str, Numbers]:
    """What central rounds give, by who is missing: computed once."""
    return {}


def central(
    known: dict[str, Numbers], missing: str, home: Path, make_settings: MakeSettings, make_profile: MakeProfile
) -> Numbers:
    if missing not in known:
        nodes = nodes_of(make_profile, 4)
        if missing:
            nodes[3].trains = lambda _request, _answer: None
        known[missing] = outcome(home / "central", nodes, make_settings(privacy=NOTHING, clients=4, deadline_s=3.0))
    return known[missing]


OF_FOUR = {**NOTHING, **FINE, "secure_sum": {"fraction_bits": 34, "least_survivors": 3}}


def changed_words(_stage: str, answer: Answer) -> Reply:
    return answer[0], answer[1], bytes([answer[2][0] ^ 1]) + answer[2][1:]


def too_few_words(_stage: str, answer: Answer) -> Reply:
    words = answer[2][:-8]
    return answer[0], json.dumps({**json.loads(answer[1]), "sha256": hashlib.sha256(words).hexdigest()}), words


def without_last(key: str) -> Tamper:
    def shortened(_stage: str, answer: Answer) -> Reply:
        facts = json.loads(answer[1])
        return answer[0], json.dumps({**facts, key: facts[key][:-1]}), answer[2]

    return shortened


def at(stage: str, tamper: Tamper) -> Tamper:
    return lambda asked, answer: tamper(asked, answer) if asked == stage else answer


def another_share(_stage: str, answer: Answer) -> Reply:
    facts = json.loads(answer[1])
    facts["seed_shares"][0]["share"] = facts["seed_shares"][1]["share"]
    return answer[0], json.dumps(facts), b""


def nonsense(_stage: str, answer: Answer) -> Reply:
    return answer[0], "[" * 9999, b""


REFUSAL = ("refusal", '{"name": "client-3", "error": "no"}', b"")
FAULTS: dict[str, tuple[Tamper, bool, str]] = {  # whether its vector is in the sum, and why it is left out from then on
    "silent from the first stage": (silent_from(ADVERTISE), False, ""),
    "silent from the second stage": (silent_from(SHARE), False, ""),
    "silent from the third stage": (silent_from(MASK), False, ""),
    "silent in the last stage": (silent_from(UNMASK), True, ""),
    "unreadable keys": (at(ADVERTISE, lambda _stage, _answer: OSError("garbled")), False, ""),
    "a refusal": (at(MASK, lambda _stage, _answer: REFUSAL), False, ""),
    "keys that are no record": (at(ADVERTISE, nonsense), False, "no record of its stage"),
    "no message at all": (at(SHARE, lambda _stage, _answer: RecordDict()), False, "no record of its stage"),
    "shares for some": (at(SHARE, without_last("shares")), False, "every other client"),
    "words that were changed": (at(MASK, changed_words), False, "the hash it announced"),
    "too few words": (at(MASK, too_few_words), False, "expected a vector of"),
    "no share of its own seed": (at(UNMASK, without_last("seed_shares")), True, "one seed share of each"),
    "a share of somebody else": (at(UNMASK, another_share), True, "was not dealt to it"),
    "an unmasking that is none": (at(UNMASK, nonsense), True, "no record of its stage"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_who_falls_silent_or_talks_nonsense_harms_only_itself(
    fault: str, tmp_path: Path, without_one: dict[str, Numbers], make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    """The sum is that of the others, over the same divisor; in the last stage the vector was there, and counts."""
    tamper, counts, reason = FAULTS[fault]
    nodes = nodes_of(make_profile, 4)
    nodes[3].sums = tamper
    found = outcome(tmp_path / "home", nodes, make_settings(privacy=OF_FOUR, clients=4, deadline_s=3.0))
    missing = "" if counts else "client-3"
    assert_same(found, central(without_one, missing, tmp_path, make_settings, make_profile))
    with open_registry(tmp_path / "home") as registry:
        kept = {each.name: each.excluded for each in registry.clients(RUN) if each.excluded}
    assert kept.keys() == ({"client-3"} if reason else set()), "nobody is left out for silence: it may be the network"
    assert nodes[3].told == list(kept.values())
    assert all(text.startswith("it is left out of the run: ") and reason in text for text in kept.values())


def test_the_sums_of_three_and_of_four_differ(
    tmp_path: Path, without_one: dict[str, Numbers], make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    """Or the test above would show nothing."""
    all_, three = (
        central(without_one, missing, tmp_path / (missing or "all"), make_settings, make_profile)
        for missing in ("", "client-3")
    )
    assert any(float((all_[name] - three[name]).abs().max()) > 1e-3 for name in all_)


def test_noise_shares_add_up_to_the_noise_that_is_promised_and_paid(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    """Nothing is learned, so all that moves is noise: three shares, of which two would be enough."""
    privacy = {"trust": "distributed", "accountant": "rdp", "noise_multiplier": 2.0, "clip": 0.5}
    settings = make_settings(privacy=privacy, learning_rate=1e-30, mechanism="ffa")
    federate(nodes_of(make_profile, 3), settings, registry)
    weights, _ = decode_weights(registry.payload("toy/1"))
    moves = torch.cat([(each.b / 2.0).double().flatten() for each in weights.layers.values()])
    plan = plan_of(settings)
    promised = plan.noise_multiplier * plan.clip / plan.divisor
    found = float(moves.std()) / (promised * np.sqrt(3 / 2))
    assert abs(found - 1.0) < 5.0 / np.sqrt(2 * moves.numel()) < 0.2, "and 2/3 or 3/2 of it would be found out"
    assert float(moves.std()) > promised
    row = registry.ledger("toys")[0]
    assert (row.noise_multiplier, row.sample_rate) == (2.0, 1.0)


# What is spent


PAID: dict[str, object] = {"trust": "distributed", "accountant": "rdp", "noise_multiplier": 4.0}


def steps(registry: Registry) -> list[tuple[str, int, int]]:
    return [(row.state, row.round, row.attempt) for row in registry.ledger("toys")]


def burnt(number: int, attempt: int) -> list[tuple[str, int, int]]:
    return [("reserved", number, attempt), ("burned", number, attempt)]


def released(number: int, attempt: int) -> list[tuple[str, int, int]]:
    return [("reserved", number, attempt), ("released", number, attempt)]


def test_a_sum_of_too_few_is_burnt_and_paid_and_tried_again_while_there_are_spare_rounds(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    settings = make_settings(
        privacy={**PAID, "spare_rounds": 2, "secure_sum": {"least_survivors": 3}}, deadline_s=3.0, rounds=2
    )
    nodes = nodes_of(make_profile, 3)
    nodes[2].sums = silent_from(MASK)
    with pytest.raises(NotEnoughClients, match=r"run-1\.1\.3 needs 3 clients, got 2; the round is burnt"):
        federate(nodes, settings, registry)
    assert registry.run(RUN).state == "failed"
    assert registry.versions("toy") == []
    assert steps(registry) == [*burnt(1, 1), *burnt(1, 2), *burnt(1, 3)]
    assert not any(each.excluded for each in registry.clients(RUN))
    nodes[2].sums = silent_from(UNMASK)
    with pytest.raises(PrivacyBudgetExhausted):  # what is left is for one round
        federate(nodes, settings, registry)
    assert steps(registry)[6:] == released(1, 4)
    assert registry.ledger("toys")[-1].epsilon == pytest.approx(plan_of(settings).epsilon_after(4)), "all are paid"


def useless_shares(_stage: str, answer: Answer) -> Reply:
    """Seal nonsense for everybody; only they can see it."""
    facts = json.loads(answer[1])
    shares = [{**each, "sealed": "00" * (len(each["sealed"]) // 2)} for each in facts["shares"]]
    return answer[0], json.dumps({**facts, "shares": shares}), b""


def another_seed(_stage: str, answer: Answer) -> Reply:
    return answer[0], json.dumps({**json.loads(answer[1]), "seed_commitment": "0" * 64}), b""


@pytest.mark.parametrize("tamper", [useless_shares, another_seed])
def test_who_deals_what_gives_no_secret_burns_one_attempt_and_takes_no_further_part(
    tamper: Tamper, registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    """Also for a process that goes on with the run, and under a new address; the others have their rounds."""
    settings = make_settings(privacy={**PAID, "spare_rounds": 2}, clients=4, rounds=2)
    nodes = nodes_of(make_profile, 4)
    asked: list[str] = []
    answered: list[str] = []

    def lying(stage: str, answer: Answer) -> Reply:
        asked.append(stage)
        return at(SHARE, tamper)(stage, answer)

    def cut_off(stage: str, answer: Answer) -> Reply:
        answered.append(stage)
        if answered.count(UNMASK) == 3:  # in the second round
            raise SystemExit
        return answer

    nodes[3].sums, nodes[0].sums = lying, cut_off
    with pytest.raises(SystemExit):
        federate(nodes, settings, registry)
    nodes[0].sums = lambda _stage, answer: answer
    assert [each.name for each in registry.clients(RUN) if each.excluded] == ["client-3"]
    told = list(nodes[3].told)
    federate([*nodes[:3], Node(nodes[3].profile), nodes[3]], settings, registry)
    assert registry.run(RUN).state == "finished"
    assert steps(registry) == [*burnt(1, 1), *released(1, 2), *burnt(2, 1), *released(2, 2)]
    assert asked == list(STAGES), "of the first attempt"
    assert len(told) == 1
    assert set(nodes[3].told) == set(told)
    assert [each.name for each in registry.clients(RUN) if each.excluded] == ["client-3"]


def test_a_burnt_attempt_that_somebody_was_left_out_for_is_tried_again_though_a_later_round_is_lost(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    """The run has promised two sums to its clients, and asks for no third."""
    nodes = nodes_of(make_profile, 4)
    nodes[3].sums = at(SHARE, useless_shares)
    settings = make_settings(privacy={**PAID, "spare_rounds": 0}, clients=4, rounds=2)
    with pytest.raises(PrivacyBudgetExhausted, match="promised its clients to ask for 2 sums, and has"):
        federate(nodes, settings, registry)
    assert [version.ref for version in registry.versions("toy")] == ["toy/1"]
    assert steps(registry) == [*burnt(1, 1), *released(1, 2)]


def test_when_too_few_are_left_the_run_ends_before_more_is_paid(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    nodes = nodes_of(make_profile, 4)
    for node in nodes[2:]:
        node.sums = at(SHARE, useless_shares)
    settings = make_settings(privacy={**PAID, "spare_rounds": 3}, clients=4)
    with pytest.raises(NotEnoughClients, match="takes 3 clients at least, and 2 were connected"):
        federate(nodes, settings, registry)
    assert [each.name for each in registry.clients(RUN) if each.excluded] == ["client-2", "client-3"]
    assert steps(registry) == burnt(1, 1)


def test_while_too_few_are_connected_nothing_is_asked_and_nothing_paid(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    privacy = {"trust": "distributed", "accountant": "rdp", "secure_sum": {"least_survivors": 3}}
    settings = make_settings(privacy=privacy)
    settings = settings.model_copy(update={"cohort": settings.cohort.model_copy(update={"min_clients": 2})})
    with pytest.raises(NotEnoughClients, match="takes 3 clients at least, and 2 were connected"):
        federate(nodes_of(make_profile, 2), settings, registry)
    assert registry.ledger("toys") == []


def test_a_grid_too_coarse_for_the_model_is_refused_before_anybody_is_asked(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    privacy = {
        "trust": "distributed", "accountant": "rdp", "noise_multiplier": 100.0, "secure_sum": {"fraction_bits": 2},
    }  # fmt: skip
    nodes = nodes_of(make_profile, 3)
    with pytest.raises(ConfigError, match="raise fraction_bits"):
        federate(nodes, make_settings(privacy=privacy), registry)
    assert not any(node.invited for node in nodes)


# What the coordinator comes to know


@dataclass
class Spy:
    """All that clients sent, and what each of them would have sent without masks."""

    received: dict[str, list[Answer]] = field(default_factory=dict)
    vectors: list[NDArray[np.int64]] = field(default_factory=list)
    terms: list[Terms] = field(default_factory=list)

    def on(self, node: Node) -> Node:
        def keep(_stage: str, answer: Answer) -> Reply:
            self.received.setdefault(node.profile.name, []).append(answer)
            return answer

        node.sums = keep
        return node

    def words(self, name: str, place: int = 0) -> NDArray[np.uint32]:
        payloads = [payload for _, _, payload in self.received[name] if payload]
        return np.frombuffer(payloads[place], dtype=f"<u{self.terms[0].modulus_bits // 8}")


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    """Watch the real thing: every vector, once without its noise and once with it, is noted before it is masked."""
    spy, real = Spy(), fixed_point.contribution

    def contribution(update: Mapping[str, torch.Tensor], terms: Terms, noise: SecureRandom) -> NDArray[np.int64]:
        spy.terms.append(terms)
        spy.vectors += [fixed_point.rounded(update, terms), real(update, terms, noise)]
        return spy.vectors[-1]

    monkeypatch.setattr(client_side, "contribution", contribution)
    return spy


def pieces(vector: NDArray[np.int64], terms: Terms) -> set[bytes]:
    """Parts of a vector as any of the types in which it could have been written down."""
    floats = vector * 2.0**-terms.fraction_bits
    forms = [vector.astype(kind) for kind in ("<i8", "<i4")] + [floats.astype(kind) for kind in ("<f8", "<f4")]
    starts = [at for at in range(vector.size - 8) if np.count_nonzero(vector[at : at + 8]) == 8][::29]
    return {form[at : at + 8].tobytes() for form in forms for at in starts}


def everything(home: Path, log: str, spy: Spy) -> Iterator[bytes]:
    """Yield all that the coordinator wrote and all that it received."""
    yield log.encode()
    for path in home.rglob("*"):
        if path.is_file():
            yield path.read_bytes()
    for answers in spy.received.values():
        for _, text, payload in answers:
            yield text.encode()
            yield payload


def holds(content: bytes, planted: Sequence[set[bytes]]) -> bool:
    return any(piece in content for each in planted for piece in each)


def uniformity(words: NDArray[np.uint32]) -> float:
    """P-value of the worst half octet of the words, of a chi-square test against fair ones."""
    octets = np.frombuffer(words.tobytes(), dtype=np.uint8).reshape(-1, words.itemsize)
    halves = np.concatenate([octets & 15, octets >> 4], axis=1)
    return min(float(stats.chisquare(np.bincount(each, minlength=16)).pvalue) for each in halves.T)


def test_nothing_that_was_written_or_received_holds_a_contribution(
    tmp_path: Path,
    spy: Spy,
    make_settings: MakeSettings,
    make_profile: MakeProfile,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each client's vector, with and without its noise share, as integers and as numbers, is searched for."""
    configure_logs()
    caplog.set_level(logging.DEBUG)
    nodes = [spy.on(node) for node in nodes_of(make_profile, 3)]
    privacy = {"trust": "distributed", "accountant": "rdp", "noise_multiplier": 1.0}
    with open_registry(tmp_path / "home") as registry:
        federate(nodes, make_settings(privacy=privacy, rounds=2), registry)
        assert registry.submissions(RUN) == []
        assert {each.cohort for each in registry.rounds(RUN)} == {()}
    planted = [pieces(vector, spy.terms[0]) for vector in spy.vectors]
    assert len(planted) == 12
    assert all(len(each) > 8 for each in planted)
    assert not any(holds(content, planted) for content in everything(tmp_path / "home", caplog.text, spy))
    for vector in (spy.vectors[0].astype("<i8"), spy.vectors[1].astype("<i4")):
        assert holds(b"\0" + vector.tobytes(), planted), "or the search finds nothing"


def test_what_a_client_sends_looks_the_same_whatever_it_has(
    registry: Registry, spy: Spy, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    """The words are uniform, and say no more in the second round, where the same is said again, than in the first."""
    nodes = [spy.on(node) for node in nodes_of(make_profile, 3)]
    privacy = {"trust": "distributed", "accountant": "rdp", "noise_multiplier": 1.0}
    federate(nodes, make_settings(privacy=privacy, rounds=2, learning_rate=1e-30), registry)
    for name in ("client-0", "client-1", "client-2"):
        first, second = spy.words(name), spy.words(name, 1)
        for words in (first, second, first - second):
            assert uniformity(words) > UNLIKELY
    assert uniformity(spy.vectors[1].astype(np.uint32)) < UNLIKELY, "or the test finds nothing"


def test_the_only_survivor_of_a_round_is_as_hidden_as_any(
    registry: Registry, spy: Spy, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    """Others fall silent after they sealed their shares: no sum comes about, and what was sent stays masked."""
    nodes = [spy.on(node) for node in nodes_of(make_profile, 3)]
    nodes[1].sums = nodes[2].sums = silent_from(MASK)
    privacy = {"trust": "distributed", "accountant": "rdp", "noise_multiplier": 1.0}
    with pytest.raises(NotEnoughClients, match="got 1; the round is burnt"):
        federate(nodes, make_settings(privacy=privacy, deadline_s=3.0), registry)
    assert [len(spy.received[name]) for name in spy.received] == [3], "nobody was asked to unmask"
    words, vector = spy.words("client-0"), spy.vectors[1]
    assert uniformity(words) > UNLIKELY
    alike = np.corrcoef(words.view(np.int32), vector)[0, 1]
    assert abs(alike) < 5.5 / np.sqrt(vector.size)
    assert registry.versions("toy") == []


def test_the_ledger_pays_no_less_than_the_sum_costs(
    registry: Registry, spy: Spy, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    settings = make_settings(privacy={"trust": "distributed", "accountant": "rdp", "epsilon": 8.0})
    federate([spy.on(node) for node in nodes_of(make_profile, 3)], settings, registry)
    (paid, _) = registry.ledger("toys")
    for terms in spy.terms:
        assert paid.noise_multiplier <= effective_noise_multiplier(terms) < paid.noise_multiplier * (1 + 1e-4)
    assert len({terms.round_id for terms in spy.terms}) == 1
    assert 7.8 < paid.epsilon <= 8.0


def test_what_is_certified_says_what_it_rests_on_and_counts_no_sampling(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    settings = make_settings(privacy={"trust": "distributed", "accountant": "rdp", "epsilon": 8.0})
    federate(nodes_of(make_profile, 3), settings, registry)
    told = certify(registry.resolve("toy/1"), whole_ledger(registry, "toys"))
    assert (told.adjacency, told.accountant, told.sample_rate) == ("zero-out-one", "rdp", 1.0)
    assert told.epsilon == told.epsilon_without_sampling == pytest.approx(plan_of(settings).epsilon_after(1))
    assert any("at least 2 clients are in every sum" in each for each in told.assumptions)
    assert not any("trusted" in each for each in told.assumptions)


def test_sums_of_shares_and_central_sums_have_budgets_of_their_own(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    privacy = {"trust": "distributed", "accountant": "rdp", "noise_multiplier": 8.0, "epsilon": 1e6}
    federate(nodes_of(make_profile, 3), make_settings(privacy=privacy), registry)
    central = {"noise_multiplier": 8.0, "epsilon": 1e6}
    for accountant in ("prv", "rdp"):
        with pytest.raises(ConfigError, match="is another promise"):
            check_privacy(registry, make_settings(privacy={**central, "accountant": accountant}), run_id="run-2")


def test_simulated_clients_are_refused_as_they_keep_no_secrets(registry: Registry, make_settings: MakeSettings) -> None:
    settings = make_settings(privacy={"trust": "distributed", "accountant": "rdp"})
    simulation = settings.simulation.model_copy(update={"ranks": (4, 8)})
    settings = settings.model_copy(update={"simulation": simulation})
    with pytest.raises(ConfigError, match="simulate trust='central'"):
        simulate_run(registry, settings, clients=3, show=lambda _run: None)
    assert registry.runs() == []
