"""The commands print what is there, for people and for machines, and end with the documented codes."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from safetensors.numpy import save
from typer.testing import CliRunner

from pomona.cli import output
from pomona.cli.registry import VERSION_COLUMNS, app
from pomona.storage.opening import open_registry
from pomona.storage.records import NewSubmission, NewVersion, SubmissionStatus
from pomona.storage.registry import Registry

BASE = "b" * 64
PAYLOAD = save({"lora_A.x": np.ones((2, 3), np.float32), "lora_B.x": np.ones((4, 2), np.float32)})
HOSTILE = "\x1b[31mmallory\x07[bold]x[/nope]\n\u202e"

Call = Callable[..., Result]


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POMONA_REGISTRY_URL", raising=False)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def registry(home: Path) -> Iterator[Registry]:
    with open_registry(home) as registry:
        registry.add_base_model(BASE, "tiny-base", "a test")
        registry.start_run(run_id="run-1", adapter="demo", base_sha256=BASE, settings_json="{}")
        for number in (1, 2):
            _round(registry, number)
        registry.finish_run("run-1", "finished")
        yield registry


def _round(registry: Registry, number: int) -> None:
    parent = f"demo/{number - 1}" if number > 1 else None
    registry.enrol_client("run-1", name=HOSTILE, rank=4, num_examples=120)
    registry.open_round("run-1", number, parent=parent, cohort=[HOSTILE])
    answers: list[tuple[SubmissionStatus, str]] = [("accepted", ""), ("rejected", "norm [red]1e9[/red]")]
    for status, reason in answers:
        registry.record_submission(
            NewSubmission(
                run_id="run-1",
                round_number=number,
                client=HOSTILE,
                rank=4,
                alpha=8.0,
                num_examples=120,
                nonce=f"{status}{number}",
                status=status,
                reason=reason,
                payload=b"x",
            )
        )
    registry.publish_round(
        NewVersion(
            run_id="run-1",
            round_number=number,
            adapter="demo",
            payload=PAYLOAD,
            base_sha256=BASE,
            rank=2,
            exactness="exact",
            recipe={"task": "classification"},
            metrics={"accuracy": 0.5 + number / 100, "loss": float("nan")},
            weights={HOSTILE: 1.0},
        )
    )


@pytest.fixture
def call(registry: Registry, home: Path) -> Call:
    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(app, [*arguments, "--home", str(home)])

    return invoke


def parsed(result: Result) -> object:
    assert result.exit_code == 0, result.output
    value: object = json.loads(result.stdout)
    return value


def test_an_adapter_whose_newest_version_is_in_quarantine_is_marked(call: Call, registry: Registry) -> None:
    assert "quarantine" not in call("ls").stdout
    registry.quarantine(["demo/2"], "somebody was to be forgotten")
    assert "demo/2, in quarantine" in " ".join(call("ls").stdout.split())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["ls"], ["demo", "accuracy=0.52", "1 adapter"]),
        (["show", "demo/1"], ["accuracy=0.51", "tiny-base", "mallory", "120", "norm [red]1e9[/red]"]),
        (["versions", "demo"], ["accuracy=0.51", "accuracy=0.52", "run-1 round 2"]),
        (
            ["lineage", "demo"],
            ["demo/2", "demo/1", "parent x 1", "mallory", "rank 4", "weight 1", "rejected"],
        ),
        (["runs"], ["run-1", "finished", "2 of 2 committed"]),
    ],
    ids=["ls", "show", "versions", "lineage", "runs"],
)
def test_people_get_a_table(call: Call, arguments: list[str], expected: list[str]) -> None:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    assert [text for text in expected if text not in result.stdout] == []


@pytest.mark.parametrize("arguments", [["show", "demo"], ["lineage", "demo"]], ids=lambda value: value[0])
def test_a_hostile_name_is_shown_and_does_nothing(call: Call, arguments: list[str]) -> None:
    shown = call(*arguments).stdout
    assert "[31mmallory[bold]x[/nope]" in shown
    assert not {"\x1b", "\x07", "\u202e"} & set(shown)


def test_machines_get_one_document(call: Call) -> None:
    adapters = parsed(call("ls", "--json"))
    assert isinstance(adapters, list)
    assert [(item["name"], item["versions"], item["latest"]["ref"]) for item in adapters] == [("demo", 2, "demo/2")]
    versions = parsed(call("versions", "demo", "--json"))
    assert isinstance(versions, list)
    assert [item["metrics"] for item in versions] == [
        {"accuracy": 0.51, "loss": None},
        {"accuracy": 0.52, "loss": None},
    ]
    runs = parsed(call("runs", "--json"))
    assert isinstance(runs, list)
    assert (runs[0]["id"], runs[0]["state"], runs[0]["started_at"][-6:]) == ("run-1", "finished", "+00:00")


def test_machines_get_the_submissions_of_a_version(call: Call) -> None:
    version = parsed(call("show", "demo", "--json"))
    assert isinstance(version, dict)
    assert version["ref"] == "demo/2"
    sent = [(item["client"], item["status"], item["weight"]) for item in version["submissions"]]
    assert sent == [(HOSTILE, "accepted", 1.0), (HOSTILE, "rejected", None)]


def test_machines_get_the_lineage_flat(call: Call) -> None:
    lineage = parsed(call("lineage", "demo", "--json"))
    assert isinstance(lineage, dict)
    assert [item["ref"] for item in lineage["versions"]] == ["demo/2", "demo/1"]
    assert lineage["versions"][0]["parents"] == [{"ref": "demo/1", "kind": "parent", "coefficient": 1.0}]
    assert len(lineage["versions"][1]["submissions"]) == 2


def test_the_tree_stops_where_it_is_told(call: Call) -> None:
    shown = call("lineage", "demo", "--depth", "1").stdout
    assert "demo/1" in shown
    assert "--depth 2" in shown
    assert shown.count("accepted") == 1


def test_an_alias_is_set_moved_and_removed(call: Call, registry: Registry) -> None:
    assert "demo@champion is demo/1" in call("alias", "demo", "champion", "1").stdout
    assert registry.resolve("demo@champion").number == 1
    moved = parsed(call("alias", "demo", "champion", "2", "--json"))
    assert isinstance(moved, dict)
    assert (moved["ref"], moved["aliases"]) == ("demo/2", ["champion"])
    assert call("alias", "demo", "champion", "--remove").exit_code == 0
    assert registry.resolve("demo/2").aliases == ()


def test_a_tag_is_set(call: Call, registry: Registry) -> None:
    assert call("tag", "demo/1", "note=a=b [red]").exit_code == 0
    assert registry.resolve("demo/1").tags == {"note": "a=b [red]"}
    assert "note=a=b [red]" in call("versions", "demo").stdout


def test_an_export_is_written_once(call: Call, tmp_path: Path) -> None:
    target = tmp_path / "out"
    facts = parsed(call("export", "demo/1", "--to", str(target), "--json"))
    assert isinstance(facts, dict)
    assert (facts["ref"], facts["directory"]) == ("demo/1", str(target))
    assert (target / "adapter_model.safetensors").is_file()
    refused = call("export", "demo/2", "--to", str(target))
    assert (refused.exit_code, "--overwrite" in refused.stderr) == (3, True)
    assert call("export", "demo/2", "--to", str(target), "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (["show", "demi"], 11, "AdapterNotFound"),
        (["versions", "demi"], 11, "AdapterNotFound"),
        (["lineage", "demo/9"], 11, "AdapterNotFound"),
        (["alias", "demo", "Champion", "1"], 3, "ConfigError"),
        (["alias", "demo", "nobody", "--remove"], 11, "AdapterNotFound"),
        (["tag", "demo", "nothing"], 3, "ConfigError"),
    ],
)
def test_an_error_is_one_line_and_a_code(call: Call, arguments: list[str], code: int, kind: str) -> None:
    people = call(*arguments)
    assert (people.exit_code, people.stdout) == (code, "")
    assert people.stderr.startswith("error: ")
    assert people.stderr.count("\n") == 1
    machines = call(*arguments, "--json")
    assert machines.exit_code == code
    error = json.loads(machines.stdout)["error"]
    assert (error["code"], error["type"]) == (code, kind)
    assert error["message"]


@pytest.mark.parametrize(
    "arguments",
    [["alias", "demo", "champion"], ["alias", "demo", "champion", "1", "--remove"], ["export", "demo"]],
)
def test_wrong_usage_is_code_2(call: Call, arguments: list[str]) -> None:
    assert call(*arguments).exit_code == 2


def test_a_damaged_version_is_code_15(call: Call, registry: Registry, tmp_path: Path) -> None:
    registry.blobs.path(registry.resolve("demo").sha256).write_bytes(b"")
    assert call("export", "demo", "--to", str(tmp_path / "out")).exit_code == 15


def test_looking_where_nothing_is_creates_nothing(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["ls", "--home", str(tmp_path / "nowhere")])
    assert (result.exit_code, "there is no registry" in result.stderr) == (16, True)
    assert not (tmp_path / "nowhere").exists()


def test_a_bug_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), output.exit_on_error(as_json=True):
        _ = 1 / 0


def test_help_is_quick_because_it_loads_nothing() -> None:
    script = (
        "import sys; from pomona.cli.registry import app\n"
        "print(sorted({'torch', 'sqlalchemy', 'pydantic', 'numpy', 'alembic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["gc"],
        ["tag", "demo/1", "stage=live"],
        ["alias", "demo", "champion", "1"],
        ["alias", "demo", "champion", "--remove"],
    ],
    ids=["gc", "tag", "alias", "alias --remove"],
)
def test_a_mistyped_home_creates_no_registry(tmp_path: Path, arguments: list[str]) -> None:
    result = CliRunner().invoke(app, [*arguments, "--home", str(tmp_path / "typo")])
    assert result.exit_code == 16
    assert "there is no registry in" in result.stderr
    assert not (tmp_path / "typo").exists()


def test_half_a_surrogate_pair_in_an_argument_is_one_line(call: Call) -> None:
    missing = call("show", "a\udc80")
    assert (missing.exit_code, len(missing.stderr.splitlines())) == (11, 1)
    refused = call("tag", "demo/1", "stage=a\udc80")
    assert (refused.exit_code, len(refused.stderr.splitlines())) == (3, 1)


@pytest.mark.parametrize("command", [["versions", "demo"], ["search"], ["audit"], ["runs"]], ids=lambda value: value[0])
def test_no_date_event_or_header_breaks_in_80_columns(
    call: Call, registry: Registry, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    registry.set_tag("demo/2", "site", "b" * 300)
    monkeypatch.setenv("COLUMNS", "80")
    shown = call(*command).stdout
    table = [line for line in shown.splitlines() if line.startswith(("┃", "│"))]
    headers = [each.strip() for each in table[0].strip("┃").split("┃")]
    known = {*VERSION_COLUMNS, "at", "event", "subject", "details", "run", "adapter", "state", "rounds", "reason"}
    assert set(headers) <= known | {"record", "actor", "clients", "started", "finished"}
    assert max(len(line) for line in table) <= 80
    assert "bbb..." in shown or command == ["runs"] or "tags" not in headers
    if command == ["audit"]:
        assert "submission-recorded" in shown
    if {"created", "at", "finished"} & set(headers):
        assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d", shown)


def test_a_list_of_nothing_is_one_line(call: Call) -> None:
    assert call("search", "rank > 99").stdout == "0 found\n"
    assert "1 run" in call("runs").stdout.splitlines()[0].split("  ")
