"""How many numbers the clients of a run train: what noise is spread over."""

import math

from pomona.base_model import find_base_model
from pomona.continual.encoder import FrozenEncoder
from pomona.coordinator.beginning import load_held_out
from pomona.errors import ConfigError
from pomona.lora_model import AdaptedModel
from pomona.manifest import AdapterManifest
from pomona.privacy.class_sums import FIRST, OWN, SumsLayout
from pomona.settings import RunSettings

_ONLY_B = {"ffa", "ffa-nested"}


def trained_dimensions(settings: RunSettings) -> int:
    """Return the length of the longest update of a run, the head included; loads the base model.

    Raises:
        BaseModelError: The base model is not here.
        DataError: The coordinator's data, which name the classes, cannot be used.
    """
    if settings.continual is not None:
        return task_dimensions(settings)[0]
    model = AdaptedModel(
        find_base_model(settings.model.base),
        task=settings.task,
        labels=load_held_out(settings).labels,
        target_modules=settings.model.target_modules,
    )
    return dimensions_of(settings, model.manifest)


def task_dimensions(settings: RunSettings) -> tuple[int, SumsLayout]:
    """Return the same of a run with tasks, and which sums there are of a task; of the task with most classes.

    Raises:
        ConfigError: The run does not learn task after task, or does not name its tasks.
        BaseModelError: The base model is not here, or has fewer blocks.
    """
    if settings.continual is None or not settings.continual.tasks:
        raise ConfigError("expected a run with continual.tasks, which say how much is trained")
    mos, tasks = settings.continual.mos, settings.continual.tasks
    encoder = FrozenEncoder(find_base_model(settings.model.base), adapted_blocks=mos.adapted_blocks)
    classes = max(map(len, tasks))
    factors = sum(mos.rank * out for out, _ in encoder.manifest.layers.values())
    adapters = (OWN, FIRST) if len(tasks) > 1 else (OWN,)
    layout = SumsLayout(classes=classes, width=encoder.width, moments=mos.moments, adapters=adapters)
    return factors + classes * (encoder.width + 1), layout


def dimensions_of(settings: RunSettings, manifest: AdapterManifest) -> int:
    """Return the same where the manifest is known."""
    limits, total = settings.aggregation, 0
    rank = limits.rank or limits.max_rank
    for name, (out, in_) in manifest.layers.items():
        width = out if limits.strategy in _ONLY_B else out + in_
        total += settings.training.layer_rank(name, rank) * width
    return total + sum(math.prod(shape) for shape in manifest.heads.values())
