"""Tasks whose data are spread over clients, in one process: what comes of them is what central learning gives."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from tests.coordinator.grid import Answer, Change, InProcessGrid, MakeNodes, Reply, Tamper, facts_of, rewritten
from tests.coordinator.things import Write
from torch import Tensor
from torch.testing import assert_close

from pomona.continual.encoder import FrozenEncoder
from pomona.continual.knowledge import nothing_known
from pomona.continual.learner import TaskData
from pomona.continual.mos import learn_task
from pomona.continual.statistics import ClassStatistics
from pomona.continual.tasks import Task
from pomona.coordinator import task_loop
from pomona.coordinator.beginning import begin_run
from pomona.coordinator.client_removal import remove_client
from pomona.coordinator.continual_settings import EncoderSettings
from pomona.coordinator.federation import run_federation
from pomona.coordinator.forgetting import ForgetRequest, forget
from pomona.coordinator.learning import LearnRequest, learn
from pomona.coordinator.memory import recall
from pomona.coordinator.predicting import predict
from pomona.datasets import load_dataset
from pomona.errors import DataError, ServerGone, VersionConflict, VersionQuarantined
from pomona.forget_settings import ForgetSettings
from pomona.protocol import SUMS, TASK
from pomona.settings import RunSettings
from pomona.storage.opening import open_registry
from pomona.storage.records import NewImport
from pomona.storage.registry import Registry
from pomona.storage.verification import verify

pytestmark = pytest.mark.usefixtures("quick_polls")

TASKS = (("animal", "food"), ("tool", "weather"))
RUN = "run-1"
MOS = {"rank": 2, "training": {"epochs": 1, "min_steps": 8}}

MakeSettings = Callable[..., RunSettings]


@pytest.fixture
def make_settings(tiny_bert: Path, toy_data: Path) -> MakeSettings:
    def make(*, mos: Mapping[str, object] = MOS, rounds_per_task: int = 1, **sections: object) -> RunSettings:
        return RunSettings.model_validate(
            {
                "name": "things",
                "seed": 3,
                "model": {"base": str(tiny_bert), "max_length": 16},
                "data": {"source": str(toy_data)},
                "cohort": {"join_timeout_s": 5.0, "round_deadline_s": 30.0},
                "continual": {"tasks": TASKS, "rounds_per_task": rounds_per_task, "mos": mos},
                **sections,
            }
        )

    return make


def central(model: Path, data: Path, settings: RunSettings) -> list[dict[str, Tensor]]:
    """What one owner of all rows learns by itself, after each task."""
    assert settings.continual is not None
    mos = settings.continual.mos.model_copy(update={"seed": settings.seed})
    encoder = FrozenEncoder(model, adapted_blocks=mos.adapted_blocks)
    train = load_dataset(data, split="train")
    knowledge, found = nothing_known(encoder.width, mos), []
    for number, classes in enumerate(settings.continual.tasks, start=1):
        mine = train.subset([i for i, label in enumerate(train.labels) if label in classes])
        order = (*knowledge.classes, *classes)
        targets = torch.tensor([order.index(label) for label in mine.labels])
        states = encoder.of_texts(mine.texts, max_length=16)
        knowledge = learn_task(encoder, knowledge, TaskData(Task(number, classes), states, targets), mos)
        found.append(knowledge.to_tensors()[0])
    return found


def known(registry: Registry, ref: str) -> dict[str, Tensor]:
    return dict(recall(registry, ref).state.tensors)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("head", ["combined", "aligned", "ridge"])
def test_one_client_with_all_rows_and_one_round_gives_the_bytes_of_central_learning(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes, tiny_bert: Path, toy_data: Path, head: str
) -> None:
    extra: dict[str, object] = {"ridge_dimensions": 30} if head == "ridge" else {}
    settings = make_settings(mos={**MOS, "adapted_blocks": 1, "head": head, **extra})
    run_federation(InProcessGrid(make_nodes(1)), settings, registry, run_id=RUN)
    for ref, expected in zip(("things/1", "things/2"), central(tiny_bert, toy_data, settings), strict=True):
        assert same(known(registry, ref), expected)


def test_each_task_becomes_a_version_that_predicts_like_one_that_was_learned_centrally(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes, toy_data: Path, tmp_path: Path
) -> None:
    settings = make_settings(rounds_per_task=2)
    versions = run_federation(InProcessGrid(make_nodes(3)), settings, registry, run_id=RUN)
    first, second = versions
    assert (first.ref, second.ref, second.kind, second.exactness) == ("things/1", "things/2", "task", "exact")
    assert [(each.version.ref, each.kind) for each in registry.lineage("things/2").parents] == [("things/1", "task")]
    assert second.metrics["accuracy"] > 0.8
    assert second.metrics["average_accuracy"] == pytest.approx(
        (first.metrics["accuracy"] + second.metrics["accuracy"]) / 2
    )
    everybody = ["client-0", "client-1", "client-2"]
    assert second.recipe["clients"] == {"trained": everybody, "summed": everybody}
    for number in (1, 2):
        shares = [each.weight or 0.0 for each in registry.submissions(RUN, number)]
        assert shares == pytest.approx([1 / 3] * 3)
    assert registry.run(RUN).state == "finished"
    assert verify(registry).problems == ()
    held_out = load_dataset(toy_data, split="validation")
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"{each.text},{each.label}\n" for each in held_out))
    answers = predict(registry, "things", str(rows)).rows
    right = sum(row.label == label for row, label in zip(answers, held_out.labels, strict=True))
    assert right / len(answers) == pytest.approx(second.metrics["accuracy"])


def test_sums_of_clients_are_those_of_all_rows_under_the_adapter_that_they_were_taken_under(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes, tiny_bert: Path, toy_data: Path
) -> None:
    """Also where every client has classes of its own; the slow oracle sums row after row."""
    owners = {"animal": 0, "food": 1, "tool": 2, "weather": 0}
    nodes = make_nodes(3, lambda _row, label: owners[label])
    run_federation(InProcessGrid(nodes), make_settings(), registry, run_id=RUN)
    knowledge = recall(registry, "things").knowledge
    encoder = FrozenEncoder(tiny_bert, adapted_blocks=knowledge.settings.adapted_blocks)
    train = load_dataset(toy_data, split="train")
    for position, task in enumerate(knowledge.tasks):
        for label, own, first in zip(task.classes, task.statistics, task.first, strict=True):
            rows = [text for text, each in zip(train.texts, train.labels, strict=True) if each == label]
            states = encoder.of_texts(rows, max_length=16)
            for kept, adapter in ((own, knowledge.adapter(position)), (first, knowledge.adapter(0))):
                features = encoder.all_features(states, adapter).double()
                assert kept.count == len(rows)
                assert_close(kept.total, sum(features), atol=1e-5, rtol=0)
                assert_close(kept.moment, sum(torch.outer(row, row) for row in features), atol=1e-5, rtol=0)


def test_the_order_in_which_answers_come_changes_no_byte(
    tmp_path: Path, make_settings: MakeSettings, make_nodes: MakeNodes
) -> None:
    found = []
    for name, order in (("one", sorted), ("other", lambda keys: sorted(keys, reverse=True))):
        with open_registry(tmp_path / name) as registry:
            run_federation(InProcessGrid(make_nodes(3), order=order), make_settings(), registry, run_id=RUN)
            found.append([version.sha256 for version in registry.versions("things")])
    assert found[0] == found[1]


def test_a_client_without_rows_of_a_task_says_so_and_is_left_out_of_that_task(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes
) -> None:
    nodes = make_nodes(2, lambda row, label: row % 2 if label in TASKS[0] else 1)
    settings = make_settings(rounds_per_task=2, cohort={"join_timeout_s": 5.0, "min_clients": 2, "min_replies": 2})
    _, second = run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN)
    assert second.recipe["clients"] == {"trained": ["client-1"], "summed": ["client-1"]}
    assert [kind for kind, _, _ in nodes[0].worked] == [TASK, TASK, SUMS, TASK]
    assert nodes[0].told == []
    assert [each.client for each in registry.submissions(RUN, 2)] == ["client-1"]


def test_a_task_that_nobody_has_rows_of_ends_the_run(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes
) -> None:
    nodes = make_nodes(1, lambda _row, label: 0 if label in TASKS[0] else 1)
    with pytest.raises(DataError, match="no client has examples of task 2"):
        run_federation(InProcessGrid(nodes), make_settings(), registry, run_id=RUN)
    assert [version.ref for version in registry.versions("things")] == ["things/1"]


def test_clients_learn_nothing_of_each_other_but_adapters(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes
) -> None:
    """A later task's payloads hold factors, the head's rows of that task and no sums."""
    nodes = make_nodes(2)
    run_federation(InProcessGrid(nodes), make_settings(), registry, run_id=RUN)
    sent = {key for _, _, payload in nodes[0].worked for key in load(payload)}
    assert all(key.removeprefix("mean.").removeprefix("own.").removeprefix("first.").startswith("lora_") for key in
               sent - {"head.weight", "head.bias"})  # fmt: skip
    trained = load(nodes[0].worked[2][2])
    assert trained["head.weight"].shape[0] == len(TASKS[1])
    assert not trained["head.weight"].any()


# Clients that lie


def changed(kind: str, change: Change, *, task: int = 1) -> Tamper:
    """Change what a client answers to one kind of request about a task."""

    def tamper(message_type: str, answer: Answer) -> Reply:
        if message_type != kind or answer[0] == "nothing" or facts_of(answer[2])["task_number"] != task:
            return answer
        return rewritten(answer, change)

    return tamper


def _not_positive(tensors: dict[str, Tensor], _facts: dict[str, object]) -> None:
    tensors["statistics.moment"][0, 1] += 5.0  # beside the diagonal


LIES: dict[str, tuple[str, Change, str]] = {
    "not a number": (SUMS, lambda t, _: t["statistics.total"].fill_(float("nan")), "has NaN or an infinity"),
    "not positive": (SUMS, _not_positive, "a variance would be"),
    "an infinite adapter": (TASK, lambda t, _: t["head.bias"].fill_(float("inf")), "head.bias has NaN"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_client_that_lies_harms_nobody(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes, toy_data: Path, lie: str
) -> None:
    """The task completes, and its sums are those of the honest client."""
    kind, change, reason = LIES[lie]
    settings = make_settings(continual={"tasks": TASKS[:1], "rounds_per_task": 1, "mos": MOS})
    nodes = make_nodes(2, client_1=changed(kind, change))
    (version,) = run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN)
    (told,) = nodes[1].told
    assert reason in told
    assert [each.client for each in registry.submissions(RUN, 1) if each.status == "rejected"] == ["client-1"]
    counts = [each.count for each in recall(registry, "things").knowledge.statistics]
    adds = kind == TASK  # whose adapter was refused may still add its sums
    labels = load_dataset(toy_data, split="train").labels
    mine = labels if adds else labels[::2]
    assert sum(counts) == sum(label in TASKS[0] for label in mine)
    both = ["client-0", "client-1"]
    assert version.recipe["clients"] == {
        "trained": ["client-0"] if adds else both, "summed": both if adds else ["client-0"]
    }  # fmt: skip
    assert registry.touched_by("client-1") == [version]  # by its adapter, or by its sums
    assert verify(registry).problems == ()


def test_unchecked_sums_would_have_broken_the_task() -> None:
    """Why they are checked: one client's negative variances let nobody align any more."""
    honest = ClassStatistics.of(torch.nn.functional.normalize(torch.randn(20, 4, generator=torch.Generator())))
    lying = ClassStatistics(0, torch.zeros(4).double(), -40 * torch.eye(4).double())
    assert float(torch.linalg.eigvalsh((honest + lying).covariance())[0]) < -1.0


def test_a_client_has_as_many_rows_of_a_task_all_the_time(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes
) -> None:
    settings = make_settings(continual={"tasks": TASKS[:1], "rounds_per_task": 1, "mos": MOS})
    nodes = make_nodes(2, client_1=changed(TASK, lambda _, facts: facts.update(num_examples=5)))
    (version,) = run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN)
    (told,) = nodes[1].told
    assert "it had 5 examples of task 1 before, and now states 25" in told
    assert version.recipe["clients"] == {"trained": ["client-0", "client-1"], "summed": ["client-0"]}


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut off"])
def test_a_client_that_goes_silent_after_training_keeps_its_part_in_the_version(
    registry: Registry,
    make_settings: MakeSettings,
    make_nodes: MakeNodes,
    monkeypatch: pytest.MonkeyPatch,
    *,
    cut: bool,
) -> None:
    settings = make_settings(
        continual={"tasks": TASKS[:1], "rounds_per_task": 1, "mos": MOS},
        cohort={"join_timeout_s": 5.0, "round_deadline_s": 1.0},
    )
    nodes = make_nodes(2, client_1=lambda kind, answer: None if kind == SUMS else answer)

    def die(name: str) -> None:
        if name == "round-frozen":
            raise ServerGone("as if it had died")

    if cut:
        with monkeypatch.context() as dying:
            dying.setattr(task_loop, "reach", die)
            with pytest.raises(ServerGone):
                run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN)
    (version,) = run_federation(InProcessGrid(nodes), settings, registry, run_id=RUN)
    sent = {(each.client, each.status): each for each in registry.submissions(RUN, 1)}
    assert sent.keys() == {("client-0", "accepted"), ("client-1", "accepted"), ("client-1", "late")}
    assert sent["client-1", "accepted"].reason == "its sums did not come"
    assert registry.touched_by("client-1") == [version]


# Cut off and resumed

PLACES = ("task-trained", "submission-recorded", "round-frozen", "version-published")


@pytest.fixture(scope="module")
def uncut() -> list[str]:
    """Hashes of what a run publishes that is not cut off, when there is one."""
    return []


@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(
    place: str,
    uncut: list[str],
    tmp_path: Path,
    make_settings: MakeSettings,
    make_nodes: MakeNodes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whose sums were recorded is not asked again, and no update counts twice."""
    if not uncut:
        with open_registry(tmp_path / "whole") as whole:
            run_federation(InProcessGrid(make_nodes(2)), make_settings(), whole, run_id=RUN)
            uncut += [version.sha256 for version in whole.versions("things")]
    reached: list[str] = []

    def die(name: str) -> None:
        reached.append(name)
        if name == place and reached.count(name) == 2:  # in the second task, or at the second client's sums
            raise ServerGone("as if it had died")

    with open_registry(tmp_path / "cut") as registry:
        with monkeypatch.context() as dying:
            dying.setattr(task_loop, "reach", die)
            dying.setattr("pomona.storage.registry.reach", die)
            with pytest.raises(ServerGone):
                run_federation(InProcessGrid(make_nodes(2)), make_settings(), registry, run_id=RUN)
        recorded = [each.client for each in registry.submissions(RUN) if each.version is None]
        nodes = make_nodes(2)
        run_federation(InProcessGrid(nodes), make_settings(), registry, run_id=RUN)
        assert [version.sha256 for version in registry.versions("things")] == uncut
        assert registry.run(RUN).state == "finished"
        for number in (1, 2):
            assert [each.status for each in registry.submissions(RUN, number)] == ["accepted"] * 2
        if recorded:
            asked = [[kind for kind, request, _ in node.worked if '"task_number":2' in request] for node in nodes]
            assert recorded in (["client-0"], ["client-0", "client-1"])
            if place != "submission-recorded":
                assert asked == [[], []]
        assert verify(registry).problems == ()


# Together with what is learned centrally


def test_a_run_goes_on_from_what_was_learned_centrally(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes, things: LearnRequest, write: Write
) -> None:
    first = replace(things, data=write("train", TASKS[0]), test=write("test", TASKS[0]), seed=3)
    first = replace(first, settings=first.settings.model_copy(update={"encoder": EncoderSettings(max_length=16)}))
    learn(registry, first)
    settings = make_settings(continual={"tasks": TASKS[1:], "rounds_per_task": 1, "mos": MOS})
    run_federation(InProcessGrid(make_nodes(2)), settings, registry, run_id=RUN)
    assert recall(registry, "things/2").knowledge.classes[2:] == TASKS[1]
    with pytest.raises(DataError, match="'tool' was learned before"):
        run_federation(InProcessGrid(make_nodes(2)), settings, registry, run_id="run-2")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mos": {**MOS, "rank": 3}}, "was learned with other settings"),
        ({"tasks": [["animal"]]}, "'animal' was learned before"),
    ],
)
def test_a_run_that_does_not_fit_what_was_learned_is_refused(
    registry: Registry,
    make_settings: MakeSettings,
    make_nodes: MakeNodes,
    change: dict[str, object],
    says: str,
) -> None:
    one = {"tasks": TASKS[:1], "rounds_per_task": 1, "mos": MOS}
    run_federation(InProcessGrid(make_nodes(1)), make_settings(continual=one), registry, run_id=RUN)
    two = make_settings(continual={**one, "tasks": TASKS[1:], **change})
    with pytest.raises((VersionConflict, DataError), match=says):
        run_federation(InProcessGrid(make_nodes(1)), two, registry, run_id="run-2")


def test_rounds_and_tasks_do_not_go_on_from_each_other(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes
) -> None:
    one = make_settings(continual={"tasks": TASKS[:1], "rounds_per_task": 1, "mos": MOS})
    run_federation(InProcessGrid(make_nodes(1)), one, registry, run_id=RUN)
    rounds = one.model_copy(update={"continual": None})
    with pytest.raises(VersionConflict, match="things/1 was learned task after task"):
        begin_run(registry, rounds, run_id="run-2")
    begin_run(registry, rounds.model_copy(update={"name": "other"}), run_id="run-3")
    made = replace(_IMPORT, base_sha256=registry.versions("things")[0].base_sha256)
    registry.publish_import(made)
    with pytest.raises(VersionConflict, match="other/1 was not learned task after task"):
        begin_run(registry, one.model_copy(update={"name": "other"}), run_id="run-4")


_IMPORT = NewImport(adapter="other", payload=b"x", base_sha256="", base_model="tiny", base_source="a test", rank=1)


def test_a_client_is_forgotten_with_the_tasks_that_it_had_a_part_in(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes
) -> None:
    """What is left is the task before, which can be learned on."""
    nodes = make_nodes(2, lambda row, label: 0 if label in TASKS[0] else row % 2)
    run_federation(InProcessGrid(nodes), make_settings(), registry, run_id=RUN)
    before = recall(registry, "things/1").state
    (removal,), updates = remove_client(registry, "client-1")
    assert (removal.certificate.method, removal.certificate.exactness) == ("rollback", "exact")
    assert (removal.rounds_lost, updates) == (1, 1)
    left = recall(registry, "things")
    assert (left.version.ref, left.version.kind, left.state.sha256()) == ("things/3", "forget", before.sha256())
    with pytest.raises(VersionQuarantined):
        recall(registry, "things/2")
    more = make_settings(continual={"tasks": TASKS[1:], "rounds_per_task": 1, "mos": MOS})
    (again,) = run_federation(InProcessGrid(make_nodes(1)), more, registry, run_id="run-2")
    assert (again.ref, recall(registry, "things").knowledge.classes) == ("things/4", (*TASKS[0], *TASKS[1]))
    assert verify(registry).problems == ()


@pytest.fixture
def wish(write: Write) -> ForgetRequest:
    settings = ForgetSettings(steps=2, rank=2)
    return ForgetRequest(
        name="things", classes=("tool",), data=write("train"), test=write("test"), settings=settings, seed=1
    )


def test_going_back_for_a_client_brings_back_nothing_that_was_forgotten_since(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes, wish: ForgetRequest
) -> None:
    """What it goes back to never knew the class, and so did not know that it was to be forgotten."""
    nodes = make_nodes(2, lambda row, label: 0 if label in TASKS[0] else row % 2)
    run_federation(InProcessGrid(nodes), make_settings(), registry, run_id=RUN)
    forget(registry, wish)
    remove_client(registry, "client-1")
    left = recall(registry, "things")
    assert (left.version.ref, left.knowledge.classes, left.forgotten) == ("things/4", TASKS[0], ("tool",))
    more = make_settings(continual={"tasks": TASKS[1:], "rounds_per_task": 1, "mos": MOS})
    with pytest.raises(DataError, match="'tool' was to be forgotten"):
        run_federation(InProcessGrid(make_nodes(1)), more, registry, run_id="run-2")
    assert verify(registry).problems == ()


def test_going_back_for_a_client_is_not_the_request_that_it_goes_back_to(
    registry: Registry, make_settings: MakeSettings, make_nodes: MakeNodes, wish: ForgetRequest, write: Write
) -> None:
    """Asked for the same again, the certificate of the client, which says exact, was told as that of the class."""
    nodes = make_nodes(2, lambda _row, label: 0 if label in TASKS[0] else 1)
    one, two = (make_settings(continual={"tasks": [each], "rounds_per_task": 1, "mos": MOS}) for each in TASKS)
    run_federation(InProcessGrid(nodes[:1]), one, registry, run_id=RUN)
    wish = replace(wish, classes=("food",), data=write("train", TASKS[0]), test=write("test", TASKS[0]))
    forget(registry, wish)
    run_federation(InProcessGrid(nodes[1:]), two, registry, run_id="run-2")
    remove_client(registry, "client-1")
    assert recall(registry, "things").version.recipe["rolled_back_to"] == "things/2"
    with pytest.raises(DataError, match="things/4 has forgotten 'food' already"):
        forget(registry, wish)
