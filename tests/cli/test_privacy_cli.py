"""``pomona privacy plan``."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pomona.cli import app

RUN = """
name = "private"
rounds = 20
model = {{ base = "{model}", max_length = 16 }}
data = {{ source = "{data}" }}
aggregation = {{ strategy = "fedit", rank = 4 }}

[privacy]
unit = "client"
population = "phones"
population_size = {size}
epsilon = 8.0
delta = 1e-6
sample_rate = 0.05
ranks = [1, 4]
accountant = "rdp"
"""

ROOT = Path(__file__).parents[2]
FRAME = 'name = "pasted"\nrounds = 4\n[model]\nbase = "{model}"\nmax_length = 16\n[data]\nsource = "{data}"\n'


@pytest.fixture
def file(tiny_bert: Path, toy_data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "private.toml"
    path.write_text(RUN.format(model=tiny_bert, data=toy_data, size=100_000))
    return path


def test_a_plan_is_told_to_machines(file: Path) -> None:
    told = CliRunner().invoke(app, ["privacy", "plan", str(file), "--json"])
    assert told.exit_code == 0, told.output
    facts = json.loads(told.stdout)
    assert (facts["unit"], facts["mechanism"], facts["rounds"]) == ("client", "dp-dylora", 20)
    assert (facts["delta"], facts["sample_rate"], facts["accountant"]) == (1e-6, 0.05, "rdp")
    assert 7.9 < facts["epsilon"] <= 8.0
    assert facts["epsilon_by_round"]["20"] == facts["epsilon"]
    assert facts["feasible"] is (facts["feasibility"] <= 1.0) is True
    assert facts["noise_multiplier"] > 0


def test_a_plan_is_told_to_people_with_what_to_do_about_a_hopeless_one(file: Path) -> None:
    assert "Hopeless" not in CliRunner().invoke(app, ["privacy", "plan", str(file)]).stdout
    file.write_text(file.read_text().replace("100000", "1000").replace("epsilon = 8.0", "epsilon = 0.5"))
    told = CliRunner().invoke(app, ["privacy", "plan", str(file)])
    assert told.exit_code == 0, told.output
    assert "Hopeless as it is" in told.stdout
    assert "times as many clients" in told.stdout.replace("\n", " ")


UNITS = {
    "example": (
        'unit = "example"\nepsilon = 0.5\ndelta = 1e-6\nsample_rate = 0.05',
        "Much noise",
        ["training.batch_size", "for whoever knows which examples a step took"],
        ["clients a round", "Hopeless"],
    ),
    "local": (
        'unit = "local"\nepsilon = 0.5\ndelta = 1e-6',
        "Hopeless as it is",
        ["what one client of phones has", "3 clients (cohort.min_clients)"],
        ["for whoever knows", "training.batch_size"],
    ),
    "bands": (
        'unit = "client"\npopulation_size = 900\nepsilon = 0.5\ndelta = 1e-6\nbands = 3\nspare_rounds = 2',
        "Hopeless as it is",
        ["once in 3 rounds, by a public schedule, about 300", "room for 2 more"],
        ["with probability", "for whoever knows"],
    ),
}


@pytest.mark.parametrize("unit", UNITS)
def test_what_is_said_of_a_plan_is_of_its_unit(unit: str, tiny_bert: Path, toy_data: Path, tmp_path: Path) -> None:
    privacy, grade, said, unsaid = UNITS[unit]
    path = tmp_path / "run.toml"
    frame = FRAME.format(model=tiny_bert, data=toy_data)
    more = '[cohort]\nmin_clients = 3\n[training]\nmax_steps = 4\n[aggregation]\nstrategy = "fedit"\nrank = 4\n'
    path.write_text(f'{frame}{more}[privacy]\npopulation = "phones"\n{privacy}\n')
    told = CliRunner().invoke(app, ["privacy", "plan", str(path)], env={"COLUMNS": "400"})
    assert told.exit_code == 0, told.output
    assert grade in told.stdout
    assert [each for each in said if each not in told.stdout] == []
    assert [each for each in unsaid if each in told.stdout] == []


TASKS = """
[continual]
tasks = [["animal", "food"], ["tool", "weather"]]
rounds_per_task = 3
[privacy]
unit = "client"
population = "phones"
population_size = 100_000
epsilon = 8.0
delta = 1e-6
accountant = "rdp"
"""


def test_a_plan_of_tasks_counts_their_releases_and_tells_the_noise_on_a_class(
    tiny_bert: Path, toy_data: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'name = "tasks"\n' + FRAME.format(model=tiny_bert, data=toy_data).partition("rounds = 4\n")[2] + TASKS
    )
    told = CliRunner().invoke(app, ["privacy", "plan", str(path), "--json"])
    assert told.exit_code == 0, told.output
    facts = json.loads(told.stdout)
    assert (facts["mechanism"], facts["rounds"], facts["sums_clip"]) == ("ffa-tasks", 8, 1.0)
    assert facts["epsilon_by_round"]["8"] == facts["epsilon"]
    count, total, moment = (facts["noise_of_class"][kind] for kind in ("count", "total", "moment"))
    assert count == pytest.approx(facts["noise_multiplier"] * 2 / (0.1**0.5 * 100_000))
    assert count < total < moment
    shown = CliRunner().invoke(app, ["privacy", "plan", str(path)], env={"COLUMNS": "400"}).stdout
    assert "after 8 releases" in shown
    assert "of a task's sums 1 rows" in shown
    assert "noise / a class, at best" in shown


def test_what_cannot_be_promised_has_the_exit_code_of_settings(file: Path) -> None:
    file.write_text(file.read_text().replace('strategy = "fedit", rank = 4', 'strategy = "flora-bounded"'))
    told = CliRunner().invoke(app, ["privacy", "plan", str(file)])
    assert told.exit_code == 3
    assert "ffa-nested" in told.stderr


@pytest.mark.parametrize("page", ["README.md", "docs/privacy.md"])
def test_what_the_pages_show_can_be_pasted_under_a_run_file(
    page: str, tiny_bert: Path, toy_data: Path, tmp_path: Path
) -> None:
    shown = re.findall(r"```toml\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    sections = [block for block in shown if "[privacy]" in block]
    assert sections
    for block in sections:
        path = tmp_path / "pasted.toml"
        path.write_text(FRAME.format(model=tiny_bert, data=toy_data) + block)
        told = CliRunner().invoke(app, ["privacy", "plan", str(path), "--json"])
        assert told.exit_code == 0, f"{block}\n{told.output}"


def test_the_example_of_silos_has_little_noise_and_room_for_a_round_that_is_cut_off() -> None:
    told = CliRunner().invoke(app, ["privacy", "plan", str(ROOT / "examples" / "private.toml"), "--json"])
    facts = json.loads(told.stdout)
    assert facts["feasibility"] < 1.5
    assert facts["spare_rounds"] >= 1
    assert facts["epsilon"] < facts["budget"] == 8.0
