"""``docs/continual.md``: its worked example runs as it stands, and machines get what it says."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from pomona.cli import app
from pomona.cli.output import INTERRUPTED
from pomona.datasets import load_dataset
from pomona.storage.opening import open_registry

PAGE = (Path(__file__).parents[2] / "docs" / "continual.md").read_text(encoding="utf-8")
EXAMPLE, _, OF_CLIENTS = PAGE.partition("## Forgetting a client")  # which needs a federated run: test_client_removal.py
COMMANDS = re.findall(r"^pomona (.+)$", EXAMPLE, re.MULTILINE)
TASKS = {"animal": 1, "food": 1, "tool": 2, "weather": 3}
SETTINGS = """
[encoder]
max_length = 32
[mos]
rank = 2
[mos.training]
epochs = 1
min_steps = 8
[forget]
steps = 6
rank = 2
"""

Call = Callable[[str], Result]


@pytest.fixture
def call(tmp_path: Path, tiny_bert: Path, toy_data: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run a command of the page where its files are, on a model that is quick to train."""
    monkeypatch.delenv("POMONA_REGISTRY_URL", raising=False)
    monkeypatch.setenv("POMONA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    Path("settings.toml").write_text(SETTINGS)
    for name, split in (("train", "train"), ("test", "validation")):
        data = load_dataset(toy_data, split="train" if split == "train" else "validation")
        rows = [{"text": each.text, "label": each.label, "task": TASKS[each.label]} for each in data]
        Path(f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        food = [{"text": row["text"], "label": row["label"]} for row in rows if row["label"] == "food"]
        if name == "train":
            Path("again.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in food))

    def run(command: str) -> Result:
        words = command.split()
        if words[0] in {"learn", "forget"}:
            words += ["--settings", "settings.toml", "--base", str(tiny_bert)]
        return CliRunner().invoke(app, words)

    return run


def test_the_worked_example_runs(call: Call) -> None:
    said = []
    for command in COMMANDS:
        done = call(command)
        assert done.exit_code == 0, f"{command}: {done.output}"
        said.append(done.stdout)
    learned, _, _, forgotten, lineage, certificate, versions, again = said
    assert "things/3" in learned
    assert "forgetting" in learned
    answers = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert {answer["label"] for answer in answers} <= set(TASKS)
    assert (Path("features") / "adapter_model.safetensors").is_file()
    assert "things/4: without food" in forgotten
    assert "things/3 forget x 1" in lineage
    assert "things/2 task x 1" in lineage
    assert "behavioural" in certificate
    assert "things/1, things/2, things/3" in certificate
    assert versions.count("in quarantine") == 3
    assert "things/5" in again


def test_machines_get_what_the_page_says(call: Call) -> None:
    promised = PAGE.partition("## What machines get")[2]
    learned, forgotten = (set(re.findall(r"`(\w+)`", part)) for part in promised.split("`forget`:"))
    found = json.loads(call("learn things --data train.jsonl --test test.jsonl --json").stdout.splitlines()[-1])
    assert found.keys() == learned - {"learn"}
    assert [len(row) for row in found["matrix"]] == [1, 2, 3]
    assert found["adapter"] == "things/3"
    done = call("forget things --class food --data train.jsonl --test test.jsonl --json")
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == forgotten
    assert found["certificate"]["sha256"]
    assert found["exactness"] == found["certificate"]["exactness"] == "behavioural"
    shown = json.loads(call("registry certificate things --json").stdout)
    assert shown == [found["certificate"]]
    predicted = json.loads(call("predict things --data test.jsonl --json").stdout)
    assert predicted["adapter"] == "things/4"
    assert len(predicted["rows"]) == len(Path("test.jsonl").read_text().splitlines())


def test_an_edit_that_did_nothing_is_a_warning(call: Call) -> None:
    call("learn things --data train.jsonl --test test.jsonl")
    Path("settings.toml").write_text(f"{SETTINGS}sparsity = 1e6\nwarm_up = 0.0\n")
    done = call("forget things --class food --data train.jsonl --test test.jsonl")
    assert done.exit_code == 0
    assert "warning: the edit changed no block: only rows and statistics of the classes are gone" in done.stderr
    assert "0 of 2" in done.stdout


@pytest.mark.parametrize(
    ("works", "command"),
    [
        ("learning.learn", "learn things --data train.jsonl"),
        ("forgetting.forget", "forget things --class food --data train.jsonl"),
        ("client_removal.remove_client", "forget --client me"),
    ],
)
def test_who_interrupts_is_told_how_to_go_on(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, works: str, command: str
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    open_registry(tmp_path / "home").close()
    monkeypatch.setattr(f"pomona.coordinator.{works}", interrupted)
    done = call(command) if "--client" not in command else CliRunner().invoke(app, command.split())
    assert done.exit_code == INTERRUPTED
    assert done.stderr.startswith("interrupted: the same command goes on")


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        ("learn things --data train.jsonl --test test.jsonl --classes-per-task 2", 3, "has a column 'task'"),
        ("learn things --data again.jsonl --test again.jsonl --classes-per-task 1", 4, "has the single class 'food'"),
        ("learn things --data nowhere.jsonl --classes-per-task 1", 4, "no data file"),
        ("predict things --data test.jsonl", 16, "there is no registry"),
        ("forget things --class food --data train.jsonl", 16, "there is no registry"),
        (re.findall(r"^pomona (.+)$", OF_CLIENTS, re.MULTILINE)[0], 16, "there is no registry"),
        ("forget --client me --class food", 3, "leave out NAME, --class"),
        (
            "forget things",
            3,
            "expected NAME, --class and --data to forget classes, or --client alone; --class, --data is",
        ),
        ("forget things --class food", 3, "or --client alone; --data is missing"),
    ],
)
def test_a_mistake_is_one_line_and_a_code(call: Call, command: str, code: int, says: str) -> None:
    done = call(command)
    assert done.exit_code == code, done.output
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
