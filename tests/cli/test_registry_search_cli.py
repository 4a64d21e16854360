"""Searching, metrics over versions and the moves of an alias, as commands print them."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from pomona.cli import app
from pomona.cli.sparkline import WIDTH, sparkline
from pomona.storage.opening import open_registry
from pomona.storage.records import NewVersion
from pomona.storage.registry import Registry

BASE = "b" * 64
Call = Callable[..., Result]


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POMONA_REGISTRY_URL", raising=False)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with open_registry(tmp_path / "home") as registry:
        registry.add_base_model(BASE, "tiny-base", "a test")
        registry.start_run(run_id="run-1", adapter="demo", base_sha256=BASE, settings_json="{}")
        for number in (1, 2, 3):
            registry.open_round("run-1", number, parent=None, cohort=[])
            registry.publish_round(
                NewVersion(
                    run_id="run-1",
                    round_number=number,
                    adapter="demo",
                    payload=bytes([number]),
                    base_sha256=BASE,
                    rank=2,
                    exactness="exact",
                    metrics={"accuracy": number / 4, "loss": math.nan if number == 2 else 1.0},
                )
            )
        yield registry


@pytest.fixture
def call(registry: Registry, tmp_path: Path) -> Call:
    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["registry", *arguments, "--home", str(tmp_path / "home")])

    return invoke


def parsed(result: Result) -> object:
    assert result.exit_code == 0, result.output
    value: object = json.loads(result.stdout)
    return value


def test_people_get_a_table_of_what_was_found(call: Call) -> None:
    result = call("search", "metrics.accuracy >= 0.5", "--order-by", "metrics.accuracy DESC")
    assert result.exit_code == 0, result.output
    assert "2 found" in result.stdout
    assert result.stdout.index("demo/3") < result.stdout.index("demo/2")
    assert "demo/1" not in result.stdout
    assert "there are more" not in result.stdout


def test_a_page_says_how_to_go_on(call: Call) -> None:
    shown = call("search", "--limit", "2").stdout
    token = shown.split("--page-token ")[1].strip()
    rest = parsed(call("search", "--limit", "2", "--page-token", token, "--json"))
    assert isinstance(rest, dict)
    assert ([item["ref"] for item in rest["versions"]], rest["next_page_token"]) == (["demo/1"], None)


def test_machines_get_the_versions_and_the_token(call: Call) -> None:
    page = parsed(call("search", "name = 'demo'", "--limit", "1", "--json"))
    assert isinstance(page, dict)
    assert page["versions"][0]["metrics"] == {"accuracy": 0.75, "loss": 1.0}
    assert page["next_page_token"]


def test_a_filter_that_cannot_be_read_is_pointed_at(call: Call) -> None:
    result = call("search", "name LKE 'x'")
    assert (result.exit_code, result.stdout) == (3, "")
    error, text, caret = result.stderr.splitlines()
    assert error.startswith("error: the filter cannot be used, at character 6: expected =")
    assert (text, caret) == ("  name LKE 'x'", "       ^")
    machines = call("search", "nme = 'x'", "--json")
    assert machines.exit_code == 3
    facts = json.loads(machines.stdout)["error"]
    assert (facts["code"], facts["type"], "did you mean name?" in facts["message"]) == (3, "ConfigError", True)


def test_a_hostile_filter_does_nothing_to_a_terminal(call: Call) -> None:
    result = call("search", "\x1b[31m[bold]x[/nope]\u202e = 'x'")
    assert result.exit_code == 3
    assert not {"\x1b", "\u202e"} & set(result.stderr)
    assert "[31m[bold]x[/nope]" in result.stderr


@pytest.mark.parametrize(
    "arguments", [["search", "--limit", "0"], ["search", "--page-token", "x"], ["metrics", "demo", "acuracy"]]
)
def test_what_cannot_be_used_is_code_3(call: Call, arguments: list[str]) -> None:
    assert call(*arguments).exit_code == 3


def test_metrics_are_shown_over_versions(call: Call) -> None:
    shown = call("metrics", "demo").stdout
    for expected in ("accuracy", "0.25", "0.75", "▁▅█", "loss", "▁ ▁"):
        assert expected in shown
    assert call("metrics", "demi").exit_code == 11


def test_one_metric_is_shown_version_by_version(call: Call) -> None:
    shown = call("metrics", "demo", "accuracy").stdout
    assert "accuracy of demo  ▁▅█" in shown
    assert shown.count("+0.25") == 2


def test_machines_get_the_points_of_a_metric(call: Call) -> None:
    histories = parsed(call("metrics", "demo", "loss", "--json"))
    assert isinstance(histories, list)
    assert [(item["version"], item["value"]) for item in histories[0]["points"]] == [(1, 1.0), (2, None), (3, 1.0)]


def test_the_moves_of_an_alias_are_shown(call: Call, registry: Registry) -> None:
    registry.set_alias("demo", "champion", 1)
    registry.set_alias("demo", "champion", 3)
    registry.remove_alias("demo", "champion")
    shown = call("alias", "demo", "champion", "--history").stdout
    assert "demo@champion" in shown
    assert "removed" in shown
    moves = parsed(call("alias", "demo", "champion", "--history", "--json"))
    assert isinstance(moves, list)
    assert [(item["previous"], item["version"]) for item in moves] == [(None, 1), (1, 3), (3, None)]
    assert call("alias", "demo", "nobody", "--history").exit_code == 11
    assert call("alias", "demo", "champion", "1", "--history").exit_code == 2


def test_the_help_names_every_field(call: Call) -> None:
    from pomona.storage.fields import FIELDS

    shown = CliRunner().invoke(app, ["registry", "search", "--help"]).stdout
    assert [name for name in FIELDS if name not in shown] == []


@pytest.mark.parametrize(
    ("values", "encoding", "expected"),
    [
        ([1.0, 2.0, 3.0, math.nan, 1.0], "utf-8", "▁▅█ ▁"),
        ([2.0, 2.0], "utf-8", "▁▁"),
        ([0.0, 1.0], "ascii", "_#"),
        ([-1.7e308, 1.7e308], "utf-8", "▁█"),
        ([math.inf, math.nan], "utf-8", "  "),
        ([], "utf-8", ""),
        ([9.0] + [1.0] * (WIDTH - 1) + [2.0], "utf-8", "▁" * (WIDTH - 1) + "█"),
    ],
)
def test_a_sparkline_draws_the_newest_numbers(values: list[float], encoding: str, expected: str) -> None:
    assert sparkline(values, encoding=encoding) == expected
