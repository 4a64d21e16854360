"""One federated run, from its row in the registry to its end."""

import logging
from collections.abc import Callable

import httpx
from flwr.serverapp import Grid

from pomona.coordinator.beginning import begin_run
from pomona.coordinator.membership import cuts_off
from pomona.coordinator.own_noise_loop import OwnNoiseLoop
from pomona.coordinator.private_loop import PrivateLoop
from pomona.coordinator.private_task_loop import PrivateTaskLoop
from pomona.coordinator.replies import server_gone
from pomona.coordinator.request_loop import RequestLoop
from pomona.coordinator.round_loop import RoundLoop
from pomona.coordinator.secure_loop import SecureLoop
from pomona.coordinator.task_loop import TaskLoop
from pomona.settings import RunSettings
from pomona.storage.records import Version
from pomona.storage.registry import Registry

_log = logging.getLogger(__name__)


def _loop_of(settings: RunSettings) -> type[RoundLoop | TaskLoop | RequestLoop]:
    if settings.forget is not None:
        return RequestLoop
    if settings.continual is not None:
        return TaskLoop if settings.privacy is None else PrivateTaskLoop
    match settings.privacy and settings.privacy.unit:
        case "client":
            return SecureLoop if settings.privacy and settings.privacy.trust == "distributed" else PrivateLoop
        case "example" | "local":
            return OwnNoiseLoop
        case _:
            return RoundLoop


def run_federation(
    grid: Grid,
    settings: RunSettings,
    registry: Registry,
    *,
    run_id: str,
    make_sure: Callable[[], None] = lambda: None,
    lasting: bool = True,
) -> list[Version]:
    """Run all rounds and return the versions that were published, oldest first.

    However it ends, the run's row in the registry says so. Where the server is gone or stopped, the database stays away
    or another process has taken the run over, it has not ended.

    Args:
        grid: Where the clients are.
        settings: Of the run.
        registry: Where it is recorded.
        run_id: Its id.
        make_sure: Called at every round, and before it is published; raises AlreadyCoordinated where the run is no
            longer ours.
        lasting: A round under client-level privacy lasts until its deadline, so that nobody learns from its length who
            answered. False only where all clients are simulated.

    Raises:
        AlreadyCoordinated: Another process took the run over while we had lost its lock.
        ServerGone: Flower's server cannot be reached; the same call goes on with the run later.
        RegistryUnavailable: The database stays away; likewise.
        NotEnoughClients: Too few clients joined in time, or answered.
        PrivacyBudgetExhausted: A release would cost the population more than its budget.
    """
    invitation = begin_run(registry, settings, run_id=run_id)
    try:
        loop = _loop_of(settings)(grid, settings, registry, invitation, make_sure, lasting=lasting)
        versions = loop.run()
    except BaseException as error:
        if cuts_off(error):
            _log.error("run %s is cut off: %s: %s", run_id, type(error).__name__, error)
            if isinstance(error, httpx.TransportError):
                raise server_gone(error) from error
            raise
        make_sure()
        if registry.run(run_id).state == "running":  # else whoever ended it has said why
            registry.finish_run(run_id, "failed", f"{type(error).__name__}: {error}")
        raise
    registry.finish_run(run_id, "finished")
    return versions
