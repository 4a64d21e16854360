"""What `forgetting.py` forgets from: glosses under MiniLM, or images under a vision transformer trained here."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from continual_streams import images

from pomona.base_model import find_base_model
from pomona.continual.editing import Examples
from pomona.continual.encoder import FrozenEncoder
from pomona.datasets import Split, class_names, load_dataset

BLOCKS = 3  # adapted ones of MiniLM, from the top: the others' states are computed once, for all methods alike
MAX_LENGTH = 32
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
PRETRAINING_ORDER = 0  # draws which five classes of images are pretrained on


@dataclass(frozen=True, slots=True)
class Material:
    """Examples of all classes, and what is asked for.

    Attributes:
        encoder: The frozen base model.
        names: All classes.
        examples: Of each split.
        requests: Classes that are forgotten, one after another.
        chosen_on: Those that settings are chosen on, on the validation split.
        missing: Classes without examples at hand, where that is asked.
        rank: Of what edits train; a small base model is edited with fewer numbers.
    """

    encoder: FrozenEncoder
    names: tuple[str, ...]
    examples: dict[Split, Examples]
    requests: tuple[str, ...]
    chosen_on: tuple[str, ...]
    missing: tuple[str, ...]
    rank: int


@cache
def glosses() -> Material:
    """Return WordNet's 24 noun classes; to forget are two pairs of close neighbours."""
    encoder = FrozenEncoder(find_base_model("all-minilm-l6-v2"), adapted_blocks=BLOCKS)
    names = class_names(load_dataset("wordnet-nouns", split=None))
    examples: dict[Split, Examples] = {}
    for split in SPLITS:
        rows = load_dataset("wordnet-nouns", split=split)
        states = encoder.of_texts(rows.texts, max_length=MAX_LENGTH)
        examples[split] = Examples(states, torch.tensor([names.index(label) for label in rows.labels]))
    return Material(
        encoder,
        names,
        examples,
        requests=("plant", "food", "animal", "substance"),
        chosen_on=("plant", "food"),
        missing=("person", "body", "time", "group", "artifact"),
        rank=8,
    )


@cache
def pictures(encoders: Path, fashion: Path) -> Material:
    """Return the five classes of Fashion-MNIST that the encoder was not trained on; three are forgotten.

    Args:
        encoders: Where pretrained vision transformers are kept.
        fashion: Folder of Fashion-MNIST's four files.
    """
    source = images("fashion", PRETRAINING_ORDER, encoders, fashion)
    names = tuple(sorted(set(source.labels["train"])))
    examples: dict[Split, Examples] = {
        split: Examples(source.states[split], torch.tensor([names.index(label) for label in source.labels[split]]))
        for split in SPLITS
    }
    return Material(
        source.encoder, names, examples, requests=names[:3], chosen_on=names[:2], missing=names[3:4], rank=4
    )
