"""A coordinator in the tests' process asks its stand-in grid without long pauses."""

import pytest

from pomona.coordinator import replies, round_loop


@pytest.fixture
def quick_polls(flower_task: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask every 10 ms, with the registry in a folder."""
    del flower_task
    monkeypatch.delenv("POMONA_REGISTRY_URL", raising=False)
    monkeypatch.setattr(replies, "_POLL_S", 0.01)
    monkeypatch.setattr(round_loop, "_JOIN_POLL_S", 0.01)
