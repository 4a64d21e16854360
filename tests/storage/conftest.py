"""A registry on either database, and the shortest way to a published version."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save
from tests.postgresql import empty_tables, fresh_database

from pomona.storage import schema
from pomona.storage.engine import create_engine
from pomona.storage.opening import open_registry
from pomona.storage.records import NewSubmission, NewVersion, SubmissionStatus, Version
from pomona.storage.registry import Registry

BASE = "b" * 64
PAYLOAD = save({"lora_A.layer": np.ones((2, 3), np.float32), "lora_B.layer": np.ones((4, 2), np.float32)})

Submit = Callable[..., NewSubmission]
Publish = Callable[..., Version]


@pytest.fixture(autouse=True)
def _no_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POMONA_REGISTRY_URL", raising=False)
    monkeypatch.delenv("POMONA_HOME", raising=False)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture(scope="session")
def migrated(postgresql: str) -> Iterator[str]:
    """A database of that server with the registry's tables."""
    with fresh_database(postgresql) as url:
        engine = create_engine(url, read_only=False)
        schema.prepare(engine, lock=None, read_only=False)
        engine.dispose()
        yield url


@pytest.fixture
def url(postgresql: str) -> Iterator[str]:
    """An empty database of PostgreSQL."""
    with fresh_database(postgresql) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _no_surroundings: None) -> str:
    """Which database ``open_registry`` takes when no URL is said; see SQLITE_ONLY in tests/storage/filling.py."""
    if request.param == "postgresql":
        url = request.getfixturevalue("migrated")
        empty_tables(url)
        monkeypatch.setenv("POMONA_REGISTRY_URL", url)
    return str(request.param)


@pytest.fixture
def registry(home: Path, backend: str) -> Iterator[Registry]:
    with open_registry(home) as registry:
        registry.add_base_model(BASE, "tiny-base", "a test")
        registry.start_run(run_id="run-1", adapter="demo", base_sha256=BASE, settings_json="{}")
        yield registry


@pytest.fixture
def submission() -> Submit:
    def make(
        client: str = "anna",
        *,
        number: int = 1,
        payload: bytes = b"update",
        nonce: str | None = None,
        status: SubmissionStatus = "accepted",
        reason: str = "",
        run_id: str = "run-1",
        rank: int = 4,
        alpha: float = 8.0,
        num_examples: int = 100,
        train_loss: float = 0.5,
    ) -> NewSubmission:
        return NewSubmission(
            run_id=run_id,
            round_number=number,
            client=client,
            rank=rank,
            alpha=alpha,
            num_examples=num_examples,
            nonce=f"{client}-{number}" if nonce is None else nonce,
            status=status,
            reason=reason,
            payload=payload,
            train_loss=train_loss,
        )

    return make


def new_version(
    number: int = 1,
    *,
    payload: bytes = PAYLOAD,
    run_id: str = "run-1",
    adapter: str = "demo",
    base: str = BASE,
    weights: Mapping[str, float] | None = None,
    metrics: Mapping[str, float] | None = None,
    recipe: Mapping[str, object] | None = None,
    reduced: Mapping[str, str] | None = None,
    quarantined: Mapping[str, str] | None = None,
) -> NewVersion:
    return NewVersion(
        run_id=run_id,
        round_number=number,
        adapter=adapter,
        payload=payload,
        base_sha256=base,
        rank=2,
        exactness="exact",
        retained_energy=1.0,
        recipe={"task": "classification"} if recipe is None else recipe,
        metrics={"accuracy": 0.5 + number / 100} if metrics is None else metrics,
        weights=weights or {},
        reduced=reduced or {},
        quarantined=quarantined or {},
        bytes_down=10,
        bytes_up=20,
        seconds=1.5,
    )


@pytest.fixture
def make_version() -> Callable[..., NewVersion]:
    return new_version


@pytest.fixture
def publish(registry: Registry, submission: Submit) -> Publish:
    """Open a round on the version before it, let two clients answer, and publish."""

    def run_round(number: int = 1, *, weights: Mapping[str, float] | None = None) -> Version:
        weights = {"anna": 0.25, "bert": 0.75} if weights is None else weights
        parent = f"demo/{number - 1}" if number > 1 else None
        registry.open_round("run-1", number, parent=parent, cohort=list(weights))
        for client in weights:
            registry.record_submission(submission(client, number=number, payload=f"{client}{number}".encode()))
        return registry.publish_round(new_version(number, weights=weights))

    return run_round
