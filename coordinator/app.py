"""Flower ServerApp of the coordinator. Flower starts it beside the SuperLink; torch is imported when it runs."""

import logging
from typing import TYPE_CHECKING

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

if TYPE_CHECKING:
    from pomona.storage.registry import Registry

app = ServerApp()

_log = logging.getLogger(__name__)

_OLD_COORDINATOR_S = 120.0


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federation with the settings that ``pomona run`` sent, unless it has ended meanwhile."""
    from pomona.coordinator.federation import run_federation  # noqa: PLC0415 - imports torch
    from pomona.coordinator.recovery import only_coordinator  # noqa: PLC0415
    from pomona.logs import bind, configure_logs  # noqa: PLC0415
    from pomona.settings import RunSettings  # noqa: PLC0415

    configure_logs()
    settings = RunSettings.model_validate_json(str(context.run_config["settings"]))
    run_id = str(context.run_config["run-id"])
    bind(run_id=run_id)
    with (
        patient_registry() as registry,
        only_coordinator(registry, run_id, wait_s=_OLD_COORDINATOR_S) as make_sure,
    ):
        if (state := registry.run(run_id).state) != "running":
            _log.info("run %s is %s: it was stopped, or another process has done it", run_id, state)
            return
        run_federation(grid, settings, registry, run_id=run_id, make_sure=make_sure)


def patient_registry() -> "Registry":
    """Open the registry, and wait for a database that is away, now or later.

    Raises:
        RegistryUnavailable: It stays away for two minutes, or cannot be used for a reason that does not pass by itself.
    """
    from pomona.storage.opening import open_registry  # noqa: PLC0415
    from pomona.storage.retrying import RUN_PATIENCE_S, until_done  # noqa: PLC0415

    return until_done(lambda: open_registry(patience_s=RUN_PATIENCE_S), patience_s=RUN_PATIENCE_S)
