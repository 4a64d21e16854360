"""Follow a run to its end, and write down an end that the run itself cannot."""

import contextlib
import time
from collections.abc import Callable, Iterator

from pomona import errors
from pomona.coordinator.recovery import PROBE_S, coordinated, only_coordinator
from pomona.errors import PomonaError, RegistryUnavailable, RunFailed, ServerGone
from pomona.storage.records import Run
from pomona.storage.registry import Registry

_POLL_S = 0.5
_LOCK_POLL_S = 5.0
_LETS_GO_S = 30.0  # a stopped run's process hears of it by its next heartbeat
_ABANDONED_S = 180.0  # a server that was killed may be back by then


@contextlib.contextmanager
def recorded(registry: Registry, run_id: str) -> Iterator[None]:
    """Write down in a run's row the error that ends it here, unless the run has written down its own.

    Where the server died, or the database stays away, the run is only cut off: it stays ``running``, and can go on when
    they are back. Nor does a run end that a process coordinates; one that was stopped may take half a minute to let go.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, ServerGone) or (isinstance(error, RegistryUnavailable) and error.passing):
            raise
        wait_s = PROBE_S if isinstance(error, PomonaError) else _LETS_GO_S
        with contextlib.suppress(PomonaError), only_coordinator(registry, run_id, wait_s=wait_s):
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
        alive: Raises when the run cannot go on; RunFailed is believed only of one that nobody coordinates.
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
            # else another process has it, because it was started twice, or it ended while Flower was asked
            if coordinated(registry, run_id) == "nowhere" and registry.run(run_id).state == "running":
                raise
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


def watch_coordinator(registry: Registry, run_id: str) -> Callable[[], None]:
    """Return a check that some process coordinates a run, for those that have not started it."""
    asked = held = time.monotonic()

    def alive() -> None:
        nonlocal asked, held
        if time.monotonic() - asked < _LOCK_POLL_S:
            return
        asked = time.monotonic()
        if coordinated(registry, run_id) != "nowhere":
            held = asked
        elif asked - held > _ABANDONED_S:
            raise ServerGone(
                f"nobody has coordinated run {run_id} for {_ABANDONED_S:.0f} s; go on with it by: "
                f"pomona run --resume {run_id}"
            )

    return alive
