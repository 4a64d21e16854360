"""``pomona server``."""

from pathlib import Path
from typing import Annotated

import typer

from pomona.cli.options import Home, Insecure
from pomona.cli.output import console, exit_on_error


def server(
    *,
    home: Home = None,
    host: Annotated[
        str, typer.Option(help="Address that clients join at; 0.0.0.0 for all of this machine's.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port that clients join at; 0: a free one.")] = 9092,
    insecure: Insecure = False,
    ssl_ca_certfile: Annotated[Path | None, typer.Option(help="Certificate authority (PEM).")] = None,
    ssl_certfile: Annotated[
        Path | None, typer.Option(help="The server's certificate (PEM), valid for 127.0.0.1 too.")
    ] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="The server's private key (PEM).")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads for aggregating and scoring.")] = 1,
) -> None:
    """Run a coordinator that clients join over gRPC, until it is stopped."""
    with exit_on_error():
        import time  # noqa: PLC0415

        from pomona.coordinator.launch import resume_unfinished  # noqa: PLC0415
        from pomona.coordinator.server import run_server, tls_or_insecure  # noqa: PLC0415
        from pomona.processes import Supervisor, terminated_like_interrupted  # noqa: PLC0415
        from pomona.storage.registry import default_home, open_registry  # noqa: PLC0415

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
                with open_registry(folder) as registry:
                    for run_id in resume_unfinished(running, registry):
                        console().print(f"going on with run {run_id}, which was cut off", soft_wrap=True)
                while True:
                    supervisor.check()
                    time.sleep(0.5)
        except KeyboardInterrupt:
            console().print("stopped")
