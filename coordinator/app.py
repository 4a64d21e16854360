"""Flower ServerApp of the coordinator. Flower starts it beside the SuperLink; torch is imported when it runs."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()

_OLD_COORDINATOR_S = 120.0


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federation with the settings that ``pomona run`` sent."""
    from pomona.coordinator.federation import run_federation  # noqa: PLC0415 - imports torch
    from pomona.coordinator.recovery import only_coordinator  # noqa: PLC0415
    from pomona.logs import bind, configure_logs  # noqa: PLC0415
    from pomona.settings import RunSettings  # noqa: PLC0415
    from pomona.storage.opening import open_registry  # noqa: PLC0415
    from pomona.storage.retrying import RUN_PATIENCE_S  # noqa: PLC0415

    configure_logs()
    settings = RunSettings.model_validate_json(str(context.run_config["settings"]))
    run_id = str(context.run_config["run-id"])
    bind(run_id=run_id)
    with (
        open_registry(patience_s=RUN_PATIENCE_S) as registry,
        only_coordinator(registry, run_id, wait_s=_OLD_COORDINATOR_S) as make_sure,
    ):
        run_federation(grid, settings, registry, run_id=run_id, make_sure=make_sure)
