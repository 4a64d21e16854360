"""``pomona strategies``: what people read and what programs parse."""

import json
import subprocess
import sys

from typer.testing import CliRunner

from pomona.cli import app
from pomona.strategies import BY_NAME

KEYS = {"name", "exact", "heterogeneous_ranks", "download_grows_with_clients", "client_dp", "secure_aggregation"}


def test_json_lists_every_strategy_with_its_properties() -> None:
    done = CliRunner().invoke(app, ["strategies", "--json"])
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert [each["name"] for each in found] == list(BY_NAME)
    for each in found:
        assert each.keys() >= {*KEYS, "reference"}
        assert "20" in each["reference"], "a reference has a year"
    assert {each["name"] for each in found if each["download_grows_with_clients"]} == {"flora", "fedex"}


def test_the_table_names_every_strategy() -> None:
    done = CliRunner().invoke(app, ["strategies"])
    assert done.exit_code == 0
    assert all(f"{name}: " in done.stdout for name in BY_NAME)


def test_listing_needs_no_torch() -> None:
    code = "import sys; from pomona.cli.strategies import strategies; strategies(); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
