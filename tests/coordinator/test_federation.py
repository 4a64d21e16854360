"""Whole runs in one process: the real round loop, registry and trainers, on a grid whose nodes can misbehave."""

import itertools
import json
import logging
import math
import pickle
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from safetensors.torch import load, save
from tests.coordinator.grid import Answer, InProcessGrid, Node, Reply, Tamper
from torch import Tensor
from torch.testing import assert_close

from pomona.adapters import AdapterUpdate, AdapterWeights, LoraFactors
from pomona.aggregation.verify import Enrolment
from pomona.client.trainer import Profile
from pomona.coordinator import membership, replies
from pomona.coordinator.beginning import begin_run
from pomona.coordinator.enrolment import Roster
from pomona.coordinator.federation import run_federation
from pomona.coordinator.strategy import LoraStrategy
from pomona.datasets import load_dataset
from pomona.errors import AdapterNotFound, BlobCorrupt, BlobWriteError, ConfigError, NotEnoughClients
from pomona.lora_model import AdaptedModel
from pomona.payload import read_header
from pomona.protocol import TrainRequest
from pomona.seeds import fresh_a, orthonormal_a
from pomona.settings import RunSettings
from pomona.storage.opening import open_registry
from pomona.storage.records import Submission
from pomona.storage.registry import Registry
from pomona.strategies import BY_NAME as FACTS
from pomona.wire import Factor, decode_update, decode_weights, encode_update, encode_weights

pytestmark = pytest.mark.usefixtures("quick_polls")

LABELS = ("animal", "food", "tool", "weather")
RUN = "run-1"

Tensors = dict[str, Tensor]
Facts = dict[str, object]
MakeProfile = Callable[..., Profile]


MakeSettings = Callable[..., RunSettings]


@pytest.fixture
def make_settings(tiny_bert: Path, toy_data: Path) -> MakeSettings:
    """Return a maker of settings: sections as keywords, over small defaults."""

    def make(*, rounds: int = 1, seed: int = 3, **sections: Mapping[str, object]) -> RunSettings:
        defaults: dict[str, dict[str, object]] = {
            "model": {"base": str(tiny_bert), "max_length": 16},
            "data": {"source": str(toy_data)},
            "cohort": {"join_timeout_s": 5.0, "round_deadline_s": 30.0},
            "training": {"batch_size": 8, "max_steps": 1, "learning_rate": 1e-2},
            "aggregation": {"max_rank": 16},
            "simulation": {"ranks": (4,)},
        }
        merged = {name: {**defaults.get(name, {}), **sections.get(name, {})} for name in {*defaults, *sections}}
        return RunSettings.model_validate({"name": "toy", "rounds": rounds, "seed": seed, **merged})

    return make


def by_client(registry: Registry, number: int) -> dict[str, Submission]:
    return {each.client: each for each in registry.submissions(RUN, number)}


def weights_of(registry: Registry, ref: str) -> AdapterWeights:
    return decode_weights(registry.payload(ref))[0]


def assert_equal(one: AdapterWeights, other: AdapterWeights) -> None:
    assert one.layers.keys() == other.layers.keys()
    assert one.heads.keys() == other.heads.keys()
    for name, factors in one.layers.items():
        assert torch.equal(factors.a, other.layers[name].a)
        assert torch.equal(factors.b, other.layers[name].b)
    assert all(torch.equal(tensor, other.heads[name]) for name, tensor in one.heads.items())


# What a run gives


def test_three_rounds_learn_and_publish_three_versions(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile, tiny_bert: Path, toy_data: Path
) -> None:
    """The whole way of an update, with four clients of four ranks."""
    settings = make_settings(
        rounds=3, training={"max_steps": 0, "local_epochs": 4, "learning_rate": 2e-2, "head_learning_rate": 2e-2}
    )
    nodes = [Node(make_profile(i, count=4, rank=rank)) for i, rank in enumerate((2, 3, 4, 8))]
    versions = run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN)

    run = registry.run(RUN)
    assert (run.state, run.reason) == ("finished", "")
    losses = [run.initial_metrics["loss"], *(version.metrics["loss"] for version in versions)]
    assert losses == sorted(losses, reverse=True)
    assert versions[-1].metrics["accuracy"] > run.initial_metrics["accuracy"] + 0.5

    assert [version.ref for version in versions] == ["toy/1", "toy/2", "toy/3"]
    node, refs = registry.lineage("toy/3"), ["toy/3"]
    while node.parents:
        (node,) = node.parents
        refs.append(node.version.ref)
    assert refs == ["toy/3", "toy/2", "toy/1"]
    for number, version in enumerate(versions, start=1):
        shares = [each.weight or 0.0 for each in registry.submissions(RUN, number)]
        assert shares == [0.25] * 4
        assert math.fsum(shares) == 1.0
        assert version.metrics["retained_energy_min"] <= version.metrics["retained_energy_mean"] <= 1.0
        assert (version.exactness == "exact") == (version.retained_energy >= 1.0)
        assert 1 <= version.rank <= 16

    model = AdaptedModel(tiny_bert, task="classification", labels=LABELS)
    held_out = load_dataset(toy_data, split="validation")
    model.attach(weights_of(registry, "toy/3"))
    scores = model.score(model.encode(held_out.texts, held_out.labels, max_length=16))
    assert scores.accuracy == versions[-1].metrics["accuracy"]
    assert scores.loss == pytest.approx(versions[-1].metrics["loss"], rel=1e-6)


def test_a_language_model_learns_the_same_way(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile, tiny_llama: Path
) -> None:
    """A task without labels and heads takes another path through every record."""
    settings = make_settings(rounds=2, model={"base": str(tiny_llama)}, training={"max_steps": 6})
    settings = settings.model_copy(update={"task": "causal-lm"})
    nodes = [Node(make_profile(i, count=2, rank=rank, model=tiny_llama)) for i, rank in enumerate((2, 4))]
    versions = run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN)
    losses = [registry.run(RUN).initial_metrics["loss"], *(version.metrics["loss"] for version in versions)]
    assert losses == sorted(losses, reverse=True)
    assert losses[2] < losses[0] - 0.1
    assert not weights_of(registry, "toy/2").heads


def test_the_published_adapter_is_the_weighted_sum_of_what_was_recorded(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    """In float64 from the bytes on disk: wrong weights, scales or a lost client would show."""
    settings = make_settings(rounds=2, training={"alpha_per_rank": 3.0})
    nodes = [Node(make_profile(0, count=2, rank=2)), Node(make_profile(0, count=5, rank=5, name="small"))]
    run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN)
    for number in (1, 2):
        sent = [decode_update(registry.blobs.get(each.sha256)) for each in registry.submissions(RUN, number)]
        counts = [update.num_examples for update in sent]
        assert sorted(counts) == [20, 48]
        published = weights_of(registry, f"toy/{number}")
        before = weights_of(registry, f"toy/{number - 1}").layers if number > 1 else {}
        for name, factors in published.layers.items():
            terms = [
                count / sum(counts) * 3.0 * (u.weights.layers[name].b.double() @ u.weights.layers[name].a.double())
                for u, count in zip(sent, counts, strict=True)
            ]
            expected = torch.stack(terms).sum(0)
            if name in before:
                expected = expected + before[name].delta().double()
            assert_close(factors.delta().double(), expected, rtol=1e-4, atol=1e-7)
        for name, head in published.heads.items():
            mean = sum(n / sum(counts) * u.weights.heads[name].double() for u, n in zip(sent, counts, strict=True))
            assert_close(head.double(), mean, rtol=1e-6, atol=1e-8)


@dataclass(frozen=True)
class _Heard:
    """What one client was asked and answered in a round, read from the bytes."""

    request: TrainRequest
    given: dict[str, LoraFactors]
    trained: dict[str, LoraFactors]  # scaled

    def effective(self, name: str) -> Tensor:
        """What the client's model adds to the base after training."""
        total = self.trained[name].delta().double()
        if name in self.given:
            frozen = self.given[name]
            at = self.request.training.layer_rank(name, self.request.trainable) if self.request.trainable else 0
            total = total + frozen.b[:, at:].double() @ frozen.a[at:].double()
        return total


def _heard(request: str, payload: bytes, answer: Answer, shapes: Mapping[str, tuple[int, int]]) -> _Heard:
    asked = TrainRequest.model_validate_json(request)
    draw = orthonormal_a if asked.initial == "orthonormal" else fresh_a
    ranks = {name: asked.training.layer_rank(name, asked.rank) for name in shapes}
    drawn = {name: draw(name, ranks[name], in_, seed=asked.adapter_seed) for name, (_, in_) in shapes.items()}
    given = decode_weights(payload, known=drawn, known_factor="a" if asked.draws_a else None)[0].layers
    scale = asked.training.alpha_per_rank
    start_a = drawn | ({name: given[name].a[: ranks[name]] for name in given} if asked.trainable else {})
    start_b = {name: given[name].b[:, : ranks[name]] / scale for name in given}
    if asked.trains == "both":
        update = decode_update(answer[2])
    elif asked.trains == "b":
        update = decode_update(answer[2], known=start_a, known_factor="a")
    else:
        update = decode_update(answer[2], known=start_b, known_factor="b")
    scaled = {name: replace(factors, scale=scale) for name, factors in update.weights.layers.items()}
    return _Heard(asked, dict(given), scaled)


@pytest.mark.parametrize("name", sorted(FACTS))
def test_every_strategy_trains_over_the_wire(
    name: str, registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile, tiny_bert: Path
) -> None:
    """From the bytes alone: exact strategies publish the mean of what the clients' models became, others do not."""
    facts = FACTS[name]  # type: ignore[index]
    shapes = AdaptedModel(tiny_bert, task="classification", labels=LABELS).manifest.layers
    told: dict[int, list[tuple[str, Answer]]] = {}

    def listen(request: str, answer: Answer) -> Reply:
        told.setdefault(json.loads(request)["round_number"], []).append((request, answer))
        return answer

    ranks = (2, 4, 3) if facts.heterogeneous_ranks else (3, 3, 3)
    nodes = [Node(make_profile(i, count=3, rank=rank), trains=listen) for i, rank in enumerate(ranks)]
    limits = {"strategy": name, "max_rank": 32} | ({} if facts.heterogeneous_ranks else {"rank": 3})
    settings = make_settings(rounds=3, aggregation=limits, training={"max_steps": 2, "alpha_per_rank": 3.0})
    versions = run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN)
    for number, version in enumerate(versions, start=1):
        assert {each.status for each in by_client(registry, number).values()} == {"accepted"}
        assert version.exactness in (("exact", "truncated") if facts.exact else ("approximate",))
        heard = [
            _heard(request, node.asked[number - 1][1], answer, shapes)
            for node, (request, answer) in zip(nodes, told[number], strict=True)
        ]
        published = weights_of(registry, version.ref).layers
        for layer in shapes:
            mean = torch.stack([each.effective(layer) for each in heard]).mean(0)
            error = float((published[layer].delta().double() - mean).norm() / mean.norm())
            assert (error < 1e-4) if facts.exact else (error > 1e-3), (layer, error)
    sent = {number: {key.split(".")[0] for key in load(told[number][0][1][2])} - {"head"} for number in (1, 2)}
    halves = {"ffa": ("lora_B", "lora_B"), "ffa-nested": ("lora_B", "lora_B"), "rolora": ("lora_B", "lora_A")}
    for number in (1, 2):
        assert sent[number] == ({halves[name][number - 1]} if name in halves else {"lora_A", "lora_B"})


HALVED = {"query": 0.5, "output.dense": 2.0}


def _rank_by_hand(layer: str, rank: int) -> int:
    return rank // 2 if layer.endswith(".query") else 2 * rank if layer.endswith(".output.dense") else rank


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("flora-bounded", {}),
        ("flora-bounded", {"warm_start": True}),
        ("ffa-nested", {}),
        ("ffa", {"rank": 4}),
        ("rolora", {"rank": 4}),
        ("fedex", {"rank": 4}),
        ("hetlora", {}),
        ("flexlora", {}),
    ],
)
def test_layers_train_the_ranks_of_the_pattern_over_the_wire(
    name: str,
    options: dict[str, object],
    registry: Registry,
    make_settings: MakeSettings,
    make_profile: MakeProfile,
    tiny_bert: Path,
) -> None:
    """Both ends work the ranks out for themselves; where they differ, every update is refused or means another."""
    shapes = AdaptedModel(tiny_bert, task="classification", labels=LABELS).manifest.layers
    told: dict[int, list[tuple[str, Answer]]] = {}

    def listen(request: str, answer: Answer) -> Reply:
        told.setdefault(json.loads(request)["round_number"], []).append((request, answer))
        return answer

    ranks = (4, 4) if "rank" in options else (2, 4)
    nodes = [Node(make_profile(i, count=2, rank=rank), trains=listen) for i, rank in enumerate(ranks)]
    training = {"max_steps": 2, "alpha_per_rank": 3.0, "rank_pattern": HALVED}
    limits = {"strategy": name, "max_rank": 32, **options}
    settings = make_settings(rounds=3, aggregation=limits, training=training)
    versions = run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN)
    for number, version in enumerate(versions, start=1):
        assert {each.status for each in by_client(registry, number).values()} == {"accepted"}
        for rank, (_, answer) in zip(ranks, told[number], strict=True):
            sent = {key.split(".", 1)[1]: t for key, t in load(answer[2]).items() if key.startswith("lora_B.")}
            assert all(t.shape[1] == _rank_by_hand(layer, rank) for layer, t in sent.items())
            assert not sent or sent.keys() == shapes.keys()
        heard = [
            _heard(request, node.asked[number - 1][1], answer, shapes)
            for node, (request, answer) in zip(nodes, told[number], strict=True)
        ]
        published = weights_of(registry, version.ref).layers
        for layer in shapes:
            mean = torch.stack([each.effective(layer) for each in heard]).mean(0)
            error = float((published[layer].delta().double() - mean).norm() / mean.norm())
            assert not FACTS[name].exact or error < 1e-4, (layer, error)  # type: ignore[index]


def test_large_layers_of_a_pattern_are_not_too_many_bytes(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    """The limit on a payload is that of the ranks that were asked."""
    large = {"rank_pattern": dict.fromkeys(("query", "key", "value", "dense"), 16.0)}
    settings = make_settings(aggregation={"max_rank": 128}, training=large)
    run_federation(InProcessGrid([Node(make_profile(rank=128))]), settings, registry, run_id=RUN)
    (sent,) = registry.submissions(RUN)
    assert (sent.status, sent.reason) == ("accepted", "")
    assert len(registry.blobs.get(sent.sha256)) > 3 << 20


def test_a_pattern_that_names_no_layer_ends_the_run_before_it_asks_anybody(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    node = Node(make_profile())
    settings = make_settings(training={"rank_pattern": {"qurey": 0.5}})
    with pytest.raises(ConfigError, match=r"training.rank_pattern names 'qurey', which no adapted layer ends with; .*"):
        run_federation(InProcessGrid([node]), settings, registry, run_id=RUN)
    assert (registry.run(RUN).state, node.invited) == ("failed", 0)


@pytest.mark.parametrize("rslora", [False, True])
def test_with_a_fixed_alpha_each_client_has_the_scale_of_its_rank(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile, *, rslora: bool
) -> None:
    """One scale for all, or that of another rank, would weigh clients by it."""
    ranks = (2, 4, 8)
    nodes = [Node(make_profile(i, count=i + 3, rank=rank)) for i, rank in enumerate(ranks)]
    training = {"alpha": 8.0, "rslora": rslora, "max_steps": 2}
    run_federation(InProcessGrid(nodes), make_settings(rounds=2, training=training), registry, run_id=RUN)
    for number in (1, 2):
        sent = by_client(registry, number)
        assert {each.status for each in sent.values()} == {"accepted"}
        updates = [decode_update(registry.blobs.get(sent[f"client-{i}"].sha256)) for i in range(3)]
        total = sum(update.num_examples for update in updates)
        published = weights_of(registry, f"toy/{number}").layers
        before = weights_of(registry, "toy/1").layers if number == 2 else {}
        for name, factors in published.items():
            expected = torch.zeros_like(factors.delta(), dtype=torch.float64)
            for update, rank in zip(updates, ranks, strict=True):
                trained, scale = update.weights.layers[name], 8.0 / (math.sqrt(rank) if rslora else rank)
                expected += update.num_examples / total * scale * trained.b.double() @ trained.a.double()
            if name in before:
                expected += before[name].delta().double()
            assert_close(factors.delta().double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pattern", [{}, HALVED], ids=["equal", "pattern"])
def test_a_client_whose_tail_shrank_goes_on_with_less(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile, pattern: dict[str, float]
) -> None:
    """In the first round B is zero, the second makes the tail smaller, and from the third on the rank is."""
    sizes: list[int] = []

    def weigh(_request: str, answer: Answer) -> Reply:
        sizes.append(len(answer[2]))
        return answer

    nodes = [Node(make_profile(0, count=2, rank=8), trains=weigh), Node(make_profile(1, count=2, rank=1))]
    limits = {"strategy": "hetlora", "self_pruning": {"penalty": 10.0, "decay": 0.5}}
    settings = make_settings(rounds=5, aggregation=limits, training={"max_steps": 3, "rank_pattern": pattern})
    run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN)
    asked = [[request.rank for request, _ in node.asked] for node in nodes]
    assert asked[0] == [8, 8, 4, 2, 1]
    assert asked[1] == [1] * 5
    assert sizes[1] > sizes[2] > sizes[3] > sizes[4]
    given = [len(payload) for _, payload in nodes[0].asked]
    assert given[1] > given[2] > given[3] > given[4]
    for number in range(1, 6):
        assert {each.status for each in by_client(registry, number).values()} == {"accepted"}


def test_without_self_pruning_no_rank_shrinks(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    node = Node(make_profile(rank=8))
    settings = make_settings(rounds=4, aggregation={"strategy": "hetlora"}, training={"max_steps": 3})
    run_federation(InProcessGrid([node]), settings, registry, run_id=RUN)
    assert [(request.rank, request.tail_penalty) for request, _ in node.asked] == [(8, 0.0)] * 4


def test_ranks_follow_the_schedule(registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile) -> None:
    nodes = [Node(make_profile(i, count=2, rank=rank)) for i, rank in enumerate((2, 8))]
    limits = {"rank_schedule": [[2, 4], [3, 1]], "max_rank": 16}
    run_federation(InProcessGrid(nodes), make_settings(rounds=3, aggregation=limits), registry, run_id=RUN)
    asked = [[request.rank for request, _ in node.asked] for node in nodes]
    assert asked == [[2, 2, 1], [8, 4, 1]]
    for number in (1, 2, 3):
        assert {each.status for each in by_client(registry, number).values()} == {"accepted"}


def _scaled_up(factor: float) -> Tamper:
    """An attacker whose update is its honest one, many times over and the other way."""

    def tamper(_request: str, answer: Answer) -> Reply:
        update = decode_update(answer[2])
        layers = {name: replace(each, b=-factor * each.b) for name, each in update.weights.layers.items()}
        weights = AdapterWeights(layers=layers, heads=update.weights.heads)
        return answer[0], answer[1], encode_update(replace(update, weights=weights))

    return tamper


@pytest.fixture(scope="module")
def honest_norms() -> dict[bool, float]:
    """How large the sum of honest clients is, with and without warm starts: it is the same for every defence."""
    return {}


@pytest.mark.parametrize(
    ("defence", "status"),
    [
        ({"kind": "norm-bounding"}, "accepted"),
        ({"kind": "multi-krum", "attackers": 1}, "quarantined"),
        ({"kind": "trimmed-mean", "attackers": 1}, "quarantined"),
        ({"kind": "geometric-median"}, "accepted"),
        ({"kind": "fltrust"}, "quarantined"),
    ],
)
@pytest.mark.parametrize("warm", [False, True])
def test_a_poisoned_update_moves_the_sum_little_and_is_named(
    defence: dict[str, object],
    status: str,
    registry: Registry,
    tmp_path: Path,
    make_settings: MakeSettings,
    make_profile: MakeProfile,
    toy_data: Path,
    honest_norms: dict[bool, float],
    *,
    warm: bool,
) -> None:
    """One client of five sends 300 times its update, reversed; without a defence it decides the sum."""
    limits, cohort = {"warm_start": warm}, {"min_replies": 5, "join_timeout_s": 5.0}

    def nodes(*, attacked: bool) -> list[Node]:
        made = [Node(make_profile(i, count=2, rank=rank)) for i, rank in enumerate((2, 4, 3, 4, 2))]
        return [*made[:4], replace(made[4], trains=_scaled_up(300.0))] if attacked else made

    def norm(of: AdapterWeights) -> float:
        return math.sqrt(sum(float(each.delta().norm()) ** 2 for each in of.layers.values()))

    if warm not in honest_norms:
        plain = make_settings(rounds=2, cohort=cohort, aggregation=limits)
        with open_registry(tmp_path / "honest") as other:
            run_federation(InProcessGrid(nodes(attacked=False)), plain, other, run_id=RUN)
            honest_norms[warm] = norm(weights_of(other, "toy/2"))
        with open_registry(tmp_path / "plain") as other:
            run_federation(InProcessGrid(nodes(attacked=True)), plain, other, run_id=RUN)
            assert norm(weights_of(other, "toy/2")) > 10 * honest_norms[warm]
    if defence["kind"] == "fltrust":
        clean = tmp_path / "clean.csv"
        clean.write_text(
            "".join(r for r in toy_data.read_text().splitlines(keepends=True) if not r.endswith(",test\n"))
        )
        defence = {**defence, "trusted_data": str(clean)}
    defended = make_settings(rounds=2, cohort=cohort, aggregation=limits, defence=defence)
    run_federation(InProcessGrid(nodes(attacked=True)), defended, registry, run_id=RUN)
    assert norm(weights_of(registry, "toy/2")) < 2.5 * honest_norms[warm]
    for number in (1, 2):
        found = by_client(registry, number)
        assert found["client-4"].status == status
        assert found["client-4"].reason
        assert (found["client-4"].weight or 0.0) < 0.05
        assert {each.status for name, each in found.items() if name != "client-4"} == {"accepted"}
        norms = {name: each.spectrum["norm"] for name, each in found.items()}
        assert norms["client-4"] > 10 * max(norm for name, norm in norms.items() if name != "client-4")


def test_momentum_carries_over_between_rounds(
    tmp_path: Path, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    """From two runs alike but for the optimiser: the second version has the first change once more, by beta."""
    found = []
    for number, optimizer in enumerate(({"kind": "fedavg"}, {"kind": "fedavgm", "momentum": 0.5})):
        with open_registry(tmp_path / str(number)) as registry:
            settings = make_settings(rounds=2, aggregation={"server_optimizer": optimizer, "max_rank": 32})
            run_federation(InProcessGrid([Node(make_profile(0, count=2))]), settings, registry, run_id=RUN)
            found.append([weights_of(registry, f"toy/{version}").layers for version in (1, 2)])
    plain, carried = found
    for name in plain[0]:
        first = plain[0][name].delta()
        assert_close(carried[0][name].delta(), first, rtol=1e-4, atol=1e-7)
        assert_close(carried[1][name].delta(), plain[1][name].delta() + 0.5 * first, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["flora-bounded", "ffa-nested", "hetlora"])
def test_the_order_in_which_replies_land_does_not_matter(
    tmp_path: Path, make_settings: MakeSettings, make_profile: MakeProfile, name: str
) -> None:
    """The fastest client would decide about the last bits, and no run could be reproduced."""
    payloads = []
    settings = make_settings(rounds=2, aggregation={"strategy": name})
    for number, order in enumerate((lambda r: r, lambda r: r[::-1], lambda r: r[1:] + r[:1])):
        nodes = [Node(make_profile(i, count=3, rank=rank)) for i, rank in enumerate((2, 4, 3))]
        with open_registry(tmp_path / str(number)) as registry:
            versions = run_federation(InProcessGrid(nodes, order=order), settings, registry, run_id=RUN)
            payloads.append([(registry.payload(version.ref), version.metrics) for version in versions])
    assert payloads[0] == payloads[1] == payloads[2]


@pytest.mark.parametrize(
    ("name", "alive"),
    [
        ("flora-bounded", [0, 0, 0, 0]),
        ("ffa-nested", [0, 0, 0, 0]),
        ("hetlora", [0, 1, 2, 3]),
    ],
)
def test_a_coordinator_holds_no_update_while_it_reads_the_next(
    registry: Registry,
    make_settings: MakeSettings,
    make_profile: MakeProfile,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    alive: list[int],
) -> None:
    """A thousand clients would not fit in memory; strategies that average factors need them all when a round closes."""
    seen: list[weakref.ref[Tensor]] = []
    found: list[int] = []

    def counted(payload: bytes, *, known: Tensors, known_factor: Factor | None) -> AdapterUpdate:
        found.append(sum(ref() is not None for ref in seen))
        update = decode_update(payload, known=known, known_factor=known_factor)
        seen.append(weakref.ref(update.weights.layers[POOLER].b))
        return update

    monkeypatch.setattr("pomona.coordinator.strategy.decode_update", counted)
    nodes = [Node(make_profile(i, count=4, rank=2)) for i in range(4)]
    settings = make_settings(rounds=2, aggregation={"strategy": name})
    run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN)
    assert found == 2 * [0, 0, 0, 0, *alive]


@pytest.mark.parametrize("how", ["changed", "gone"])
@pytest.mark.parametrize("name", ["flora-bounded", "hetlora"])
def test_an_update_that_changes_on_disk_before_the_round_closes_ends_the_run(
    registry: Registry,
    make_settings: MakeSettings,
    make_profile: MakeProfile,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    how: str,
) -> None:
    """It was verified when it came; what is read later must be the same bytes."""
    close = LoraStrategy.close

    def spoil_and_close(strategy: LoraStrategy) -> object:
        blob = registry.blobs.path(by_client(registry, 1)["client-1"].sha256)
        blob.unlink()
        if how == "changed":
            blob.write_bytes(registry.blobs.get(by_client(registry, 1)["client-0"].sha256))
        return close(strategy)

    monkeypatch.setattr(LoraStrategy, "close", spoil_and_close)
    nodes = [Node(make_profile(i, count=2, rank=2)) for i in range(2)]
    with pytest.raises(BlobCorrupt, match="restore it from a backup"):
        run_federation(InProcessGrid(nodes), make_settings(aggregation={"strategy": name}), registry, run_id=RUN)
    run = registry.run(RUN)
    assert (run.state, run.reason[:11]) == ("failed", "BlobCorrupt")
    assert registry.rounds(RUN)[0].state == "failed"
    assert registry.versions("toy") == []


@pytest.mark.parametrize("merged", [False, True])
def test_what_truncation_lost_is_published_with_the_version(
    registry: Registry,
    make_settings: MakeSettings,
    make_profile: MakeProfile,
    monkeypatch: pytest.MonkeyPatch,
    *,
    merged: bool,
) -> None:
    """The share of the dense sum; exact where the stack fits, estimated where merges dropped a part of it before."""
    if merged:  # the layers are so small that they would be summed densely
        monkeypatch.setattr("pomona.aggregation.strategies.folding.guard_rank", lambda max_rank: max_rank + 1)
    nodes = [Node(make_profile(i, count=6, rank=2)) for i in range(6)]
    training = {"learning_rate": 0.1, "max_steps": 4, "batch_size": 4}
    settings = make_settings(aggregation={"max_rank": 2}, training=training, simulation={"ranks": (2,)})
    (version,) = run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN)
    updates = [decode_update(registry.blobs.get(each.sha256)).weights for each in registry.submissions(RUN, 1)]
    retained = []
    for name, factors in weights_of(registry, "toy/1").layers.items():
        total = sum(2.0 / 6 * each.layers[name].b.double() @ each.layers[name].a.double() for each in updates)
        assert isinstance(total, Tensor)
        retained.append(1.0 - float((total - factors.delta().double()).norm() / total.norm()) ** 2)
        best = torch.linalg.svdvals(total).square()
        assert retained[-1] == pytest.approx(float(best[:2].sum() / best.sum()), abs=0.02 if merged else 1e-5)
    assert (version.exactness, len(updates)) == ("truncated", 6)
    assert version.retained_energy == pytest.approx(min(retained), abs=0.03 if merged else 1e-5)
    assert version.metrics["retained_energy_mean"] == pytest.approx(sum(retained) / len(retained), abs=0.02)
    assert version.retained_energy < 0.97


def test_flowers_own_loop_gets_the_same_aggregate(
    tmp_path: Path, make_settings: MakeSettings, make_profile: MakeProfile, tiny_bert: Path
) -> None:
    """The strategy is also one for ``Strategy.start``, which hands over all replies at once."""
    settings, grid = make_settings(), InProcessGrid([Node(make_profile(i, count=2, rank=2)) for i in range(2)])
    with open_registry(tmp_path / "one") as registry:
        run_federation(grid, settings, registry, run_id=RUN)
        expected = weights_of(registry, "toy/1")
    with open_registry(tmp_path / "other") as registry:
        model = AdaptedModel(tiny_bert, task="classification", labels=LABELS)
        roster = Roster(nodes={"client-0": 101, "client-1": 102})
        for name in roster.nodes:
            roster.members[name] = Enrolment(client=name, rank=2, alpha=4.0, rslora=False, num_examples=48)
        strategy = LoraStrategy(
            settings=settings,
            invitation=begin_run(registry, settings, run_id=RUN),
            manifest=model.manifest,
            registry=registry,
            roster=roster,
            weights=AdapterWeights(heads=model.initial_heads(seed=settings.seed)),
        )
        registry.open_round(RUN, 1, parent=None, cohort=list(roster.nodes))
        config = ConfigRecord({"cohort": list(roster.nodes)})
        replies = grid.pull_messages(list(grid.push_messages(strategy.configure_train(1, ArrayRecord(), config, grid))))
        arrays, metrics = strategy.aggregate_train(1, replies)
    assert arrays is not None
    assert metrics is not None
    assert metrics["clients"] == 2
    assert_equal(decode_weights(next(iter(arrays.values())).data)[0], expected)
    assert list(strategy.configure_evaluate(1, ArrayRecord(), ConfigRecord(), grid)) == []


# Who takes part


@pytest.mark.parametrize(("cohort", "size"), [({"fraction": 0.5}, 2), ({"size": 3}, 3), ({"fraction": 0.01}, 1)])
def test_a_part_of_the_clients_is_asked_and_the_seed_decides_which(
    tmp_path: Path, make_settings: MakeSettings, make_profile: MakeProfile, cohort: dict[str, object], size: int
) -> None:
    """The wrong share, or another one when the run is repeated."""
    cohorts = []
    for attempt, seed in enumerate((3, 3, 4)):
        nodes = [Node(make_profile(i, count=4, rank=2)) for i in range(4)]
        settings = make_settings(rounds=4, seed=seed, cohort={**cohort, "min_clients": 4})
        with open_registry(tmp_path / str(attempt)) as registry:
            run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN)
            cohorts.append([tuple(each.cohort) for each in registry.rounds(RUN)])
        asked = [sum(node.profile.name in names for names in cohorts[-1]) for node in nodes]
        assert [len(node.asked) for node in nodes] == asked
    assert all(len(names) == size for names in itertools.chain(*cohorts))
    assert cohorts[0] == cohorts[1] != cohorts[2]
    assert len(set(cohorts[0])) > 1


def test_who_joins_late_gets_what_all_others_get(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    """A newcomer would train on a model that lacks the history."""
    nodes = [Node(make_profile(i, count=3, rank=2), joins_after=2 if i == 2 else 0) for i in range(3)]
    run_federation(InProcessGrid(nodes), make_settings(rounds=3), registry, run_id=RUN)
    assert [tuple(each.cohort) for each in registry.rounds(RUN)] == [
        ("client-0", "client-1"),
        ("client-0", "client-1"),
        ("client-0", "client-1", "client-2"),
    ]
    ((request, payload),) = nodes[2].asked
    assert (request.round_number, request.parent) == (3, "toy/2")
    assert payload == nodes[0].asked[2][1]
    assert_equal(decode_weights(payload)[0], weights_of(registry, "toy/2"))
    assert by_client(registry, 3)["client-2"].weight == pytest.approx(1 / 3)


def test_who_leaves_is_not_asked_any_more(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    nodes = [Node(make_profile(i, count=2), leaves_after=1 if i == 1 else math.inf) for i in range(2)]
    run_federation(InProcessGrid(nodes), make_settings(rounds=2), registry, run_id=RUN)
    assert [tuple(each.cohort) for each in registry.rounds(RUN)] == [("client-0", "client-1"), ("client-0",)]


def test_a_round_waits_for_clients_that_are_away_for_a_moment(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A SuperNode that restarts between two rounds would end the whole run."""
    grid = InProcessGrid([Node(make_profile(i, count=2)) for i in range(2)])
    away = iter(range(12))
    monkeypatch.setattr(
        grid, "get_node_ids", lambda: [] if grid._round == 1 and next(away, None) is not None else [101, 102]
    )
    run_federation(grid, make_settings(rounds=2, cohort={"min_replies": 2}), registry, run_id=RUN)
    assert [tuple(each.cohort) for each in registry.rounds(RUN)] == [("client-0", "client-1")] * 2
    assert next(away, None) is None, "they were away"


def test_who_never_answers_is_late_and_the_round_goes_on(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    """One hanging client would hold up all."""
    nodes = [Node(make_profile(0, count=2)), Node(make_profile(1, count=2), trains=lambda _q, _a: None)]
    settings = make_settings(rounds=2, cohort={"round_deadline_s": 0.2})
    run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN)
    for number in (1, 2):
        sent = by_client(registry, number)
        assert (sent["client-0"].status, sent["client-0"].weight) == ("accepted", 1.0)
        assert (sent["client-1"].status, sent["client-1"].weight) == ("late", None)
        assert "did not answer before the deadline" in sent["client-1"].reason
    assert [each.late for each in registry.rounds(RUN)] == [1, 1]


def test_who_does_not_answer_the_invitation_does_not_hold_up_the_others(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every round would wait for as long as the run waits for its first clients, and ask the mute one again."""
    monkeypatch.setattr(membership, "_GRACE_S", 0.1)
    mute = Node(make_profile(1, count=2), enrols=lambda _q, _a: None)
    settings = make_settings(rounds=3, cohort={"join_timeout_s": 60.0})
    began = time.monotonic()
    run_federation(InProcessGrid([Node(make_profile(0, count=2)), mute]), settings, registry, run_id=RUN)
    assert time.monotonic() - began < 20.0
    assert mute.invited == 1
    assert [tuple(each.cohort) for each in registry.rounds(RUN)] == [("client-0",)] * 3


def test_a_slow_answer_to_the_invitation_is_taken_in_a_later_round(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that loads its model slowly would be lost to the whole run."""
    monkeypatch.setattr(membership, "_GRACE_S", 0.05)
    grid = InProcessGrid([Node(make_profile(0, count=2)), Node(make_profile(1, count=2))])
    pull = grid.pull_messages

    def pull_late(message_ids: Iterable[str]) -> Iterable[Message]:
        # the second node's answer to its invitation stays away until the first round is over
        return pull([key for key in message_ids if key != "message-1" or grid._round == 1])

    monkeypatch.setattr(grid, "pull_messages", pull_late)
    run_federation(grid, make_settings(rounds=3), registry, run_id=RUN)
    cohorts = [tuple(each.cohort) for each in registry.rounds(RUN)]
    assert cohorts == [("client-0",), ("client-0", "client-1"), ("client-0", "client-1")]


def test_who_is_lost_during_its_invitation_is_invited_again(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    replies: Iterator[Error | None] = iter([Error(code=3, reason="the node left")])
    node = Node(make_profile(0, count=2), enrols=lambda _q, answer: next(replies, None) or answer)
    run_federation(InProcessGrid([node]), make_settings(), registry, run_id=RUN)
    assert node.invited == 2
    assert registry.resolve("toy/1").ref == "toy/1"


# How a run fails


@pytest.mark.parametrize(
    "error", [KeyError("sha"), ValueError("bad head"), RecursionError(), UnicodeDecodeError("utf-8", b"", 0, 1, "x")]
)
def test_bytes_that_flower_cannot_read_harm_only_their_sender(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile, error: Exception
) -> None:
    """Flower raises for the whole batch of replies, which would end the run or lose the updates of the others."""
    hostile = Node(make_profile(1, count=2), trains=lambda _q, _a: error)
    mute = Node(make_profile(2, count=2), enrols=lambda _q, _a: error)
    nodes = [Node(make_profile(0, count=2)), hostile, mute, Node(make_profile(3, count=2))]
    run_federation(InProcessGrid(nodes), make_settings(rounds=2), registry, run_id=RUN)
    for number in (1, 2):
        sent = by_client(registry, number)
        assert {name: each.status for name, each in sent.items()} == {
            "client-0": "accepted",
            "client-1": "rejected",
            "client-3": "accepted",
        }
        assert sent["client-1"].reason.startswith(f"its reply cannot be read: {type(error).__name__}")
    assert mute.invited == 1


def test_a_reply_that_never_comes_whole_holds_up_nobody(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that dies while it sends: Flower would wait for the rest of its reply for two hours."""
    monkeypatch.setattr(replies, "_PULL_S", 0.05)
    grid = InProcessGrid([Node(make_profile(0, count=2)), Node(make_profile(1, count=2))])
    pull, never = grid.pull_messages, threading.Event()

    def pull_and_wait(message_ids: Iterable[str]) -> Iterable[Message]:
        if "message-3" in message_ids:  # the second client's first update; its enrolment was message-1
            never.wait()
        return pull(message_ids)

    monkeypatch.setattr(grid, "pull_messages", pull_and_wait)
    settings = make_settings(rounds=2, cohort={"round_deadline_s": 6.0, "join_timeout_s": 5.0})
    began = time.monotonic()
    try:
        run_federation(grid, settings, registry, run_id=RUN)
    finally:
        never.set()
    assert time.monotonic() - began < 60.0
    first, second = by_client(registry, 1), by_client(registry, 2)
    assert (first["client-0"].status, first["client-1"].status) == ("accepted", "late")
    assert (second["client-0"].status, second["client-1"].status) == ("accepted", "accepted")


def test_flowers_error_counts_as_no_answer(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    broken = Node(make_profile(1, count=2), trains=lambda _q, _a: Error(code=1, reason="the app crashed"))
    run_federation(InProcessGrid([Node(make_profile(0, count=2)), broken]), make_settings(), registry, run_id=RUN)
    sent = by_client(registry, 1)["client-1"]
    assert (sent.status, sent.reason) == ("rejected", "no answer (Flower error 1): the app crashed")


@pytest.mark.parametrize("how", ["mute", "error", "gone"])
def test_when_all_are_dead_the_run_and_its_round_fail(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile, how: str
) -> None:
    """A version without any client in it, or a run that says it still runs."""

    def trains(request: str, answer: Answer) -> Reply:
        if json.loads(request)["round_number"] == 1:
            return answer
        return None if how == "mute" else Error(code=3, reason="lost")

    leaves = 1 if how == "gone" else math.inf
    nodes = [Node(make_profile(i, count=2), trains=trains, leaves_after=leaves) for i in range(2)]
    settings = make_settings(rounds=3, cohort={"round_deadline_s": 0.2, "join_timeout_s": 0.2})
    with pytest.raises(NotEnoughClients, match=r"round 2 needs 1 accepted updates, got 0"):
        run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN)
    run = registry.run(RUN)
    assert (run.state, run.reason[:16]) == ("failed", "NotEnoughClients")
    assert run.finished_at is not None
    assert [each.state for each in registry.rounds(RUN)] == ["committed", "failed"]
    assert "needs 1 accepted" in registry.rounds(RUN)[1].reason
    assert [version.ref for version in registry.versions("toy")] == ["toy/1"]


def test_too_few_replies_fail_the_round(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    nodes = [Node(make_profile(0, count=2)), Node(make_profile(1, count=2), trains=lambda _q, _a: RecordDict())]
    with pytest.raises(NotEnoughClients, match="needs 2 accepted updates, got 1 from a cohort of 2"):
        run_federation(InProcessGrid(nodes), make_settings(cohort={"min_replies": 2}), registry, run_id=RUN)
    assert [each.state for each in registry.rounds(RUN)] == ["failed"]


def test_too_few_clients_fail_the_run_in_time(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    """It would wait for ever, or not say who was turned away and why."""
    other = make_profile(1, count=2, rank=17)
    settings = make_settings(cohort={"min_clients": 2, "join_timeout_s": 0.3})
    began = time.monotonic()
    with pytest.raises(
        NotEnoughClients, match=r"expected 2 clients within 0.3 s, got 1; client-1 takes no part: "
    ) as told:
        run_federation(InProcessGrid([Node(make_profile(0, count=2)), Node(other)]), settings, registry, run_id=RUN)
    assert time.monotonic() - began < 10.0
    assert "at most max_rank=16, got 17" in str(told.value)
    assert registry.run(RUN).state == "failed"
    assert registry.rounds(RUN) == []


@pytest.mark.parametrize("what", ["an update", "the version"])
def test_a_full_disk_fails_the_run_and_publishes_nothing(
    registry: Registry,
    make_settings: MakeSettings,
    make_profile: MakeProfile,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    """A row would name bytes that are not there."""
    put = registry.blobs.put

    def full(content: bytes) -> str:
        if what == "an update" or b"adapter/1" in content[:4000]:
            raise BlobWriteError("cannot write a blob: no space left on device")
        return put(content)

    monkeypatch.setattr(registry.blobs, "put", full)
    with pytest.raises(BlobWriteError, match="no space left"):
        run_federation(InProcessGrid([Node(make_profile())]), make_settings(), registry, run_id=RUN)
    run = registry.run(RUN)
    assert (run.state, run.reason[:14]) == ("failed", "BlobWriteError")
    assert registry.versions("toy") == []
    with pytest.raises(AdapterNotFound):
        registry.resolve("toy/1")
    assert registry.rounds(RUN)[0].state == "failed"
    assert len(registry.submissions(RUN)) == (0 if what == "an update" else 1)


# Updates that must not count


def forge(
    tensors: Callable[[Tensors], Tensors] = lambda tensors: tensors,
    facts: Callable[[Facts], Facts] = lambda facts: facts,
) -> Tamper:
    """Change an honest update behind the back of every check that the client's own code makes."""

    def tamper(_request: str, answer: Answer) -> Reply:
        stated = json.loads(read_header(answer[2]).metadata["pomona"])
        content = {name: tensor.contiguous() for name, tensor in tensors(load(answer[2])).items()}
        return answer[0], answer[1], save(content, {"pomona": json.dumps(facts(stated))})

    return tamper


def state(**changes: object) -> Tamper:
    return forge(facts=lambda facts: {**facts, **changes})


def sends(payload: bytes) -> Tamper:
    return lambda _request, answer: (answer[0], answer[1], payload)


def says(kind: str, text: str) -> Tamper:
    return lambda _request, _answer: (kind, text, b"")


def _rename(tensors: Tensors, old: str, new: str) -> Tensors:
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


def _without(tensors: Tensors, part: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if part not in name}


def _poke(tensors: Tensors, name: str, value: float) -> Tensors:
    tensors[name].view(-1)[-1] = value
    return tensors


def _widen(tensors: Tensors, extra: int) -> Tensors:
    return {
        name: torch.cat([t, torch.zeros(extra, t.shape[1])])
        if name.startswith("lora_A.")
        else torch.cat([t, torch.zeros(t.shape[0], extra)], dim=1)
        if name.startswith("lora_B.")
        else t
        for name, t in tensors.items()
    }


def _swap(tensors: Tensors, layer: str) -> Tensors:
    a, b = tensors[f"lora_A.{layer}"], tensors[f"lora_B.{layer}"]
    return {**tensors, f"lora_A.{layer}": b.T, f"lora_B.{layer}": a.T}


POOLER = "bert.pooler.dense"
QUERY = "bert.encoder.layer.0.attention.self.query"
WIDE = "bert.encoder.layer.1.intermediate.dense"

ATTACKS: dict[str, tuple[Tamper, str]] = {
    "NaN in a factor": (forge(lambda t: _poke(t, f"lora_B.{POOLER}", math.nan)), "lora_B of layer .* has NaN"),
    "infinity in a factor": (forge(lambda t: _poke(t, f"lora_A.{POOLER}", math.inf)), "lora_A of layer .* infinity"),
    "NaN in the head": (forge(lambda t: _poke(t, "head.classifier.bias", math.nan)), "head 'classifier.bias' has NaN"),
    "missing layer": (forge(lambda t: _without(t, POOLER)), rf"layer '{POOLER}' is missing \(1 of 13 are\)"),
    "missing factor": (forge(lambda t: _without(t, f"lora_B.{POOLER}")), "came without lora_B"),
    "missing head": (forge(lambda t: _without(t, "classifier.bias")), "head 'classifier.bias' is missing"),
    "extra layer": (
        forge(lambda t: {**t, "lora_A.bert.x": torch.ones(3, 2), "lora_B.bert.x": torch.ones(2, 3)}),
        "layer 'bert.x' is not part of this run",
    ),
    "extra head": (forge(lambda t: {**t, "head.bonus": torch.ones(1)}), "head 'bonus' is not part of this run"),
    "misspelt layer": (
        forge(lambda t: _rename(t, QUERY, QUERY.replace("query", "qurey"))),
        f"qurey' is not part of this run; did you mean '{QUERY}'",
    ),
    "unknown kind of key": (forge(lambda t: _rename(t, "lora_A.", "lora_E.")), "expected a key that starts with"),
    "nothing in it": (forge(lambda _: {}), "is missing"),
    "wrong shape": (forge(lambda t: _swap(t, WIDE)), r"should have shape \(3, 16\), got \(3, 24\)"),
    "head of another shape": (
        forge(lambda t: {**t, "head.classifier.bias": torch.zeros(5)}),
        r"should have shape \(4,\), got \(5,\)",
    ),
    "float64": (forge(lambda t: {n: x.double() for n, x in t.items()}), "dtype F32, got 'F64'"),
    "bfloat16": (forge(lambda t: {n: x.bfloat16() for n, x in t.items()}), "dtype F32, got 'BF16'"),
    "claims a rank": (state(rank=8), "enrolled with rank 3, got 8"),
    "claims no rank": (state(rank=0), "rank of at least 1, got 0"),
    "has another rank": (forge(lambda t: _widen(t, 2)), "has rank 5, the update says 3"),
    "claims and has another rank": (forge(lambda t: _widen(t, 2), lambda f: {**f, "rank": 5}), "enrolled with rank 3"),
    "claims and has too high a rank": (
        forge(lambda t: _widen(t, 20), lambda f: {**f, "rank": 23}),
        "rank 23 is above max_rank=16",
    ),
    "claims an alpha": (state(alpha=600.0), "enrolled with alpha 6.0, got 600.0"),
    "claims another scale": (state(rslora=True), "enrolled with rslora=False, got True"),
    "negative number of examples": (state(num_examples=-5), "num_examples of at least 1, got -5"),
    "a million times the examples": (state(num_examples=48_000_000), "above max_examples"),
    "twice the examples": (state(num_examples=96), "enrolled with num_examples=48, got 96"),
    "more examples than integers": (state(num_examples=2**80), "metadata are malformed: num_examples"),
    "examples as text": (state(num_examples="48"), "metadata are malformed: num_examples"),
    "NaN as loss": (state(train_loss=math.nan), "not finite"),
    "a round before": (state(round_number=0), "stale: expected round 1, got 0"),
    "a round ahead": (state(round_number=2), "from the future: expected round 1, got 2"),
    "another run": (state(run_id="run-2"), "expected run 'run-1', got 'run-2'"),
    "another parent": (state(parent="toy/7"), "expected parent '', got 'toy/7'"),
    "another base model": (state(base_sha256="a" * 64), "another base model"),
    "another client's name": (state(client="client-0"), "expected client 'client-1', the update says 'client-0'"),
    "a nonce of its own making": (state(nonce="x"), "metadata are malformed: nonce"),
    "more than is known": (state(admin=True), "metadata are malformed: admin"),
    "huge": (forge(lambda t: {n: x + 1e15 for n, x in t.items()}), r"above max_update_norm=10000"),
    "far too many bytes": (sends(bytes(3 << 20)), r"expected at most \d+ bytes for its rank, got 3145728"),
    "random bytes": (sends(bytes(range(256)) * 40), "header"),
    "a pickle": (sends(pickle.dumps({"a": 1})), "header"),
    "a truncated update": (lambda _q, a: (a[0], a[1], a[2][:-1]), "truncated"),
    "an adapter without facts": (sends(encode_weights(AdapterWeights())), "metadata are malformed: format"),
    "no payload": (says("update", "{}"), "without a payload"),
    "an enrolment": (says("enrolled", "{}"), "without a payload"),
    "a malformed refusal": (says("refusal", "{"), "its refusal is malformed"),
    "a refusal with more": (says("refusal", '{"name": "x", "error": "y", "z": 1}'), "its refusal is malformed"),
    "a refusal": (says("refusal", '{"name": "x", "error": "no memory"}'), "the client refused: no memory"),
    "other content": (lambda _q, _a: RecordDict(), "expected a message with one record of facts"),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_bad_update_is_rejected_with_its_reason_and_the_round_goes_on(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile, attack: str
) -> None:
    """It would poison the adapter, or one client could stop everybody's run."""
    tamper, reason = ATTACKS[attack]
    nodes = [Node(make_profile(0, count=2, rank=3)), Node(make_profile(1, count=2, rank=3), trains=tamper)]
    (version,) = run_federation(InProcessGrid(nodes), make_settings(), registry, run_id=RUN)
    sent = by_client(registry, 1)
    assert (sent["client-0"].status, sent["client-0"].weight) == ("accepted", 1.0)
    assert (sent["client-1"].status, sent["client-1"].weight, sent["client-1"].version) == ("rejected", None, None)
    assert re.search(reason, sent["client-1"].reason), sent["client-1"].reason
    (closed,) = registry.rounds(RUN)
    assert (closed.state, closed.accepted, closed.rejected, closed.late) == ("committed", 1, 1, 0)
    assert math.isfinite(version.metrics["loss"])
    assert registry.run(RUN).state == "finished"


def test_the_untampered_update_of_the_same_client_counts(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    """Forging that breaks every update would make each of the tests above pass."""
    nodes = [Node(make_profile(0, count=2, rank=3)), Node(make_profile(1, count=2, rank=3), trains=forge())]
    run_federation(InProcessGrid(nodes), make_settings(), registry, run_id=RUN)
    assert [each.weight for each in registry.submissions(RUN)] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("disguise", "reason"),
    [("the same bytes", "stale"), ("under the new round", "nonce"), ("with a new loss", "nonce")],
)
def test_an_update_that_was_counted_does_not_count_again(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile, disguise: str, reason: str
) -> None:
    """A client could put its weight in twice, or a message delivered twice would."""
    kept: list[bytes] = []

    def replay(request: str, answer: Answer) -> Reply:
        kept.append(answer[2])
        if len(kept) == 1 or disguise == "the same bytes":
            return answer[0], answer[1], kept[0]
        asked = json.loads(request)
        facts = {"round_number": asked["round_number"], "parent": asked["parent"]}
        if disguise == "with a new loss":
            facts["train_loss"] = 0.125
        return state(**facts)(request, (answer[0], answer[1], kept[0]))

    nodes = [Node(make_profile(0, count=2)), Node(make_profile(1, count=2), trains=replay)]
    run_federation(InProcessGrid(nodes), make_settings(rounds=3), registry, run_id=RUN)
    statuses = [by_client(registry, number)["client-1"].status for number in (1, 2, 3)]
    assert statuses == ["accepted", "rejected", "rejected"]
    for number in (2, 3):
        assert reason in by_client(registry, number)["client-1"].reason
        assert by_client(registry, number)["client-0"].weight == 1.0


@pytest.mark.parametrize("thief_first", [False, True])
def test_another_clients_bytes_do_not_count(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile, *, thief_first: bool
) -> None:
    """A copied update would count twice, or take the place of the one it was copied from."""
    stolen: list[bytes] = []

    def leak(_request: str, answer: Answer) -> Reply:
        stolen.append(answer[2])
        return answer

    nodes = [
        Node(make_profile(0, count=2), trains=leak),
        Node(make_profile(1, count=2), trains=lambda _q, answer: (answer[0], answer[1], stolen[-1])),
    ]
    grid = InProcessGrid(nodes, order=lambda replies: replies[::-1] if thief_first else replies)
    run_federation(grid, make_settings(), registry, run_id=RUN)
    sent = by_client(registry, 1)
    assert (sent["client-0"].status, sent["client-0"].weight) == ("accepted", 1.0)
    assert sent["client-1"].status == "rejected"
    expected = "expected client 'client-1', the update says 'client-0'" if thief_first else "a second copy"
    assert expected in sent["client-1"].reason


def test_a_rejected_client_may_do_better_in_the_next_round(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    spoilt = ATTACKS["NaN in a factor"][0]

    def once(request: str, answer: Answer) -> Reply:
        return spoilt(request, answer) if json.loads(request)["round_number"] == 1 else answer

    nodes = [Node(make_profile(0, count=2)), Node(make_profile(1, count=2), trains=once)]
    run_federation(InProcessGrid(nodes), make_settings(rounds=2), registry, run_id=RUN)
    assert by_client(registry, 1)["client-1"].status == "rejected"
    assert by_client(registry, 2)["client-1"].weight == 0.5


def test_a_round_in_which_nobody_changes_anything_changes_nothing(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    """Every idle round would wear the adapter away, bit by bit or, by replacement, at once."""

    def idle(request: str, answer: Answer) -> Reply:
        asked = TrainRequest.model_validate_json(request)
        if asked.round_number == 1:
            return answer
        node = next(node for node in nodes if node.asked[-1][0] == asked)
        heads = {f"head.{name}": tensor for name, tensor in decode_weights(node.asked[-1][1])[0].heads.items()}

        def still(tensors: Tensors) -> Tensors:
            return {n: torch.zeros_like(t) if n.startswith("lora_B.") else t for n, t in tensors.items()} | heads

        return forge(still)(request, answer)

    nodes = [Node(make_profile(i, count=7 + i, rank=2 + i), trains=idle) for i in range(3)]
    run_federation(InProcessGrid(nodes), make_settings(rounds=3), registry, run_id=RUN)
    assert [each.accepted for each in registry.rounds(RUN)] == [3, 3, 3]
    first = weights_of(registry, "toy/1")
    assert first.layers
    for ref in ("toy/2", "toy/3"):
        assert_equal(weights_of(registry, ref), first)
        assert registry.resolve(ref).metrics["accuracy"] == registry.resolve("toy/1").metrics["accuracy"]
        assert registry.resolve(ref).exactness == "exact"


def test_a_first_round_without_any_change_publishes_the_heads_alone(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    """An adapter without layers is an edge that must neither crash nor be scored as something else."""
    still = make_settings(rounds=2, training={"learning_rate": 1e-30, "head_learning_rate": 1e-30, "weight_decay": 0.0})
    zero = forge(lambda t: {n: torch.zeros_like(x) if n.startswith("lora_B.") else x for n, x in t.items()})
    versions = run_federation(InProcessGrid([Node(make_profile(), trains=zero)]), still, registry, run_id=RUN)
    assert weights_of(registry, "toy/2").layers == {}
    assert versions[-1].metrics["loss"] == registry.run(RUN).initial_metrics["loss"]


# Clients that lie when they enrol


def enrols_as(**changes: object) -> Tamper:
    return lambda _request, answer: (answer[0], json.dumps({**json.loads(answer[1]), **changes}), answer[2])


LIES: dict[str, tuple[Tamper, str, str]] = {
    "rank 0": (enrols_as(rank=0), "node-102", "malformed: rank: Input should be greater than or equal to 1"),
    "rank as text": (enrols_as(rank="4"), "node-102", "its answer is malformed: rank: Input should be a valid integer"),
    "rank above max": (enrols_as(rank=17), "client-1", "its rank 17 is above max_rank=16"),
    "negative examples": (enrols_as(num_examples=-1), "node-102", "malformed: num_examples: .* greater than or equal"),
    "no examples": (enrols_as(num_examples=0), "node-102", "malformed: num_examples: .* greater than or equal to 1"),
    "NaN examples": (enrols_as(num_examples=math.nan), "node-102", "its answer is malformed: num_examples"),
    "more examples than integers": (enrols_as(num_examples=2**63), "node-102", "malformed: num_examples"),
    "another version": (enrols_as(pomona_version="9.9"), "client-1", "it runs pomona 9.9, the coordinator"),
    "another base": (enrols_as(base_sha256="c" * 64), "client-1", "its base model has sha256 cccccccccccc, the run's"),
    "a name that is a path": (enrols_as(name="../x"), "node-102", "malformed: name: String should match pattern"),
    "no name": (enrols_as(name=""), "node-102", "malformed: name"),
    "more than is known": (enrols_as(admin=True), "node-102", "malformed: admin: Extra inputs"),
    "not JSON": (lambda _q, a: (a[0], "{", b""), "node-102", "its answer is malformed"),
    "a malformed refusal": (says("refusal", "[]"), "node-102", "its answer is malformed"),
    "a refusal": (says("refusal", '{"name": "client-1", "error": "no model here"}'), "client-1", "no model here"),
    "a refusal without a name": (says("refusal", '{"name": "", "error": "no"}'), "node-102", "no"),
    "other content": (lambda _q, _a: RecordDict(), "node-102", "expected a message with one record of facts"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_who_lies_when_it_enrols_takes_no_part(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile, lie: str
) -> None:
    """It would choose its own weight, or fail in every round instead of once."""
    tamper, name, reason = LIES[lie]
    liar = Node(make_profile(1, count=2), enrols=tamper)
    run_federation(InProcessGrid([Node(make_profile(0, count=2)), liar]), make_settings(rounds=2), registry, run_id=RUN)
    clients = {client.name: client.excluded for client in registry.clients(RUN)}
    assert clients.keys() == {"client-0", name}
    assert clients["client-0"] == ""
    assert re.search(reason, clients[name]), clients[name]
    assert liar.asked == []
    assert liar.invited == 1, "it is not asked over and over"
    assert [tuple(each.cohort) for each in registry.rounds(RUN)] == [("client-0",)] * 2


def test_a_name_belongs_to_one_connected_node(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody could speak for another client, or push it out."""
    owner, other = Node(make_profile(0, count=2)), Node(make_profile(0, count=2))
    with caplog.at_level(logging.WARNING):
        run_federation(InProcessGrid([owner, other]), make_settings(rounds=2), registry, run_id=RUN)
    assert "client client-0 takes no part: another connected client has that name" in caplog.text
    assert (len(owner.asked), len(other.asked)) == (2, 0)
    assert [(client.name, client.excluded) for client in registry.clients(RUN)] == [("client-0", "")]
    assert other.invited == 1, "it is not asked over and over"
    assert owner.told == []
    assert [reason.partition(";")[0] for reason in other.told] == ["another connected client has that name"]
    assert "client-0 takes no part in run run-1: another connected client has that name" in caplog.text


def test_a_client_that_restarted_gets_its_name_back_when_its_old_node_is_gone(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    """Flower shows a crashed node as connected for a while, and its successor would be shut out for ever."""
    crashed = Node(make_profile(0, count=2), leaves_after=2)
    restarted = Node(make_profile(0, count=2), joins_after=1)
    bystander = Node(make_profile(1, count=2))
    grid = InProcessGrid([crashed, bystander, restarted])
    run_federation(grid, make_settings(rounds=4), registry, run_id=RUN)
    assert [request.round_number for request, _ in crashed.asked] == [1, 2]
    assert [request.round_number for request, _ in restarted.asked] == [3, 4]
    assert all(tuple(each.cohort) == ("client-0", "client-1") for each in registry.rounds(RUN))


def test_a_client_that_restarts_before_the_run_begins_is_not_shut_out(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run would wait in vain for a client that is there, because its name was taken when it was asked."""
    grid = InProcessGrid(
        [Node(make_profile(0, count=2)), Node(make_profile(0, count=2)), Node(make_profile(1, count=2))]
    )
    online = iter([[101, 102]] * 4 + [[102]] * 4)
    monkeypatch.setattr(grid, "get_node_ids", lambda: next(online, [102, 103]))
    run_federation(grid, make_settings(cohort={"min_clients": 2}), registry, run_id=RUN)
    assert [len(node.asked) for node in grid.nodes.values()] == [0, 1, 1]
    assert grid.nodes[102].invited == 2


def test_a_client_is_held_to_what_it_said_when_it_first_enrolled(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    """By leaving and coming back it could change its weight between rounds."""
    first = Node(make_profile(0, count=2), leaves_after=1)
    changed = Node(make_profile(0, count=2), enrols=enrols_as(num_examples=5000), joins_after=1)
    run_federation(
        InProcessGrid([first, Node(make_profile(1, count=2)), changed]), make_settings(rounds=2), registry, run_id=RUN
    )
    assert changed.asked == []
    assert [tuple(each.cohort) for each in registry.rounds(RUN)] == [("client-0", "client-1"), ("client-1",)]


def test_factors_are_held_to_the_scale_of_the_enrolment(
    registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    """Rank-stabilised scaling must reach both ends: the version is what the one client trained."""
    settings = make_settings(training={"rslora": True, "alpha_per_rank": 2.0})
    run_federation(InProcessGrid([Node(make_profile(rank=4))]), settings, registry, run_id=RUN)
    (sent,) = registry.submissions(RUN)
    update = decode_update(registry.blobs.get(sent.sha256))
    for name, factors in weights_of(registry, "toy/1").layers.items():
        trained = update.weights.layers[name]
        expected = LoraFactors(a=trained.a, b=trained.b, scale=8.0 / 2.0).delta()
        assert_close(factors.delta(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("strategy", "rank"),
    [("ffa-nested", 8), ("hetlora", 16), ("flora-bounded", 20)],
    ids=["16 inputs hold 16 orthonormal rows", "32 is the widest layer", "the sum is cut to 32 anyway"],
)
def test_a_pattern_makes_no_layer_wider_than_the_strategy_allows(
    strategy: str, rank: int, registry: Registry, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    node = Node(make_profile(0, rank=20))
    limits = {"strategy": strategy, "max_rank": 32}
    settings = make_settings(aggregation=limits, training={"rank_pattern": {"query": 2.0}})
    run_federation(InProcessGrid([node]), settings, registry, run_id=RUN)
    assert [request.rank for request, _ in node.asked] == [rank]
    assert weights_of(registry, "toy/1").layers["bert.encoder.layer.0.attention.self.query"].rank <= 32


def _with_first_entries(a: float, b: float) -> Tamper:
    """Send factors that are zero but for one entry each."""

    def tamper(_request: str, answer: Answer) -> Reply:
        update = decode_update(answer[2])
        layers = {}
        for name, each in update.weights.layers.items():
            down, up = torch.zeros_like(each.a), torch.zeros_like(each.b)
            down[0, 0], up[0, 0] = a, b
            layers[name] = LoraFactors(a=down, b=up)
        weights = AdapterWeights(layers=layers, heads=update.weights.heads)
        return answer[0], answer[1], encode_update(replace(update, weights=weights))

    return tamper


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"warm_start": True},
        {"strategy": "flora"},
        {"strategy": "hetlora"},
        {"strategy": "flexlora"},
        {"strategy": "fedit", "rank": 3},
        {"strategy": "fedex", "rank": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize(("a", "b"), [(3e38, 1e-38), (1e-38, 3e38), (1e20, 1e-20), (1e6, 1e-6)])
def test_factors_that_cancel_harm_their_sender_only(
    limits: dict[str, object],
    a: float,
    b: float,
    registry: Registry,
    make_settings: MakeSettings,
    make_profile: MakeProfile,
) -> None:
    """Their product is small, and neither their mean nor float32 knows that."""
    nodes = [Node(make_profile(i, count=3, rank=3)) for i in range(3)]
    nodes[2] = replace(nodes[2], trains=_with_first_entries(a, b))
    versions = run_federation(InProcessGrid(nodes), make_settings(rounds=2, aggregation=limits), registry, run_id=RUN)
    for number, version in enumerate(versions, start=1):
        assert version.metrics["loss"] < 3.0
        found = by_client(registry, number)
        assert [found[f"client-{i}"].status for i in (0, 1)] == ["accepted"] * 2


def test_where_nobody_is_trusted_the_adapter_stays_as_it_is(
    registry: Registry, tmp_path: Path, make_settings: MakeSettings, make_profile: MakeProfile, toy_data: Path
) -> None:
    """From the second round on every client sends the reverse of what it learned."""

    def reversed_later(request: str, answer: Answer) -> Reply:
        later = TrainRequest.model_validate_json(request).round_number > 1
        return _scaled_up(1.0)(request, answer) if later else answer

    clean = tmp_path / "clean.csv"
    clean.write_text("".join(r for r in toy_data.read_text().splitlines(keepends=True) if not r.endswith(",test\n")))
    nodes = [Node(make_profile(i, count=2, rank=3), trains=reversed_later) for i in range(2)]
    settings = make_settings(
        rounds=2,
        training={"max_steps": 4, "head_learning_rate": 1e-9},
        defence={"kind": "fltrust", "trusted_data": str(clean)},
    )
    run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN)
    assert_equal(weights_of(registry, "toy/2"), weights_of(registry, "toy/1"))
    assert {each.status for each in registry.submissions(RUN, 2)} == {"quarantined"}


@pytest.mark.parametrize(
    ("sections", "exactness"),
    [
        ({"aggregation": {"max_rank": 64}}, "exact"),
        ({"aggregation": {"max_rank": 64, "server_optimizer": {"kind": "fedavgm"}}}, "approximate"),
        ({"aggregation": {"max_rank": 64}, "defence": {"kind": "norm-bounding"}}, "approximate"),
        ({"aggregation": {"max_rank": 64, "strategy": "flexlora", "rank_partitioned": True}}, "approximate"),
    ],
    ids=str,
)
def test_what_is_not_the_mean_of_what_clients_trained_does_not_say_exact(
    sections: dict[str, dict[str, object]],
    exactness: str,
    registry: Registry,
    make_settings: MakeSettings,
    make_profile: MakeProfile,
) -> None:
    nodes = [Node(make_profile(i, count=2, rank=3)) for i in range(2)]
    (version,) = run_federation(InProcessGrid(nodes), make_settings(**sections), registry, run_id=RUN)
    assert version.exactness == exactness
    chosen = {**sections["aggregation"], **sections.get("defence", {})}
    assert all(name in version.recipe for name in ("server_optimizer", "rank_partitioned") if name in chosen)


def test_options_of_the_run_file_reach_the_aggregation(
    tmp_path: Path, make_settings: MakeSettings, make_profile: MakeProfile
) -> None:
    """Each changes what is published or asked for; one that is lost on the way would change nothing."""

    def published(number: int, **sections: Mapping[str, object]) -> tuple[AdapterWeights, list[int], list[float]]:
        nodes = [Node(make_profile(i, count=3, rank=rank)) for i, rank in enumerate((2, 4, 3))]
        nodes[0] = Node(replace(make_profile(0, count=9, rank=2), name="client-0"))  # fewer examples than the others
        with open_registry(tmp_path / str(number)) as registry:
            run_federation(InProcessGrid(nodes), make_settings(rounds=2, **sections), registry, run_id=RUN)
            shares = [each.weight or 0.0 for each in registry.submissions(RUN, 2)]
            return weights_of(registry, "toy/2"), [node.asked[1][0].trainable for node in nodes], shares

    plain, trainable, shares = published(0)
    assert trainable == [0, 0, 0]
    assert len(set(shares)) == 2
    _, trainable, _ = published(1, aggregation={"warm_start": True})
    assert trainable == [2, 4, 3]
    cut, _, _ = published(2, aggregation={"energy": 0.5})
    assert max(each.rank for each in cut.layers.values()) < max(each.rank for each in plain.layers.values())
    _, _, shares = published(3, defence={"kind": "norm-bounding", "equal_weights": True, "norm_factor": 100.0})
    assert shares == [1 / 3] * 3
    padded, _, _ = published(4, aggregation={"strategy": "hetlora"})
    partitioned, _, _ = published(5, aggregation={"strategy": "hetlora", "rank_partitioned": True})
    name = next(iter(padded.layers))
    assert not torch.allclose(padded.layers[name].delta(), partitioned.layers[name].delta(), rtol=0.01)


def test_a_defence_bounds_heads_too(tmp_path: Path, make_settings: MakeSettings, make_profile: MakeProfile) -> None:
    """The mean of scaled weights would be normalised again, and the poisoned head count in full."""

    def poisoned(_request: str, answer: Answer) -> Reply:
        update = decode_update(answer[2])
        heads = {name: head + 50.0 for name, head in update.weights.heads.items()}
        return answer[0], answer[1], encode_update(replace(update, weights=replace(update.weights, heads=heads)))

    moved = []
    for number, defence in enumerate(({}, {"kind": "norm-bounding"})):
        nodes = [Node(make_profile(i, count=5)) for i in range(5)]
        nodes[4] = replace(nodes[4], trains=poisoned)
        with open_registry(tmp_path / str(number)) as registry:
            settings = make_settings(cohort={"min_replies": 5}, defence=defence)
            run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN)
            moved.append(max(float(head.abs().max()) for head in weights_of(registry, "toy/1").heads.values()))
    assert moved[0] > 5.0
    assert moved[1] < 0.5
