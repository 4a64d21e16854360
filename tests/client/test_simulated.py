"""Simulated clients: every one has a number of its own, and what follows from it."""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from pomona.client.join import JoinSettings
from pomona.client.simulated import claimed_number, simulated_client
from pomona.datasets import load_dataset
from pomona.errors import ConfigError, ProcessError
from pomona.settings import RunSettings, SimulationSettings

SETTINGS = RunSettings(name="x", simulation=SimulationSettings(ranks=(4, 8, 16)))
HOLD = """
import sys
from pathlib import Path
from pomona.client.join import JoinSettings
from pomona.client.simulated import claimed_number
with claimed_number(Path(sys.argv[1]), int(sys.argv[2]), holder=sys.argv[3]) as number:
    print(number, flush=True)
    sys.stdin.read()
"""


def test_everybody_has_another_number_and_one_too_many_is_told(tmp_path: Path) -> None:
    with ExitStack() as stack:
        taken = [stack.enter_context(claimed_number(tmp_path, 3, holder=name)) for name in "abc"]
        assert taken == [1, 2, 3]
        with pytest.raises(ConfigError, match="all 3 shares"), claimed_number(tmp_path, 3, holder="d"):
            pass


def test_who_comes_back_has_its_old_number_and_newcomers_the_lowest(tmp_path: Path) -> None:
    with ExitStack() as stack:
        for name in "abc":
            stack.enter_context(claimed_number(tmp_path, 3, holder=name))
    with claimed_number(tmp_path, 3, holder="c") as old, claimed_number(tmp_path, 3, holder="new") as new:
        assert (old, new) == (3, 1)


def test_the_number_of_a_killed_client_is_free_again(tmp_path: Path) -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), "2", "a"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with first:
        assert first.stdout is not None
        assert first.stdout.readline() == "1\n"
        with claimed_number(tmp_path, 2, holder="b") as other:
            assert other == 2
        first.kill()
    with claimed_number(tmp_path, 2, holder="c") as number:
        assert number == 1


def test_a_folder_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ProcessError, match="--claims"), claimed_number(tmp_path / "file", 2, holder="a"):
        pass


def _client(settings: RunSettings, number: int, clients: int, folder: Path) -> JoinSettings:
    return simulated_client(
        settings, number, clients, server="host:1", folder=folder, root_certificates=None, threads=1
    )


def test_shares_are_disjoint_and_together_the_training_data(tmp_path: Path) -> None:
    joins = [_client(SETTINGS, number, 5, tmp_path) for number in range(1, 6)]
    assert [each.rank for each in joins] == [4, 8, 16, 4, 8]
    assert len({each.name for each in joins}) == 5
    examples = [example for each in joins for example in load_dataset(each.data, split=None)]
    everything = list(load_dataset("wordnet-nouns", split="train"))
    assert sorted(map(repr, examples)) == sorted(map(repr, everything))


def test_a_base_model_that_ships_in_no_package_is_named(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"model": SETTINGS.model.model_copy(update={"base": "/models/own"})})
    assert _client(settings, 1, 2, tmp_path).model == "/models/own"
    assert _client(SETTINGS, 1, 2, tmp_path).model == ""
