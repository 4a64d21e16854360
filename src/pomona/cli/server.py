"""``pomona server``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from pomona.cli.options import Home, Insecure
from pomona.cli.output import console, exit_on_error

_POLL_S = 1.0


def server(
    *,
    home: Home = None,
    host: Annotated[
        str, typer.Option(help="Address that clients join at; 0.0.0.0 for all of this machine's.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port that clients join at; 0: a free one.")] = 9092,
    insecure: Insecure = False,
    run: Annotated[
        Path | None, typer.Option(help="Start the run of this file, unless the registry has a run of its name.")
    ] = None,
    ssl_ca_certfile: Annotated[Path | None, typer.Option(help="Certificate authority (PEM).")] = None,
    ssl_certfile: Annotated[
        Path | None, typer.Option(help="The server's certificate (PEM), valid for 127.0.0.1 too.")
    ] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="The server's private key (PEM).")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Serve /metrics for Prometheus at this port; 0: a free one.")
    ] = None,
    metrics_host: Annotated[str, typer.Option(help="Address that metrics are served at.")] = "127.0.0.1",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads for aggregating and scoring.")] = 1,
    superlink_state: Annotated[
        Literal["disk", "memory"],
        typer.Option(help="Where Flower keeps messages and nodes: in memory it is several times as fast."),
    ] = "disk",
) -> None:
    """Run a coordinator that clients join over gRPC, until it is stopped."""
    with exit_on_error():
        import contextlib  # noqa: PLC0415
        import time  # noqa: PLC0415
        from functools import partial  # noqa: PLC0415

        from pomona.cli.progress import UnattendedRuns  # noqa: PLC0415
        from pomona.coordinator.launch import submit_unattended  # noqa: PLC0415
        from pomona.coordinator.metrics import serve_metrics  # noqa: PLC0415
        from pomona.coordinator.server import run_server, tls_or_insecure  # noqa: PLC0415
        from pomona.coordinator.unattended import Keeper  # noqa: PLC0415
        from pomona.processes import Supervisor, terminated_like_interrupted  # noqa: PLC0415
        from pomona.run_file import load_settings  # noqa: PLC0415
        from pomona.storage.opening import default_home, open_registry  # noqa: PLC0415

        settings = load_settings(run) if run else None
        folder = home or default_home()
        tls = tls_or_insecure(ssl_ca_certfile, ssl_certfile, ssl_keyfile, insecure=insecure)
        open_registry(folder).close()
        try:
            with (
                terminated_like_interrupted(),
                Supervisor(folder / "server" / "logs") as supervisor,
                run_server(
                    supervisor,
                    folder / "server",
                    registry_home=folder,
                    host=host,
                    port=port,
                    tls=tls,
                    threads=threads,
                    superlink_state=superlink_state,
                ) as running,
            ):
                everywhere = host in {"0.0.0.0", "::"}  # noqa: S104 - compared, not bound
                address = f"THIS-MACHINE:{running.fleet.rsplit(':', 1)[1]}" if everywhere else running.fleet
                how = f"--root-certificates {ssl_ca_certfile}" if tls else "--insecure"
                console().print(
                    f"listening on {running.fleet}{'' if tls else ' WITHOUT TLS'}; registry in {folder}\n"
                    f"join with: pomona join --server {address} --rank 8 --data FILE --name NAME {how}\n"
                    f"start a run with: pomona run FILE.toml --home {folder}",
                    soft_wrap=True,
                )
                with open_registry(folder) as registry, contextlib.ExitStack() as metrics:
                    if metrics_port is not None:
                        found = metrics.enter_context(serve_metrics(registry, host=metrics_host, port=metrics_port))
                        console().print(f"metrics at http://{metrics_host}:{found}/metrics", soft_wrap=True)
                    unattended = UnattendedRuns(registry, console())
                    submit = partial(submit_unattended, running)
                    keeper = Keeper(registry, submit=submit, watch=unattended.watch, say=unattended.say)
                    keeper.resume()
                    if settings:
                        keeper.start_once(settings, source=str(run))
                    while True:
                        supervisor.check()
                        unattended.show()
                        keeper.look()
                        time.sleep(_POLL_S)
        except KeyboardInterrupt:
            console().print("stopped")
