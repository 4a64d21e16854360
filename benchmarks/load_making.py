"""Updates without training, for ``benchmarks/load.py``: random factors of the rank that is asked for, otherwise valid.

Everything around them is what a real client sends: facts, nonce, encoding. The tiny model of the tests has layers of 16
to 24 inputs, so that a client of rank 64 sends about 100 KiB.
"""

import json
import random
import secrets
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pomona import __version__
from pomona.adapters import AdapterUpdate, AdapterWeights, LoraFactors
from pomona.base_model import find_base_model
from pomona.lora_model import AdaptedModel
from pomona.manifest import AdapterManifest
from pomona.protocol import ENROL, TRAIN, Enrolled, TrainRequest
from pomona.wire import encode_update

LABELS = ("animal", "food", "tool", "weather")
EXAMPLES = 24
SILENT = 0.3

Answer = tuple[str, str, bytes]
Answerer = Callable[[str, str], Answer]


@dataclass(frozen=True, slots=True)
class Shapes:
    """What an update of a run looks like; goes to other processes as JSON."""

    base_sha256: str
    layers: dict[str, tuple[int, int]]
    heads: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, manifest: AdapterManifest) -> "Shapes":
        """Return those of a manifest."""
        heads = {name: tuple(shape) for name, shape in manifest.heads.items()}
        return cls(manifest.base_sha256, dict(manifest.layers), heads)

    @classmethod
    def read(cls, text: str) -> "Shapes":
        """Return what :meth:`json` wrote."""
        facts = json.loads(text)
        layers = {name: (out, in_) for name, (out, in_) in facts["layers"].items()}
        return cls(facts["base_sha256"], layers, {name: tuple(shape) for name, shape in facts["heads"].items()})

    def json(self) -> str:
        """Return it as text."""
        return json.dumps(asdict(self))


def manifest_of(model: Path) -> AdapterManifest:
    """Return what an adapter of a base model must look like."""
    return AdaptedModel(find_base_model(str(model)), task="classification", labels=LABELS, target_modules=()).manifest


def client_names(count: int) -> list[str]:
    """Return the names of all clients."""
    return [f"client-{number:04d}" for number in range(count)]


def silent_in(round_number: int, names: Collection[str], *, seed: int) -> list[str]:
    """Return who does not answer in a round: three in ten, chosen at random."""
    chooser = random.Random(f"silent:{seed}:{round_number}")  # noqa: S311 - must be the same in every process
    return chooser.sample(sorted(names), round(SILENT * len(names)))


def answerer(name: str, rank: int, shapes: Shapes, weights: AdapterWeights) -> Answerer:
    """Return what answers as the client of a name and rank would, at once."""

    def answer(kind: str, text: str) -> Answer:
        if kind == ENROL:
            enrolled = Enrolled(
                name=name, rank=rank, num_examples=EXAMPLES, base_sha256=shapes.base_sha256, pomona_version=__version__
            )
            return "enrolled", enrolled.model_dump_json(), b""
        if kind == TRAIN:
            return "update", "{}", update(TrainRequest.model_validate_json(text), name, shapes, weights)
        return "told", "{}", b""

    return answer


def update(request: TrainRequest, name: str, shapes: Shapes, weights: AdapterWeights) -> bytes:
    """Return a valid update for a request."""
    return encode_update(
        AdapterUpdate(
            client=name,
            run_id=request.invitation.run_id,
            round_number=request.round_number,
            parent=request.parent,
            base_sha256=shapes.base_sha256,
            rank=request.rank,
            alpha=request.training.alpha_of(request.rank),
            rslora=request.training.rslora,
            num_examples=EXAMPLES,
            nonce=secrets.token_hex(16),
            weights=weights,
            train_loss=1.0,
        )
    )


def random_weights(shapes: Shapes, rank: int, *, seed: int) -> AdapterWeights:
    """Return factors and heads that are small enough to leave the model in one piece."""
    chance = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return 0.01 * torch.randn(*shape, generator=chance)

    layers = {name: LoraFactors(a=draw(rank, in_), b=draw(out, rank)) for name, (out, in_) in shapes.layers.items()}
    return AdapterWeights(layers=layers, heads={name: draw(*shape) for name, shape in shapes.heads.items()})
