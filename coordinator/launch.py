"""Start a run at a server, and follow it to its end."""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pomona import __version__, errors
from pomona.coordinator.beginning import begin_run
from pomona.coordinator.recovery import only_coordinator
from pomona.coordinator.server import Server
from pomona.errors import PomonaError, ProcessDied, RunFailed, ServerGone
from pomona.processes import child_environment, listens
from pomona.settings import RunSettings
from pomona.storage.records import Run
from pomona.storage.registry import Registry

_POLL_S = 0.5
_ALIVE_POLL_S = 60.0
_LISTENS_POLL_S = 5.0
_SUBMIT_TIMEOUT_S = 120.0

_APP = """\
[project]
name = "pomona-run"
version = "{version}"
description = "One run; the code is the installed pomona package"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "pomona"

[tool.flwr.app.components]
serverapp = "pomona.coordinator.app:app"
clientapp = "pomona.client.app:app"

[tool.flwr.app.config]
run-id = {run_id}
settings = {settings}
"""


def new_run_id() -> str:
    """Return a new id: the time, to sort by, and 6 random hexadecimal digits."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


def submit(server: Server, settings: RunSettings, *, run_id: str, folder: Path) -> int:
    """Start a run and return Flower's number of it.

    Args:
        server: Where to start it.
        settings: Settings of the run.
        run_id: Our id of it.
        folder: A private folder for what Flower needs.

    Raises:
        ProcessDied: The server did not take the run.
    """
    app = folder / "pomona-run"
    app.mkdir(parents=True)
    text = _APP.format(
        version=__version__.split("+", maxsplit=1)[0],
        run_id=json.dumps(run_id),
        settings=json.dumps(settings.model_dump_json(), ensure_ascii=False),
    )
    (app / "pyproject.toml").write_text(text, encoding="utf-8")
    answer = _flwr(server, folder, "run", str(app), "server", "--format", "json")
    try:
        return int(json.loads(answer)["run-id"])
    except (ValueError, KeyError) as error:
        raise ProcessDied(f"the server did not take the run: {answer[-500:]}") from error


def stop(server: Server, flower_run: int, *, folder: Path) -> None:
    """Stop a run."""
    _flwr(server, folder, "stop", str(flower_run), "server")


def run_at(server: Server, registry: Registry, settings: RunSettings, *, show: Callable[[Run], None]) -> Run:
    """Start a run at a server and follow it to its end; an interrupt stops it.

    Raises:
        BaseModelError: The base model is not here.
        DataError: The held-out data cannot be used.
        PomonaError: The run ended with it.
    """
    run_id = new_run_id()
    begin_run(registry, settings, run_id=run_id)
    return _start_and_follow(server, registry, settings, run_id=run_id, show=show)


def resume_at(server: Server, registry: Registry, run: Run, *, show: Callable[[Run], None]) -> Run:
    """Go on with a run that was cut off, from what it has in the registry, and follow it to its end.

    Raises:
        ProcessError: It is being coordinated right now.
        PomonaError: As :func:`run_at`.
    """
    with only_coordinator(registry, run.id):
        settings = RunSettings.model_validate_json(run.settings_json)
        begin_run(registry, settings, run_id=run.id)
    return _start_and_follow(server, registry, settings, run_id=run.id, show=show)


def resume_unfinished(server: Server, registry: Registry) -> list[str]:
    """Start every run again that was running when its server died; return their ids.

    Raises:
        ProcessDied: The server did not take one.
    """
    cut_off = [run for run in registry.runs() if run.state == "running"]
    for run in cut_off:
        _submit_unattended(server, RunSettings.model_validate_json(run.settings_json), run_id=run.id)
    return [run.id for run in cut_off]


def start_once(server: Server, registry: Registry, settings: RunSettings) -> str | None:
    """Start a run that nobody follows, unless the registry has a run of its name; return its id, None if it has.

    Whatever happens after the run has its row, :func:`resume_unfinished` goes on with it.

    Raises:
        BaseModelError: The base model is not here.
        DataError: The held-out data cannot be used.
        ProcessDied: The server did not take it.
    """
    if any(run.adapter == settings.name for run in registry.runs()):
        return None
    run_id = new_run_id()
    begin_run(registry, settings, run_id=run_id)
    _submit_unattended(server, settings, run_id=run_id)
    return run_id


def _submit_unattended(server: Server, settings: RunSettings, *, run_id: str) -> None:
    folder = private_folder()
    try:
        submit(server, settings, run_id=run_id, folder=folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start_and_follow(
    server: Server, registry: Registry, settings: RunSettings, *, run_id: str, show: Callable[[Run], None]
) -> Run:
    folder = private_folder()
    flower_run = None
    try:
        with recorded(registry, run_id):
            flower_run = submit(server, settings, run_id=run_id, folder=folder)
            alive = watch_flower(server, flower_run, folder=folder)
            return follow(registry, run_id, alive=alive, show=show)
    except BaseException as error:
        if flower_run is not None:
            with contextlib.suppress(PomonaError):
                stop(server, flower_run, folder=folder)
        if isinstance(error, KeyboardInterrupt):
            error.args = (f"run {run_id} was stopped; go on with it by: pomona run --resume {run_id}",)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def recorded(registry: Registry, run_id: str) -> Iterator[None]:
    """Write down in a run's row the error that ends it here, unless the run has written down its own.

    Where the server died the run is only cut off: it stays ``running``, for the server to go on with when it is back.
    """
    try:
        yield
    except ServerGone:
        raise
    except BaseException as error:
        with contextlib.suppress(PomonaError):
            if registry.run(run_id).state == "running":
                registry.finish_run(run_id, "failed", f"{type(error).__name__}: {error}")
        raise


def follow(
    registry: Registry,
    run_id: str,
    *,
    alive: Callable[[], None],
    show: Callable[[Run], None],
) -> Run:
    """Watch a run until it ends.

    Args:
        registry: Where the run writes down what it does.
        run_id: The run.
        alive: Raises when the run cannot go on.
        show: Called with the run's row a few times a second.

    Raises:
        PomonaError: The error that the run ended with, of its own class.
    """
    while True:
        run = registry.run(run_id)
        show(run)
        if run.state != "running":
            break
        try:
            alive()
        except RunFailed:
            if registry.run(run_id).state == "running":  # else it ended while Flower was asked
                raise
            continue
        time.sleep(_POLL_S)
    if run.state == "failed":
        raise failure(run.reason)
    return run


def failure(reason: str) -> errors.PomonaError:
    """Return the error that a run wrote down as the reason of its end."""
    kind, _, text = reason.partition(": ")
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, errors.PomonaError) and known is not errors.UpdateRejected:
        return known(text)
    return RunFailed(f"the run failed: {reason}")


def watch_flower(server: Server, flower_run: int, *, folder: Path) -> Callable[[], None]:
    """Return a check that Flower still runs a run.

    Whether the server is there is seen every few seconds; Flower is asked seldom, because asking costs a process.
    """
    asked = seen = time.monotonic()

    def alive() -> None:
        nonlocal asked, seen
        if time.monotonic() - seen > _LISTENS_POLL_S:
            seen = time.monotonic()
            if not listens(server.control):
                raise ServerGone(
                    f"the server on {server.fleet} is gone; what it published is in the registry, and the run goes on "
                    "when `pomona server` is started again"
                )
        if time.monotonic() - asked < _ALIVE_POLL_S:
            return
        asked = time.monotonic()
        status = flower_status(server, flower_run, folder=folder)
        if status.startswith("finished"):
            raise RunFailed(f"Flower ended the run ({status}) and the coordinator wrote nothing down; see its log")

    return alive


def flower_status(server: Server, flower_run: int, *, folder: Path) -> str:
    """Return Flower's own status of a run, like ``running`` or ``finished:failed``."""
    listing = json.loads(_flwr(server, folder, "ls", "server", "--run-id", str(flower_run), "--format", "json"))
    runs = listing.get("runs") or [{}]
    return str(runs[0].get("status", "unknown"))


def _flwr(server: Server, folder: Path, command: str, *arguments: str) -> str:
    config = folder / "flwr" / "config.toml"
    if not config.exists():
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(_connection(server), encoding="utf-8")
    env: Mapping[str, str] = child_environment({"FLWR_HOME": str(config.parent)})
    try:
        done = subprocess.run(
            ["flwr", command, *arguments],  # noqa: S607 - of this installation: child_environment puts it first
            env={**env, "NO_COLOR": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SUBMIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProcessDied(f"`flwr {command}` did not end well: {error}") from error
    if done.returncode:
        raise ProcessDied(f"`flwr {command}` failed: {(done.stdout + done.stderr).strip()[-800:]}")
    return done.stdout


def _connection(server: Server) -> str:
    security = (
        f"root-certificates = {json.dumps(os.path.abspath(server.ca_certificate))}"  # noqa: PTH100
        if server.ca_certificate
        else "insecure = true"
    )
    return f'[superlink]\ndefault = "server"\n\n[superlink.server]\naddress = "{server.control}"\n{security}\n'


def private_folder() -> Path:
    """Return a new private folder for one command's files."""
    return Path(tempfile.mkdtemp(prefix="pomona-"))
