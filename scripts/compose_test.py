"""Try docker-compose.yml for real: a run that starts by itself, a coordinator killed in mid-run, eight clients.

Needs Docker and either form of Compose, and nothing of this package: it looks from outside, by ``psql`` on the views
and by the command line in the coordinator's container. Everything is in a Compose project of its own, which is removed
with its volumes at the end. ``--log FILE`` writes down what was typed and what came of it::

    python3 scripts/compose_test.py --log docs/compose-run.md
"""

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = "pomona-compose-test"
RUN_FILE = "examples/compose.toml"
RANKS = (4, 8, 16, 32)

_NO_ENGINE = 69  # EX_UNAVAILABLE
_TAIL = 60
_POLL_S = 2.0
_PATIENCE_S = 1200.0

_VERSIONS = """\
SELECT ref, rank, exactness, ROUND(retained_energy::numeric, 4) AS energy,
       ROUND((metrics ->> 'accuracy')::numeric, 4) AS accuracy
FROM adapter_versions WHERE name = 'wordnet' ORDER BY version"""
_ROUNDS = """\
SELECT round, state, cohort_size AS asked, accepted, rejected, late, parent, published
FROM rounds WHERE name = 'wordnet' ORDER BY round"""
_OPEN = "SELECT round FROM rounds WHERE name = 'wordnet' AND round > 1 AND state = 'open' AND accepted > 0"
_RECEIPTS = """\
SELECT id, round, client, rank, num_examples, sha256
FROM submissions WHERE name = 'wordnet' AND status = 'accepted' ORDER BY id"""
_ENDED = "SELECT 1 FROM rounds WHERE name = 'wordnet' AND (state = 'failed' OR round = {} AND state = 'committed')"


@dataclass(slots=True)
class Trial:
    """The Compose project under test, and the log of what was typed.

    Attributes:
        compose: ``docker compose`` or ``docker-compose``.
        environment: Of every command.
        postgresql: Version of the database, once it was asked.
        lines: The log, in Markdown.
    """

    compose: tuple[str, ...]
    environment: dict[str, str]
    postgresql: str = ""
    lines: list[str] = field(default_factory=list)
    _db: str = ""

    def __call__(self, *arguments: str, shown: bool = False, ok: bool = True, stdin: str | None = None) -> str:
        """Run a Compose command and return what it printed; fail where it fails."""
        done = subprocess.run(
            [*self.compose, "-p", PROJECT, *arguments],
            cwd=ROOT,
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )
        if ok and done.returncode:
            raise SystemExit(f"FAILED: {' '.join(arguments)}: {done.returncode}\n{done.stdout}{done.stderr}")
        if shown:
            self.show(_typed(arguments), done.stdout)
        return done.stdout

    def say(self, text: str) -> None:
        """Write a sentence to the log and to the screen."""
        print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)
        self.lines += [text, ""]

    def show(self, command: str, output: str) -> None:
        """Write a command and its output to the log."""
        self.lines += ["```console", f"$ {command}", *_trimmed(output), "```", ""]

    def psql(self, query: str, *, shown: bool = False) -> list[tuple[str, ...]]:
        """Return the rows of a query, none where the database or its tables are not there yet."""
        if shown:
            table = self("exec", "-T", "db", "psql", "-U", "pomona", "-c", query)
            self.show(f'docker compose exec db psql -U pomona -c "{query}"', table)
        self._db = self._db or self("ps", "-q", "db").strip()  # asking Docker itself is cheaper than asking Compose
        done = subprocess.run(
            ["docker", "exec", self._db, "psql", "-U", "pomona", "-At", "-F", "\t", "-c", query],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
        )
        return [tuple(line.split("\t")) for line in done.stdout.splitlines()]

    def pomona(self, *arguments: str, shown: bool = False) -> str:
        """Run a command of ours in the coordinator's container."""
        return self("exec", "-T", "coordinator", "pomona", *arguments, shown=shown)


def main() -> int:
    """Try everything; raise where something is not as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, help="write what was seen there, in Markdown")
    parser.add_argument("--keep", action="store_true", help="leave containers and volumes for a look")
    options = parser.parse_args()
    compose = find_compose()
    if compose is None:
        print("NOTHING WAS TESTED: no Docker engine answers here, or Compose is missing", file=sys.stderr, flush=True)
        return _NO_ENGINE
    trial = Trial(compose, {**os.environ, "POMONA_PORT": str(_free_port()), "POMONA_SHARES": "8"})
    began = time.monotonic()
    with _removed(trial, keep=options.keep):
        a_run_starts_by_itself(trial)
        a_killed_coordinator_goes_on(trial)
        eight_clients_have_eight_shares(trial)
        clients_keep_their_numbers(trial)
    trial.say(f"All of it took {time.monotonic() - began:.0f} s, and everything was as promised.")
    if options.log:
        options.log.write_text("\n".join([*_heading(trial), *trial.lines]).rstrip() + "\n", encoding="utf-8")
    return 0


def a_run_starts_by_itself(trial: Trial) -> None:
    """Build, start, and wait for the first version; nobody types anything else."""
    trial.say("The images are built, and everything is started. Nothing else is typed to start the run.")
    began = time.monotonic()
    trial("build")
    trial.say(f"(Building, with whatever was built before: {time.monotonic() - began:.0f} s.)")
    began = time.monotonic()
    trial("up", "-d", shown=True)
    wait_until(lambda: len(trial.psql(_VERSIONS)) > 0, what="the first version", trial=trial)
    trial.postgresql = trial.psql("SHOW server_version")[0][0].split()[0]
    trial.say(f"The first version is there after {time.monotonic() - began:.0f} s. By SQL, and by the command line:")
    versions = trial.psql(_VERSIONS, shown=True)
    trial.pomona("registry", "ls", shown=True)
    (adapter,) = json.loads(trial.pomona("registry", "ls", "--json"))
    expect(adapter["name"] == "wordnet" and adapter["versions"] >= len(versions), f"registry ls agrees: {adapter}")
    with socket.create_connection(("127.0.0.1", int(trial.environment["POMONA_PORT"])), timeout=5):
        pass  # the port that more clients may join at


def a_killed_coordinator_goes_on(trial: Trial) -> None:
    """Kill the coordinator in a round that has acknowledged some updates and not others, and start it again."""
    wait_until(lambda: bool(trial.psql(_OPEN)), what="an open round with an update", trial=trial, poll_s=0.3)
    trial("kill", "coordinator", shown=True)
    before, cut = trial.psql(_RECEIPTS), trial.psql(_ROUNDS)[-1]
    trial.say(f"The coordinator is killed in round {cut[0]}, in which {cut[3]} of {cut[2]} updates are acknowledged:")
    trial.psql(_ROUNDS, shown=True)
    expect(cut[1] == "open" and 0 < int(cut[3]) < int(cut[2]), f"the round is cut off in the middle: {cut}")
    trial("up", "-d", shown=True)
    ended = _ENDED.format(_setting("rounds"))
    wait_until(lambda: bool(trial.psql(ended)), what="the last round", trial=trial)
    wait_until(lambda: _runs(trial) != ["running"], what="the end of the run", trial=trial)
    trial.say("What the coordinator says since it was started again:")
    said = trial("logs", "--no-color", "coordinator").splitlines()
    last_start = max(number for number, line in enumerate(said) if "listening on" in line)
    trial.show("docker compose logs coordinator", "\n".join(said[last_start:]))
    trial.say("The rounds, each once, and what their updates were:")
    rounds = trial.psql(_ROUNDS, shown=True)
    _check_the_run(trial, before, rounds)
    trial.say("The registry reads everything that it keeps:")
    trial.pomona("registry", "verify", shown=True)


def _check_the_run(trial: Trial, before: list[tuple[str, ...]], rounds: list[tuple[str, ...]]) -> None:
    wanted = int(_setting("rounds"))
    expect(_runs(trial) == ["finished"], f"one run, finished: {_runs(trial)}")
    expect([each[0] for each in rounds] == [str(n) for n in range(1, wanted + 1)], f"every round once: {rounds}")
    expect(all(each[1] == "committed" for each in rounds), f"all rounds are committed: {rounds}")
    published = [each[7] for each in rounds]
    expect(published == [f"wordnet/{n}" for n in range(1, wanted + 1)], f"a version each: {published}")
    expect([each[6] for each in rounds] == ["", *published[:-1]], f"each made from the one before: {rounds}")
    after = trial.psql(_RECEIPTS)
    expect(after[: len(before)] == before, "what was acknowledged before the kill is there, unchanged")
    pairs = [each[1:3] for each in after]
    expect(len(set(pairs)) == len(pairs) == 4 * wanted, f"one update a round and client: {pairs}")
    expect({(each[2], int(each[3])) for each in after} == set(_names(4)), "four clients of unequal rank")
    expect(len({each[4] for each in after}) == 4, "with four different shares")


def eight_clients_have_eight_shares(trial: Trial) -> None:
    """Scale to eight clients and run a second run on all of them."""
    trial("up", "-d", "--scale", "client=8", shown=True)
    wait_until(lambda: len(_numbers(trial)) == 8, what="eight clients", trial=trial)
    expect(sorted(_numbers(trial).values()) == list(range(1, 9)), f"eight numbers: {_numbers(trial)}")
    run_file = (ROOT / RUN_FILE).read_text(encoding="utf-8")
    for key, value in (
        ("name", '"eight"'),
        ("rounds", "1"),
        ("min_clients", "8\nsize = 2"),
        ("join_timeout_s", "900.0"),
    ):
        run_file = re.sub(rf"(?m)^{key} = .*$", f"{key} = {value}", run_file)
    trial("exec", "-T", "coordinator", "sh", "-c", "cat > eight.toml", stdin=run_file)
    trial.say("A second run, on eight clients: together they hold the training data, each its own part; two are asked.")
    done = json.loads(trial.pomona("run", "eight.toml", "--json").splitlines()[-1])
    trial.show("docker compose exec coordinator pomona run eight.toml --json", json.dumps(done, indent=1))
    took = [(each["name"], each["rank"]) for each in done["clients"]]
    expect(took == _names(8), f"eight clients and their ranks: {done}")
    count = "from pomona.datasets import load_dataset; print(len(load_dataset('wordnet-nouns', split='train')))"
    everything = int(trial("exec", "-T", "coordinator", "python", "-c", count))
    examples = [each["examples"] for each in done["clients"]]
    expect(sum(examples) == everything and len(set(examples)) == 8, f"{examples} are all of {everything}")
    expect("everything is there" in trial.pomona("registry", "verify"), "the registry is sound")


def clients_keep_their_numbers(trial: Trial) -> None:
    """Kill two clients, start first the one that would get the other's number if it took the lowest, and compare."""
    before = _numbers(trial)
    low, *_, high = sorted(before, key=lambda container: before[container])
    _docker("kill", low, high)
    for container in (high, low):
        _docker("start", container)
        wait_until(lambda: _docker("logs", container).count("number") == 2, what="the client", trial=trial)  # noqa: B023
    expect(_numbers(trial) == before, f"the numbers are what they were: {before} {_numbers(trial)}")
    trial.say("Two clients that were killed and started again have the numbers that they had.")


def find_compose() -> tuple[str, ...] | None:
    """Return the command of Compose where it and an engine are there."""
    for command in (("docker", "compose"), ("docker-compose",)):
        if _works("docker", "info") and _works(*command, "version"):
            return command
    return None


def _works(*command: str) -> bool:
    return bool(shutil.which(command[0])) and not subprocess.run(command, capture_output=True, check=False).returncode


def _docker(*arguments: str) -> str:
    command = ["docker", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def wait_until(
    done: Callable[[], bool], *, what: str, trial: Trial, timeout_s: float = _PATIENCE_S, poll_s: float = _POLL_S
) -> None:
    """Wait; fail with the end of all logs where it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            logs = trial("logs", "--no-color", "--tail", str(_TAIL), ok=False)
            raise SystemExit(f"FAILED: {what} did not come within {timeout_s:.0f} s\n{logs}")
        time.sleep(poll_s)


def expect(found: bool, what: str) -> None:
    """Fail unless something was found as promised."""
    if not found:
        raise SystemExit(f"FAILED: expected that {what}")


@contextmanager
def _removed(trial: Trial, *, keep: bool) -> Iterator[None]:
    trial("down", "--volumes")
    try:
        yield
    finally:
        if not keep:
            trial("down", "--volumes", ok=False)


def _runs(trial: Trial) -> list[str]:
    return [each["state"] for each in json.loads(trial.pomona("registry", "runs", "--json"))]


def _numbers(trial: Trial) -> dict[str, int]:
    """Return the number that each client's container has claimed last."""
    found = {
        each: re.findall(r"number (\d+) of 8", _docker("logs", each)) for each in trial("ps", "-q", "client").split()
    }
    return {container: int(numbers[-1]) for container, numbers in found.items() if numbers}


def _names(clients: int) -> list[tuple[str, int]]:
    return [(f"client-{number + 1}", RANKS[number % len(RANKS)]) for number in range(clients)]


def _setting(key: str) -> str:
    (value,) = re.findall(rf"(?m)^{key} = (\S+)", (ROOT / RUN_FILE).read_text(encoding="utf-8"))
    return str(value)


def _typed(arguments: Sequence[str]) -> str:
    return " ".join(["docker compose", *(each for each in arguments if each != "-T")])


def _trimmed(output: str) -> list[str]:
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).replace(str(ROOT), ".").rstrip() for line in output.splitlines()]
    return lines if len(lines) <= _TAIL else ["…", *lines[-_TAIL:]]


def _heading(trial: Trial) -> list[str]:
    engine = _docker("version", "--format", "{{.Server.Version}}").strip()
    compose = subprocess.run([*trial.compose, "version", "--short"], capture_output=True, text=True, check=True)
    return [
        "# A run of `make compose-test`",
        "",
        'Written by `make compose-test ARGS="--log docs/compose-run.md"`, which fails where this does not hold.',
        f"{time.strftime('%d %B %Y', time.gmtime())}, Docker {engine}, Compose {compose.stdout.strip()}, "
        f"PostgreSQL {trial.postgresql}, {os.cpu_count()} cores.",
        "",
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
