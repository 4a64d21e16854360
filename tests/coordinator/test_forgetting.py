"""Forgetting on request: a version without, a certificate, quarantine; killed anywhere; back only if asked for."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.coordinator.things import ROOT, SETTINGS, Write

from pomona.coordinator.differences import compare_versions
from pomona.coordinator.edits import SHORTFALL, shortfall, verdict_of
from pomona.coordinator.forgetting import ForgetRequest, forget
from pomona.coordinator.layouts import export_version
from pomona.coordinator.learning import LearnRequest, learn
from pomona.coordinator.memory import recall
from pomona.coordinator.predicting import predict
from pomona.coordinator.reemergence import TOLERANCE
from pomona.datasets import load_dataset
from pomona.errors import AdapterNotFound, ConfigError, DataError, VersionQuarantined
from pomona.storage.opening import open_registry
from pomona.storage.registry import Registry
from pomona.storage.verification import verify

STRONG = SETTINGS.forget.model_copy(update={"rank": 4, "steps": 20, "learning_rate": 1e-2})
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with open_registry(tmp_path / "home") as registry:
        yield registry


@pytest.fixture
def wish(things: LearnRequest) -> ForgetRequest:
    return ForgetRequest(name="things", classes=("food",), data=things.data, test=things.test, settings=SETTINGS.forget)


@pytest.fixture
def learned(registry: Registry, things: LearnRequest) -> Registry:
    learn(registry, things)
    registry.set_alias("things", "champion", 2)
    return registry


def labels(registry: Registry, ref: str, data: str) -> set[str]:
    return {row.label for row in predict(registry, ref, data).rows}


def test_a_request_leaves_a_version_without_the_class_and_says_how_far_that_holds(
    learned: Registry, wish: ForgetRequest
) -> None:
    found = forget(learned, wish)
    assert found.adapter == "things/3"
    assert labels(learned, "things", wish.data) == {"animal", "tool", "weather"}
    memory = recall(learned, "things")
    assert memory.forgotten == ("food",)
    assert len(memory.knowledge.statistics) == len(memory.knowledge.first) == memory.knowledge.head.classes == 3
    assert 1 <= found.groups_changed <= found.groups_total == 2
    certificate = found.certificate
    assert (certificate.subjects, certificate.exactness) == (("food",), "behavioural")
    assert "the forget-adapter" in certificate.reason
    assert certificate.evidence["accuracy on what was to be forgotten"]["published"] == 0.0  # type: ignore[index]
    knew = list(certificate.affected)
    assert knew == [version.ref for version in learned.versions("things") if "food" in str(version.recipe["knows"])]
    assert learned.resolve("things@champion").ref == "things/3"
    with pytest.raises(VersionQuarantined, match="food was to be forgotten; things/3 goes on without"):
        predict(learned, knew[-1], wish.data)
    assert verify(learned).problems == ()


def test_an_edit_that_changes_no_block_is_said_to_have_done_nothing(learned: Registry, wish: ForgetRequest) -> None:
    useless = SETTINGS.forget.model_copy(update={"sparsity": 1e6, "warm_up": 0.0})
    found = forget(learned, replace(wish, settings=useless))
    assert found.groups_changed == 0
    reason = found.certificate.reason
    assert "the edit changed no block: only rows and statistics of the classes are gone" in reason
    assert found.certificate.evidence[SHORTFALL] in reason  # type: ignore[operator]
    assert "forget-adapter" not in reason
    assert "food" not in labels(learned, "things", wish.data)


def test_an_edit_falls_short_where_the_accuracy_did_not_fall() -> None:
    assert shortfall(1, 0.5, 0.25) == shortfall(2, 0.0, 0.0) == ""
    assert "did not lower the accuracy on the classes (0.5000 before, 0.5000 with it)" in shortfall(1, 0.5, 0.5)
    assert "changed no block" in shortfall(0, 0.5, 0.5)


def test_asked_for_the_same_again_nothing_is_forgotten(learned: Registry, wish: ForgetRequest) -> None:
    first = forget(learned, wish)
    before = learned.audit()
    assert replace(forget(learned, wish), seconds=first.seconds) == first
    assert learned.audit() == before


def test_a_forgotten_class_comes_back_only_if_asked_for(
    learned: Registry,
    wish: ForgetRequest,
    things: LearnRequest,
    write: Write,
) -> None:
    forget(learned, wish)
    food = write("train", ("food",))
    again = replace(things, data=food, classes_per_task=1)
    with pytest.raises(DataError, match=r"classes that were to be forgotten: 'food'; .* --relearn food"):
        learn(learned, again)
    found = learn(learned, replace(again, relearn=["food"]))
    assert found.adapter == "things/4"
    assert "food" in labels(learned, "things", wish.data)
    assert recall(learned, "things").forgotten == ()
    assert learned.resolve("things/4").quarantined == ""
    assert verify(learned).problems == ()


def test_a_class_that_was_learned_again_is_forgotten_no_better_than_the_first_time(
    learned: Registry, wish: ForgetRequest, things: LearnRequest, write: Write
) -> None:
    """Its new task is one of a single class, whose head is not trained; that of its first task is, and in use."""
    first = forget(learned, wish)
    assert "the head of task" in first.certificate.reason
    learn(learned, replace(things, data=write("train", ("food",)), classes_per_task=1, relearn=["food"]))
    second = forget(learned, wish)
    assert first.exactness == second.exactness == "behavioural"
    assert "; certificate 1 says what is in use of when it was learned before" in second.certificate.reason
    assert list(second.certificate.affected) == ["things/2", "things/4"]
    other = forget(learned, replace(wish, classes=("tool",)))
    assert "says what is in use" not in other.certificate.reason


def test_learning_on_looks_whether_what_was_forgotten_is_told_again(
    learned: Registry, wish: ForgetRequest, things: LearnRequest, tmp_path: Path
) -> None:
    forget(learned, replace(wish, settings=STRONG))
    stones = tmp_path / "stones.jsonl"
    stones.write_text("".join(f'{{"text": "old {i % 3} and near", "label": "stone"}}\n' for i in range(12)))
    both = tmp_path / "both.jsonl"
    both.write_text(stones.read_text() + Path(str(wish.test)).read_text())
    found = learn(learned, replace(things, data=str(stones), test=str(both), classes_per_task=1))
    assert found.reappeared == ()
    newest = learned.resolve(found.adapter)
    assert newest.metrics["acc_forgotten_earlier"] <= TOLERANCE
    assert (newest.kind, newest.exactness) == ("task", "behavioural")  # the edit below is still in use
    assert "food" not in labels(learned, "things", str(both))


def test_a_second_request_says_what_became_of_the_first(learned: Registry, wish: ForgetRequest) -> None:
    forget(learned, replace(wish, settings=STRONG))
    second = forget(learned, replace(wish, classes=("tool",), settings=STRONG))
    assert second.acc_forgotten_earlier is not None
    assert second.acc_forgotten_earlier <= TOLERANCE
    assert second.reappeared == ()
    assert second.exactness == "exact-given-frozen-features"  # the last class of its task: no head of it is left
    left = learned.resolve(second.adapter)
    assert left.exactness == "behavioural"  # as the version below, which holds what the first request left
    rows = zip(
        predict(learned, "things", str(wish.test)).rows, load_dataset(str(wish.test), split=None).labels, strict=True
    )
    kept = [row.label == label for row, label in rows if label in {"animal", "weather"}]
    assert left.metrics["accuracy"] == sum(kept) / len(kept)
    assert labels(learned, "things", wish.data) == {"animal", "weather"}
    assert [item.subjects for item in learned.certificates("things")] == [("food",), ("tool",)]
    assert len(recall(learned, "things").knowledge.edits) == 2


def test_the_verdict_names_what_was_trained_on_the_examples_and_answers(learned: Registry) -> None:
    knowledge = recall(learned, "things").knowledge
    (one, _), whole = (task.classes for task in knowledge.tasks)
    adapters = "the adapter of task 1, the adapter of task 2"  # the second began at the first
    found = verdict_of(knowledge, [one], [], edited=False)
    assert (found.exactness, found.why.startswith(f"{adapters}, the head of task 1 were")) == ("behavioural", True)
    found = verdict_of(knowledge, whole, [])
    assert found.exactness == "exact-given-frozen-features"
    assert "the adapter of task 1" not in found.why
    assert "the adapter of task 2, the forget-adapter below" in found.why
    assert verdict_of(knowledge, whole, ["the ridge sums of task 2"]).exactness == "behavioural"


def test_what_cannot_be_forgotten_changes_nothing(
    learned: Registry,
    wish: ForgetRequest,
    write: Write,
) -> None:
    others = write("train", ("animal", "tool"))
    only = write("train", ("food",))
    before = learned.audit()
    refusals = {
        "knows no class 'foot'; did you mean 'food'": replace(wish, classes=("foot",)),
        "some but not all of the 4 classes": replace(wish, classes=("food", "tool", "animal", "weather")),
        "has no rows of 'food', which is to be forgotten": replace(wish, data=others),
        "has no rows of classes to keep": replace(wish, data=only),
    }
    for says, asked in refusals.items():
        with pytest.raises(DataError, match=says):
            forget(learned, asked)
    with pytest.raises(AdapterNotFound, match="there is no adapter 'nothing'"):
        forget(learned, replace(wish, name="nothing"))
    assert learned.audit() == before
    forget(learned, wish)
    with pytest.raises(DataError, match="things/3 has forgotten 'food' already"):
        forget(learned, replace(wish, seed=1))


def test_the_features_of_a_version_are_what_plain_peft_computes(
    learned: Registry, wish: ForgetRequest, tiny_bert: Path, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModel, AutoTokenizer

    from pomona.continual.encoder import FrozenEncoder

    export_version(learned, "things/2", tmp_path / "out")
    text, knowledge = "the old dog and bread", recall(learned, "things/2").knowledge
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_bert), str(tmp_path / "out"))
    batch = AutoTokenizer.from_pretrained(tiny_bert)([text], return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state[0].mean(0)
    encoder = FrozenEncoder(tiny_bert, adapted_blocks=2)
    expected = encoder.all_features(encoder.of_texts([text], max_length=32), knowledge.adapter(1))[0]
    torch.testing.assert_close(torch.nn.functional.normalize(hidden, dim=0), expected, atol=1e-5, rtol=1e-4)
    plain = encoder.all_features(encoder.of_texts([text], max_length=32))[0]
    assert not torch.allclose(plain, expected, atol=1e-3)
    with pytest.raises(ConfigError, match="--layout merged would lack it"):
        export_version(learned, "things/2", tmp_path / "whole", layout="merged")
    forget(learned, wish)
    with pytest.raises(VersionQuarantined):
        export_version(learned, "things/2", tmp_path / "late")
    assert compare_versions(learned, "things/2", "things/3").comparison.distance > 0


PLACES = ("task-learned:2", "version-blob-written:2", "version-inserted:1", "classes-forgotten:1", "version-inserted:3")


def test_killed_anywhere_the_registry_is_whole_and_goes_on_to_the_same_bytes(
    tmp_path: Path,
    things: LearnRequest,
    wish: ForgetRequest,
) -> None:
    facts = {"name": "things", "data": wish.data, "test": wish.test}
    wanted = {
        "learn": {**facts, "classes_per_task": 2, "base": things.base},
        "forget": {**facts, "classes": wish.classes},
        "settings": SETTINGS.model_dump(mode="json"),
        "lives": [(str(tmp_path / place), place) for place in PLACES] + [(str(tmp_path / "whole"), "")],
    }
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.coordinator.learn_until_killed"],
        input=json.dumps(wanted), env=env, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(PLACES) + ["0"]
    with open_registry(tmp_path / "whole", read_only=True) as whole:
        expected = [version.sha256 for version in whole.versions("things")]
    for place in PLACES:
        with open_registry(tmp_path / place) as registry:
            assert verify(registry).problems == ()
            assert len(registry.certificates()) == 0
            learn(registry, things)
            forget(registry, wish)
            assert [version.sha256 for version in registry.versions("things")] == expected
            assert verify(registry).problems == ()
