"""The re-emergence alarm: a later task or edit that undoes an earlier edit is noticed, and looking changes nothing."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.coordinator.grid import InProcessGrid, MakeNodes
from tests.coordinator.things import SETTINGS, Write

from pomona.adapters import LoraFactors
from pomona.cli.learn import warn_of_reemergence
from pomona.continual.knowledge import Knowledge
from pomona.continual.mos import learn_task, with_task
from pomona.continual.requests import MetRequest, forget_in_knowledge
from pomona.continual.scores import scores_of
from pomona.coordinator import forgetting, learning, task_loop
from pomona.coordinator.federation import run_federation
from pomona.coordinator.forgetting import ForgetRequest, Forgotten, forget
from pomona.coordinator.learning import LearnRequest, learn
from pomona.coordinator.memory import Memory, open_encoder, recall
from pomona.coordinator.reemergence import TOLERANCE, Recheck, reappears, recheck, recheck_of
from pomona.coordinator.task_scores import Rows, encoded
from pomona.datasets import load_dataset
from pomona.errors import PayloadError
from pomona.settings import RunSettings
from pomona.storage.opening import open_registry
from pomona.storage.registry import Registry
from pomona.storage.verification import verify

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

STRONG = SETTINGS.forget.model_copy(update={"rank": 4, "steps": 20, "learning_rate": 1e-2})
LEARNED = ("animal", "food", "tool")


@pytest.fixture(scope="module")
def begun(things: LearnRequest, write: Write) -> LearnRequest:
    return replace(things, data=write("train", LEARNED), test=write("test", LEARNED))


@pytest.fixture(scope="module")
def wish(begun: LearnRequest) -> ForgetRequest:
    return ForgetRequest(name="things", classes=("food",), data=begun.data, test=begun.test, settings=STRONG)


@pytest.fixture(scope="module")
def after_food(begun: LearnRequest, wish: ForgetRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry in which food was learned by ``things/1`` or ``things/2`` and forgotten by ``things/3``."""
    folder = tmp_path_factory.mktemp("forgotten") / "home"
    with open_registry(folder) as registry:
        learn(registry, begun)
        assert forget(registry, wish).acc_forget <= TOLERANCE
    return folder


@pytest.fixture
def registry(after_food: Path, tmp_path: Path) -> Iterator[Registry]:
    shutil.copytree(after_food, tmp_path / "home")
    with open_registry(tmp_path / "home") as registry:
        yield registry


@pytest.fixture
def more(begun: LearnRequest, write: Write) -> LearnRequest:
    """A task that is new, scored on rows of all classes."""
    return replace(begun, data=write("train", ("weather",)), test=write("test"), classes_per_task=1)


def undone(knowledge: Knowledge) -> Knowledge:
    """Return knowledge with one edit more, whose factors cancel those before it."""
    cancelling = {name: LoraFactors(a=each.a, b=-each.b, scale=each.scale) for name, each in knowledge.edit.items()}
    return replace(knowledge, edits=(*knowledge.edits, cancelling))


def undoing(change: Callable[..., Knowledge]) -> Callable[..., Knowledge]:
    return lambda *args, **more: undone(change(*args, **more))


def undo_in_requests(patch: pytest.MonkeyPatch) -> None:
    def undone_at_once(met: MetRequest) -> MetRequest:
        return replace(met, edited=undone(met.edited), left=undone(met.left))

    patch.setattr(
        forgetting, "forget_in_knowledge", lambda *args, **more: undone_at_once(forget_in_knowledge(*args, **more))
    )


def opened(registry: Registry, base: Path, data: str) -> tuple[Memory, Rows]:
    memory = recall(registry, "things")
    return memory, encoded(open_encoder(base, memory.stream.mos), load_dataset(data, split=None), max_length=32)


def looked(registry: Registry, memory: Memory, base: Path, test: Rows, knowledge: Knowledge | None = None) -> Recheck:
    encoder = open_encoder(base, memory.stream.mos)
    return recheck(registry, memory, encoder, knowledge or memory.knowledge, test)


def test_a_second_request_that_leaves_the_first_alone_raises_no_alarm(registry: Registry, wish: ForgetRequest) -> None:
    second = forget(registry, replace(wish, classes=("tool",)))
    rechecked = recheck_of(registry.resolve(second.adapter))
    assert rechecked.rows == {"food": 12, "tool": 12}
    assert second.acc_forgotten_earlier == rechecked.right["food"] / 12 <= 1 / 12
    assert (second.reappeared, dict(second.unchecked)) == ((), {})


def test_a_second_request_that_undoes_the_first_raises_the_alarm(
    registry: Registry, wish: ForgetRequest, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes wrong without putting rows back: knowledge that lacks the class never tells it, so 0 is stated."""
    undo_in_requests(monkeypatch)
    asked = replace(wish, classes=("tool",))
    second: Forgotten = forget(registry, asked)
    assert second.reappeared == ("food",)
    assert second.acc_forgotten_earlier is not None
    assert second.acc_forgotten_earlier > 0.8
    assert registry.resolve(second.adapter).metrics["acc_forgotten_earlier"] == second.acc_forgotten_earlier
    assert forget(registry, asked).reappeared == ("food",)  # told once more
    memory, test = opened(registry, tiny_bert, str(wish.test))
    encoder = open_encoder(tiny_bert, memory.stream.mos)
    assert scores_of(encoder, memory.knowledge, test.states, test.labels).accuracy(["food"]) == 0.0
    assert "food" not in memory.knowledge.classes
    assert verify(registry).problems == ()


@pytest.mark.parametrize("undoes", [False, True])
def test_a_task_that_undoes_a_request_raises_the_alarm(
    registry: Registry, more: LearnRequest, monkeypatch: pytest.MonkeyPatch, undoes: bool
) -> None:
    if undoes:
        monkeypatch.setattr(learning, "learn_task", undoing(learn_task))
    found = learn(registry, more)
    stated = registry.resolve(found.adapter).metrics["acc_forgotten_earlier"]
    assert (found.reappeared, stated > 0.8) == ((("food",), True) if undoes else ((), False))
    assert learn(registry, more).reappeared == found.reappeared  # told once more


@pytest.mark.usefixtures("quick_polls")
def test_a_task_of_clients_that_undoes_a_request_raises_the_alarm(
    registry: Registry,
    make_nodes: MakeNodes,
    tiny_bert: Path,
    toy_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    mos = recall(registry, "things").knowledge.settings.model_dump(exclude={"seed"}, exclude_defaults=True)
    settings = RunSettings.model_validate(
        {
            "name": "things",
            "model": {"base": str(tiny_bert), "max_length": 32},
            "data": {"source": str(toy_data)},
            "cohort": {"join_timeout_s": 5.0, "round_deadline_s": 30.0},
            "continual": {"tasks": (("weather",),), "rounds_per_task": 1, "mos": mos},
        }
    )
    monkeypatch.setattr(task_loop, "with_task", undoing(with_task))
    (version,) = run_federation(InProcessGrid(make_nodes(1)), settings, registry, run_id="run-1")
    assert version.metrics["acc_forgotten_earlier"] > 0.8
    assert recheck_of(version).reappeared == ("food",)
    assert "food was to be forgotten, and would be told again" in caplog.text


def test_looking_publishes_and_changes_nothing(
    registry: Registry, tiny_bert: Path, write: Write, tmp_path: Path
) -> None:
    memory, test = opened(registry, tiny_bert, write("test"))
    knowledge = undone(memory.knowledge)

    def everything() -> dict[str, bytes]:
        files = [each for each in (tmp_path / "home").rglob("*") if each.is_file() and not each.name.endswith("-shm")]
        return {str(each): each.read_bytes() for each in files}

    before, audit = everything(), registry.audit()
    assert len(before) > 3  # a database, and a blob of each version
    tensors = {name: each.clone() for name, each in knowledge.to_tensors()[0].items()}
    assert looked(registry, memory, tiny_bert, test, knowledge).reappeared == ("food",)
    assert (everything(), registry.audit()) == (before, audit)
    after = knowledge.to_tensors()[0]
    assert tensors.keys() == after.keys()
    assert all(torch.equal(each, after[name]) for name, each in tensors.items())


def test_a_class_that_was_learned_again_is_not_looked_for(registry: Registry, more: LearnRequest, write: Write) -> None:
    again = replace(more, data=write("train", ("food",)), test=write("test", LEARNED), relearn=("food",))
    found = learn(registry, again)
    version = registry.resolve(found.adapter)
    assert found.reappeared == ()
    assert "acc_forgotten_earlier" not in version.metrics
    assert recheck_of(version) == Recheck()


def test_bytes_that_are_gone_leave_the_figure_out_and_are_named(
    registry: Registry, wish: ForgetRequest, tiny_bert: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    forget(registry, replace(wish, classes=("tool",)))
    memory, test = opened(registry, tiny_bert, write("test"))
    known = undone(memory.knowledge)  # of both
    whole = looked(registry, memory, tiny_bert, test, known)
    assert whole.rows == {"food": 12, "tool": 12}
    assert whole.metrics(["food", "tool"]) == {"acc_forgotten_earlier": sum(whole.right.values()) / 24}
    registry.blobs.path(registry.resolve("things/3").sha256).unlink()  # the last that knew tool
    found = looked(registry, memory, tiny_bert, test, known)
    assert found.rows == {"food": 12}
    assert found.reappeared == ("food",)
    assert found.metrics(["food", "tool"]) == {}
    assert "things/3, the last that knew it, cannot be read" in found.unchecked["tool"]
    warn_of_reemergence(found.reappeared, found.unchecked)
    said = capsys.readouterr().err
    assert "warning: food was to be forgotten, and would be told again" in said
    assert "warning: tool was not looked at again: things/3" in said


def test_what_a_request_left_is_no_re_emergence(
    begun: LearnRequest, wish: ForgetRequest, more: LearnRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edit that did nothing is said where it was made; the figure stays, and is no alarm of each later task."""
    useless = STRONG.model_copy(update={"steps": 1, "sparsity": 1e6, "warm_up": 0.0})
    for stated in (True, False):
        with open_registry(tmp_path / str(stated)) as registry, monkeypatch.context() as patch:
            learn(registry, begun)
            if not stated:  # as versions are that were made before it was stated
                patch.setattr(forgetting, "recheck", lambda *_args, **_more: Recheck())
            assert forget(registry, replace(wish, settings=useless)).acc_forget > 0.8
            found = learn(registry, more)
            assert registry.resolve(found.adapter).metrics["acc_forgotten_earlier"] > 0.8
            assert found.reappeared == ()


@given(right=st.integers(0, 200), rows=st.integers(1, 200), before=st.integers(0, 200), rows_before=st.integers(1, 200))
def test_the_alarm_is_for_more_than_three_points_and_more_than_a_row(
    right: int, rows: int, before: int, rows_before: int
) -> None:
    right, after = min(right, rows), Fraction(min(before, rows_before), rows_before)
    more = right - after * rows
    assert reappears(right, rows, after=float(after)) == (more > Fraction(3, 100) * rows and more > 1)
    assert not reappears(right, rows, after=right / rows)


def test_a_recipe_that_says_nothing_that_can_be_read_is_refused(registry: Registry) -> None:
    version = registry.resolve("things")
    assert recheck_of(replace(version, recipe={})) == Recheck()
    with pytest.raises(PayloadError, match="things/3 does not say how it was looked at"):
        recheck_of(replace(version, recipe={"rechecked": {"rows": "many"}}))
