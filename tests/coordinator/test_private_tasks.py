"""Tasks under client-level privacy: what they sum, what they cost, and what of a client they write down."""

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.coordinator.grid import Answer, Change, InProcessGrid, MakeNodes, Node, Reply, Tamper, honest, rewritten
from torch import Tensor

from pomona import failpoints
from pomona.client.privacy_ledger import locked_ledger
from pomona.client.required_privacy import RequiredPrivacy
from pomona.client.trainer import Trainer
from pomona.continual.share_verification import check_class
from pomona.coordinator.certificate import certify
from pomona.coordinator.client_removal import remove_client
from pomona.coordinator.federation import run_federation
from pomona.coordinator.memory import recall
from pomona.coordinator.predicting import predict
from pomona.datasets import load_dataset
from pomona.errors import PrivacyBudgetExhausted
from pomona.privacy.gaussian_sum import GaussianSum
from pomona.privacy.plan import plan_of
from pomona.privacy.randomness import SecureRandom
from pomona.protocol import SUMS, TASK
from pomona.settings import RunSettings
from pomona.storage.opening import open_registry
from pomona.storage.records import LedgerEntry, Version
from pomona.storage.registry import Registry
from pomona.storage.verification import verify

pytestmark = pytest.mark.usefixtures("quick_polls")

TASKS = (("animal", "food"), ("tool", "weather"))
RUN = "run-1"
MOS = {"rank": 2, "head": "aligned", "training": {"epochs": 1, "min_steps": 8}}
CANARY = "zyzzogeton"
NOTHING = {"noise_multiplier": 1e-12, "clip": 1e3, "sums_clip": 1e3, "epsilon": 1e30}

MakeSettings = Callable[..., RunSettings]


@pytest.fixture
def make_settings(tiny_bert: Path, toy_data: Path) -> MakeSettings:
    def make(
        privacy: Mapping[str, object] | None = NOTHING,
        *,
        tasks: object = TASKS,
        rounds_per_task: int = 1,
        mos: Mapping[str, object] = MOS,
        deadline_s: float = 30.0,
    ) -> RunSettings:
        facts: dict[str, object] = {
            "name": "things",
            "seed": 3,
            "model": {"base": str(tiny_bert), "max_length": 16},
            "data": {"source": str(toy_data)},
            "cohort": {"join_timeout_s": 5.0, "round_deadline_s": deadline_s, "min_clients": 3},
            "continual": {"tasks": tasks, "rounds_per_task": rounds_per_task, "mos": mos},
        }
        if privacy is not None:
            base = {"unit": "client", "population": "toys", "population_size": 3, "epsilon": 1e30, "delta": 1e-3}
            facts["privacy"] = {**base, **privacy}
        return RunSettings.model_validate(facts)

    return make


def federate(nodes: list[Node], settings: RunSettings, registry: Registry, *, lasting: bool = False) -> list[Version]:
    return run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN, lasting=lasting)


def steps(rows: list[LedgerEntry]) -> list[tuple[str, int, int]]:
    return [(row.state, row.round, row.attempt) for row in rows]


def known(registry: Registry, ref: str) -> dict[str, Tensor]:
    return dict(recall(registry, ref).state.tensors)


def all_do(nodes: list[Node], learns: Tamper) -> list[Node]:
    for node in nodes:
        node.learns = learns
    return nodes


def silent(_kind: str, _answer: Answer) -> Reply:
    return None


def refusing(kind: str) -> Tamper:
    """Refuse one kind of request; it counts as zero at once."""
    refused = "refusal", json.dumps({"name": "x", "error": CANARY}), b""
    return lambda asked, answer: refused if asked == kind else answer


@dataclass
class Watched:
    """What was released, and what the ledger had when a cohort was drawn."""

    registry: Registry
    means: list[dict[str, Tensor]] = field(default_factory=list)
    paid: list[LedgerEntry] = field(default_factory=list)
    tossed: list[int] = field(default_factory=list)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Watched]:
    """Watch the real coins and sums; ``chosen`` says what the coins show."""

    toss, release = SecureRandom.chosen, GaussianSum.release

    def watched(registry: Registry, *, chosen: tuple[bool, ...] = ()) -> Watched:
        seen = Watched(registry)

        def tossed(self: SecureRandom, count: int, rate: float) -> NDArray[np.bool_]:
            seen.paid.append(registry.ledger("toys")[-1])
            seen.tossed.append(count)
            found = toss(self, count, rate)
            return np.array(chosen) if chosen else found

        def released(self: GaussianSum, standard: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
            seen.means.append(release(self, standard))
            return seen.means[-1]

        monkeypatch.setattr(SecureRandom, "chosen", tossed)
        monkeypatch.setattr(GaussianSum, "release", released)
        return seen

    return watched


# What is summed


@pytest.mark.parametrize("head", ["aligned", "combined"])
def test_with_no_noise_and_no_clip_tasks_are_what_they_are_without_privacy(
    head: str, tmp_path: Path, make_settings: MakeSettings, make_nodes: MakeNodes
) -> None:
    """Clients with equally many rows of each class: the same adapters, heads, counts, sums and moments."""
    found, accuracy = {}, {}
    for name, privacy in (("plain", None), ("private", NOTHING)):
        with open_registry(tmp_path / name) as registry:
            federate(make_nodes(3), make_settings(privacy, mos={**MOS, "head": head}), registry)
            found[name] = known(registry, "things/2")
            accuracy[name] = registry.resolve("things/2").metrics["accuracy"]
    assert found["plain"].keys() == found["private"].keys()
    for key, tensor in found["plain"].items():
        torch.testing.assert_close(found["private"][key], tensor, rtol=1e-3, atol=1e-3)
    assert accuracy["private"] == pytest.approx(accuracy["plain"], abs=0.05)
    assert accuracy["private"] > 0.8


def test_each_release_is_paid_before_a_cohort_of_its_own_is_drawn_for_it(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes, watch: Callable[..., Watched]
) -> None:
    settings = make_settings(
        {"noise_multiplier": 1.0, "sample_rate": 0.7, "population_size": 30, "epsilon": 1e3, "accountant": "rdp"},
        rounds_per_task=2,
    )
    seen, nodes = watch(registry, chosen=(False, True, True)), make_nodes(3)
    versions = federate(nodes, settings, registry)
    assert steps(seen.paid) == [("reserved", number, 1) for number in range(1, 7)]
    assert seen.tossed == [3] * 6
    assert [[kind for kind, _, _ in node.worked] for node in nodes] == [[], *[[TASK, TASK, SUMS] * 2] * 2]
    rows, plan = registry.ledger("toys"), plan_of(settings)
    assert steps(rows) == [(state, number, 1) for number in range(1, 7) for state in ("reserved", "released")]
    assert rows[-1].epsilon == pytest.approx(plan.epsilon_after(6))
    for version, last in zip(versions, (rows[5], rows[11]), strict=True):
        assert version.sha256 == last.release_sha256
        assert (version.kind, version.exactness) == ("task", "approximate")
    told = certify(versions[1], rows)
    assert (told.mechanism, told.rounds) == ("ffa-tasks", 6)
    assert told.epsilon == pytest.approx(plan.epsilon_after(6))
    assert (told.clip, told.plan_sha256) == (plan.sums_clip, plan.sha256)
    assert verify(registry).problems == ()


def test_noise_of_the_right_size_is_released_where_nobody_answers(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes
) -> None:
    privacy = {"noise_multiplier": 2.0, "clip": 0.5, "sums_clip": 3.0, "sample_rate": 0.5, "accountant": "rdp"}
    settings = make_settings(privacy, deadline_s=0.5)
    federate(all_do(make_nodes(3), silent), settings, registry)
    knowledge = recall(registry, "things/2").knowledge
    noise = torch.cat([each.b.flatten() for each in knowledge.tasks[0].adapter.values()]).double()
    assert abs(float(noise.std()) / (2.0 * 0.5 / 1.5) - 1.0) < 5.0 / np.sqrt(2 * len(noise)) < 0.3
    for task in knowledge.tasks:
        for kept in (*task.statistics, *task.first):
            check_class("a class", kept)
    assert registry.run(RUN).state == "finished"


def test_a_task_of_one_class_takes_one_release_and_each_lasts_until_its_deadline(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes
) -> None:
    """Also where all have answered."""
    settings = make_settings({"noise_multiplier": 1.0}, tasks=[["animal"], ["food", "tool"]], deadline_s=1.0)
    federate(make_nodes(3), settings, registry, lasting=True)
    assert [row.round for row in registry.ledger("toys") if row.state == "released"] == [1, 2, 3]
    assert plan_of(settings).rounds == 3
    for number, releases in ((1, 1), (2, 2)):
        (made,) = registry.rounds(RUN, number)
        assert made.closed_at is not None
        assert (made.closed_at - made.opened_at).total_seconds() >= releases
        assert made.seconds == releases


# Clients that lie


def changed(kind: str, change: Change) -> Tamper:
    """Change the tensors of what a client answers to one kind of request."""
    return lambda message_type, answer: rewritten(answer, change) if message_type == kind else answer


def larger(tensors: dict[str, Tensor], _facts: dict[str, object]) -> None:
    tensors |= {name: each * (-1000.0 if each.is_floating_point() else 1000) for name, each in tensors.items()}


LIES: dict[str, tuple[str, Change, bool]] = {
    "a large update": (TASK, larger, True),
    "large negative sums": (SUMS, larger, True),
    "an update that is no number": (TASK, lambda t, _: t["head.bias"].fill_(float("nan")), False),
    "sums that are no numbers": (SUMS, lambda t, _: t["statistics.total"].fill_(float("nan")), False),
    "negative counts": (SUMS, lambda t, _: t["statistics.count"].fill_(-3), False),
    "other sums": (SUMS, lambda t, _: t.pop("statistics.total"), False),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_client_that_lies_moves_a_release_by_no_more_than_the_bound_and_nobody_is_told(
    lie: str,
    tmp_path: Path,
    make_settings: MakeSettings,
    make_nodes: MakeNodes,
    watch: Callable[..., Watched],
) -> None:
    """Beside a run in which it answers nothing of use; what cannot be used counts as zero, and so gives the same."""
    kind, change, counts = LIES[lie]
    settings = make_settings({**NOTHING, "clip": 0.01, "sums_clip": 0.5}, tasks=TASKS[:1])
    found = []
    for name, tamper in (("lies", changed(kind, change)), ("refuses", refusing(kind))):
        with open_registry(tmp_path / name) as registry:
            seen, nodes = watch(registry), make_nodes(3)
            nodes[2].learns = tamper
            federate(nodes, settings, registry)
            found.append(seen.means[0 if kind == TASK else 1])
            assert [node.told for node in nodes] == [[], [], []]
            assert registry.submissions(RUN) == []
    bound = 0.01 if kind == TASK else 0.5
    moved = torch.cat([(found[0][key] - found[1][key]).flatten() for key in sorted(found[0])]).norm()
    assert float(moved) <= bound / 3 * (1 + 1e-6)
    assert float(moved) >= bound / 3 * 0.99 if counts else float(moved) < 1e-6


# What is written down


def test_a_run_looks_alike_in_the_registry_whoever_has_rows_and_answers(
    tmp_path: Path, make_settings: MakeSettings, make_nodes: MakeNodes, caplog: pytest.LogCaptureFixture
) -> None:
    """All have rows, one has all, all refuse, nobody answers: the same but for hashes, times, scores and noise."""
    caplog.set_level(logging.DEBUG)
    kinds: dict[str, tuple[Callable[[int, str], int] | None, Tamper]] = {
        "all": (None, honest),
        "one": (lambda _row, _label: 1, honest),
        "refuses": (None, refusing(TASK)),
        "none": (None, silent),
    }
    shapes = []
    for name, (owner, learns) in kinds.items():
        with open_registry(tmp_path / name) as registry:
            nodes = all_do(make_nodes(3, owner), learns)
            versions = federate(nodes, make_settings({"noise_multiplier": 1.0}, deadline_s=1.0), registry)
            rounds = [
                (each.cohort, each.accepted, each.rejected, each.late, each.bytes_up, each.bytes_down, each.seconds)
                for each in registry.rounds(RUN)
            ]
            clients = [(each.name, each.rank, each.num_examples, each.excluded) for each in registry.clients(RUN)]
            audit = [(record.event, record.subject) for record in registry.audit()]
            blobs = sorted(each.bytes // 1000 for each in registry.blobs.listing())
            keys = [sorted(version.recipe) for version in versions]
            assert not any(node.told for node in nodes)
            shapes.append((rounds, clients, audit, blobs, keys, registry.submissions(RUN), steps(registry.ledger())))
    assert all(each == shapes[0] for each in shapes[1:])
    assert shapes[0][0] == [((), 0, 0, 0, 0, 0, 2.0)] * 2
    assert [each[2:] for each in shapes[0][1]] == [(1, "")] * 3
    assert len(shapes[0][3]) == 4, "what was released, and nothing else"
    told = [record.getMessage() for record in caplog.records if record.name.startswith("pomona.coordinator")]
    assert not [line for line in told if "client-" in line or CANARY in line]


def test_a_client_that_is_forgotten_was_hidden_from_the_beginning(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes
) -> None:
    settings = make_settings({"noise_multiplier": 1.0, "epsilon": 1e3})
    federate(make_nodes(3), settings, registry)
    (removal,), updates = remove_client(registry, "client-1")
    assert (removal.certificate.method, removal.certificate.exactness) == ("differential-privacy", "certified-DP")
    assert removal.certificate.evidence["epsilon"] == pytest.approx(plan_of(settings).epsilon_after(4))
    assert (removal.certificate.version, removal.rounds_lost, updates) == ("things/2", 0, 0)
    assert recall(registry, "things").version.ref == "things/2"


def test_a_client_that_insists_on_noise_of_its_own_takes_no_part_and_spends_nothing(
    make_settings: MakeSettings, make_nodes: MakeNodes, registry: Registry, tmp_path: Path
) -> None:
    nodes = make_nodes(3)
    required = RequiredPrivacy(unit="client-distributed", max_epsilon=8.0, max_delta=1e-3, ledger=tmp_path / "a.jsonl")
    nodes[2].trainer = Trainer(replace(nodes[2].profile, required_privacy=required))
    settings = make_settings({"noise_multiplier": 1.0})
    fewer = settings.model_copy(update={"cohort": settings.cohort.model_copy(update={"min_clients": 2})})
    federate(nodes, fewer, registry)
    assert [node.invited for node in nodes] == [1, 1, 1]
    assert nodes[2].worked == []
    with locked_ledger(required.ledger) as ledger:
        assert ledger.entries == []


# What is spent


def test_a_run_that_costs_more_than_the_budget_is_refused_before_anybody_is_asked(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes
) -> None:
    wanted = {"epsilon": 8.0, "population_size": 100}
    first, second = make_nodes(3), make_nodes(3)
    federate(first, make_settings(wanted, tasks=TASKS[:1]), registry)
    with pytest.raises(PrivacyBudgetExhausted, match="has spent epsilon"):
        run_federation(InProcessGrid(second), make_settings(wanted, tasks=TASKS[1:]), registry, run_id="run-2")
    assert not any(node.worked or node.invited for node in second)


PLACES = [f"release-{place}:2" for place in ("reserved", "summed", "written", "settled")]
PLACES += ["release-summed:3", "release-settled:3", "version-published:1"]


@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_is_killed_goes_on_after_its_last_release_and_pays_for_each_attempt(
    place: str,
    registry: Registry,
    make_settings: MakeSettings,
    make_nodes: MakeNodes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two rounds and the sums of one task; what was released is not asked for again, and keeps its bytes."""
    settings = make_settings({"epsilon": 20.0, "spare_rounds": 1}, tasks=TASKS[:1], rounds_per_task=2)
    die_at(place, monkeypatch)
    with pytest.raises(SystemExit, match="killed"):
        federate(make_nodes(3), settings, registry)
    monkeypatch.delenv(failpoints.VARIABLE)
    before = registry.ledger("toys")
    nodes, at = make_nodes(3), int(place[-1])
    federate(nodes, settings, registry)
    after = registry.ledger("toys")
    assert after[: len(before)] == before, "nothing is taken back"
    once = [(state, number, 1) for number in (1, 2, 3) for state in ("reserved", "released")]
    released = place.startswith(("release-settled", "version"))
    again = [("burned", at, 1), ("reserved", at, 2), ("released", at, 2)]
    assert steps(after) == (once if released else [*once[: 2 * at - 1], *again, *once[2 * at :]])
    done = {"version-published:1": 3}.get(place, at if released else at - 1)
    assert [kind for kind, _, _ in nodes[0].worked] == [TASK, TASK, SUMS][done:]
    assert registry.run(RUN).state == "finished"
    assert len(registry.versions("things")) == 1
    assert verify(registry).problems == ()


def test_without_room_for_another_try_the_run_ends(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings({"epsilon": 20.0}, tasks=TASKS[:1])
    die_at("release-summed:2", monkeypatch)
    with pytest.raises(SystemExit, match="killed"):
        federate(make_nodes(3), settings, registry)
    monkeypatch.delenv(failpoints.VARIABLE)
    nodes = make_nodes(3)
    with pytest.raises(PrivacyBudgetExhausted):
        federate(nodes, settings, registry)
    assert not any(node.worked for node in nodes)


def die_at(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the process as it is at a place, but for what it holds in this one."""

    def end(_pid: int, _signal: int) -> None:
        raise SystemExit("killed")

    monkeypatch.setattr(failpoints, "_reached", {})
    monkeypatch.setattr(failpoints, "os", SimpleNamespace(environ=os.environ, getpid=os.getpid, kill=end))
    monkeypatch.setenv(failpoints.VARIABLE, place)


# Together with what else there is


def test_what_was_learned_under_privacy_predicts_and_is_learned_on(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes, toy_data: Path
) -> None:
    federate(make_nodes(3), make_settings(tasks=TASKS[:1]), registry)
    settings = make_settings(None, tasks=TASKS[1:])
    (second,) = run_federation(InProcessGrid(make_nodes(3)), settings, registry, run_id="run-2")
    assert (second.ref, second.exactness, recall(registry, second.ref).knowledge.classes) == (
        "things/2", "approximate", (*TASKS[0], *TASKS[1]),
    )  # fmt: skip
    assert len(predict(registry, "things/1", str(toy_data)).rows) == len(load_dataset(toy_data, split=None))
