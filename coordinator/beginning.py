"""How a run begins: its data and base model are checked and it gets a row in the registry. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pomona import __version__
from pomona.base_model import base_model_sha256, check_base_model, find_base_model, is_packaged, public_name
from pomona.datasets import Dataset, check_labels, class_names, load_dataset
from pomona.errors import BaseModelError, DataError
from pomona.privacy.promises import example_promise, local_promise
from pomona.protocol import Invitation
from pomona.settings import RunSettings
from pomona.storage.registry import Registry

if TYPE_CHECKING:
    from pomona.privacy.plan import PrivacyPlan


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The coordinator's data: what is scored, and the classes."""

    dataset: Dataset
    labels: tuple[str, ...]


def load_held_out(settings: RunSettings) -> HeldOut:
    """Load the coordinator's held-out data and decide the classes of the run.

    Raises:
        DataError: The data are missing, empty or malformed.
    """
    data, task = settings.data, settings.task
    split = None if data.evaluation_split == "all" else data.evaluation_split
    held_out = load_dataset(data.source, split=split, task=task)
    if len(held_out) > data.evaluation_examples:
        order = np.random.default_rng(settings.seed).permutation(len(held_out))
        held_out = held_out.subset(sorted(order[: data.evaluation_examples].tolist()))
    labels = data.labels
    if task == "classification" and not labels:
        labels = class_names(load_dataset(data.source, split=None, task=task))
    if settings.continual is not None:
        return HeldOut(held_out, _labels_of_tasks(settings, labels, held_out))
    return HeldOut(held_out, labels if task == "classification" else ())


def _labels_of_tasks(settings: RunSettings, labels: Sequence[str], held_out: Dataset) -> tuple[str, ...]:
    from pomona.coordinator.task_stream import tasks_of  # noqa: PLC0415 - imports torch, which a server needs not

    tasks = tasks_of(settings, labels)
    for task in tasks:
        if not set(task.classes) & set(held_out.labels):
            raise DataError(
                f"{held_out.source} has no held-out rows of task {task.number} to "
                f"score it by ({', '.join(task.classes[:5])}); add some, or raise data.evaluation_examples"
            )
    return tuple(label for task in tasks for label in task.classes)


def load_trusted(settings: RunSettings, labels: Sequence[str]) -> Dataset:
    """Load the coordinator's own clean examples.

    Raises:
        DataError: They are missing, malformed, or have a label that the run does not know.
    """
    dataset = load_dataset(settings.defence.trusted_data, split=None, task=settings.task)
    if settings.task == "classification":
        check_labels(dataset, labels)
    return dataset


def _plan_of(registry: Registry, settings: RunSettings, *, run_id: str) -> "PrivacyPlan | None":
    if settings.privacy is None:
        return None
    from pomona.coordinator.spending import check_privacy  # noqa: PLC0415 - imports torch, which a server needs not

    return check_privacy(registry, settings, run_id=run_id)


def begin_run(registry: Registry, settings: RunSettings, *, run_id: str) -> Invitation:
    """Record a run in the registry and return what its clients are told.

    Raises:
        AdapterNotFound: It is to forget a part of an adapter that is not there.
        VersionConflict: It cannot go on from the newest version of its adapter.
        BaseModelError: The base model is not here, or is not the one that the settings name.
        ConfigError: What it promises cannot be promised, or it was begun under another plan.
        PrivacyBudgetExhausted: Its rounds would cost its population more than its budget.
        DataError: The held-out data, or those that a defence trusts, cannot be used; or a class cannot be forgotten.
    """
    if settings.forget is not None:
        return _begin_request(registry, settings, run_id=run_id)
    plan = _plan_of(registry, settings, run_id=run_id)
    sha256 = _base_sha256(settings)
    held_out = load_held_out(settings)
    if settings.defence.trusted_data:
        load_trusted(settings, held_out.labels)
    registry.add_base_model(sha256, public_name(settings.model.base), settings.model.base)
    registry.start_run(
        run_id=run_id,
        adapter=settings.name,
        base_sha256=sha256,
        settings_json=settings.model_dump_json(),
        learns=settings.continual is not None,
    )
    mos = None if settings.continual is None else settings.continual.mos.model_copy(update={"seed": settings.seed})
    return Invitation(
        run_id=run_id,
        pomona_version=__version__,
        task=settings.task,
        base=settings.model.base if is_packaged(settings.model.base) else "",
        base_sha256=sha256,
        target_modules=settings.model.target_modules,
        max_length=settings.model.max_length,
        labels=held_out.labels,
        max_rank=mos.rank if mos else settings.aggregation.max_rank,
        min_rank=mos.rank if mos else settings.aggregation.rank or 1,
        training=settings.training,
        private=plan is not None,
        example_privacy=example_promise(plan),
        local_privacy=local_promise(plan),
        secure_sum=plan.secure_sum if plan else None,
        continual=mos,
    )


def _base_sha256(settings: RunSettings) -> str:
    path = find_base_model(settings.model.base)
    if settings.model.sha256:
        check_base_model(path, expected_sha256=settings.model.sha256)
    return base_model_sha256(path)


def _begin_request(registry: Registry, settings: RunSettings, *, run_id: str) -> Invitation:
    """Record a run that forgets. Clients hold out rows to score by, so the coordinator needs none."""
    from pomona.coordinator.request_terms import request_terms  # noqa: PLC0415 - imports torch, as above

    terms, sha256 = request_terms(registry, settings, run_id=run_id), _base_sha256(settings)
    if sha256 != terms.base_sha256:
        raise BaseModelError(
            f"{terms.parent} was learned on the base model with sha256 {terms.base_sha256[:12]}, got {sha256[:12]}; "
            "name that one as model.base"
        )
    registry.start_run(
        run_id=run_id,
        adapter=settings.name,
        base_sha256=sha256,
        settings_json=settings.model_dump_json(),
        learns=True,
    )
    return Invitation(
        run_id=run_id,
        pomona_version=__version__,
        task=settings.task,
        base=settings.model.base if is_packaged(settings.model.base) else "",
        base_sha256=sha256,
        max_length=terms.max_length,
        labels=terms.labels,
        max_rank=terms.mos.rank,
        min_rank=terms.mos.rank,
        continual=terms.mos,
        forget=terms.forget,
    )
