"""How many numbers the clients of a run train: what noise is spread over."""

import math

from pomona.base_model import find_base_model
from pomona.coordinator.beginning import load_held_out
from pomona.lora_model import AdaptedModel
from pomona.manifest import AdapterManifest
from pomona.settings import RunSettings

_ONLY_B = {"ffa", "ffa-nested"}


def trained_dimensions(settings: RunSettings) -> int:
    """Return the length of the longest update of a run, the head included; loads the base model.

    Raises:
        BaseModelError: The base model is not here.
        DataError: The coordinator's data, which name the classes, cannot be used.
    """
    model = AdaptedModel(
        find_base_model(settings.model.base),
        task=settings.task,
        labels=load_held_out(settings).labels,
        target_modules=settings.model.target_modules,
    )
    return dimensions_of(settings, model.manifest)


def dimensions_of(settings: RunSettings, manifest: AdapterManifest) -> int:
    """Return the same where the manifest is known."""
    limits, total = settings.aggregation, 0
    rank = limits.rank or limits.max_rank
    for name, (out, in_) in manifest.layers.items():
        width = out if limits.strategy in _ONLY_B else out + in_
        total += settings.training.layer_rank(name, rank) * width
    return total + sum(math.prod(shape) for shape in manifest.heads.values())
