"""Many clients on one machine: the same round loop and the same training, on Flower's simulation runtime (Ray).

Each simulated client trains on its share of the run's training data, with the rank that ``simulation.ranks`` gives it.
A Ray worker keeps one base model and uses it for one client after another.
"""

import logging
import os
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from pomona.client.trainer import Profile, Trainer
from pomona.coordinator.beginning import begin_run
from pomona.coordinator.federation import run_federation
from pomona.coordinator.following import failure, recorded
from pomona.coordinator.launch import new_run_id
from pomona.coordinator.recovery import PROBE_S, only_coordinator
from pomona.datasets import Dataset, load_dataset
from pomona.errors import ConfigError, PomonaError, RunFailed
from pomona.messages import pack, unpack
from pomona.partition import partition
from pomona.processes import child_environment
from pomona.protocol import refusal
from pomona.settings import RunSettings
from pomona.storage.records import Run
from pomona.storage.registry import Registry

_POLL_S = 0.5


def simulate_run(registry: Registry, settings: RunSettings, *, clients: int, show: Callable[[Run], None]) -> Run:
    """Run a federation of simulated clients and return its row.

    Args:
        registry: Where it publishes.
        settings: Settings of the run; ``cohort.min_clients`` becomes the number of clients.
        clients: How many.
        show: Called with the run's row a few times a second.

    Raises:
        ConfigError: ``cohort`` can never be met by so many clients.
        DataError: There are fewer training examples than clients.
        PomonaError: The run ended with it.
    """
    settings = _fitted(settings, clients)
    shares_of(settings.model_dump_json(), clients)
    run_id = new_run_id()
    begin_run(registry, settings, run_id=run_id)
    watching = threading.Event()
    watcher = threading.Thread(target=_watch, args=(registry, run_id, show, watching), daemon=True)
    watcher.start()
    try:
        with recorded(registry, run_id), only_coordinator(registry, run_id, wait_s=PROBE_S) as make_sure:
            _simulate(registry, settings, clients=clients, run_id=run_id, make_sure=make_sure)
    except Exception as error:  # Flower may put its own in place of the round loop's
        if (ended := registry.run(run_id)).state == "failed":
            raise failure(ended.reason) from error
        raise
    finally:
        watching.set()
        watcher.join()
    run = registry.run(run_id)
    show(run)
    if run.state != "finished":
        raise failure(run.reason)
    return run


def build_client_app(settings_json: str) -> ClientApp:
    """Return the app of every simulated client; Ray carries it to its workers."""
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        number, count = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
        try:
            _, json, payload = unpack(message)
            trainer = _trainer(settings_json, count)
            trainer.become(_profile(settings_json, number, count))
            reply = trainer.answer(message.metadata.message_type, json, payload)
        except PomonaError as error:
            reply = ("refusal", refusal(_name(number), error).model_dump_json(), b"")
        return Message(pack(*reply), reply_to=message)

    app.query()(answer)
    app.query("tell")(answer)
    app.train()(answer)
    app.train("task")(answer)
    app.query("sums")(answer)
    return app


@lru_cache(maxsize=2)
def shares_of(settings_json: str, clients: int) -> tuple[Dataset, tuple[Any, ...]]:
    """Return the training data and the indices of each client's share; loaded once per worker.

    Raises:
        DataError: There are fewer examples than clients.
    """
    settings = RunSettings.model_validate_json(settings_json)
    train = load_dataset(settings.data.source, split="train", task=settings.task)
    return train, tuple(partition(train, settings.data, clients, settings.seed))


@lru_cache(maxsize=1)
def _trainer(settings_json: str, count: int) -> Trainer:
    torch.set_num_threads(1)
    return Trainer(_profile(settings_json, 0, count))


def _profile(settings_json: str, number: int, count: int) -> Profile:
    settings = RunSettings.model_validate_json(settings_json)
    ranks = settings.simulation.ranks

    def load(_task: str) -> Dataset:
        train, shares = shares_of(settings_json, count)
        return train.subset(shares[number].tolist())

    return Profile(
        name=_name(number),
        rank=ranks[number % len(ranks)] if settings.continual is None else None,
        load_data=load,
        model_folder=settings.model.base,
    )


def _name(number: int) -> str:
    return f"client-{number + 1:05d}"


def _fitted(settings: RunSettings, clients: int) -> RunSettings:
    cohort, limits, ranks = settings.cohort, settings.aggregation, settings.simulation.ranks
    if settings.continual is None and not (limits.rank or 1) <= min(ranks) <= max(ranks) <= limits.max_rank:
        raise ConfigError(
            f"expected simulation.ranks from {limits.rank or 1} to aggregation.max_rank={limits.max_rank}, got {ranks}"
        )
    if settings.forget is not None:
        raise ConfigError(
            "[forget] needs clients that keep what is known between its many small messages, and simulated ones share "
            "their workers; run real clients with `pomona join`, or `pomona forget` where all rows are at one place"
        )
    if settings.privacy is not None and settings.privacy.trust == "distributed":
        raise ConfigError(
            "privacy.trust='distributed' needs clients that keep secrets between a round's messages, and simulated "
            "ones share their workers; simulate trust='central', or run real clients with `pomona join`"
        )
    if max(cohort.min_replies, cohort.size or 0) > clients:
        raise ConfigError(
            f"cohort.size={cohort.size} and cohort.min_replies={cohort.min_replies} can never be met "
            f"by {clients} clients; simulate more, or lower them"
        )
    return settings.model_copy(update={"cohort": cohort.model_copy(update={"min_clients": clients})})


def _simulate(
    registry: Registry, settings: RunSettings, *, clients: int, run_id: str, make_sure: Callable[[], None]
) -> None:
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        torch.set_num_threads(1)
        run_federation(grid, settings, registry, run_id=run_id, make_sure=make_sure, lasting=False)

    os.environ.update(child_environment())
    for name in ("flwr", "ray"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what ends the simulation is told by its error
    simulation = settings.simulation
    resources: Mapping[str, float] = {
        "num_cpus": simulation.cpus_per_client,
        "num_gpus": simulation.gpus_per_client,
    }
    try:
        run_simulation(
            server_app=server,
            client_app=build_client_app(settings.model_dump_json()),
            num_supernodes=clients,
            backend_config={
                "client_resources": dict(resources),
                "init_args": {"include_dashboard": False, "logging_level": logging.ERROR, "log_to_driver": False},
            },
        )
    except RuntimeError as error:
        raise RunFailed(f"the simulation ended early: {_first(error)}") from error


def _first(error: BaseException) -> str:
    """Return the error that led to another, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def _watch(registry: Registry, run_id: str, show: Callable[[Run], None], ended: threading.Event) -> None:
    while not ended.is_set():
        show(registry.run(run_id))
        ended.wait(_POLL_S)
