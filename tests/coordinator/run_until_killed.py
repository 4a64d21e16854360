"""Coordinators that live until they are killed, each a process of its own, forked from one that has imported all.

Importing torch and Flower takes longer than a run of the tiny model, and what SIGKILL takes away and what it leaves is
the same for a forked process. Run as ``python -m tests.coordinator.run_until_killed``; :class:`tests.coordinator.lives.
Lives` does, and says on standard input, one JSON object a line, what each life is to be.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timedelta, tzinfo
from functools import cache
from pathlib import Path
from typing import Self

from flwr.supercore.task_identity import TaskIdentity
from tests.coordinator.grid import Answer, InProcessGrid, Node, Reply, Tamper

from pomona.client.trainer import Profile
from pomona.coordinator import membership, replies
from pomona.coordinator.federation import run_federation
from pomona.coordinator.recovery import only_coordinator
from pomona.datasets import Dataset, Task, load_dataset
from pomona.errors import PomonaError, RegistryError
from pomona.failpoints import VARIABLE
from pomona.lora_model import AdaptedModel
from pomona.settings import RunSettings
from pomona.storage import audit, publishing, rounds, submissions, versions
from pomona.storage.opening import open_registry
from pomona.storage.records import NewSubmission, NewVersion, Submission, Version
from pomona.storage.registry import Registry

RANKS = (2, 4, 3)
RUN = "run-1"
JOURNAL, LOG = "journal.jsonl", "coordinator.log"
_LOOK_S = 0.001


class Journalling(Registry):
    """A registry that writes down elsewhere what it has promised, so that the promise can be held against it."""

    def __init__(self, registry: Registry, journal: Path) -> None:
        super().__init__(registry._engine, registry.blobs)
        self._journal = journal

    def record_submissions(self, new: Sequence[NewSubmission]) -> list[Submission | RegistryError]:
        recorded = super().record_submissions(new)
        for each in recorded:
            if isinstance(each, Submission) and each.status == "accepted":
                self.note("acknowledged", each.round_number, each.client, each.sha256)
        return recorded

    def publish_round(self, new: NewVersion) -> Version:
        made = super().publish_round(new)
        self.note("published", new.round_number, made.ref, made.sha256)
        return made

    def note(self, event: str, round_number: int, name: str, sha256: str = "") -> None:
        """Append one line; it is with the kernel when this returns, which no SIGKILL takes back."""
        line = json.dumps({"event": event, "round": round_number, "name": name, "sha256": sha256})
        descriptor = os.open(self._journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(descriptor, f"{line}\n".encode())
        os.close(descriptor)


def nodes(model: Path, data: Path) -> list[Node]:
    """Return three clients of unequal rank."""

    def profile(number: int) -> Profile:
        def load_data(task: str) -> Dataset:
            kind: Task = "causal-lm" if task == "causal-lm" else "classification"
            train = load_dataset(data, split="train", task=kind)
            return train.subset(range(number, len(train), len(RANKS)))

        return Profile(name=f"client-{number}", rank=RANKS[number], load_data=load_data, model_folder=str(model))

    return [Node(profile(number)) for number in range(len(RANKS))]


def federate(home: Path, model: Path, data: Path, settings: RunSettings, *, url: str | None) -> None:
    """Coordinate the run, or go on with it."""
    for name in ("_task_id", "_run_id", "_node_id"):
        setattr(TaskIdentity, name, 1)
    replies._POLL_S = 0.01
    membership._JOIN_POLL_S = 0.01
    with open_registry(home, url=url) as opened, only_coordinator(opened, RUN) as make_sure:
        registry = Journalling(opened, home / JOURNAL)
        clients = nodes(model, data)
        for node in clients:
            node.trains = _noted(registry, node.profile.name)
        run_federation(InProcessGrid(clients), settings, registry, run_id=RUN, make_sure=make_sure, lasting=False)


def _noted(registry: Journalling, client: str) -> Tamper:
    def trained(request: str, answer: Answer) -> Reply:
        registry.note("asked", json.loads(request)["round_number"], client)
        return answer

    return trained


def set_clock(shift_s: float) -> None:
    """Let this process believe that it is so many seconds later; what counts seconds (``time.monotonic``) goes on."""
    real, shift = time.time, timedelta(seconds=shift_s)

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return super().now(tz) + shift

    time.time = lambda: real() + shift_s
    for module in (audit, publishing, rounds, submissions, versions):
        setattr(module, "datetime", Shifted)  # noqa: B010 - a name that the module imported


def live(wanted: dict[str, str | float | None]) -> int:
    """Be one coordinator in this process, and return its exit code."""
    home = Path(str(wanted["home"]))
    log = os.open(home / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if wanted["failpoint"]:
        os.environ[VARIABLE] = str(wanted["failpoint"])
    if shift_s := float(wanted["clock_s"] or 0.0):
        set_clock(shift_s)
    settings = RunSettings.model_validate_json(str(wanted["settings"]))
    try:
        url = str(wanted["url"]) if wanted["url"] else None
        federate(home, Path(str(wanted["model"])), Path(str(wanted["data"])), settings, url=url)
    except PomonaError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return error.exit_code
    return 0


def die_and_tell(wanted: dict[str, str | float | None]) -> dict[str, float]:
    """Fork one life, kill it when its time is over, and return how it ended."""
    if len(os.listdir("/proc/self/task")) > 1:  # noqa: PTH208 - also those that Python knows nothing of
        raise SystemExit("only a process with one thread can be forked safely")
    began, limit = time.monotonic(), wanted["kill_after_s"]
    if (pid := os.fork()) == 0:
        code = 1
        try:
            code = live(wanted)
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            sys.stderr.flush()
            os._exit(code)
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if limit is not None and time.monotonic() - began > float(limit):
            os.kill(pid, signal.SIGKILL)
            limit = None
        time.sleep(_LOOK_S)
    return {"code": os.waitstatus_to_exitcode(ended[1]), "seconds": time.monotonic() - began}


@cache
def prepare(model: str) -> None:
    """Import and compute once what every life would by itself when it first loads a model, or promises privacy."""
    import opacus.accountants

    del opacus
    AdaptedModel(Path(model), task="classification", labels=("one", "other"))


def main() -> None:
    """Read what lives are wanted, and write how each ended."""
    for line in sys.stdin:
        wanted = json.loads(line)
        prepare(wanted["model"])
        sys.stdout.write(json.dumps(die_and_tell(wanted)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
