"""Metrics for Prometheus, counted in the registry whenever they are asked for.

Nothing is counted twice or forgotten at a restart, because nothing is counted here. What the registry itself does not
know of a round that a restart cut in two is in the help of each metric. There are totals only: no figure of a single
client leaves by this way.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pomona.errors import PortInUse, RegistryDamaged, RegistryUnavailable
from pomona.storage.records import RoundState, RunState, SubmissionStatus
from pomona.storage.registry import Registry
from pomona.storage.statistics import OpenRound, Statistics


class RegistryCollector(Collector):
    """What a registry counts, each time anew; ``pomona_registry_up`` is 0 while the database does not answer."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def describe(self) -> list[Metric]:
        """Return nothing: names are known without asking the database at the start."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield one family of samples after another."""
        try:
            found = self._registry.statistics()
        except (RegistryUnavailable, RegistryDamaged):
            yield GaugeMetricFamily("pomona_registry_up", "Whether the registry's database answers.", 0)
            return
        yield GaugeMetricFamily("pomona_registry_up", "Whether the registry's database answers.", 1)
        yield from _totals(found)
        yield from _open_rounds(found.open_rounds)


@contextmanager
def serve_metrics(registry: Registry, *, host: str, port: int) -> Iterator[int]:
    """Answer ``GET /metrics`` at an address in a thread, and lend the port.

    Args:
        registry: What to count in.
        host: Address to listen at.
        port: Port to listen at; 0: a free one.

    Raises:
        PortInUse: Another program listens there.
    """
    collectors = CollectorRegistry(auto_describe=False)
    collectors.register(RegistryCollector(registry))
    ProcessCollector(registry=collectors)
    PlatformCollector(registry=collectors)
    try:
        server, thread = start_http_server(port, addr=host, registry=collectors)
    except OSError as error:
        raise PortInUse(f"metrics cannot be served at {host}:{port}: {error}; choose another --metrics-port") from error
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _totals(found: Statistics) -> Iterator[Metric]:
    yield GaugeMetricFamily("pomona_adapters", "Adapter names in the registry.", found.adapters)
    yield GaugeMetricFamily("pomona_versions", "Adapter versions in the registry.", found.versions)
    runs = GaugeMetricFamily("pomona_runs", "Runs by state.", labels=["state"])
    for state in get_args(RunState):
        runs.add_metric([state], found.runs.get(state, 0))
    yield runs
    rounds = GaugeMetricFamily("pomona_rounds", "Rounds by state.", labels=["state"])
    for state in get_args(RoundState):
        rounds.add_metric([state], found.rounds.get(state, 0))
    yield rounds
    # no counter: an accepted update that a defence sets aside becomes a quarantined one
    updates = GaugeMetricFamily("pomona_submissions", "Updates that were received, by status.", labels=["status"])
    for status in get_args(SubmissionStatus):
        updates.add_metric([status], found.submissions.get(status, 0))
    yield updates
    payload = CounterMetricFamily(
        "pomona_payload_bytes",
        "Payload bytes of committed rounds; not those sent before a restart to clients that had not answered by then.",
        labels=["direction"],
    )
    payload.add_metric(["down"], found.bytes_down)
    payload.add_metric(["up"], found.bytes_up)
    yield payload
    lasted = "Seconds of all committed rounds; where a restart cut one in two, from the restart."
    yield CounterMetricFamily("pomona_round_seconds", lasted, found.round_seconds)


def _open_rounds(rounds: tuple[OpenRound, ...]) -> Iterator[Metric]:
    labels = ["adapter", "run"]
    number = GaugeMetricFamily("pomona_open_round", "Number of the round that is being trained.", labels=labels)
    asked = GaugeMetricFamily("pomona_open_round_cohort", "Clients asked in it.", labels=labels)
    accepted = GaugeMetricFamily("pomona_open_round_accepted", "Accepted updates so far.", labels=labels)
    for each in rounds:
        where = [each.adapter, each.run_id]
        number.add_metric(where, each.number)
        asked.add_metric(where, each.cohort_size)
        accepted.add_metric(where, each.accepted)
    yield from (number, asked, accepted)
