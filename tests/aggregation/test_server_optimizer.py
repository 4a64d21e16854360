"""Server optimisers against the dense formulas, round after round."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pomona.adapters import AdapterWeights, LoraFactors
from pomona.aggregation.flora import aggregate_layers
from pomona.aggregation.server_optimizer import OptimizerState, server_step
from pomona.aggregation_settings import ServerOptimizerSettings

OUT, IN, WHOLE = 10, 8, 8  # WHOLE: a bound that truncates nothing


def weights(seed: int, *, rank: int = 2) -> AdapterWeights:
    noise = torch.Generator().manual_seed(seed)
    factors = LoraFactors(a=torch.randn(rank, IN, generator=noise), b=torch.randn(OUT, rank, generator=noise))
    return AdapterWeights(layers={"q": factors}, heads={"bias": torch.randn(3, generator=noise)})


def added(before: AdapterWeights, change: AdapterWeights) -> AdapterWeights:
    layers, _ = aggregate_layers(before.layers, [change.layers], weights=[1.0], max_rank=WHOLE, energy=1.0)
    heads = {name: before.heads[name] + tensor for name, tensor in change.heads.items()}
    return AdapterWeights(layers=layers, heads=heads)


def dense(of: AdapterWeights) -> Tensor:
    return of.layers["q"].delta().double() if "q" in of.layers else torch.zeros(OUT, IN, dtype=torch.float64)


def run(options: ServerOptimizerSettings, *, rounds: int, max_rank: int = WHOLE) -> list[AdapterWeights]:
    """Return the global adapter before the first and after each round; round ``t`` changes it by ``weights(t)``."""
    found = [AdapterWeights(heads={"bias": torch.zeros(3)})]
    state = OptimizerState()
    for number in range(1, rounds + 1):
        after = added(found[-1], weights(number))
        following, state, _ = server_step(found[-1], after, state, settings=options, max_rank=max_rank, energy=1.0)
        found.append(following)
    return found


def test_fedavg_takes_the_round_as_it_is() -> None:
    for number, after in enumerate(run(ServerOptimizerSettings(), rounds=3)):
        expected = torch.stack([torch.zeros(OUT, IN), *(dense(weights(n)).float() for n in range(1, number + 1))])
        assert_close(dense(after).float(), expected.sum(0), rtol=1e-4, atol=1e-5)


def test_half_a_step_is_half_the_change() -> None:
    _, after = run(ServerOptimizerSettings(learning_rate=0.5), rounds=1)
    assert_close(dense(after), 0.5 * dense(weights(1)), rtol=1e-5, atol=1e-6)
    assert_close(after.heads["bias"], 0.5 * weights(1).heads["bias"])


def test_momentum_follows_the_dense_formula() -> None:
    found = run(ServerOptimizerSettings(kind="fedavgm", learning_rate=0.7, momentum=0.6), rounds=4)
    momentum, bias = torch.zeros(OUT, IN, dtype=torch.float64), torch.zeros(3)
    total, total_bias = torch.zeros_like(momentum), torch.zeros(3)
    for number in range(1, 5):
        momentum = 0.6 * momentum + dense(weights(number))
        bias = 0.6 * bias + weights(number).heads["bias"]
        total, total_bias = total + 0.7 * momentum, total_bias + 0.7 * bias
        assert_close(dense(found[number]), total, rtol=1e-4, atol=1e-5)
        assert_close(found[number].heads["bias"], total_bias, rtol=1e-5, atol=1e-6)


def test_adam_follows_the_dense_formula_with_one_step_size_per_layer() -> None:
    options = ServerOptimizerSettings(kind="fedadam", learning_rate=0.1, momentum=0.9, beta_2=0.8, tau=1e-2)
    found = run(options, rounds=4)
    momentum, moment = torch.zeros(OUT, IN, dtype=torch.float64), 0.0
    bias, bias_moment = torch.zeros(3), torch.zeros(3)
    total, total_bias = torch.zeros_like(momentum), torch.zeros(3)
    for number in range(1, 5):
        change, head = dense(weights(number)), weights(number).heads["bias"]
        momentum, moment = 0.9 * momentum + 0.1 * change, 0.8 * moment + 0.2 * float(change.square().mean())
        bias, bias_moment = 0.9 * bias + 0.1 * head, 0.8 * bias_moment + 0.2 * head.square()
        total = total + 0.1 * momentum / (moment**0.5 + 1e-2)
        total_bias = total_bias + 0.1 * bias / (bias_moment.sqrt() + 1e-2)
        assert_close(dense(found[number]), total, rtol=1e-3, atol=1e-4)
        assert_close(found[number].heads["bias"], total_bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["fedavgm", "fedadam"])
def test_ranks_stay_within_the_bound(kind: str) -> None:
    options = ServerOptimizerSettings.model_validate({"kind": kind})
    for after in run(options, rounds=5, max_rank=3)[1:]:
        assert after.rank <= 3


def test_without_momentum_there_is_no_memory() -> None:
    with_none = run(ServerOptimizerSettings(kind="fedavgm", momentum=0.0), rounds=3)
    plain = run(ServerOptimizerSettings(), rounds=3)
    assert_close(dense(with_none[-1]), dense(plain[-1]), rtol=1e-4, atol=1e-5)
    remembering = run(ServerOptimizerSettings(kind="fedavgm", momentum=0.9), rounds=3)
    assert float((dense(remembering[-1]) - dense(plain[-1])).norm()) > 0.1 * float(dense(plain[-1]).norm())


def test_a_layer_that_first_changes_later_is_taken_up() -> None:
    options = ServerOptimizerSettings(kind="fedavgm")
    empty = AdapterWeights(heads={"bias": torch.zeros(3)})
    same, state, _ = server_step(empty, empty, OptimizerState(), settings=options, max_rank=4, energy=1.0)
    assert same.layers == {}
    after, _, _ = server_step(same, added(same, weights(1)), state, settings=options, max_rank=4, energy=1.0)
    assert_close(dense(after), dense(weights(1)), rtol=1e-5, atol=1e-6)


def test_what_truncation_costs_is_told_and_energy_is_heeded() -> None:
    before, after = weights(0, rank=6), added(weights(0, rank=6), weights(1, rank=2))
    options = ServerOptimizerSettings(kind="fedavgm")
    cut, _, kept = server_step(before, after, OptimizerState(), settings=options, max_rank=4, energy=1.0)
    whole = dense(after).double()
    assert list(kept.values()) == pytest.approx(
        [1.0 - float((dense(cut) - whole).norm() / whole.norm()) ** 2], abs=1e-4
    )
    half, _, _ = server_step(before, after, OptimizerState(), settings=options, max_rank=WHOLE, energy=0.5)
    assert half.rank < 6


def test_fedadam_takes_small_steps_unless_told_otherwise() -> None:
    """Its steps do not shrink with the change: at rate 1 each would be as long as the layer allows."""
    assert ServerOptimizerSettings(kind="fedadam").step == 0.01
    assert ServerOptimizerSettings(kind="fedavgm").step == 1.0
    assert ServerOptimizerSettings(kind="fedadam", learning_rate=0.3).step == 0.3
