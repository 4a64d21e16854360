"""Alignment by replay makes classes of different tasks comparable, which a head trained task by task is not."""

import pytest
import torch
from torch import Tensor

from pomona.continual.alignment import aligned_head, drawn_features
from pomona.continual.heads import LinearHead
from pomona.continual.statistics import ClassStatistics
from pomona.errors import ConfigError, DataError
from pomona.mos_settings import AlignmentSettings

WIDTH = 8
SETTINGS = AlignmentSettings(epochs=8, samples_per_class=32, batch_size=32, learning_rate=0.05)


def rows_of(label: int, n: int, *, seed: int = 0) -> Tensor:
    noise = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(10 * seed + label)) * 0.15
    return torch.nn.functional.normalize(torch.eye(WIDTH)[label] + noise, dim=1)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def accuracy_of(head: LinearHead) -> float:
    rows = torch.cat([rows_of(c, 50, seed=7) for c in range(4)])
    return float((head.logits(rows).argmax(1) == torch.arange(4).repeat_interleave(50)).double().mean())


def test_a_head_of_tasks_that_were_never_compared_is_mended() -> None:
    """The rows of the second task have larger logits on everything, because its training ran longer."""
    head = LinearHead(torch.eye(4, WIDTH) + torch.tensor([0.0, 0.0, 1.0, 1.0])[:, None], torch.zeros(4))
    classes = [ClassStatistics.of(rows_of(c, 40)) for c in range(4)]
    before = head.weight.clone()
    aligned = aligned_head(head, classes, settings=SETTINGS, generator=generator())
    assert accuracy_of(head) < 0.8
    assert accuracy_of(aligned) > 0.95
    assert torch.equal(head.weight, before)
    assert not aligned.weight.requires_grad
    again = aligned_head(head, classes, settings=SETTINGS, generator=generator())
    assert torch.equal(aligned.weight, again.weight)


def test_a_head_that_is_not_finite_is_refused() -> None:
    wild = SETTINGS.model_copy(update={"learning_rate": 1e30})
    classes = [ClassStatistics.of(rows_of(c, 40)) for c in range(4)]
    with pytest.raises(ConfigError, match="diverged; lower learning_rate"):
        aligned_head(LinearHead.zeros(4, WIDTH), classes, settings=wild, generator=generator())


def test_as_many_features_of_unit_length_are_drawn_of_each_class() -> None:
    classes = [ClassStatistics.of(rows_of(c, n)) for c, n in ((0, 1), (1, 3), (2, 40))]
    features, targets = drawn_features(classes, each=5, generator=generator())
    assert targets.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    torch.testing.assert_close(features.norm(dim=1), torch.ones(15))
    assert features.dtype == torch.float32


def test_a_class_without_statistics_is_refused() -> None:
    with pytest.raises(DataError, match="each of the head's 4 classes, got 1"):
        aligned_head(
            LinearHead.zeros(4, WIDTH), [ClassStatistics.of(rows_of(0, 3))], settings=SETTINGS, generator=generator()
        )
