"""A request that owners meet together, through bytes: what comes out, and which bytes are refused."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from pomona.continual.edit_rounds import EditState, is_done, start_edit
from pomona.continual.editing import Examples
from pomona.continual.encoder import FrozenEncoder
from pomona.continual.forgetting import forget_step
from pomona.continual.groups import changed_groups
from pomona.continual.knowledge import Knowledge, nothing_known
from pomona.continual.learner import data_of_tasks
from pomona.continual.mos import learn_task
from pomona.continual.moves import TaskMoves, summed_moves
from pomona.continual.moves_payload import decode_moves, encode_moves
from pomona.continual.request_known import decode_known, encode_known
from pomona.continual.request_payload import (
    RequestFacts,
    decode_edit,
    decode_gradients,
    decode_scores,
    encode_edit,
    encode_gradients,
    encode_scores,
)
from pomona.continual.requests import MetRequest, RequestOwner, forget_in_knowledge, meet, with_edit
from pomona.continual.scores import scores_of
from pomona.continual.statistics import ClassStatistics
from pomona.continual.tasks import Task
from pomona.datasets import load_dataset
from pomona.errors import PayloadError
from pomona.forget_settings import ForgetSettings
from pomona.mos_settings import HeadKind, LoopSettings, MosSettings
from pomona.payload import read_header

TASKS = (Task(1, ("animal", "food")), Task(2, ("tool", "weather")))
CLASSES = ("animal", "food", "tool", "weather")
SHORT = ForgetSettings(rank=2, steps=8, batch_size=12, forget_batch_size=6, learning_rate=2e-2, sparsity=0.1)
FACTS = RequestFacts(client="clinic-1", parent="things/2", base_sha256="a" * 64, number=0, nonce="0" * 32)

Spoil = Callable[[dict[str, Tensor]], None]


@dataclass(frozen=True)
class Learned:
    encoder: FrozenEncoder
    knowledge: Knowledge
    train: Examples

    def owners(self, parts: list[Examples]) -> list[RequestOwner]:
        return [RequestOwner(self.encoder, self.knowledge, each, ["food"], settings=SHORT, seed=0) for each in parts]


def learned(model: Path, data: Path, head: HeadKind) -> Learned:
    encoder = FrozenEncoder(model)
    settings = MosSettings(head=head, rank=2, ridge_dimensions=16, training=LoopSettings(epochs=1, min_steps=8))
    rows = load_dataset(data, split="train")
    found = data_of_tasks(TASKS, rows.labels, encoder.of_texts(rows.texts, max_length=16))
    knowledge = nothing_known(encoder.width, settings)
    for each in found:
        knowledge = learn_task(encoder, knowledge, each, settings)
    states = found[0].states + found[1].states
    return Learned(encoder, knowledge, Examples(states, torch.cat([each.targets for each in found])))


@pytest.fixture(scope="module")
def ridge(tiny_bert: Path, toy_data: Path) -> Learned:
    return learned(tiny_bert, toy_data, "ridge")


def met_by(known: Learned, parts: list[Examples]) -> tuple[MetRequest, EditState]:
    """Meet a request as a coordinator would, every word through bytes."""
    owners, settings = known.owners(parts), SHORT
    state = start_edit(known.encoder, rank=settings.rank, seed=0)
    like = state.adapter
    while not is_done(state, settings):
        sent = EditState(state.number, decode_edit(encode_edit(state.adapter), like), {}, {})
        facts = FACTS.model_copy(update={"number": state.number})
        answers = [encode_gradients(each.gradients(sent), facts) for each in owners]
        state = forget_step(
            state, [decode_gradients(each, state, most=1e3, max_rows=200)[1] for each in answers], settings
        )
    moves = [encode_moves(each.moves(state), FACTS) for each in owners]
    read = [decode_moves(each, known.knowledge, ["food"], max_rows=200)[1] for each in moves]
    return meet(known.knowledge, ["food"], state, read), state


def facts_of(knowledge: Knowledge) -> dict[str, Tensor]:
    return knowledge.to_tensors()[0]


@pytest.mark.parametrize("head", ["combined", "aligned", "ridge"])
def test_one_owner_of_everything_gives_the_bytes_of_one_place(tiny_bert: Path, toy_data: Path, head: HeadKind) -> None:
    known = learned(tiny_bert, toy_data, head)
    expected = forget_in_knowledge(known.encoder, known.knowledge, known.train, ["food"], settings=SHORT, seed=0)
    found, _ = met_by(known, [known.train])
    one, other = facts_of(found.left), facts_of(expected.left)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert found.stale == expected.stale == ()


def test_owners_of_some_rows_each_make_one_edit_and_the_statistics_of_all_rows(ridge: Learned) -> None:
    """One has nothing to forget, one nothing to retain, one has some of each."""
    targets = ridge.train.targets
    half = torch.arange(len(targets)) % 2 == 0
    parts = [
        ridge.train.subset((targets != 1) & half),
        ridge.train.subset((targets == 1) & half),
        ridge.train.subset(~half),
    ]
    found, state = met_by(ridge, parts)
    assert changed_groups(state.adapter) == found.forgotten.groups_changed
    for position, task in enumerate(found.left.tasks):  # the oracle: features of all retained rows at one place
        for label, own, first in zip(task.classes, task.statistics, task.first, strict=True):
            rows = ridge.train.subset(targets == CLASSES.index(label)).states
            for at, kept in ((position, own), (0, first)):
                expected = ClassStatistics.of(ridge.encoder.all_features(rows, found.left.adapter(at)))
                assert kept.count == expected.count
                torch.testing.assert_close(kept.total, expected.total, atol=1e-5, rtol=1e-6)
                torch.testing.assert_close(kept.moment, expected.moment, atol=1e-5, rtol=1e-6)
    assert found.stale == ()
    moves = [each.moves(state) for each in ridge.owners(parts)]
    (whole,) = [each.moves(state) for each in ridge.owners([ridge.train])]
    for one, other in zip(summed_moves(moves), whole, strict=True):
        assert one.ridge is not None
        assert other.ridge is not None
        torch.testing.assert_close(one.ridge.total.gram, other.ridge.total.gram, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(one.first[0].before, other.first[0].before, atol=1e-5, rtol=1e-6)


def spoiled(payload: bytes, spoil: Spoil) -> bytes:
    tensors = load(payload)
    spoil(tensors)
    return save(
        {key: each.contiguous() for key, each in tensors.items()},
        dict(read_header(payload, dtypes={"F32", "F64", "I64"}).metadata),
    )


def times(name: str, factor: float) -> Spoil:
    return lambda tensors: tensors.update({key: each * factor for key, each in tensors.items() if name in key})


def without(name: str) -> Spoil:
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if name in key].clear()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (times("forgotten.lora_B", float("nan")), "NaN or an infinity"),
        (times("retained.lora_B", 1e12), "Frobenius norm"),
        (without("forgotten."), "is missing"),
        (lambda tensors: tensors.update({"more": torch.zeros(1)}), "not expected"),
        (times("retained.lora_A", torch.ones(1, dtype=torch.float64)), "torch.float64"),  # type: ignore[arg-type]
    ],
)
def test_gradients_that_lie_are_refused(ridge: Learned, spoil: Spoil, says: str) -> None:
    state = start_edit(ridge.encoder, rank=2, seed=0)
    (owner,) = ridge.owners([ridge.train])
    payload = encode_gradients(owner.gradients(state), FACTS)
    decode_gradients(payload, state, most=1e3, max_rows=200)
    with pytest.raises(PayloadError, match=says):
        decode_gradients(spoiled(payload, spoil), state, most=1e3, max_rows=200)


def test_gradients_of_another_step_or_of_too_many_rows_are_refused(ridge: Learned) -> None:
    state = start_edit(ridge.encoder, rank=2, seed=0)
    (owner,) = ridge.owners([ridge.train])
    late = encode_gradients(owner.gradients(state), FACTS.model_copy(update={"number": 3}))
    with pytest.raises(PayloadError, match="of step 0 over at most 200 rows"):
        decode_gradients(late, state, most=1e3, max_rows=200)
    with pytest.raises(PayloadError, match="at most 10 rows"):
        decode_gradients(encode_gradients(owner.gradients(state), FACTS), state, most=1e3, max_rows=10)
    with pytest.raises(PayloadError, match="not expected; expected 8"):
        decode_edit(late, state.adapter)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (times("1.own.moment", 3.0), "features of length 1"),
        (times("1.first.moment", 3.0), "features of length 1"),
        (times("1.own.before", 50.0), "sum before"),
        (times("1.first.before", 50.0), "sum before"),
        (times("0.first.count", -1), "negative one"),
        (times("1.own.count", 2), "same examples of task 2"),
        (times("0.ridge.total.gram", -1.0), "no sums of random features"),
        (times("0.first.total", float("inf")), "NaN or an infinity"),
    ],
)
def test_moves_that_no_features_can_have_made_are_refused(ridge: Learned, spoil: Spoil, says: str) -> None:
    payload = moves_payload(ridge)
    decode_moves(payload, ridge.knowledge, ["food"], max_rows=200)
    with pytest.raises(PayloadError, match=says):
        decode_moves(spoiled(payload, spoil), ridge.knowledge, ["food"], max_rows=200)


def test_moves_tell_nothing_of_what_is_to_be_forgotten(ridge: Learned) -> None:
    with pytest.raises(PayloadError, match="nothing of 'tool'"):
        decode_moves(moves_payload(ridge), ridge.knowledge, ["tool"], max_rows=200)
    with pytest.raises(PayloadError, match="at most 5 retained"):
        decode_moves(moves_payload(ridge), ridge.knowledge, ["food"], max_rows=5)
    food = ridge.knowledge.classes.index("food")
    moves: tuple[TaskMoves, ...] = ridge.owners([ridge.train])[0].moves(start_edit(ridge.encoder, rank=2, seed=0))
    assert moves[0].first[food].after.count == 0
    assert not moves[0].first[food].before.any()


def moves_payload(known: Learned) -> bytes:
    (owner,) = known.owners([known.train])
    return encode_moves(owner.moves(start_edit(known.encoder, rank=2, seed=0)), FACTS)


def test_scores_add_up_and_right_answers_are_no_more_than_examples(ridge: Learned) -> None:
    names = [CLASSES[i] for i in ridge.train.targets.tolist()]
    whole = scores_of(ridge.encoder, ridge.knowledge, ridge.train.states, names)
    parts = []
    for start in (0, 1):
        rows = list(range(start, len(names), 2))
        one = scores_of(ridge.encoder, ridge.knowledge, ridge.train.states.subset(rows), [names[i] for i in rows])
        _, (read,) = decode_scores(encode_scores([one], CLASSES, FACTS), CLASSES, sets=1, max_rows=100)
        parts.append(read)
    assert (parts[0] + parts[1]).accuracies() == whole.accuracies()
    payload = encode_scores([whole], CLASSES, FACTS)
    for spoil in (times("counts", 0), times("right", -1), times("counts", 1000)):
        with pytest.raises(PayloadError, match="expected right answers among at most 100"):
            decode_scores(spoiled(payload, spoil), CLASSES, sets=1, max_rows=100)
    with pytest.raises(PayloadError, match=f"at most {len(names) - 1} examples"):
        decode_scores(payload, CLASSES, sets=1, max_rows=len(names) - 1)


def known_payload(known: Learned) -> bytes:
    return encode_known(known.knowledge)


def test_what_is_known_comes_back_to_the_byte(ridge: Learned) -> None:
    state = start_edit(ridge.encoder, rank=2, seed=0)
    edited = with_edit(ridge.knowledge, state)  # whose factors have a scale
    for knowledge in (ridge.knowledge, edited, edited.without(["food"])):
        read = decode_known(encode_known(knowledge), ridge.encoder.manifest, width=16, classes=CLASSES)
        one, other = facts_of(read), facts_of(knowledge)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert read.settings == knowledge.settings


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (times("task.1.head.bias", float("nan")), "NaN or an infinity"),
        (without("task.1.statistics.total"), "knowledge of a task"),
        (lambda tensors: tensors.update({"head.weight": torch.zeros(4, 7)}), "weight of the head"),
        (times("task.2.first.count", 0), "statistics of examples, got of 0"),
        (
            lambda tensors: tensors.update(
                {key: each[:, :3] for key, each in tensors.items() if key.startswith("task.2.lora_A")}
            ),
            r"expected A of .* shape \(2, ",
        ),
        (
            lambda tensors: tensors.update(
                {"task.1.lora_A.other": torch.zeros(2, 3), "task.1.lora_B.other": torch.zeros(3, 2)}
            ),
            "layers of this encoder",
        ),
        (
            lambda tensors: tensors.update(
                {
                    f"task.1.ridge.{part}.{name}": torch.zeros(*shape, dtype=torch.float64)
                    for part in ("total", "held_out")
                    for name, shape in (("gram", (15 * 16 // 2,)), ("cross", (15, 2)))
                }
            ),
            r"expected gram of sums of random features .* shape \(16, 16\)",
        ),
    ],
)
def test_what_nobody_can_know_of_this_encoder_is_refused(ridge: Learned, spoil: Spoil, says: str) -> None:
    """A coordinator is not trusted either; unchecked, these end a client with an error of torch in the middle."""
    with pytest.raises(PayloadError, match=says):
        decode_known(spoiled(known_payload(ridge), spoil), ridge.encoder.manifest, width=16, classes=CLASSES)


def test_knowledge_of_other_classes_is_refused(ridge: Learned) -> None:
    with pytest.raises(PayloadError, match="classes of the run, got 'weather'"):
        decode_known(known_payload(ridge), ridge.encoder.manifest, width=16, classes=CLASSES[:3])
