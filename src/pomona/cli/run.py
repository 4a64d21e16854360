"""``pomona run``."""

from pathlib import Path
from typing import Annotated

import typer

from pomona.cli.options import Home, Json
from pomona.cli.output import console, exit_on_error, print_json_line


def run(
    file: Annotated[Path | None, typer.Argument(help="TOML file with the settings of the run.")] = None,
    *,
    resume: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Go on with a run that was cut off: its id, or latest; without a file."),
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Start a run at the server on this machine, or resume one, and follow it to its end."""
    if (file is None) == (resume is None):
        raise typer.BadParameter("give a run file, or --resume with the id of a run")
    with exit_on_error(as_json=as_json):
        from pomona.cli.progress import run_view  # noqa: PLC0415
        from pomona.coordinator.launch import resume_at, run_at  # noqa: PLC0415
        from pomona.coordinator.recovery import resumable_run  # noqa: PLC0415
        from pomona.coordinator.server import find_server  # noqa: PLC0415
        from pomona.coordinator.summary import summarise  # noqa: PLC0415
        from pomona.processes import terminated_like_interrupted  # noqa: PLC0415
        from pomona.run_file import load_settings  # noqa: PLC0415
        from pomona.storage.opening import default_home, open_registry  # noqa: PLC0415
        from pomona.storage.retrying import RUN_PATIENCE_S  # noqa: PLC0415

        settings = load_settings(file) if file else None
        folder = home or default_home()
        server = find_server(folder / "server")
        with terminated_like_interrupted(), open_registry(folder, patience_s=RUN_PATIENCE_S) as registry:
            cut_off = resumable_run(registry, resume) if resume else None
            with run_view(registry, as_json=as_json) as view:
                if settings:
                    done = run_at(server, registry, settings, show=view.show)
                else:
                    assert cut_off is not None
                    done = resume_at(server, registry, cut_off, show=view.show)
            result = summarise(registry, done)
            if as_json:
                print_json_line(result)
            else:
                console().print(f"published {result.adapter}; see it with: pomona registry show {result.adapter}")
