"""Runs that nobody follows: a server goes on with them when it starts, and again when their process dies under it.

Flower starts a process for a run once. Whether one is at work is seen by the lock that it holds.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from pomona.coordinator.beginning import begin_run
from pomona.coordinator.launch import new_run_id
from pomona.coordinator.recovery import PROBE_S, Place, coordinated, only_coordinator, settings_of
from pomona.errors import ConfigError, PomonaError, ProcessDied, RegistryDamaged, RegistryUnavailable
from pomona.settings import RunSettings
from pomona.storage.registry import Registry

_LOOK_S = 5.0
_DEAD_S = 10.0  # since a process of this machine let the run go
_STARTING_S = 120.0  # that Flower takes at most to start one, and another server to be there again
_STARTS = 3  # that may come to nothing, one after the other

Submit = Callable[[RunSettings, str], None]


@dataclass(slots=True)
class _Watched:
    settings: RunSettings
    where: Place
    before: Place
    since: float
    made: int  # when it was last started
    in_vain: int = 0


class Keeper:
    """Keeps runs going that nobody follows.

    Args:
        registry: Where they are.
        submit: Starts a process for a run of some settings and id; raises ProcessDied where it cannot.
        watch: Told of a run that is kept, with a line for people.
        say: Told whatever else becomes of them.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        submit: Submit,
        watch: Callable[[str, str], None],
        say: Callable[[str], None],
    ) -> None:
        self._registry, self._submit, self._watch, self._say = registry, submit, watch, say
        self._watched: dict[str, _Watched] = {}
        self._looked = time.monotonic()

    def resume(self) -> None:
        """Go on with every run that was running when its server died; one that cannot go on keeps back no other."""
        for run in [run for run in self._registry.runs() if run.state == "running"]:
            try:
                settings = settings_of(run)
            except ConfigError as error:
                self._say(f"run {run.id} is left as it is: {error}")
                continue
            if (where := coordinated(self._registry, run.id)) == "nowhere":
                self._watch(run.id, f"going on with run {run.id}, which was cut off")
            else:
                self._watch(run.id, f"run {run.id} is coordinated {where} already")
            self._keep(run.id, settings, where)

    def start_once(self, settings: RunSettings, *, source: str) -> None:
        """Start a run, unless the registry has a run of its name, whatever became of that.

        Args:
            settings: Of the run.
            source: Where they come from, for people.

        Raises:
            BaseModelError: The base model is not here.
            DataError: The held-out data cannot be used.
        """
        if any(run.adapter == settings.name for run in self._registry.runs()):
            return
        run_id = new_run_id()
        begin_run(self._registry, settings, run_id=run_id)
        self._watch(run_id, f"started run {run_id} of {source}")
        self._keep(run_id, settings, "nowhere")

    def look(self) -> None:
        """Start again what has died, where it is time to look; a database that is away ends no run."""
        if time.monotonic() - self._looked < _LOOK_S:
            return
        self._looked = time.monotonic()
        for run_id in list(self._watched):
            with suppress(RegistryUnavailable, RegistryDamaged):
                self._look_at(run_id)

    def _keep(self, run_id: str, settings: RunSettings, where: Place) -> None:
        kept = _Watched(settings, where, where, time.monotonic(), self._made(run_id))
        self._watched[run_id] = kept
        if where == "nowhere":
            self._start(run_id, kept)

    def _look_at(self, run_id: str) -> None:
        if self._registry.run(run_id).state != "running":
            del self._watched[run_id]
            return
        kept, now = self._watched[run_id], time.monotonic()
        if (where := coordinated(self._registry, run_id)) != kept.where:
            kept.before, kept.where, kept.since = kept.where, where, now
        lasted = now - kept.since
        if where == "elsewhere" and lasted >= _STARTING_S:
            self._say(f"run {run_id} is left to the server that coordinates it")
            del self._watched[run_id]
        elif where == "nowhere" and lasted >= (_DEAD_S if kept.before == "here" else _STARTING_S):
            self._start_again(run_id, kept)

    def _start_again(self, run_id: str, kept: _Watched) -> None:
        made = self._made(run_id)
        kept.in_vain, kept.made = (0 if made > kept.made else kept.in_vain + 1), made
        if kept.in_vain == _STARTS:
            self._give_up(run_id)
            return
        self._say(f"run {run_id} has lost its process; going on with it")
        self._start(run_id, kept)

    def _start(self, run_id: str, kept: _Watched) -> None:
        try:
            self._submit(kept.settings, run_id)
        except ProcessDied as error:
            self._say(f"run {run_id} could not be started, which is tried again: {error}")
        kept.where, kept.before, kept.since = "nowhere", "nowhere", time.monotonic()

    def _give_up(self, run_id: str) -> None:
        """End a run that does not get anywhere, unless somebody coordinates it after all."""
        reason = f"its process ended {_STARTS} times before anything came of it; the server's logs say why"
        with suppress(PomonaError), only_coordinator(self._registry, run_id, wait_s=PROBE_S):
            self._registry.finish_run(run_id, "failed", f"{ProcessDied.__name__}: {reason}")

    def _made(self, run_id: str) -> int:
        """Count what a run has to show: updates and versions."""
        return sum(each.accepted + each.quarantined + bool(each.version) for each in self._registry.rounds(run_id))
