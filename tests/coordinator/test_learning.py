"""Learning files into a registry: a version a task, resumable to the byte, and every refusal."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.coordinator.things import ANIMAL_FOOD, TOOL_WEATHER, Write

from pomona.coordinator.continual_settings import ContinualSettings, EncoderSettings, load_continual_settings
from pomona.coordinator.forgetting import ForgetRequest, forget
from pomona.coordinator.learning import LearnRequest, learn
from pomona.coordinator.memory import recall
from pomona.coordinator.predicting import predict
from pomona.datasets import load_dataset
from pomona.errors import AdapterNotFound, BaseModelError, ConfigError, DataError, PomonaError, VersionConflict
from pomona.storage.opening import open_registry
from pomona.storage.records import NewImport
from pomona.storage.registry import Registry
from pomona.storage.verification import verify


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with open_registry(tmp_path / "home") as registry:
        yield registry


def test_each_task_becomes_a_version_that_predicts_all_learned_by_then(
    registry: Registry, things: LearnRequest, write: Write
) -> None:
    seen: list[str] = []
    found = learn(registry, things, show=lambda learned: seen.append(learned.adapter))
    assert seen == ["things/1", "things/2"]
    assert [len(row) for row in found.matrix.rows] == [1, 2]
    assert found.last_accuracy > 0.8
    first, second = registry.versions("things")
    assert (first.kind, second.kind, second.exactness) == ("task", "task", "exact")
    assert second.metrics["accuracy"] == found.last_accuracy
    assert [(parent.version.ref, parent.kind) for parent in registry.lineage("things/2").parents] == [
        ("things/1", "task")
    ]
    answers = predict(registry, "things/1", write("test"))
    assert {row.label for row in answers.rows} <= set(found.tasks[0].classes)
    data = load_dataset(write("test"), split=None)
    answers = predict(registry, "things", write("test"))
    assert [row.text for row in answers.rows] == list(data.texts)
    right = [row.label == label for row, label in zip(answers.rows, data.labels, strict=True)]
    assert sum(right) / len(right) == pytest.approx(found.last_accuracy)
    assert all(0.0 <= row.score <= 1.0 for row in answers.rows)
    assert verify(registry).problems == ()


def test_asked_for_the_same_again_nothing_is_learned(registry: Registry, things: LearnRequest) -> None:
    first = learn(registry, things)
    before = registry.audit()
    again = learn(registry, things, show=lambda _learned: pytest.fail("a task was learned again"))
    assert (again.adapter, again.matrix) == (first.adapter, first.matrix)
    assert registry.audit() == before


def test_more_classes_can_be_learned_later_from_their_own_file(
    registry: Registry, things: LearnRequest, write: Write
) -> None:
    first = replace(things, data=write("train", ANIMAL_FOOD), test=write("test", ANIMAL_FOOD))
    assert learn(registry, first).adapter == "things/1"
    more = replace(first, data=write("train", TOOL_WEATHER), test=write("test"), classes_per_task=1, base=None)
    found = learn(registry, more)
    assert found.adapter == "things/3"
    assert {row.label for row in predict(registry, "things", write("test")).rows} == {*ANIMAL_FOOD, *TOOL_WEATHER}
    with pytest.raises(DataError, match="classes that were learned before: 'animal', 'food'"):
        learn(registry, replace(first, classes_per_task=1))


def test_what_the_published_code_overwrites_is_still_what_versions_are_made_of(
    registry: Registry, things: LearnRequest
) -> None:
    """It writes into adapters as it answers; a version made on what was written could not be read again."""
    mos = things.settings.mos.model_copy(update={"head": "aligned", "official_compat": True})
    asked = replace(things, settings=things.settings.model_copy(update={"mos": mos}))
    learn(registry, asked)
    request = ForgetRequest(
        name="things", classes=("food",), data=things.data, test=things.test, settings=things.settings.forget
    )
    forget(registry, request)
    for version in registry.versions("things"):
        recall(registry, version.ref, quarantined=True)


class Cut(Exception):
    pass


def cut(_learned: object) -> None:
    raise Cut


def test_a_stream_that_was_cut_off_goes_on_with_the_same_data_and_settings_only(
    registry: Registry, things: LearnRequest, write: Write
) -> None:
    with pytest.raises(Cut):
        learn(registry, things, show=cut)
    others = {
        "data": replace(things, data=write("test")),
        "seed": replace(things, seed=1),
        "settings": replace(things, settings=ContinualSettings()),
    }
    for name, other in others.items():
        with pytest.raises(VersionConflict, match=f"has learned 1 of 2 tasks with other .*{name}"):
            learn(registry, other)
    longer = things.settings.model_copy(update={"encoder": EncoderSettings(max_length=16)})
    with pytest.raises(VersionConflict, match="with other settings"):
        learn(registry, replace(things, settings=longer))
    assert learn(registry, things).adapter == "things/2"


def test_what_federated_rounds_made_is_not_learned_on(registry: Registry, things: LearnRequest) -> None:
    made = NewImport(
        adapter="things", payload=b"x", base_sha256="b" * 64, base_model="tiny", base_source="a test", rank=1
    )
    registry.publish_import(made)
    with pytest.raises(VersionConflict, match="things/1 was made by an import, not by `pomona learn`"):
        learn(registry, things)


def test_another_base_model_is_refused(registry: Registry, things: LearnRequest, tmp_path: Path) -> None:
    from tests.conftest import write_tiny_bert

    learn(registry, things)
    other = write_tiny_bert(tmp_path / "other-bert")
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(BaseModelError, match=r"things/2 was learned on base model .*name that one by --base"):
        learn(registry, replace(things, base=str(other)))


def test_what_cannot_be_learned_leaves_no_trace(registry: Registry, things: LearnRequest) -> None:
    refusals: list[tuple[LearnRequest, type[PomonaError], str]] = [
        (replace(things, name="no/name"), ConfigError, "expected an adapter name"),
        (replace(things, data="nowhere.jsonl"), DataError, "no data file"),
        (replace(things, classes_per_task=None), ConfigError, "expected --classes-per-task, or a column 'task'"),
        (replace(things, relearn=["plant"]), DataError, "'plant' is to be learned again"),
    ]
    for request, error, says in refusals:
        with pytest.raises(error, match=says):
            learn(registry, request)
    assert registry.adapters() == []


def test_what_cannot_predict_says_so(registry: Registry, things: LearnRequest, tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFound, match="there is no adapter 'things'"):
        predict(registry, "things", things.data)
    learn(registry, things)
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(DataError, match="is empty"):
        predict(registry, "things", str(empty))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mos = 3", "mos: .*got 3"),
        ("[mos]\nrnak = 3", "mos.rnak: .*not permitted"),
        ("[mos]\nseed = 3", "mos.seed: leave it out and say it by --seed"),
        ("[mos", "is not TOML"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_continual_settings(path)
    assert load_continual_settings(None) == ContinualSettings()


def test_the_answers_are_lines_of_json(registry: Registry, things: LearnRequest) -> None:
    learn(registry, things)
    line, *_ = predict(registry, "things", things.data).lines()
    assert json.loads(line).keys() == {"text", "label", "score"}
