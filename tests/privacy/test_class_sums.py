"""The sums at the end of a task are one vector with one bound, whatever a client sends; rows have norm 1 in it."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pomona.mos_settings import Moments
from pomona.privacy.class_sums import SumsLayout, SumsNoise
from pomona.privacy.clipping import clip, joint_norm
from pomona.privacy.gaussian_sum import GaussianSum
from pomona.privacy.randomness import SecureRandom

KEY = bytes(range(32))
WIDTH, CLASSES = 5, 3
Adapters = tuple[str, ...]
ONE: Adapters = ("own",)
BOTH: Adapters = ("own", "first")
KINDS = [(moments, adapters) for moments in ("full", "diagonal") for adapters in (ONE, BOTH)]


def layout_of(moments: Moments, adapters: Adapters, *, width: int = WIDTH) -> SumsLayout:
    return SumsLayout(classes=CLASSES, width=width, moments=moments, adapters=adapters)


def features(rows: int, *, seed: int, width: int = WIDTH) -> Tensor:
    drawn = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(drawn, dim=1)


def sums_of(targets: list[int], layout: SumsLayout, *, seed: int) -> dict[str, Tensor]:
    """What a client with a row of each of these classes sends."""
    found = {"count": torch.tensor([targets.count(c) for c in range(CLASSES)])}
    upper = torch.triu_indices(layout.width, layout.width)
    for k, name in enumerate(layout.adapters):
        rows = features(len(targets), seed=seed + k, width=layout.width)
        of_class = [rows[[i for i, each in enumerate(targets) if each == c]] for c in range(CLASSES)]
        found[f"{name}.total"] = torch.stack([each.sum(0) for each in of_class])
        moments = [
            each.square().sum(0) if layout.moments == "diagonal" else (each.T @ each)[*upper] for each in of_class
        ]
        found[f"{name}.moment"] = torch.stack(moments)
    return found


def noiseless(
    clients: Sequence[Mapping[str, Tensor]], layout: SumsLayout, *, bound: float, divisor: float = 1.0
) -> dict[str, Tensor]:
    """What the mechanism makes of clients, with next to no noise."""
    total = GaussianSum(
        layout.shapes, bound=bound, noise_multiplier=1e-15, divisor=divisor, noise=SecureRandom(KEY)
    )  # fmt: skip
    for each in clients:
        total.add(layout.contribution(each))
    return total.release()


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.mark.parametrize(("moments", "adapters"), KINDS)
@pytest.mark.parametrize("bound", [0.7, 2.0, 100.0])
def test_clipped_sums_are_those_of_a_slow_oracle(moments: Moments, adapters: Adapters, bound: float) -> None:
    """Row after row and entry after entry, with the formula of the module; the bound cuts some, all, none."""
    layout, clients = layout_of(moments, adapters), [[0], [0, 0, 1, 2], [1, 1], []]
    a, b, c = math.sqrt(0.1), math.sqrt(0.6 / len(adapters)), math.sqrt(0.3 / len(adapters))
    expected: dict[tuple[object, ...], float] = {}
    for number, targets in enumerate(clients):
        mine: dict[tuple[object, ...], float] = {}
        for k, name in enumerate(adapters):
            for row, label in zip(features(len(targets), seed=10 * number + k).tolist(), targets, strict=True):
                if k == 0:
                    mine["count", label] = mine.get(("count", label), 0.0) + a
                for i in range(WIDTH):
                    mine[name, label, i] = mine.get((name, label, i), 0.0) + b * row[i]
                    for j in range(WIDTH) if moments == "full" else [i]:
                        mine[name, label, i, j] = mine.get((name, label, i, j), 0.0) + c * row[i] * row[j]
        norm = math.sqrt(sum(value**2 for value in mine.values()))
        for key, value in mine.items():
            expected[key] = expected.get(key, 0.0) + value * min(1.0, bound / norm)
    sent = [sums_of(targets, layout, seed=10 * number) for number, targets in enumerate(clients)]
    found = layout.sums(noiseless(sent, layout, bound=bound, divisor=4.0), divisor=4.0)
    for label in range(CLASSES):
        assert float(found["count"][label]) == pytest.approx(expected["count", label] / a, abs=1e-9)
        for name in adapters:
            for i in range(WIDTH):
                total = float(found[f"{name}.total"][label, i])
                assert total == pytest.approx(expected[name, label, i] / b, abs=1e-9)
            upper = [(i, j) for i in range(WIDTH) for j in range(i, WIDTH) if moments == "full" or i == j]
            for (i, j), got in zip(upper, found[f"{name}.moment"][label].tolist(), strict=True):
                assert got == pytest.approx(expected[name, label, i, j] / c, abs=1e-9)


@pytest.mark.parametrize(("moments", "adapters"), KINDS)
def test_a_row_has_norm_1_and_a_bound_is_a_number_of_rows(moments: Moments, adapters: Adapters) -> None:
    layout = layout_of(moments, adapters)
    for seed in range(20):
        norm = joint_norm(layout.contribution(sums_of([seed % CLASSES], layout, seed=seed)))
        assert norm == pytest.approx(1.0, rel=1e-12) if moments == "full" else math.sqrt(0.7) <= norm <= 1.0
        assert joint_norm(layout.contribution(sums_of([0, 0, 1, 0], layout, seed=seed))) <= 4.0


Sent = st.one_of(st.lists(st.integers(0, CLASSES - 1), max_size=8), st.sampled_from(["huge", "negative", "nan", "inf"]))


def made(sent: "list[int] | str", layout: SumsLayout, seed: int) -> dict[str, Tensor]:
    """What an honest client sends of some rows, or a lying one."""
    if isinstance(sent, list):
        return sums_of(sent, layout, seed=seed)
    value = {"huge": 1e300, "negative": -1e9, "nan": math.nan, "inf": math.inf}[sent]
    whole = {"huge": 2**62, "negative": -(2**40), "nan": 0, "inf": 3}[sent]
    return {
        name: torch.full(shape, whole) if name == "count" else torch.full(shape, value, dtype=torch.float64)
        for name, shape in layout.shapes.items()
    }


@settings(max_examples=60)
@given(st.lists(Sent, min_size=1, max_size=5), st.data(), st.sampled_from(KINDS), st.floats(1e-3, 1e3))
def test_any_client_moves_the_sum_by_at_most_the_bound(
    sent: "list[list[int] | str]", data: st.DataObject, kind: tuple[Moments, Adapters], bound: float
) -> None:
    """The sensitivity that the noise is sized for; also of clients who send what no rows have."""
    layout, gone = layout_of(*kind), data.draw(st.integers(0, len(sent) - 1))
    clients = [made(each, layout, seed) for seed, each in enumerate(sent)]
    everybody = noiseless(clients, layout, bound=bound)
    without = noiseless([each for i, each in enumerate(clients) if i != gone], layout, bound=bound)
    assert float((flat(everybody) - flat(without)).norm()) <= bound * (1 + 1e-9)


@pytest.mark.parametrize("adapters", [ONE, BOTH])
def test_clipped_each_by_itself_the_tensors_would_move_it_by_more(adapters: Adapters) -> None:
    """Why there is one norm: the noise is sized for a bound of 1."""
    layout = layout_of("full", adapters)
    parts = layout.contribution(sums_of([0] * 50, layout, seed=1))
    each = {name: clip({name: tensor}, 1.0)[name] for name, tensor in parts.items()}
    assert joint_norm(clip(parts, 1.0)) <= 1.0
    assert joint_norm(each) == pytest.approx(math.sqrt(len(parts)))
    assert joint_norm(each) > 1.7


def test_what_is_clipped_keeps_its_means_and_second_moments() -> None:
    layout = layout_of("full", ONE)
    sent = sums_of([0, 0, 0, 0, 0, 1, 1, 2], layout, seed=3)
    found = layout.sums(noiseless([sent], layout, bound=0.5), divisor=1.0)
    assert float(found["count"].sum()) < 0.2 * 8
    for name in ("own.total", "own.moment"):
        per_row = found[name] / found["count"][:, None]
        torch.testing.assert_close(per_row, sent[name] / sent["count"][:, None], atol=1e-9, rtol=0)


def standardised(noise: SumsNoise, layout: SumsLayout, *, sigma: float) -> dict[str, np.ndarray]:
    """What a release without anybody gives of each kind, in standard deviations."""
    total = GaussianSum(layout.shapes, bound=1.5, noise_multiplier=sigma, divisor=40.0, noise=SecureRandom(KEY))
    found = layout.sums(total.release(), divisor=40.0)
    rows, columns = torch.triu_indices(layout.width, layout.width)
    beside = torch.where(rows == columns, 1.0, math.sqrt(2.0))
    return {
        "count": found["count"].numpy() / noise.count,
        "total": found["own.total"].flatten().numpy() / noise.total,
        "moment": (found["own.moment"] * beside).flatten().numpy() / noise.moment,
    }


@pytest.mark.parametrize("factor", [1.0, 2 / 3, 3 / 2])
def test_the_noise_on_each_kind_is_what_is_said(factor: float) -> None:
    """And noise of another scale would be noticed."""
    layout = SumsLayout(classes=400, width=40, moments="full", adapters=BOTH)
    noise = layout.noise(noise_multiplier=2.0, bound=1.5)
    for kind, drawn in standardised(noise, layout, sigma=2.0 * factor).items():
        off = abs(float(drawn.std()) - 1.0)
        assert (off < 5.0 / math.sqrt(2 * len(drawn))) is (factor == 1.0), kind


def test_other_sums_are_refused() -> None:
    layout = layout_of("full", BOTH)
    with pytest.raises(ValueError, match="expected sums"):
        layout.contribution(sums_of([0], layout_of("full", ONE), seed=1))
    with pytest.raises(ValueError, match="expected sums"):
        layout.contribution(sums_of([0], layout_of("diagonal", BOTH), seed=1))
