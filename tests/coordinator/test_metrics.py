"""Metrics are what the registry has, and say so when it does not answer."""

import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.exc import OperationalError

from pomona.coordinator.metrics import serve_metrics
from pomona.errors import PortInUse
from pomona.storage.opening import open_registry
from pomona.storage.records import NewSubmission
from pomona.storage.registry import Registry

SUBMISSION = NewSubmission(
    run_id="run-1",
    round_number=1,
    client="secret-clinic",
    rank=4,
    alpha=8.0,
    num_examples=4711,
    nonce="n1",
    status="accepted",
    reason="",
    payload=b"update",
    train_loss=0.123,
)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with open_registry(tmp_path / "home") as registry:
        registry.add_base_model("b" * 64, "tiny-base", "a test")
        registry.start_run(run_id="run-1", adapter="demo", base_sha256="b" * 64, settings_json="{}")
        registry.open_round("run-1", 1, parent=None, cohort=["secret-clinic", "other"])
        registry.record_submission(SUBMISSION)
        late = replace(SUBMISSION, status="late", nonce="n2", client="other")
        registry.record_submission(late)
        yield registry


def scraped(port: int) -> tuple[str, dict[tuple[str, ...], float]]:
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").raise_for_status().text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return text, {(sample.name, *sample.labels.values()): sample.value for sample in samples}


def test_totals_are_those_of_the_registry(registry: Registry) -> None:
    with serve_metrics(registry, host="127.0.0.1", port=0) as port:
        text, found = scraped(port)
        assert found["pomona_registry_up",] == 1
        assert (found["pomona_adapters",], found["pomona_versions",]) == (1, 0)
        assert (found["pomona_runs", "running"], found["pomona_runs", "failed"]) == (1, 0)
        assert (found["pomona_rounds", "open"], found["pomona_rounds", "committed"]) == (1, 0)
        assert found["pomona_submissions", "accepted"] == 1
        assert found["pomona_submissions", "late"] == 1
        assert found["pomona_submissions", "quarantined"] == 0
        assert "# TYPE pomona_submissions gauge" in text, "one that a defence sets aside is no longer accepted"
        assert found["pomona_open_round_cohort", "demo", "run-1"] == 2
        assert found["pomona_open_round_accepted", "demo", "run-1"] == 1
        assert "process_resident_memory_bytes" in text
        for secret in ("secret-clinic", "4711", "0.123"):
            assert secret not in text
        registry.finish_run("run-1", "failed", "a test")
        _, found = scraped(port)
    assert (found["pomona_runs", "running"], found["pomona_runs", "failed"]) == (0, 1)
    assert ("pomona_open_round", "demo", "run-1") not in found


def test_a_database_that_does_not_answer_is_a_metric_and_no_error(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise OperationalError("SELECT", {}, ConnectionError("refused"))

    with serve_metrics(registry, host="127.0.0.1", port=0) as port:
        monkeypatch.setattr(sa.Connection, "execute", gone)
        _, found = scraped(port)
    assert found["pomona_registry_up",] == 0
    assert ("pomona_versions",) not in found


def test_a_port_that_is_taken_is_named(registry: Registry) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse, match=f"127.0.0.1:{port}"), serve_metrics(registry, host="127.0.0.1", port=port):
            pass
