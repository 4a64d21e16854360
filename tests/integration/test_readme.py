"""What the README says to type is typed, in order, and must work."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.integration.conftest import FinishedDemo, Terminal, stop

from pomona.base_model import find_base_model
from pomona.processes import free_ports

pytestmark = pytest.mark.timeout(500)

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
INSTALLED = Path(sys.executable).parent


def _block(language: str, first: str) -> str:
    """Return the one block that starts with a text, so that a README that changed is noticed."""
    (found,) = [text for kind, text in BLOCKS if kind == language and text.startswith(first)]
    return str(found)


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder that looks like the checkout: the environment and the examples are where the README expects them."""
    (tmp_path / ".venv").symlink_to(INSTALLED.parent)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def _type(commands: str, folder: Path, home: Path) -> None:
    env = {**os.environ, "POMONA_HOME": str(home), "PATH": f"{INSTALLED}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_two_commands_do_their_own_set_up() -> None:
    for command in _block("sh", "make demo").splitlines():
        done = subprocess.run([*command.split(), "-n"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert ("pomona demo" if "demo" in command else "-m pytest") in done.stdout
    fresh = subprocess.run(
        ["make", "-n", "-W", "pyproject.toml", "test"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "-m venv" in fresh.stdout
    assert "pip install" in fresh.stdout


def test_what_the_demo_left_can_be_looked_at_and_loaded(finished_demo: FinishedDemo, desk: Path) -> None:
    _type(_block("sh", ".venv/bin/pomona registry ls"), desk, finished_demo.home)
    hub = "sentence-transformers/all-MiniLM-L6-v2"
    code = _block("python", "from peft")
    assert hub in code
    code = code.replace(f'"{hub}"', repr(str(find_base_model("all-minilm-l6-v2"))))
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(model.active_adapter)"],
        cwd=desk,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["default"]


def test_the_three_commands_of_a_federation(terminal: Terminal, desk: Path) -> None:
    port = str(free_ports(1)[0])
    home = desk / "home"
    server_command, run_command = _block("sh", "pomona server").replace("9092", port).splitlines()
    (join_command,) = _block("sh", "pomona join").replace("9092", port).splitlines()
    (desk / "my.csv").write_text("text,label\n" + "a kind of horse,animal\na kind of bread,food\n" * 8)
    server = terminal.start("server", *server_command.split()[1:], "--home", str(home))
    terminal.wait_for_text("server", "listening on")
    client = terminal.start("join", *join_command.split()[1:])
    _type(run_command, desk, home)
    assert stop(client) == 0
    assert stop(server) == 0
    terminal.expect_no_process()


def test_the_simulation(desk: Path) -> None:
    _type(_block("sh", "pomona simulate"), desk, desk / "home")
