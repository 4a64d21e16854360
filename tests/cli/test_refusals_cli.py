"""Commands that would start processes, and refuse before they have started any."""

import socket
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from pomona.cli import app


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in."""
    monkeypatch.delenv("POMONA_REGISTRY_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--home", "home"])


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = refused("server", "--port", port, "--insecure")
    assert done.exit_code == 21
    assert port in done.stderr


def test_a_server_without_tls_must_be_asked_for() -> None:
    done = refused("server", "--port", "0")
    assert done.exit_code == 3
    assert "--insecure" in done.stderr


def test_a_bad_run_file_is_refused_before_anything_starts(folder: Path) -> None:
    (folder / "bad.toml").write_text('name = "x"\nbogus = 1\n')
    done = refused("server", "--port", "0", "--insecure", "--run", "bad.toml")
    assert done.exit_code == 3
    assert "bogus" in done.stderr
    assert not (folder / "home").exists()


def test_run_without_a_server_or_with_a_bad_file(folder: Path) -> None:
    (folder / "bad.toml").write_text('name = "x"\nbogus = 1\n')
    (folder / "good.toml").write_text('name = "x"\n')
    assert refused("run", "bad.toml").exit_code == 3
    done = refused("run", "good.toml")
    assert done.exit_code == 22
    assert "pomona server" in done.stderr


def test_a_cohort_that_cannot_be_met_is_refused(folder: Path) -> None:
    (folder / "run.toml").write_text('name = "x"\n[cohort]\nmin_replies = 5\n')
    done = refused("simulate", "run.toml", "--clients", "3")
    assert done.exit_code == 3
    assert "min_replies" in done.stderr


def test_simulated_ranks_that_no_run_takes_are_refused(folder: Path) -> None:
    (folder / "run.toml").write_text('name = "a"\n[aggregation]\nmax_rank = 16\n')
    done = refused("simulate", "run.toml", "--clients", "4")
    assert done.exit_code == 3
    assert "expected simulation.ranks from 1 to aggregation.max_rank=16" in done.stderr


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"--rank": "0"}, 3, "rank of at least 1"),
        ({"--rank": "-3"}, 3, "rank of at least 1"),
        ({"--name": "a b"}, 3, "name of letters"),
        ({"--server": "nowhere"}, 3, "HOST:PORT"),
        ({"--server": "127.0.0.1:65536"}, 3, "HOST:PORT"),
        ({"--data": "missing.csv"}, 4, "missing.csv"),
        ({"--data": "empty.csv"}, 4, "empty"),
        ({"--data": "broken.jsonl"}, 4, "line 1"),
    ],
)
def test_a_client_that_cannot_join_says_why_at_once(folder: Path, change: dict[str, str], code: int, said: str) -> None:
    (folder / "good.csv").write_text("text,label\nx,a\n")
    (folder / "empty.csv").write_text("")
    (folder / "broken.jsonl").write_text("{not json\n")
    options = {"--server": "127.0.0.1:1", "--rank": "4", "--data": "good.csv", "--name": "n", **change}
    done = CliRunner().invoke(app, ["join", "--insecure", *(word for pair in options.items() for word in pair)])
    assert done.exit_code == code, done.stderr
    assert said in done.stderr
