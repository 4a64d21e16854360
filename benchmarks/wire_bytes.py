"""What every aggregation strategy sends over the network: bytes for each direction, client and round.

One ``pomona server`` and four ``pomona join`` (ranks 4, 8, 16, 32) on loopback, without TLS. Every client joins through
a proxy of its own, which counts the bytes of its TCP connections: gRPC and all, but not the headers of TCP and IP. Each
strategy runs with a cohort of two, the clients of rank 16 and 32 in every round (the seed is one that draws them), and
with all four. A round trains one step, as only sizes count; FedEx-LoRA trains two, because after one from B = 0 all A
are still equal and there is no residual to send. Strategies of equal ranks run with rank 4 everywhere.

*Down* and *up* are what passed the proxies of those asked from before ``pomona run`` until after it (enrolment and
polling too), divided by rounds and clients. *Payload* is what the registry recorded: adapters and heads alone. The
first round's download is the head only, and the last round's is the largest. Idle traffic is measured before all runs.

Nothing is reported of a run that failed, or whose payload is more than what passed; nor anything at all if a download
grows with the clients where ``pomona strategies`` says that it does not, or does not where it says so. The client of
rank 32, which is in both cohorts, decides that: more than 10 % is growth.

Every finished run is written down at once, so an interrupted benchmark goes on where it stopped. Run as
``python benchmarks/wire_bytes.py``, with ``--markdown`` for a table to paste; results go to ``benchmarks/results``.
"""

import argparse
import asyncio
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any

from rich.console import Console
from rich.table import Table

from pomona.coordinator.enrolment import choose_cohort
from pomona.datasets import load_dataset, write_jsonl
from pomona.partition import partition_iid
from pomona.processes import Supervisor, child_environment, free_ports, terminated_like_interrupted
from pomona.settings import CohortSettings
from pomona.storage.opening import open_registry
from pomona.strategies import EQUAL_RANK, STRATEGIES

POMONA = str(Path(sys.executable).parent / "pomona")
RESULTS = Path(__file__).parent / "results" / "wire_bytes.json"
CLIENTS = {f"rank-{rank:02}": rank for rank in (4, 8, 16, 32)}
COHORTS = {2: ["rank-16", "rank-32"], 4: list(CLIENTS)}
IN_BOTH = "rank-32"
WARM = "flora-bounded, warm"
METHODS = ("flora-bounded", WARM, *(facts.name for facts in STRATEGIES if facts.name != "flora-bounded"))
GROWING = {facts.name for facts in STRATEGIES if facts.download_grows_with_clients}
SETTING = {"rounds": 3, "max_steps": 1, "max_steps_fedex": 2, "batch_size": 4, "equal_rank": 4, "max_rank": 32}
_START_S, _RUN_S, _SETTLE_S = 300.0, 1800.0, 10.0
_RUN_FILE = """\
name = "wire"
rounds = {rounds}
seed = {seed}
data.evaluation_examples = 24
cohort.size = {size}
cohort.min_clients = {clients}
cohort.join_timeout_s = 600.0
training.max_steps = {steps}
training.batch_size = {batch_size}
aggregation.max_rank = {max_rank}
aggregation.strategy = "{strategy}"
"""
_COLUMNS = ("strategy", "clients", "ranks", "down", "payload", "last round", "to rank 32", "up", "payload", "overhead")

WAYS = ("down", "up")
Bytes = dict[str, dict[str, int]]  # by client and way
Run = Mapping[str, Any]


class Meter:
    """A proxy in front of the Fleet port that counts what one client receives (down) and sends (up)."""

    def __init__(self, fleet_port: int) -> None:
        self.seen = dict.fromkeys(WAYS, 0)
        self.address = ""
        self._fleet_port = fleet_port

    async def listen(self) -> None:
        """Accept connections from now on, at ``address``."""
        server = await asyncio.start_server(self._forward, "127.0.0.1", 0)
        self.address = "127.0.0.1:{1}".format(*server.sockets[0].getsockname())

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):  # the server ends before the last client does
            back, out = await asyncio.open_connection("127.0.0.1", self._fleet_port)
            await asyncio.gather(self._pump(reader, out, "up"), self._pump(back, writer, "down"))
        writer.close()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, way: str) -> None:
        with suppress(OSError):
            while data := await source.read(1 << 16):
                self.seen[way] += len(data)
                sink.write(data)
                await sink.drain()
        sink.close()


class Federation:
    """A server and its clients, each behind its meter."""

    def __init__(self, folder: Path, supervisor: Supervisor, meters: Mapping[str, Meter]) -> None:
        self._folder, self._supervisor, self._meters = folder, supervisor, meters
        self._home = folder / "home"
        self._env = child_environment({"OMP_NUM_THREADS": "1", "TMPDIR": str(folder), "NO_COLOR": "1"})

    def start(self, port: int) -> None:
        """Start all processes and wait until every client has spoken to the server."""
        server = [POMONA, "server", "--home", str(self._home), "--port", str(port), "--insecure"]
        self._supervisor.start("server", server, env=self._env)
        log = self._supervisor.log_dir / "server.log"
        self._supervisor.wait_for(lambda: "listening on" in log.read_text(), what="the server", timeout_s=_START_S)
        train = load_dataset("wordnet-nouns", split="train", task="classification")
        for (name, rank), share in zip(CLIENTS.items(), partition_iid(len(train), len(CLIENTS), seed=0), strict=True):
            data = self._folder / f"{name}.jsonl"
            write_jsonl(train.subset(share.tolist()), data)
            who = ["--name", name, "--rank", str(rank), "--data", str(data)]
            join = [POMONA, "join", "--server", self._meters[name].address, *who, "--insecure"]
            self._supervisor.start(name, join, env=self._env)
        seen = [meter.seen for meter in self._meters.values()]
        self._supervisor.wait_for(lambda: all(each["down"] for each in seen), what="all clients", timeout_s=_START_S)
        time.sleep(_SETTLE_S)

    def idle(self, seconds: float) -> dict[str, float]:
        """Return bytes for each second and client while there is no run."""
        before = self._seen()
        time.sleep(seconds)
        passed = self._passed(before).values()
        rates = {way: round(sum(each[way] for each in passed) / len(passed) / seconds, 1) for way in WAYS}
        return {"seconds": seconds, **rates}

    def run(self, method: str, clients: int) -> Run:
        """Run a strategy once and return its bytes, by client and by round."""
        name = f"{method.replace(', ', '-')}-{clients}"
        run_file, log = self._folder / f"{name}.toml", self._supervisor.log_dir / f"{name}.log"
        run_file.write_text(_run_file(method, clients))
        before, began = self._seen(), time.monotonic()
        command = [POMONA, "run", str(run_file), "--home", str(self._home), "--json"]
        self._supervisor.start(name, command, env=self._env)
        while (code := self._supervisor.ended(name)) is None and time.monotonic() < began + _RUN_S:
            time.sleep(0.5)
        seconds, wire, asked = round(time.monotonic() - began, 1), self._passed(before), COHORTS[clients]
        if code != 0:
            raise SystemExit(f"{name} ended with {code}, so nothing is reported of it:\n{log.read_text()[-3000:]}")
        self._supervisor.forget(name)
        with open_registry(self._home, read_only=True) as registry:
            rounds = registry.rounds(json.loads(log.read_text().splitlines()[-1])["run_id"])
        if [(list(each.cohort), each.accepted) for each in rounds] != [(asked, clients)] * SETTING["rounds"]:
            raise SystemExit(f"{name}: expected all answers of {asked} in every round, got {rounds}")
        payload = {"down": [each.bytes_down for each in rounds], "up": [each.bytes_up for each in rounds]}
        for way in WAYS:
            if (passed := sum(wire[client][way] for client in asked)) < sum(payload[way]):
                raise SystemExit(f"{name}: {passed} bytes went {way}, fewer than the payload {payload[way]}")
        ranks = [SETTING["equal_rank"] if method in EQUAL_RANK else CLIENTS[client] for client in asked]
        facts = {"method": method, "clients": clients, "asked": asked, "ranks": ranks}
        return {**facts, "seconds": seconds, "wire": wire, "payload": payload}

    def _seen(self) -> Bytes:
        return {name: dict(meter.seen) for name, meter in self._meters.items()}

    def _passed(self, before: Bytes) -> Bytes:
        return {name: {way: seen[way] - before[name][way] for way in WAYS} for name, seen in self._seen().items()}


@contextmanager
def federation() -> Iterator[Federation]:
    """Run a server and its clients; nothing is left of them afterwards."""
    (port,) = free_ports(1)
    meters, loop = {name: Meter(port) for name in CLIENTS}, asyncio.new_event_loop()
    Thread(target=loop.run_forever, daemon=True).start()
    with terminated_like_interrupted(), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for meter in meters.values():
            asyncio.run_coroutine_threadsafe(meter.listen(), loop).result()
        with Supervisor(Path(folder, "logs")) as supervisor:
            made = Federation(Path(folder), supervisor, meters)
            made.start(port)
            yield made


def check(runs: Mapping[tuple[str, int], Run]) -> None:
    """Refuse to report downloads that do not behave as ``pomona strategies`` says."""
    few, many = COHORTS
    for method in METHODS:
        if (method, few) in runs and (method, many) in runs:
            down = {clients: runs[method, clients]["wire"][IN_BOTH]["down"] for clients in COHORTS}
            if (down[many] > 1.1 * down[few]) != (method in GROWING):
                raise SystemExit(f"nothing is reported: of {method}, {IN_BOTH} with 2 and 4 clients receives {down}")


def report(document: Mapping[str, Any], *, markdown: bool) -> None:
    """Print what was measured, as a table for people or one to paste."""
    runs = {(run["method"], run["clients"]): run for run in document["runs"]}
    check(runs)
    rows = [_row(runs[method, size]) for method in METHODS for size in COHORTS if (method, size) in runs]
    idle = "A client that waits receives {down:.0f} and sends {up:.0f} bytes a second.".format(**document["idle"])
    caption = f"kB (1000 bytes) for each client and round, mean of {SETTING['rounds']} rounds. {idle}"
    table = Table(*_COLUMNS, caption=caption)
    for row in rows:
        table.add_row(*row)
    if markdown:
        lines = (f"| {' | '.join(cells)} |" for cells in (_COLUMNS, ["---"] * len(_COLUMNS), *rows))
        print(*lines, f"\n{caption}", sep="\n")
    else:
        Console(width=120).print(table)


def _row(run: Run) -> list[str]:
    clients, payload, rounds = run["clients"], run["payload"], SETTING["rounds"]
    transfers = clients * rounds
    wire = {way: sum(run["wire"][client][way] for client in run["asked"]) for way in WAYS}
    down = (wire["down"], sum(payload["down"]), payload["down"][-1] * rounds, run["wire"][IN_BOTH]["down"] * clients)
    overhead = (sum(wire.values()) - sum(payload["down"] + payload["up"])) / transfers / 1e3
    ranks = ", ".join(map(str, run["ranks"])) if len(set(run["ranks"])) > 1 else f"{run['ranks'][0]} each"
    figures = (f"{each / transfers / 1e3:,.0f}" for each in (*down, wire["up"], sum(payload["up"])))
    return [run["method"], str(clients), ranks, *figures, f"{overhead:.0f}"]


def _run_file(method: str, clients: int) -> str:
    few, rounds = CohortSettings(size=min(COHORTS)), range(1, SETTING["rounds"] + 1)
    cohorts = ([choose_cohort(CLIENTS, few, seed=seed, round_number=each) for each in rounds] for seed in count())
    seed = next(seed for seed, drawn in enumerate(cohorts) if drawn == [COHORTS[min(COHORTS)]] * len(rounds))
    strategy = "flora-bounded" if method == WARM else method
    steps = SETTING["max_steps_fedex" if method == "fedex" else "max_steps"]
    numbers = {**SETTING, "seed": seed, "size": clients, "clients": len(CLIENTS), "steps": steps}
    text = _RUN_FILE.format(**numbers, strategy=strategy)
    rank = f"aggregation.rank = {SETTING['equal_rank']}\n" if strategy in EQUAL_RANK else ""
    return text + rank + ("aggregation.warm_start = true\n" if method == WARM else "")


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--idle-s", type=float, default=60.0, help="seconds for which idle traffic is measured")
    parser.add_argument("--markdown", action="store_true", help="print the table as markdown")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    versions = {**{name: version(name) for name in ("pomona", "flwr", "grpcio")}, "python": platform.python_version()}
    document: dict[str, Any] = {"machine": versions, "setting": SETTING, "idle": None, "runs": []}
    if options.out.exists() and (document := json.loads(options.out.read_text()))["setting"] != SETTING:
        raise SystemExit(f"{options.out} is of another setting, {document['setting']}; give another --out")
    done = {(run["method"], run["clients"]) for run in document["runs"]}
    missing = [(method, size) for method in options.methods for size in COHORTS if (method, size) not in done]
    if missing:
        with federation() as clients:
            document["idle"] = document["idle"] or clients.idle(options.idle_s)
            for method, size in missing:
                document["runs"].append(run := clients.run(method, size))
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
                Console(stderr=True).print(f"{method}, {size} clients: {run['seconds']} s")
    report(document, markdown=options.markdown)


if __name__ == "__main__":
    main()
