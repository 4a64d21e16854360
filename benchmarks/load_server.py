"""``pomona server`` with other settings of Flower's SuperLink than it has, for ``benchmarks/load.py``.

``python benchmarks/load_server.py server ...`` is ``pomona server ...``, except that its SuperLink is this file too:
``python benchmarks/load_server.py superlink ...`` is ``flower-superlink ...`` that writes down how long each of its
handlers takes, and that keeps its state in memory where ``POMONA_LOAD_DATABASE=memory``.
"""

import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

DATABASE, TIMES = "POMONA_LOAD_DATABASE", "POMONA_LOAD_TIMES"
FLEET = (
    "RegisterNode", "ActivateNode", "SendNodeHeartbeat", "PullMessages", "PushMessages", "GetRun", "GetFab",
    "PushObject", "PullObject", "ConfirmMessageReceived",
)  # fmt: skip
RUNTIME = ("get_nodes", "push_messages", "pull_messages", "push_object", "pull_object", "confirm_message_received")
_WRITE_S = 0.5


class Times:
    """Counts calls and adds up their seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.held: dict[str, list[float]] = {}

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function with a clock around it: what it waited, and what its thread computed."""

        @functools.wraps(work)
        def around(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            began, busy = time.perf_counter(), time.thread_time()
            try:
                return work(*args, **kwargs)
            finally:
                self._add(name, time.perf_counter() - began, time.thread_time() - busy)

        return around

    def _add(self, name: str, seconds: float, cpu_s: float) -> None:
        with self._lock:
            held = self.held.setdefault(name, [0, 0.0, 0.0])
            for place, value in enumerate((1, seconds, cpu_s)):
                held[place] += value

    def write_forever(self, path: Path) -> None:
        """Write down, twice a second, what was counted."""
        part = path.with_suffix(".part")
        while True:
            with self._lock:
                text = json.dumps(self.held)
            part.write_text(text)
            part.replace(path)
            time.sleep(_WRITE_S)


def superlink() -> None:
    """Be a SuperLink."""
    from flwr.server.superlink.fleet.grpc_rere.fleet_servicer import FleetServicer  # noqa: PLC0415
    from flwr.superlink.cli.flower_superlink import flower_superlink  # noqa: PLC0415
    from flwr.superlink.servicer.runtime import runtime_handlers  # noqa: PLC0415

    times = Times()
    _put_clocks(times, FleetServicer, "fleet", FLEET)
    _put_clocks(times, runtime_handlers, "runtime", RUNTIME)
    if path := os.environ.get(TIMES):
        threading.Thread(target=times.write_forever, args=(Path(path),), daemon=True).start()
    sys.argv = ["flower-superlink", *sys.argv[2:]]
    flower_superlink()


def _put_clocks(times: Times, owner: type | ModuleType, kind: str, names: tuple[str, ...]) -> None:
    for name in names:
        setattr(owner, name, times.timed(f"{kind}.{name}", getattr(owner, name)))


def server() -> None:
    """Be a server whose SuperLink is this file."""
    from pomona.__main__ import main  # noqa: PLC0415
    from pomona.coordinator import server as module  # noqa: PLC0415

    command = module._command

    def changed(*args: Any) -> list[str]:  # noqa: ANN401
        found = [sys.executable, str(Path(__file__).resolve()), "superlink", *command(*args)[1:]]
        if os.environ.get(DATABASE) == "memory":
            found[found.index("--database") + 1] = ":flwr-in-memory:"
        return found

    module._command = changed
    sys.argv = ["pomona", *sys.argv[1:]]
    main()


if __name__ == "__main__":
    superlink() if sys.argv[1] == "superlink" else server()
