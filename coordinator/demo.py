"""The main job on one machine: a coordinator, four real clients over gRPC, real model, real data, checked export."""

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from pomona.aggregation_settings import AggregationSettings
from pomona.base_model import find_base_model
from pomona.client.join import JoinSettings, start_supernode, start_trainers
from pomona.coordinator.beginning import begin_run, load_held_out
from pomona.coordinator.following import follow, recorded
from pomona.coordinator.launch import new_run_id, private_folder, submit, watch_flower
from pomona.coordinator.server import run_server
from pomona.coordinator.summary import RunSummary, summarise
from pomona.datasets import load_dataset, write_jsonl
from pomona.errors import ExportMismatch
from pomona.partition import partition
from pomona.processes import Supervisor, child_environment, free_ports
from pomona.settings import CohortSettings, DataSettings, RunSettings, TrainingSettings
from pomona.storage.export import export_peft
from pomona.storage.records import Run
from pomona.storage.registry import Registry

RANKS = (4, 8, 16, 32)
_RESCORE_TIMEOUT_S = 300.0

DEMO = RunSettings(
    name="demo",
    rounds=3,
    data=DataSettings(evaluation_split="test", evaluation_examples=250, dirichlet_alpha=0.5),
    cohort=CohortSettings(min_clients=len(RANKS), min_replies=2, join_timeout_s=120.0, round_deadline_s=180.0),
    training=TrainingSettings(max_steps=16, batch_size=12, learning_rate=3e-3, head_learning_rate=1e-2),
    aggregation=AggregationSettings(max_rank=32),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult(RunSummary):
    """What the demo found; fields as ``pomona demo --json`` prints them.

    Attributes:
        accuracy_exported: Of the exported folder, as plain peft scores it in another process.
        export_dir: The exported folder.
        wall_s: Seconds from start to end.
    """

    accuracy_exported: float
    export_dir: str
    wall_s: float


def run_demo(
    registry: Registry, home: Path, *, show: Callable[[Run], None], say: Callable[[str], None], seed: int = 0
) -> DemoResult:
    """Run the demo.

    Args:
        registry: Where it publishes.
        home: Folder of the registry; the export goes below it.
        show: Called with the run's row a few times a second.
        say: Called with one line at each step.
        seed: Of the shares of the clients and of the run.

    Raises:
        ExportMismatch: Plain peft scores the export differently.
        PomonaError: The run ended with it.
    """
    began = time.monotonic()
    settings = DEMO.model_copy(update={"seed": seed})
    run_id = new_run_id()
    begin_run(registry, settings, run_id=run_id)
    with recorded(registry, run_id), _workplace(say) as folder:
        with Supervisor(folder / "logs") as supervisor:
            clients = _clients(settings, folder)
            say(f"starting a coordinator and {len(clients)} clients; logs in {supervisor.log_dir}")
            sockets = start_trainers(supervisor, clients)
            fleet_port = int(clients[0].server.rsplit(":", 1)[1])
            with run_server(
                supervisor, folder, registry_home=home, host="127.0.0.1", port=fleet_port, tls=None
            ) as server:
                for client, socket in zip(clients, sockets, strict=True):
                    start_supernode(supervisor, client, socket, folder=folder)
                flower_run = submit(server, settings, run_id=run_id, folder=folder)
                in_flower = watch_flower(server, flower_run, folder=folder)

                def alive() -> None:
                    supervisor.check()
                    in_flower()

                run = follow(registry, run_id, alive=alive, show=show)
        reference = registry.rounds(run_id)[-1].version
        assert reference is not None
        registry.set_alias(reference.adapter, "champion", reference.number)
        export = export_peft(registry, reference.ref, home / "exports" / reference.ref.replace("/", "-"))
        say(f"loading {export} with plain peft in another process")
        accuracy = rescore(settings, export, folder)
    return _result(registry, run, export=export, accuracy=accuracy, wall_s=time.monotonic() - began)


def rescore(settings: RunSettings, export: Path, folder: Path) -> float:
    """Score an export with transformers and peft alone, in another process, on the run's held-out data.

    Raises:
        ExportMismatch: It cannot be loaded there.
    """
    data = folder / "held-out.jsonl"
    write_jsonl(load_held_out(settings).dataset, data)
    base = find_base_model(settings.model.base)
    try:
        done = subprocess.run(
            [
                sys.executable, "-m", "pomona.coordinator.rescore",
                str(base), str(export), str(data), str(settings.model.max_length),
            ],
            env=child_environment({"OMP_NUM_THREADS": "1"}),
            capture_output=True,
            text=True,
            timeout=_RESCORE_TIMEOUT_S,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ExportMismatch(f"plain peft did not score {export} within {_RESCORE_TIMEOUT_S:.0f} s") from error
    if done.returncode:
        raise ExportMismatch(f"plain peft cannot load {export}: {done.stderr[-800:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["accuracy"])


def _clients(settings: RunSettings, folder: Path) -> list[JoinSettings]:
    train = load_dataset(settings.data.source, split="train", task=settings.task)
    shares = partition(train, settings.data, len(RANKS), settings.seed)
    server = f"127.0.0.1:{free_ports(1)[0]}"
    clients = []
    for number, (rank, share) in enumerate(zip(RANKS, shares, strict=True), start=1):
        data = folder / f"client-{number}.jsonl"
        write_jsonl(train.subset(share.tolist()), data)
        clients.append(JoinSettings(server=server, name=f"client-{number}", rank=rank, data=str(data)))
    return clients


def _result(registry: Registry, run: Run, *, export: Path, accuracy: float, wall_s: float) -> DemoResult:
    summary = summarise(registry, run)
    if accuracy != summary.accuracy_rounds[-1]:
        raise ExportMismatch(
            f"plain peft scores {export} with accuracy {accuracy}, "
            f"the coordinator scored {summary.adapter} with {summary.accuracy_rounds[-1]}"
        )
    facts = {item.name: getattr(summary, item.name) for item in fields(summary)}
    return DemoResult(**facts, accuracy_exported=accuracy, export_dir=str(export), wall_s=round(wall_s, 2))


@contextlib.contextmanager
def _workplace(say: Callable[[str], None]) -> Iterator[Path]:
    folder = private_folder()
    try:
        yield folder
    except Exception:
        say(f"the logs of all processes are kept in {folder / 'logs'}")
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
