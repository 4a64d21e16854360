"""What both registries of ``benchmarks/registry.py`` hold, by the standard library only: either side can import it.

A thousand adapters of five fields and four languages, a hundred versions each, published in turns; every version has
five metrics and five tags, every adapter a champion. All follows from a version's place, so nothing needs to be sent.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

FIELDS = ("legal", "medical", "finance", "code", "chat")
LANGUAGES = ("de", "en", "fr", "es")
ADAPTERS = 1000
BASES = ("tiny-base", "large-base")
RANKS = (4, 8, 8, 16, 16, 16, 32, 64)
STAGES = ("test", "test", "test", "old", "old", "candidate", "live")
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """One version as both registries are to hold it."""

    place: int
    name: str
    number: int
    rank: int
    exactness: str
    metrics: dict[str, float]
    tags: dict[str, str]
    created_at: datetime

    @property
    def ref(self) -> str:
        """``name/3``."""
        return f"{self.name}/{self.number}"

    @property
    def run_id(self) -> str:
        """The run of this adapter: 32 hexadecimal digits, which is what MLflow takes."""
        return self.name.encode().hex().ljust(32, "0")[:32]


def adapter_names(count: int) -> list[str]:
    """Return the first names, fields and languages mixed."""
    kinds = [(field, language) for field in FIELDS for language in LANGUAGES]
    return [f"{kinds[i % 20][0]}-{kinds[i % 20][1]}-{i // 20:03d}" for i in range(count)]


def contents(versions: int, adapters: int = ADAPTERS) -> Iterator[Content]:
    """Yield versions in the order of publishing: the first of each adapter, then the second of each."""
    names = adapter_names(adapters)
    for place in range(versions):
        yield _content(place, names[place % adapters], place // adapters + 1)


def champions(versions: int, adapters: int = ADAPTERS) -> dict[str, int]:
    """Return the number of the version that each adapter's ``champion`` points at."""
    held = versions // adapters
    return {name: 1 + (7 * i) % held for i, name in enumerate(adapter_names(adapters))}


def _content(place: int, name: str, number: int) -> Content:
    draw = random.Random(place)  # noqa: S311 - a benchmark's data
    accuracy = round(min(0.999, 0.4 + 0.005 * number + draw.gauss(0, 0.08)), 6)
    loss = round(2.2 * (1 - accuracy) + draw.random() / 10, 6)
    energy = round(1 - draw.random() / 20, 6)
    return Content(
        place=place,
        name=name,
        number=number,
        rank=draw.choice(RANKS),
        exactness="exact" if draw.random() < 0.3 else "truncated",
        metrics={
            "accuracy": accuracy,
            "loss": loss,
            "train_loss": round(loss * 0.9, 6),
            "retained_energy_mean": energy,
            "retained_energy_min": round(energy * 0.97, 6),
        },
        tags={
            "site": f"site-{draw.randrange(20):02d}",
            "stage": draw.choice(STAGES),
            "owner": f"team-{draw.randrange(50):02d}",
            "dataset": f"corpus-{draw.randrange(200):03d}",
            "ticket": f"T-{place:06d}",
        },
        created_at=BEGAN + timedelta(seconds=60 * place),
    )
