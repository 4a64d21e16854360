"""Classes forgotten by clients together, in one process: what comes of it is what forgetting at one place gives."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from tests.conftest import write_tiny_bert
from tests.coordinator.grid import Answer, InProcessGrid, MakeNodes, Node, Reply, Tamper, facts_of, rewritten
from torch import Tensor

from pomona.client.trainer import Trainer
from pomona.coordinator import request_loop
from pomona.coordinator.beginning import begin_run
from pomona.coordinator.client_removal import remove_client
from pomona.coordinator.federation import run_federation
from pomona.coordinator.forgetting import ForgetRequest, forget
from pomona.coordinator.learning import LearnRequest, learn
from pomona.coordinator.memory import recall
from pomona.coordinator.reemergence import recheck_of
from pomona.coordinator.summary import summarise
from pomona.datasets import load_dataset, write_jsonl
from pomona.errors import BaseModelError, DataError, PomonaError, ServerGone, VersionConflict
from pomona.forget_settings import ForgetSettings
from pomona.protocol import EDIT, EditRequest
from pomona.settings import RunSettings
from pomona.storage.opening import open_registry
from pomona.storage.records import Version
from pomona.storage.registry import Registry
from pomona.storage.verification import verify

pytestmark = pytest.mark.usefixtures("quick_polls")

RUN = "run-1"
SHORT = ForgetSettings(rank=2, steps=4)
ALL_ROWS = SHORT.model_copy(update={"batch_size": 1000, "forget_batch_size": 1000, "sparsity": 0.0})

MakeSettings = Callable[..., RunSettings]


@pytest.fixture
def registry(tmp_path: Path, things: LearnRequest) -> Iterator[Registry]:
    with open_registry(tmp_path / "registry") as registry:
        learn(registry, things)
        yield registry


@pytest.fixture
def make_settings(tiny_bert: Path) -> MakeSettings:
    def make(settings: ForgetSettings = SHORT, *, classes: tuple[str, ...] = ("food",), **more: object) -> RunSettings:
        return RunSettings.model_validate(
            {
                "name": "things",
                "model": {"base": str(tiny_bert)},
                "cohort": {"join_timeout_s": 5.0, "round_deadline_s": 30.0},
                "forget": {"classes": classes, "settings": settings.model_dump()},
                **more,
            }
        )

    return make


def central(registry: Registry, data: Path, folder: Path, settings: ForgetSettings) -> Version:
    """Forget at one place, with the rows of all clients."""
    path = folder / "rows.jsonl"
    write_jsonl(load_dataset(data, split="train"), path)
    request = ForgetRequest(name="things", classes=("food",), data=str(path), settings=settings)
    return registry.resolve(forget(registry, request).adapter)


def write_other_bert(folder: Path) -> Path:
    """Write a base model of other weights."""
    path = write_tiny_bert(folder / "other-bert")
    weights = load((path / "model.safetensors").read_bytes())
    (path / "model.safetensors").write_bytes(save({key: each + 1 for key, each in weights.items()}, {"format": "pt"}))
    return path


def stages(node: Node) -> list[str]:
    return [EditRequest.model_validate_json(request).stage for kind, request, _ in node.worked if kind == EDIT]


def at(stage: str, change: Callable[[Answer], Reply], *, number: int = 0) -> Tamper:
    """Change what a client answers at the stage, from the step on."""

    def tamper(_kind: str, answer: Answer) -> Reply:
        if not answer[2]:
            return answer
        facts = facts_of(answer[2])
        found = {"edit-gradients/1": "step", "edit-moves/1": "moves", "edit-scores/1": "end"}[facts["format"]]
        late = facts["number"] >= number if stage != "end" else facts["number"] > 0
        return change(answer) if found == stage and late else answer

    return tamper


def with_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Answer], Reply]:
    return lambda answer: rewritten(answer, lambda tensors, _facts: change(tensors))


def with_facts(**values: object) -> Callable[[Answer], Reply]:
    return lambda answer: rewritten(answer, lambda _tensors, facts: facts.update(values))


def test_one_client_with_all_rows_gives_the_version_of_one_place(
    registry: Registry,
    make_settings: MakeSettings,
    make_nodes: MakeNodes,
    things: LearnRequest,
    toy_data: Path,
    tmp_path: Path,
) -> None:
    registry.set_alias("things", "champion", 2)
    (found,) = run_federation(InProcessGrid(make_nodes(1)), make_settings(), registry, run_id=RUN)
    with open_registry(tmp_path / "other") as other:
        learn(other, things)
        expected = central(other, toy_data, tmp_path, SHORT)
        (wanted,), (certificate,) = other.certificates("things"), registry.certificates("things")
    assert (found.ref, found.sha256, found.kind) == (expected.ref, expected.sha256, "forget")
    assert (found.metrics, found.exactness) == (expected.metrics, expected.exactness)
    assert recheck_of(found) == recheck_of(expected)  # what later tasks are compared with
    assert recheck_of(found).rows.keys() == {"food"}
    assert (certificate.reason, certificate.evidence) == (wanted.reason, wanted.evidence)
    assert certificate.affected == wanted.affected
    assert registry.resolve("things@champion").ref == found.ref
    assert registry.run(RUN).state == "finished"
    assert summarise(registry, registry.run(RUN)).adapter == found.ref
    assert verify(registry).problems == ()


def test_two_clients_reach_what_one_place_reaches_with_their_rows(
    registry: Registry,
    make_settings: MakeSettings,
    make_nodes: MakeNodes,
    things: LearnRequest,
    toy_data: Path,
    tmp_path: Path,
) -> None:
    """One has all rows to forget and some to keep, the other only some to keep."""
    nodes = make_nodes(2, lambda row, label: 0 if label == "food" else row % 2)
    (found,) = run_federation(InProcessGrid(nodes), make_settings(ALL_ROWS), registry, run_id=RUN)
    with open_registry(tmp_path / "other") as other:
        learn(other, things)
        expected = central(other, toy_data, tmp_path, ALL_ROWS)
        one, two = recall(registry, found.ref).state.tensors, recall(other, expected.ref).state.tensors
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], atol=1e-4, rtol=1e-4)
    assert found.metrics == pytest.approx(expected.metrics)
    assert found.recipe["clients"] == {"trained": ["client-0", "client-1"], "summed": ["client-0", "client-1"]}
    sent = registry.submissions(RUN)
    rows = [each.num_examples or 0 for each in sent]
    assert rows[0] > rows[1] > 0
    assert [each.weight for each in sent] == pytest.approx([each / sum(rows) for each in rows])
    assert stages(nodes[1]) == ["begin", *["step"] * 4, "moves", "end"]


LIES: dict[str, tuple[Tamper, str]] = {
    "long gradients": (
        at("step", with_tensors(lambda t: [each.mul_(1e9).add_(1e9) for each in t.values()]), number=2),
        "Frobenius norm",
    ),
    "a loss that no mean can be taken of": (
        at("step", with_facts(retained_loss=1.7e308), number=2),
        "retained_loss: Input should be less than",
    ),
    "another step": (at("step", with_facts(number=0), number=1), "gradients of step 1"),
    "other rows": (at("step", with_facts(forgotten=1), number=1), "as before; got"),
    "another client": (at("moves", with_facts(client="client-0")), "expected client 'client-1', got 'client-0'"),
    "moves of nobody": (at("moves", with_tensors(lambda t: t["0.first.before"].mul_(1e3))), "the sum before of"),
    "scores of other rows": (at("end", with_tensors(lambda t: t["counts"].add_(1))), "other rows after the edit"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_client_that_lies_is_left_out_with_its_reason(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes, lie: str
) -> None:
    tamper, reason = LIES[lie]
    nodes = make_nodes(2, client_1=tamper)
    (version,) = run_federation(InProcessGrid(nodes), make_settings(), registry, run_id=RUN)
    (told,) = nodes[1].told
    assert reason in told
    assert "food" not in recall(registry, version.ref).knowledge.classes
    assert [each.client for each in registry.submissions(RUN) if each.status == "rejected"] == ["client-1"]
    assert nodes[0].told == []
    assert version in registry.touched_by("client-1")  # the gradients of the steps before count
    assert verify(registry).problems == ()


def test_who_does_not_score_the_edit_does_not_count_before_it(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes
) -> None:
    """Else accuracies before and after would be on the rows of different clients."""

    def tamper(_kind: str, answer: Answer) -> Reply:
        facts = facts_of(answer[2])
        if facts["format"] != "edit-scores/1":
            return answer
        if facts["number"] == 0:
            return with_tensors(lambda t: t["right"].zero_())(answer)
        return with_tensors(lambda t: t["counts"].add_(1))(answer)

    run_federation(InProcessGrid(make_nodes(2, client_1=tamper)), make_settings(), registry, run_id=RUN)
    (certificate,) = registry.certificates("things")
    figures = certificate.evidence["accuracy on what is kept"]
    assert isinstance(figures, dict)
    assert figures["before"] > 0.9


def test_a_client_that_vanishes_in_the_middle_is_left_out_and_may_be_forgotten_later(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes
) -> None:
    settings = make_settings(cohort={"join_timeout_s": 5.0, "round_deadline_s": 1.0})
    nodes = make_nodes(2, client_1=at("step", lambda _answer: None, number=2))
    (version,) = run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN)
    assert stages(nodes[1]) == ["begin", *["step"] * 3]
    assert version.recipe["clients"] == {"trained": ["client-0", "client-1"], "summed": ["client-0"]}
    sent = {(each.client, each.status): each.reason for each in registry.submissions(RUN)}
    assert sent["client-1", "accepted"] == "how its features moved did not come"
    assert "did not answer" in sent["client-1", "late"]
    (removal,), _ = remove_client(registry, "client-1")
    assert removal.certificate.method == "rollback"
    left = recall(registry, "things")  # of what never knew the class, not of what is in quarantine for it
    assert left.version.number > version.number
    assert "food" not in left.knowledge.classes


def test_who_has_no_rows_says_so_and_a_request_without_rows_ends(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes
) -> None:
    run_federation(InProcessGrid(make_nodes(1)), make_settings(), registry, run_id=RUN)
    nodes = make_nodes(2, lambda _row, label: 1 if label == "food" else 0)  # which the newest version knows no more
    cohort = {"join_timeout_s": 5.0, "min_clients": 2, "min_replies": 2}
    settings = make_settings(classes=("tool",), cohort=cohort)
    (version,) = run_federation(InProcessGrid(nodes), settings, registry, run_id="run-2")
    assert version.recipe["clients"] == {"trained": ["client-0"], "summed": ["client-0"]}
    assert "acc_forgotten_earlier" not in version.metrics
    assert "its rows stay with clients" in recheck_of(version).unchecked["food"]
    assert recheck_of(version).rows.keys() == {"tool"}
    assert stages(nodes[1]) == ["begin"]
    assert nodes[1].told == []
    keepers = make_nodes(2, lambda _row, label: 1 if label == "weather" else 0)[:1]
    with pytest.raises(DataError, match="no client that is left holds out rows of 'weather'"):
        run_federation(InProcessGrid(keepers), make_settings(classes=("weather",)), registry, run_id="run-3")
    with pytest.raises(DataError, match="no client has rows of"):
        run_federation(InProcessGrid(nodes[1:]), make_settings(classes=("weather",)), registry, run_id="run-4")
    assert registry.rounds("run-3")[0].state == "failed"
    assert recall(registry, "things").version.ref == version.ref


@pytest.fixture(scope="module")
def uncut() -> list[str]:
    """Hash of what a request publishes that is not cut off, when there is one."""
    return []


@pytest.mark.parametrize("place", ["classes-forgotten", "round-frozen", "version-published"])
def test_a_run_that_was_cut_off_is_begun_again_to_the_same_bytes(
    place: str,
    uncut: list[str],
    registry: Registry,
    make_settings: MakeSettings,
    make_nodes: MakeNodes,
    things: LearnRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not uncut:
        with open_registry(tmp_path / "whole") as whole:
            learn(whole, things)
            (version,) = run_federation(InProcessGrid(make_nodes(2)), make_settings(), whole, run_id=RUN)
            uncut.append(version.sha256)

    def die(name: str) -> None:
        if name == place:
            raise ServerGone("as if it had died")

    with monkeypatch.context() as dying:
        dying.setattr(request_loop, "reach", die)
        with pytest.raises(ServerGone):
            run_federation(InProcessGrid(make_nodes(2)), make_settings(), registry, run_id=RUN)
    published = place == "version-published"
    assert bool(registry.certificates("things")) == published
    nodes = make_nodes(2)
    (version,) = run_federation(InProcessGrid(nodes), make_settings(), registry, run_id=RUN)
    assert (version.ref, version.sha256) == ("things/3", *uncut)
    assert (nodes[0].worked == []) == published
    assert [each.state for each in registry.rounds(RUN)] == (["committed"] if published else ["failed", "committed"])
    assert registry.run(RUN).state == "finished"
    assert len(registry.certificates("things")) == 1
    assert verify(registry).problems == ()


def test_what_cannot_be_forgotten_is_refused_before_anybody_is_asked(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes, tmp_path: Path
) -> None:
    every = ("animal", "food", "tool", "weather")
    for classes, says in ((("foot",), "knows no class 'foot'; did you mean 'food'"), (every, "some but not all")):
        with pytest.raises(DataError, match=says):
            begin_run(registry, make_settings(classes=classes), run_id="run-0")
    with pytest.raises(BaseModelError, match=r"name that one as model\.base"):
        begin_run(registry, make_settings(model={"base": str(write_other_bert(tmp_path))}), run_id="run-0")
    assert registry.runs() == []
    run_federation(InProcessGrid(make_nodes(1)), make_settings(), registry, run_id=RUN)
    with pytest.raises(DataError, match="has forgotten 'food' already"):
        begin_run(registry, make_settings(), run_id="run-2")


def test_a_version_published_meanwhile_ends_the_request(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes, toy_data: Path, tmp_path: Path
) -> None:
    def publish(answer: Answer) -> Reply:
        central(registry, toy_data, tmp_path, SHORT)
        return answer

    nodes = make_nodes(1, client_0=at("moves", publish))
    with pytest.raises(VersionConflict, match="somebody else published first"):
        run_federation(InProcessGrid(nodes), make_settings(), registry, run_id=RUN)
    assert len(registry.certificates("things")) == 1
    with pytest.raises(VersionConflict, match="somebody published another version; start a new run"):
        run_federation(InProcessGrid(make_nodes(1)), make_settings(), registry, run_id=RUN)


def test_an_edit_that_diverges_is_said_to_by_the_client(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes
) -> None:
    nodes = make_nodes(1)
    with pytest.raises(PomonaError, match="step 1 of the request needs 1 answers"):
        run_federation(
            InProcessGrid(nodes), make_settings(SHORT.model_copy(update={"learning_rate": 1e30})), registry, run_id=RUN
        )
    (told,) = nodes[0].told
    assert "forgetting diverged at step 1, its loss is nan; the run needs a lower learning_rate" in told


def test_a_client_that_was_started_in_the_middle_says_so(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes
) -> None:
    nodes = make_nodes(2)

    def restart(answer: Answer) -> Reply:
        nodes[1].trainer = Trainer(nodes[1].profile)
        return answer

    nodes[1].learns = at("step", restart, number=1)
    run_federation(InProcessGrid(nodes), make_settings(), registry, run_id=RUN)
    (told,) = nodes[1].told
    assert "was started after the request had begun" in told


def test_fewer_answers_than_wanted_end_the_request(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes
) -> None:
    nodes = make_nodes(2, client_1=at("step", with_facts(number=0), number=1))
    settings = make_settings(cohort={"join_timeout_s": 5.0, "min_clients": 2, "min_replies": 2})
    with pytest.raises(PomonaError, match="step 1 of the request needs 2 answers"):
        run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN)
    assert recall(registry, "things").version.ref == "things/2"
