"""Start a run at a server, and follow it to its end."""

import contextlib
import json
import logging
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pomona import __version__
from pomona.coordinator.beginning import begin_run
from pomona.coordinator.following import follow, recorded, watch_coordinator
from pomona.coordinator.recovery import PROBE_S, only_coordinator, settings_of
from pomona.coordinator.server import Server
from pomona.errors import AlreadyCoordinated, ConfigError, PomonaError, ProcessDied, RunFailed, ServerGone
from pomona.processes import child_environment, listens
from pomona.settings import RunSettings
from pomona.storage.records import Run
from pomona.storage.registry import Registry

_log = logging.getLogger(__name__)

_ALIVE_POLL_S = 60.0
_LISTENS_POLL_S = 5.0
_UNKNOWN_LOOKS = 5  # at Flower, in a row
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
        ConfigError: The run hides its clients, and the server would write what they send on its disk.
        ProcessDied: The server did not take the run.
    """
    if settings.privacy is not None and settings.privacy.unit == "client" and server.superlink_state != "memory":
        raise ConfigError(
            "under privacy.unit='client' nothing that a client sends may be written down before it is noised, and "
            "this server keeps its messages on disk; start it by `pomona server --superlink-state memory`"
        )
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

    One that another process coordinates is followed, and goes on without its follower.

    Raises:
        ConfigError: Its settings were written by another version of this package.
        ServerGone: It was another's, and nobody coordinates it any more.
        PomonaError: As :func:`run_at`.
    """
    settings = settings_of(run)
    try:
        with only_coordinator(registry, run.id, wait_s=PROBE_S):
            begin_run(registry, settings, run_id=run.id)
    except AlreadyCoordinated:
        return _follow_another(registry, run.id, show=show)
    return _start_and_follow(server, registry, settings, run_id=run.id, show=show)


def submit_unattended(server: Server, settings: RunSettings, run_id: str) -> None:
    """Start a run that nobody follows.

    Raises:
        ProcessDied: The server did not take it.
    """
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
            try:
                flower_run = submit(server, settings, run_id=run_id, folder=folder)
                alive = watch_flower(server, flower_run, folder=folder)
                return follow(registry, run_id, alive=alive, show=show)
            except PomonaError:  # it has ended by itself, or goes on without us
                raise
            except BaseException:
                if flower_run is not None:
                    with contextlib.suppress(PomonaError):
                        stop(server, flower_run, folder=folder)
                raise
    except KeyboardInterrupt as error:
        error.args = (f"run {run_id} was stopped; go on with it by: pomona run --resume {run_id}",)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _follow_another(registry: Registry, run_id: str, *, show: Callable[[Run], None]) -> Run:
    try:
        return follow(registry, run_id, alive=watch_coordinator(registry, run_id), show=show)
    except KeyboardInterrupt as error:
        error.args = (f"run {run_id} goes on; follow it again by: pomona run --resume {run_id}",)
        raise


def watch_flower(server: Server, flower_run: int, *, folder: Path) -> Callable[[], None]:
    """Return a check that Flower still runs a run.

    Whether the server is there is seen every few seconds; Flower is asked seldom, because asking costs a process. What
    it does not say once, because the machine is busy, says nothing of the run. A server that is being stopped says that
    the run has ended, so this is believed when the server is still there a few seconds later.
    """
    asked = seen = time.monotonic()
    unknown, ended = 0, ""

    def alive() -> None:
        nonlocal asked, seen, unknown, ended
        if time.monotonic() - seen > _LISTENS_POLL_S:
            seen = time.monotonic()
            if not listens(server.control):
                raise ServerGone(
                    f"the server on {server.fleet} is gone; what it published is in the registry, and the run goes on "
                    "when `pomona server` is started again"
                )
            if ended:
                raise RunFailed(f"Flower ended the run ({ended}) and the coordinator wrote nothing down; see its log")
        if ended or time.monotonic() - asked < _ALIVE_POLL_S:
            return
        status, asked = flower_status(server, flower_run, folder=folder), time.monotonic()
        ended = status if status.startswith("finished") else ""
        unknown = unknown + 1 if status == "unknown" else 0
        if unknown == _UNKNOWN_LOOKS:
            raise ProcessDied(
                f"the server was asked {unknown} times how the run is and did not say; if it goes on, it does so "
                "without this command, and `pomona run --resume` follows it"
            )

    return alive


def flower_status(server: Server, flower_run: int, *, folder: Path) -> str:
    """Return Flower's own status of a run, like ``running`` or ``finished:failed``; ``unknown`` if it does not say."""
    try:
        listing = json.loads(_flwr(server, folder, "ls", "server", "--run-id", str(flower_run), "--format", "json"))
        return str(listing["runs"][0]["status"])
    except (ProcessDied, ValueError, LookupError, TypeError) as error:
        _log.info("Flower does not say how run %d is: %s", flower_run, error)
        return "unknown"


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
