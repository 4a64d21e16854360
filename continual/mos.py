"""MOS, model surgery: one adapter per task, merged towards the others, and one retrieved for each example.

::

    learn t:    theta_t from CE over the classes of t alone; after a step  theta_t <- (1-a) theta_t + a mean theta_<t
                n, s, S of its classes under theta_t, and under theta_1;  the head over all classes aligned by replay
    answer:     argmax softmax(z(x; theta_k)) + softmax(T cos(f(x; theta_1), mu)),   k refined from theta_1's prototypes

``head="aligned"`` is that, the paper. Its retrieval is where it loses most: with the right adapter it would be several
points better. ``head="combined"`` leaves the choice of the task to the classes' normal distributions under the first
adapter, which are exact sums, and asks the adapters of likely tasks only to tell their own classes apart::

    log p(c | x) ~ log softmax(g(f(x; theta_1)) / tau)_c + w log softmax(z_k(x; theta_k))_c,       k the task of c

What is known is a frozen record (:class:`~pomona.continual.knowledge.Knowledge`); learning returns another, and
answering changes nothing. One task's part can be made from examples that are spread over clients, see
:mod:`pomona.continual.share`.

A task of a single class has nothing to tell apart, so its adapter is the mean of the earlier ones, untrained.

Reference: Sun et al., MOS: Model surgery for pre-trained model-based class-incremental learning, AAAI 2025
(https://arxiv.org/abs/2412.09441). Left out: a loss of their code that is not in the paper, which pushes examples and
stored means apart.
"""

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from pomona.continual.alignment import aligned_head
from pomona.continual.answering import Answerer
from pomona.continual.discriminant import normal_classes
from pomona.continual.encoder import Adapter, FrozenEncoder, States
from pomona.continual.heads import LinearHead
from pomona.continual.knowledge import Knowledge, TaskKnowledge, nothing_known
from pomona.continual.learner import TaskData
from pomona.continual.merging import merge_products
from pomona.continual.share import round_seed, summed_share, task_start, train_share
from pomona.continual.statistics import GaussianClass
from pomona.errors import ConfigError, DataError
from pomona.mos_settings import MosSettings
from pomona.seeds import generator_of


def learn_task(encoder: FrozenEncoder, knowledge: Knowledge, data: TaskData, settings: MosSettings) -> Knowledge:
    """Return what is known after one more task.

    Args:
        encoder: The one that all tasks are learned with.
        knowledge: What is known before; is not changed.
        data: The task's examples; targets go on where those of the earlier classes end.
        settings: Those of the stream.

    Raises:
        DataError: A class is known already or has no examples, or a target is none of the task's classes.
        ConfigError: The settings are not those of the earlier tasks, or training diverged.
    """
    if settings != knowledge.settings:
        raise ConfigError(
            "expected the settings that the earlier tasks were learned with; start a new stream for others"
        )
    adapter, head = train_task(encoder, knowledge, data)
    return with_task(knowledge, task_knowledge(encoder, knowledge, data, adapter=adapter, head=head))


def train_task(encoder: FrozenEncoder, knowledge: Knowledge, data: TaskData) -> tuple[Adapter, LinearHead]:
    """Return a task's own adapter, merged towards the earlier ones, and a head of its classes.

    Raises:
        DataError: As :func:`learn_task`.
        ConfigError: Training diverged.
    """
    targets, settings = _own_targets(knowledge, data), knowledge.settings
    earlier = [task.adapter for task in knowledge.tasks]
    start = task_start(encoder, knowledge, classes=len(data.task.classes))
    seed = round_seed(settings, task=data.task.number)
    adapter, head = train_share(encoder, start, data.states, targets, settings=settings, seed=seed)
    if earlier and settings.merge_weight and start.towards is None and head.classes > 1:
        adapter, _ = merge_products(adapter, earlier, weight=settings.merge_weight, rank=settings.rank)
    return adapter, head


def task_knowledge(
    encoder: FrozenEncoder, knowledge: Knowledge, data: TaskData, *, adapter: Adapter, head: LinearHead
) -> TaskKnowledge:
    """Return what some examples say of a task, given its adapter and head; the parts of several owners add up.

    Args:
        encoder: The one that all tasks are learned with.
        knowledge: What is known before the task.
        data: Some or all of the task's examples.
        adapter: The task's, as :func:`train_task` gives it.
        head: Of the task's classes.

    Raises:
        DataError: A target is none of the task's classes, or a class is known already.
    """
    targets = _own_targets(knowledge, data)
    empty = TaskKnowledge(data.task.number, (), adapter, LinearHead.zeros(0, encoder.width), (), ())
    extended = dataclasses.replace(knowledge, tasks=(*knowledge.tasks, empty))
    features = Answerer(encoder, extended).features
    own = features(len(knowledge.tasks), data.states)
    first = features(0, data.states) if knowledge.tasks else own
    return summed_share(own, first, targets, task=data.task, trained=(adapter, head), settings=knowledge.settings)


def with_task(knowledge: Knowledge, task: TaskKnowledge) -> Knowledge:
    """Return what is known with one more task, the head over all classes aligned where it is asked.

    Raises:
        DataError: A class is known already, or has no examples.
    """
    if known := sorted(set(task.classes) & set(knowledge.classes)):
        raise DataError(f"class {known[0]!r} is known already; a class is learned once")
    for label, kept in zip(task.classes, task.statistics, strict=True):
        if not kept.count:
            raise DataError(f"class {label!r} of task {task.number} has no examples")
    grown = dataclasses.replace(knowledge, tasks=(*knowledge.tasks, task), head=knowledge.head.joined(task.head))
    return aligned(grown) if grown.settings.head == "aligned" and len(grown.tasks) > 1 else grown


def aligned(knowledge: Knowledge) -> Knowledge:
    """Return the same knowledge with its head aligned over all classes, from their statistics."""
    settings = knowledge.settings
    generator = generator_of("alignment", settings.seed, len(knowledge.classes))
    classes: Sequence[GaussianClass] = knowledge.statistics
    if settings.regularized_replay:
        classes = normal_classes(knowledge.statistics, prior=settings.prior, sphere_examples=settings.sphere_examples)
    elif settings.replay_directions is not None:
        classes = [each.compressed(settings.replay_directions) for each in knowledge.statistics]
    head = aligned_head(knowledge.head, classes, settings=settings.alignment, generator=generator)
    return dataclasses.replace(knowledge, head=head)


def scores(encoder: FrozenEncoder, knowledge: Knowledge, states: States) -> Tensor:
    """Return the probability of each class, ``(examples, classes)`` float32, in learning order.

    Raises:
        DataError: Nothing is known.
    """
    return Answerer(encoder, knowledge).scores(states)


def predict(encoder: FrozenEncoder, knowledge: Knowledge, states: States) -> Tensor:
    """Return the likeliest class of each example, ``(examples,)`` int64, as its place in the learning order.

    Raises:
        DataError: Nothing is known.
    """
    return scores(encoder, knowledge, states).argmax(1)


class Mos:
    """A learner that holds what is known.

    Attributes:
        knowledge: After the tasks learned so far.
    """

    def __init__(self, encoder: FrozenEncoder, settings: MosSettings) -> None:
        """Start with nothing known."""
        self._encoder = encoder
        self._answerer: Answerer | None = None
        self.knowledge = nothing_known(encoder.width, settings)

    def learn(self, data: TaskData) -> None:
        """Learn the next task; see :func:`learn_task`."""
        self.knowledge = learn_task(self._encoder, self.knowledge, data, self.knowledge.settings)
        self._answerer = None

    def predict(self, states: States) -> Tensor:
        """Return the class of each example; see :func:`predict`."""
        if self._answerer is None:
            self._answerer = Answerer(self._encoder, self.knowledge)
        return self._answerer.scores(states).argmax(1)


def _own_targets(knowledge: Knowledge, data: TaskData) -> Tensor:
    targets, count = data.targets - len(knowledge.classes), len(data.task.classes)
    if known := sorted(set(data.task.classes) & set(knowledge.classes)):
        raise DataError(f"class {known[0]!r} is known already; a class is learned once")
    if not len(targets) or int(targets.min()) < 0 or int(targets.max()) >= count:
        raise DataError(
            f"expected targets from {len(knowledge.classes)} to {len(knowledge.classes) + count - 1} "
            f"for the classes of task {data.task.number}, got {sorted(set(data.targets.tolist()))[:5]}"
        )
    return targets
