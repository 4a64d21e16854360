"""The streams that continual learning is measured on: WordNet glosses, and images under a ViT that is trained here.

* ``wordnet``: 24 noun classes, 6 tasks of 4, MiniLM; ``wordnet-long``: these and 15 classes of verbs, 13 tasks of 3;
* ``fashion``: Fashion-MNIST. No pretrained vision transformer comes in a package, so a small one is **pretrained
  here**, on five of its ten classes; the other five are learned in tasks of 2, 2 and 1. Which five are pretrained on
  is drawn with the order of classes;
* ``digits``: the same with the 8x8 digits that scikit-learn carries, for trying things out.

A seed draws the examples of each class, an order the order of classes.
"""

import gzip
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from continual_verbs import WORDNET, verbs_by_split
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from pomona.base_model import find_base_model
from pomona.continual.encoder import NO_ADAPTER, Adapter, FrozenEncoder, States
from pomona.continual.learner import TaskData, data_of_tasks
from pomona.continual.tasks import Task, tasks_by_size
from pomona.datasets import load_dataset
from pomona.seeds import seed_of

STREAMS = {"wordnet": 4, "wordnet-long": 3, "fashion": 2, "digits": 2}
FASHION = Path("/usr/share/datasets/fashion-mnist")
ADAPTED_BLOCKS = 2
MAX_LENGTH = 48
EXAMPLES = {"train": 100, "validation": 40, "test": 40}  # of each class, at most
PRETRAINING_STEPS, PRETRAINING_BATCH, PRETRAINING_EXAMPLES = 600, 64, 1500


class CountingEncoder(FrozenEncoder):
    """An encoder that counts passes, and may remember features so that nothing is computed twice.

    Attributes:
        passes: Examples that went, or would have gone, through the upper blocks since it was set to 0.
        remembers: Whether features are kept; times are measured while they are not.
    """

    passes = 0
    remembers = False

    def __init__(self, path: Path, *, adapted_blocks: int | None = None) -> None:
        super().__init__(path, adapted_blocks=adapted_blocks)
        self._kept: dict[str, dict[int, Tensor]] = {}

    def all_features(self, states: States, adapter: Adapter = NO_ADAPTER, *, batch_size: int = 128) -> Tensor:
        """Return what :class:`FrozenEncoder` returns."""
        self.passes += len(states)
        if not self.remembers:
            return super().all_features(states, adapter, batch_size=batch_size)
        kept = self._kept.setdefault(_digest(adapter), {})
        missing = [i for i, row in enumerate(states.rows) if row.data_ptr() not in kept]
        if missing:
            found = super().all_features(states.subset(missing), adapter, batch_size=batch_size)
            kept.update({states.rows[i].data_ptr(): feature for i, feature in zip(missing, found, strict=True)})
        return torch.stack([kept[row.data_ptr()] for row in states.rows])

    def forget(self) -> None:
        """Drop the features that are kept."""
        self._kept.clear()


def _digest(adapter: Adapter) -> str:
    found = hashlib.sha256()
    for name, factors in sorted(adapter.items()):
        found.update(f"{name}:{factors.scale}".encode())
        for tensor in (factors.a, factors.b):
            found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@dataclass(frozen=True, slots=True)
class Stream:
    """What a method is given.

    Attributes:
        encoder: Frozen.
        train: The tasks' examples.
        held_out: Those of the split that is scored.
        facts: About the encoder, where it was trained here.
    """

    encoder: CountingEncoder
    train: tuple[TaskData, ...]
    held_out: tuple[TaskData, ...]
    facts: dict[str, object]


@dataclass(frozen=True, slots=True)
class Source:
    """Examples of all splits under one encoder."""

    encoder: CountingEncoder
    states: dict[str, States]
    labels: dict[str, list[str]]
    facts: dict[str, object]


def stream_of(
    name: str, *, seed: int, order: int, split: str, folder: Path, fashion: Path, verbs: Path = WORDNET
) -> Stream:
    """Return a stream.

    Args:
        name: One of :data:`STREAMS`.
        seed: Of the choice of examples.
        order: Of the classes.
        split: ``test`` or ``validation``: what is scored.
        folder: Where pretrained vision transformers are kept.
        fashion: Folder of Fashion-MNIST's four files.
        verbs: Folder of WordNet's data files.
    """
    source = _source(name, order, folder, fashion, verbs)
    tasks = tasks_by_size(source.labels["train"], classes_per_task=STREAMS[name], seed=order)
    train = _chosen(source, "train", tasks, seed=seed)
    return Stream(source.encoder, train, _chosen(source, split, tasks, seed=0), source.facts)


def _source(name: str, order: int, folder: Path, fashion: Path, verbs: Path) -> Source:
    if name.startswith("wordnet"):
        return wordnet(verbs if name == "wordnet-long" else None)
    return images(name, order, folder, fashion)


@cache
def wordnet(verbs: Path | None = None) -> Source:
    """Return the glosses under MiniLM: of nouns, and where a folder is given, of verbs."""
    encoder = CountingEncoder(find_base_model("all-minilm-l6-v2"), adapted_blocks=ADAPTED_BLOCKS)
    more = verbs_by_split(verbs) if verbs else {}
    states, labels = {}, {}
    for split, most in EXAMPLES.items():
        nouns = load_dataset("wordnet-nouns", split=split)  # type: ignore[arg-type]
        texts, named = more.get(split, ([], []))
        kept = _few(named, 4 * most, seed=0)
        states[split] = encoder.of_texts([*nouns.texts, *(texts[i] for i in kept)], max_length=MAX_LENGTH)
        labels[split] = [*nouns.labels, *(named[i] for i in kept)]
    return Source(encoder, states, labels, {})


@cache
def images(name: str, order: int, folder: Path, fashion: Path) -> Source:
    """Return the images of five classes under a vision transformer that was trained on the other five."""
    pixels, labels = digits() if name == "digits" else fashion_mnist(fashion)
    drawn = sorted(range(10), key=lambda label: seed_of("pretraining", order, label))
    known = torch.isin(labels, torch.tensor(drawn[:5]))
    encoder, accuracy = pretrained(pixels[known], labels[known], folder / f"{name}-{order}", seed=order)
    rest_pixels, rest_labels = pixels[~known], labels[~known]
    per_split = _split(len(rest_labels))
    states, texts = {}, {}
    for split, rows in per_split.items():
        kept = _few(rest_labels[rows].tolist(), 4 * EXAMPLES[split], seed=0)
        states[split] = encoder.of_images(rest_pixels[rows][kept])
        texts[split] = [f"class {int(label)}" for label in rest_labels[rows][kept]]
    facts = {"pretrained_on": sorted(drawn[:5]), "pretraining_accuracy": round(accuracy, 4)}
    return Source(encoder, states, texts, facts)


def pretrained(pixels: Tensor, labels: Tensor, folder: Path, *, seed: int) -> tuple[CountingEncoder, float]:
    """Train a small vision transformer on some classes, unless the folder has it, and return it with its accuracy."""
    rows = _split(len(labels))
    _, targets = labels.unique(return_inverse=True)
    if not (folder / "config.json").exists():
        size = pixels.shape[-1]
        torch.manual_seed(seed_of("vit", seed))
        config = ViTConfig(
            hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256, image_size=size,
            patch_size=size // 4, num_channels=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        model, head = ViTModel(config, add_pooling_layer=False), nn.Linear(96, len(labels.unique()))
        _train(model, head, pixels[rows["train"]], targets[rows["train"]], seed=seed)
        model.save_pretrained(folder)
    encoder = CountingEncoder(folder, adapted_blocks=ADAPTED_BLOCKS)
    return encoder, _nearest_mean_accuracy(encoder, pixels, targets, rows)


def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits, ``(examples, 1, 8, 8)`` in [-1, 1], and their labels."""
    from sklearn.datasets import load_digits  # noqa: PLC0415

    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(found.target)


def fashion_mnist(folder: Path) -> tuple[Tensor, Tensor]:
    """Return Fashion-MNIST's training images, ``(60000, 1, 28, 28)`` in [-1, 1], and their labels."""
    try:
        raw = gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes())
        named = gzip.decompress((folder / "train-labels-idx1-ubyte.gz").read_bytes())
    except FileNotFoundError as error:
        raise SystemExit(
            f"{error.filename} is missing; on Debian: apt-get install dataset-fashion-mnist, elsewhere name the folder "
            "of its four files with --fashion, or try --stream digits"
        ) from error
    pixels = torch.from_numpy(np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 1, 28, 28).astype(np.float32))
    return pixels / 127.5 - 1, torch.from_numpy(np.frombuffer(named, np.uint8, offset=8).astype(np.int64))


def _train(model: nn.Module, head: nn.Module, pixels: Tensor, targets: Tensor, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PRETRAINING_STEPS)
    for _ in range(PRETRAINING_STEPS):
        chosen = torch.randint(0, len(targets), (PRETRAINING_BATCH,), generator=generator)
        # tokens are averaged, as the encoder will average them
        logits = head(model(pixels[chosen]).last_hidden_state.mean(1))
        loss = nn.functional.cross_entropy(logits, targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _nearest_mean_accuracy(encoder: CountingEncoder, pixels: Tensor, targets: Tensor, rows: dict[str, Tensor]) -> float:
    """Return the accuracy of class means on held-out images of the classes that it was trained on."""
    few = {split: rows[split][:PRETRAINING_EXAMPLES] for split in ("train", "test")}
    features = {split: encoder.all_features(encoder.of_images(pixels[chosen])) for split, chosen in few.items()}
    means = torch.stack([features["train"][targets[few["train"]] == c].mean(0) for c in range(int(targets.max()) + 1)])
    found = torch.cdist(features["test"], means).argmin(1) == targets[few["test"]]
    return float(found.double().mean())


def _chosen(source: Source, split: str, tasks: tuple[Task, ...], *, seed: int) -> tuple[TaskData, ...]:
    kept = _few(source.labels[split], EXAMPLES[split], seed=seed)
    labels = [source.labels[split][i] for i in kept]
    return data_of_tasks(tasks, labels, source.states[split].subset(kept))


def _few(labels: list[str], most: int, *, seed: int) -> list[int]:
    """Return the indices of at most so many examples of each class."""
    found: dict[str, list[int]] = {}
    for i in np.random.default_rng(seed).permutation(len(labels)).tolist():
        found.setdefault(labels[i], []).append(i)
    return sorted(i for rows in found.values() for i in rows[:most])


def _split(count: int) -> dict[str, Tensor]:
    """Return the rows of each split: 70, 15 and 15 % of a permutation that never changes."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    ends = [int(count * share) for share in (0.7, 0.85)]
    return dict(zip(("train", "validation", "test"), torch.tensor_split(order, ends), strict=True))
