"""Align a linear head over all classes learned, from what is kept of each class.

A head that was trained task by task has never compared classes of different tasks. Features drawn from each class's
normal distribution stand in for examples that are gone::

    f ~ N(mu_c, Sigma_c), as many for each class,     min_{W, b} CE(softmax(sqrt(d) W f / ||f|| + b), c)

A drawn feature is brought to length 1, because real ones have it.

Reference: Zhang et al., SLCA: Slow learner with classifier alignment for continual learning on a pre-trained model,
ICCV 2023, section 3.3 (https://arxiv.org/abs/2303.05118); MOS, eq. 6.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pomona.continual.heads import LinearHead
from pomona.continual.statistics import GaussianClass
from pomona.errors import ConfigError, DataError
from pomona.mos_settings import AlignmentSettings


def aligned_head(
    head: LinearHead, classes: Sequence[GaussianClass], *, settings: AlignmentSettings, generator: torch.Generator
) -> LinearHead:
    """Return the head after training it on features drawn of every class.

    Args:
        head: Where to start; is not changed.
        classes: One distribution for each row of the head.
        settings: How long and how fast.
        generator: What is drawn, and in which order it is learned.

    Raises:
        DataError: There is not one distribution for each row.
        ConfigError: It diverged.
    """
    if len(classes) != head.classes or not classes:
        raise DataError(f"expected statistics of each of the head's {head.classes} classes, got {len(classes)}")
    weight, bias = (tensor.detach().clone().requires_grad_() for tensor in (head.weight, head.bias))
    steps = settings.epochs * -(-settings.samples_per_class * len(classes) // settings.batch_size)
    optimizer = torch.optim.SGD(
        [weight, bias], lr=settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(settings.epochs):
        features, targets = drawn_features(classes, each=settings.samples_per_class, generator=generator)
        order = torch.randperm(len(targets), generator=generator)
        for chosen in torch.split(order, settings.batch_size):
            logits = LinearHead(weight, bias).logits(features[chosen])
            loss = nn.functional.cross_entropy(logits, targets[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    if not bool(weight.isfinite().all() and bias.isfinite().all()):
        raise ConfigError("the alignment of the head diverged; lower learning_rate of [mos.alignment]")
    return LinearHead(weight.detach(), bias.detach())


def drawn_features(classes: Sequence[GaussianClass], *, each: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw features of length 1 of every class, ``(classes * each, width)`` float32, and their classes, int64."""
    drawn = torch.cat([kept.sample(each, generator) for kept in classes])
    return nn.functional.normalize(drawn, dim=1).float(), torch.arange(len(classes)).repeat_interleave(each)
