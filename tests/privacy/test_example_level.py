"""Example-level privacy: each example's own gradient, bounded; noise of the scale that is claimed; no trace left."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pomona.adapters import AdapterWeights, LoraFactors
from pomona.batches import Encoded, batches, collate
from pomona.client.train import Trained, train_locally
from pomona.errors import ConfigError
from pomona.lora_model import AdaptedModel, Task
from pomona.privacy import example_level
from pomona.privacy.audit import Audit, judged
from pomona.privacy.clipping import clipped_sum
from pomona.privacy.example_level import (
    check_separable,
    draw,
    example_gradients,
    private_mean,
    train_steps,
)
from pomona.privacy.randomness import SecureRandom
from pomona.protocol import ExamplePrivacy, Initial, Trains
from pomona.settings import TrainingSettings

KEY = bytes(range(32))
LABELS = ("animal", "food", "tool", "weather")
TEXTS = (
    "the old cat near some bread",
    "rain and snow",
    "hammer",
    "a very small dog with this cheese and that storm",
    "new saw",
    "honey with butter and a horse",
)
TARGETS = ("animal", "weather", "tool", "weather", "tool", "food")
PRIVACY = ExamplePrivacy(noise_multiplier=1.0, clip=1e-3, sample_rate=0.5, steps=3)
TRAINING = TrainingSettings(local_epochs=1, max_steps=1, batch_size=4, learning_rate=1e-2)
UNLIKELY = 1e-4  # of a test with a fixed key: it fails for good or never


def load(path: Path, task: Task = "classification", target_modules: Sequence[str] = ()) -> AdaptedModel:
    labels = LABELS if task == "classification" else ()
    return AdaptedModel(path, task=task, labels=labels, target_modules=target_modules)


def examples(model: AdaptedModel) -> Encoded:
    return model.encode(TEXTS, TARGETS, max_length=16)


def weights_of(model: AdaptedModel, *, rank: int = 3) -> AdapterWeights:
    gen = torch.Generator().manual_seed(0)
    layers = {
        name: LoraFactors(a=0.3 * torch.randn(rank, in_, generator=gen), b=0.3 * torch.randn(out, rank, generator=gen))
        for name, (out, in_) in model.manifest.layers.items()
    }
    heads = {name: torch.randn(shape, generator=gen) for name, shape in model.manifest.heads.items()}
    return AdapterWeights(layers=layers, heads=heads)


def attached(
    path: Path,
    task: Task = "classification",
    *,
    trains: Trains = "both",
    initial: Initial = "uniform",
    target_modules: Sequence[str] = (),
) -> AdaptedModel:
    """A model under a frozen and a trainable adapter whose factors are all different from zero."""
    model = load(path, task, target_modules)
    model.attach(weights_of(model), rank=4, alpha=6.0, seed=1, trainable=2, trains=trains, initial=initial)
    gen = torch.Generator().manual_seed(7)
    for parameter in model.parameters()[0]:
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=gen))
    return model


def trained_parameters(model: AdaptedModel) -> list[nn.Parameter]:
    return [parameter for group in model.parameters() for parameter in group]


def one_by_one(model: AdaptedModel, data: Encoded) -> list[list[Tensor]]:
    """The gradient of each example by itself, as training without privacy takes it: slow and obviously right."""
    found = []
    for i in range(len(data)):
        gradients = torch.autograd.grad(loss_of(model, data, i), trained_parameters(model), allow_unused=True)
        found.append(
            [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, trained_parameters(model), strict=True)]
        )
    return found


def loss_of(model: AdaptedModel, data: Encoded, i: int) -> Tensor:
    """The loss of one example in the precision of the network, where transformers takes that of texts in float32."""
    batch = collate(data, [i])
    logits, labels = model.network(**batch).logits, batch["labels"]
    if logits.ndim == 3:
        logits, labels = logits[0, :-1], labels[0, 1:]
    loss = nn.functional.cross_entropy(logits, labels)
    assert loss.item() == pytest.approx(model.loss(batch).item(), rel=1e-6)
    return loss


def norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def assert_each_is_its_own(model: AdaptedModel) -> None:
    """Compare in float64, where what rounding leaves of a gradient that is 0 cannot be taken for one."""
    model.network.double()
    data = examples(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", rms_norm)
        expected = one_by_one(model, data)
        alone = [loss_of(model, data, i).item() for i in range(len(data))]
        with example_gradients(model) as gradients:
            losses, found = gradients(collate(data, range(len(data))))
    assert losses.tolist() == pytest.approx(alone, rel=1e-12)
    for i, own in enumerate(expected):
        for tensor, mine in zip(own, found, strict=True):
            assert mine.dtype == torch.float64
            assert norm([mine[i] - tensor]) <= 1e-12 * norm([tensor]) + 1e-14 * norm(own)


def rms_norm(layer: LlamaRMSNorm, x: Tensor) -> Tensor:
    """Llama's norm in the precision that it is given; its own is in float32 always."""
    return layer.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + layer.variance_epsilon)


# gradients of single examples


@pytest.mark.parametrize("trains", ["both", "a", "b"])
@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_gradients_are_those_of_each_example_by_itself(
    tiny_bert: Path, tiny_llama: Path, task: Task, trains: Trains
) -> None:
    assert_each_is_its_own(attached(tiny_bert if task == "classification" else tiny_llama, task, trains=trains))


def test_orthonormal_rows_make_no_difference(tiny_bert: Path) -> None:
    assert_each_is_its_own(attached(tiny_bert, trains="b", initial="orthonormal"))


SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
DISTIL_SIZES = {"vocab_size": 64, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}


def saved(kind: str, tokenizer: Path, folder: Path, **sizes: int) -> Path:
    """A model of random weights of that kind."""
    import transformers

    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = getattr(transformers, f"{kind}Config")(**sizes, max_position_embeddings=32, pad_token_id=0)
        getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        pytest.param("Roberta", SIZES, id="a head of two layers"),
        pytest.param("DistilBert", DISTIL_SIZES, id="a head in two places"),
        pytest.param("Albert", {**SIZES, "embedding_size": 8}, id="one layer called twice"),
    ],
)
def test_other_heads_and_layers_are_right_too(
    tiny_bert: Path, tmp_path: Path, kind: str, sizes: dict[str, int]
) -> None:
    assert_each_is_its_own(attached(saved(kind, tiny_bert, tmp_path, **sizes)))


def test_a_decoder_that_classifies_is_right_too(tiny_llama: Path) -> None:
    assert_each_is_its_own(attached(tiny_llama))


def test_the_loss_of_a_language_model_would_mix_examples(tiny_llama: Path) -> None:
    """Its mean is over the tokens of the batch: a longer neighbour makes an example count for less."""
    model = attached(tiny_llama, "causal-lm")
    data = examples(model)
    alone = model.loss(collate(data, [1])).item()
    longest = int(np.argmax([len(row) for row in data.tokens]))
    both = collate(data, [1, longest])
    mean = (alone + model.loss(collate(data, [longest])).item()) / 2
    assert model.loss(both).item() != pytest.approx(mean, rel=1e-3)
    assert model.example_losses(both).mean().item() == pytest.approx(mean, rel=1e-5)


# what is released


def released(tensors: Sequence[Tensor]) -> np.ndarray:
    return np.concatenate([tensor.double().reshape(-1).numpy() for tensor in tensors])


SHAPES = [torch.zeros(40, 60), torch.zeros(60, 40), torch.zeros(17)]


def summands(count: int, *, value: float) -> list[list[Tensor]]:
    return [[torch.full((count, *shape.shape), value) for shape in SHAPES]] if count else []


@pytest.mark.parametrize("count", [0, 5])
@pytest.mark.parametrize(("factor", "right"), [(1.0, True), (2 / 3, False), (3 / 2, False)])
def test_the_noise_has_the_scale_that_is_claimed(count: int, factor: float, *, right: bool) -> None:
    """With an empty sample, too: a step that is left out would tell that nobody was drawn."""
    privacy = ExamplePrivacy(noise_multiplier=1.5 * factor, clip=0.2, sample_rate=0.5, steps=1)
    zeros = summands(count, value=0.0)
    noise = released(private_mean(SHAPES, zeros, privacy=privacy, divisor=8, noise=SecureRandom(KEY)))
    scaled = noise * 8 / (1.5 * 0.2)
    assert (stats.kstest(scaled, "norm").pvalue > UNLIKELY) == right
    assert (abs(scaled.std() - 1.0) < 4 / math.sqrt(2 * scaled.size)) == right


@pytest.mark.parametrize("value", [1.0, 1e30, math.inf, math.nan])
def test_an_example_moves_the_release_by_the_bound_over_the_divisor(value: float) -> None:
    """The same key gives the same noise, so the difference is the example."""
    privacy = ExamplePrivacy(noise_multiplier=1.0, clip=0.2, sample_rate=0.5, steps=1)
    with_it, without = (
        released(private_mean(SHAPES, given, privacy=privacy, divisor=8, noise=SecureRandom(KEY)))
        for given in (summands(3, value=-1.0) + summands(1, value=value), summands(3, value=-1.0))
    )
    expected = 0.2 / 8 if math.isfinite(value) else 0.0
    assert np.linalg.norm(with_it - without) == pytest.approx(expected, rel=1e-9)


def test_the_divisor_is_not_the_number_of_examples() -> None:
    privacy = ExamplePrivacy(noise_multiplier=1e-9, clip=0.2, sample_rate=0.5, steps=1)
    one, many = (
        released(private_mean(SHAPES, summands(n, value=1.0), privacy=privacy, divisor=8, noise=SecureRandom(KEY)))
        for n in (1, 6)
    )
    np.testing.assert_allclose(many, 6 * one, rtol=1e-5)


def test_small_batches_give_the_sum_of_a_large_one(tiny_bert: Path) -> None:
    model = attached(tiny_bert)
    data = examples(model)
    sums = []
    for size in (6, 4, 1):
        with example_gradients(model) as gradients:
            parts = [gradients(collate(data, range(i, min(i + size, 6))))[1] for i in range(0, 6, size)]
        sums.append([torch.stack(each).sum(0) for each in zip(*(clipped_sum(p, 0.5) for p in parts), strict=True)])
    for other in sums[1:]:
        assert norm([a - b for a, b in zip(sums[0], other, strict=True)]) <= 1e-5 * norm(sums[0])


# sampling


def rows(lengths: Sequence[int]) -> Encoded:
    return Encoded(tuple((1,) * length for length in lengths), (0,) * len(lengths), 0)


def test_examples_are_drawn_by_coins_and_cut_into_batches_of_like_length() -> None:
    data, sampler, rate, steps = rows([3, 1, 4, 1, 5, 9, 2, 6, 5, 3]), SecureRandom(KEY), 0.3, 4000
    hits, sizes = np.zeros(len(data)), []
    for _ in range(steps):
        drawn = draw(data, rate, at_most=2, sampler=sampler)
        flat = [int(i) for chosen in drawn for i in chosen]
        assert all(1 <= len(chosen) <= 2 for chosen in drawn)
        assert len(set(flat)) == len(flat)
        assert [len(data.tokens[i]) for i in flat] == sorted(len(data.tokens[i]) for i in flat)
        hits[flat] += 1
        sizes.append(len(flat))
    assert np.abs(hits / steps - rate).max() < 4 * math.sqrt(rate * (1 - rate) / steps)
    assert np.abs(hits / steps - 1.2 * rate).max() > 4 * math.sqrt(rate * (1 - rate) / steps)
    assert np.var(sizes) == pytest.approx(len(data) * rate * (1 - rate), rel=0.1)  # of a fixed size it would be 0


def test_nobody_may_be_drawn() -> None:
    assert draw(rows([1, 2]), 1e-12, at_most=2, sampler=SecureRandom(KEY)) == []
    assert draw(rows([]), 1.0, at_most=2, sampler=SecureRandom(KEY)) == []


def test_no_more_than_a_batch_is_in_memory(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def counted(data: Encoded, chosen: Sequence[int]) -> dict[str, Tensor]:
        sizes.append(len(chosen))
        return collate(data, chosen)

    monkeypatch.setattr(example_level, "collate", counted)
    trained = train(load(tiny_bert), ExamplePrivacy(noise_multiplier=1.0, clip=1.0, sample_rate=1.0, steps=2))
    assert trained.steps == 2
    assert sorted(sizes[-4:]) == [3, 3, 3, 3]
    assert max(sizes) <= TRAINING.batch_size


# the whole of it


def train(
    model: AdaptedModel,
    privacy: ExamplePrivacy | None,
    *,
    training: TrainingSettings = TRAINING,
    trains: Trains = "both",
    tail: tuple[int, float] = (0, 0.0),
) -> Trained:
    return train_locally(
        model,
        examples(model),
        start=weights_of(model),
        rank=4,
        training=training,
        adapter_seed=1,
        batch_seed=2,
        trains=trains,
        tail=tail,
        example_privacy=privacy,
    )


def flat(weights: AdapterWeights) -> Tensor:
    factors = [tensor.reshape(-1) for each in weights.layers.values() for tensor in (each.a, each.b)]
    return torch.cat([*factors, *(tensor.reshape(-1) for tensor in weights.heads.values())])


def as_it_was(model: AdaptedModel, training: TrainingSettings) -> Tensor:
    """Training without privacy, written out."""
    model.attach(weights_of(model), rank=4, alpha=training.alpha_of(4), seed=1)
    lora, heads = model.parameters()
    groups = [{"params": lora, "lr": training.learning_rate}, {"params": heads, "lr": training.head_learning_rate}]
    optimizer = torch.optim.AdamW(groups, weight_decay=training.weight_decay, fused=True)
    generator = np.random.default_rng(2)
    for _ in range(training.local_epochs):
        for batch in batches(examples(model), batch_size=training.batch_size, generator=generator):
            model.loss(batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
    return flat(model.local_weights())


def traces(model: AdaptedModel) -> Sequence[object]:
    """All by which training could leave a model changed, its weights aside."""
    return [
        (name, each.training, list(each._forward_hooks), list(each._backward_hooks), set(vars(each)))
        for name, each in model.network.named_modules()
    ] + [(name, set(vars(each))) for name, each in model.network.named_parameters()]


def test_without_privacy_nothing_has_changed_also_after_training_with_it(tiny_bert: Path) -> None:
    """Hooks that stay would slow every later training down, and keep all activations."""
    training = TRAINING.model_copy(update={"max_steps": 0, "local_epochs": 3})
    model = load(tiny_bert)
    expected = as_it_was(load(tiny_bert), training)
    assert torch.equal(flat(train(model, None, training=training).weights), expected)
    before = traces(model)
    train(model, PRIVACY)
    assert traces(model) == before
    assert torch.equal(flat(train(model, None, training=training).weights), expected)


def test_an_error_in_between_leaves_no_hooks(tiny_bert: Path) -> None:
    model = attached(tiny_bert)
    batch, before = collate(examples(model), range(6)), traces(model)

    def stopped() -> None:
        with example_gradients(model) as gradients:
            with model.factors_per_example(6):
                model.example_losses(batch)  # no backward pass takes what the hooks have kept
            gradients(batch)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert traces(model) == before
    assert_each_is_its_own(model)


@pytest.mark.parametrize("trains", ["both", "a", "b"])
def test_the_noise_is_drawn_anew_every_time(tiny_bert: Path, trains: Trains) -> None:
    """With noise from the seeds of the run, whoever knows them subtracts it."""
    model = load(tiny_bert)
    first, second = (flat(train(model, PRIVACY, trains=trains).weights) for _ in range(2))
    assert not torch.equal(first, second)
    plain, again = (flat(train(model, None, trains=trains).weights) for _ in range(2))
    assert torch.equal(plain, again)


def test_the_steps_are_those_of_the_promise(tiny_bert: Path) -> None:
    """Not of the epochs, which would tell how many examples there are."""
    trained = train(load(tiny_bert), PRIVACY.model_copy(update={"steps": 5}))
    assert trained.steps == 5
    assert math.isfinite(trained.loss)


def test_a_step_that_draws_nobody_still_adds_noise(tiny_bert: Path) -> None:
    model = load(tiny_bert)
    trained = train(model, PRIVACY.model_copy(update={"sample_rate": 1e-12}))
    start = weights_of(model)
    assert math.isnan(trained.loss)
    assert all(not torch.equal(trained.weights.heads[name], head) for name, head in start.heads.items())
    assert all(bool(factors.b.all()) for factors in trained.weights.layers.values())


def test_with_little_noise_it_learns(tiny_bert: Path) -> None:
    privacy = ExamplePrivacy(noise_multiplier=1e-3, clip=1.0, sample_rate=0.7, steps=60)
    model = load(tiny_bert)
    model.attach(weights_of(model))
    before = model.score(examples(model))
    trained = train(model, privacy)
    model.attach(weights_of(model))
    assert trained.loss < 0.8 * before.loss


# the audit


class Watcher(torch.optim.Optimizer):
    """An optimiser that keeps what it is given, and moves nothing."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__(parameters, {})
        self.seen: list[Tensor] = []

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        parts = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        self.seen.append(torch.cat([part.reshape(-1).double() for part in parts]))


STEPS, DIVISOR, CLIP = 200, 8, 1e-3


def attack(path: Path, *, sigma: float = 1.0) -> Audit:
    """Look for one example in what whole steps release, along its own gradient: nothing tells it better."""
    model = attached(path, target_modules=("query", "value"))
    data = examples(model)
    direction = torch.cat([tensor.reshape(-1).double() for tensor in one_by_one(model, data)[0]])
    assert direction.norm() > CLIP
    scores = []
    for kept in (data, replace(data, tokens=data.tokens[1:], targets=data.targets[1:])):
        watcher = Watcher(trained_parameters(model))
        privacy = ExamplePrivacy(noise_multiplier=sigma, clip=CLIP, sample_rate=1.0, steps=STEPS)
        streams = {"sampler": SecureRandom(KEY), "noise": SecureRandom(bytes([len(kept)]) * 32)}
        train_steps(model, kept, watcher, privacy=privacy, batch_size=DIVISOR, **streams)
        scores.append(torch.stack(watcher.seen) @ (direction / direction.norm()))
    return judged(scores[0].numpy(), scores[1].numpy(), noise_multiplier=1.0, delta=1e-5)


def test_the_audit_finds_what_is_claimed(tiny_bert: Path) -> None:
    found = attack(tiny_bert)
    assert found.passes()
    assert found.mu == pytest.approx(1.0, abs=0.3)


def test_the_audit_catches_a_bound_on_each_tensor(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tensor_by_tensor(gradients: Sequence[Tensor], bound: float) -> list[Tensor]:
        return [clipped_sum([gradient], bound)[0] for gradient in gradients]

    model = attached(tiny_bert)
    with example_gradients(model) as gradients:
        _, found = gradients(collate(examples(model), [0]))
    tensors = len(found)
    assert norm(clipped_sum(found, CLIP)) == pytest.approx(CLIP)
    assert norm(tensor_by_tensor(found, CLIP)) == pytest.approx(CLIP * math.sqrt(tensors), rel=0.1)
    monkeypatch.setattr(example_level, "clipped_sum", tensor_by_tensor)
    caught = attack(tiny_bert)
    assert not caught.passes()
    assert caught.mu > 2.0


def test_the_audit_catches_half_the_noise(tiny_bert: Path) -> None:
    caught = attack(tiny_bert, sigma=0.5)
    assert not caught.passes()
    assert caught.mu == pytest.approx(2.0, abs=0.5)


# what is refused


def test_a_penalty_on_the_tail_is_refused(tiny_bert: Path) -> None:
    with pytest.raises(ConfigError, match=r"self_pruning .* belongs to no example"):
        train(load(tiny_bert), PRIVACY, tail=(2, 0.1))


def test_a_loss_that_mixes_examples_is_refused(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounding an example's gradient would not bound what the example does to those of the others."""
    model, own = attached(tiny_bert), AdaptedModel.example_losses

    def contrasted(self: AdaptedModel, batch: dict[str, Tensor]) -> Tensor:
        losses = own(self, batch)
        return losses * losses.flip(0).detach()

    check_separable(model)
    monkeypatch.setattr(AdaptedModel, "example_losses", contrasted)
    with pytest.raises(ConfigError, match=r"another than that of the example alone, most of all that of \S+\.weight;"):
        train(model, PRIVACY)


def test_a_head_of_an_unknown_kind_is_refused(tiny_bert: Path) -> None:
    class Special(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch names it
            return super().forward(input) * self.weight.sum()

    model = load(tiny_bert)
    model.network.get_submodule("classifier").__class__ = Special
    with pytest.raises(ConfigError, match="head's module 'classifier', Special"):
        train(model, PRIVACY)


def test_a_norm_without_bias_in_a_head_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    """Opacus fails on it, in the middle of training."""
    with pytest.raises(ConfigError, match=r"head's module 'head\.norm', LayerNorm"):
        train(load(saved("ModernBert", tiny_bert, tmp_path, **SIZES)), PRIVACY)


def test_a_layer_without_a_dimension_of_examples_is_refused(tiny_bert: Path) -> None:
    model = attached(tiny_bert)
    with model.factors_per_example(5), pytest.raises(ConfigError, match=r"of 5 examples in the input of layer 'bert\."):
        model.example_losses(collate(examples(model), range(6)))


def test_weights_that_are_not_finite_are_not_sent_and_no_loss_is_told(tiny_bert: Path) -> None:
    wild = TRAINING.model_copy(update={"learning_rate": 1e38, "head_learning_rate": 1e38})
    privacy = ExamplePrivacy(noise_multiplier=1.0, clip=1e3, sample_rate=1.0, steps=3)
    with pytest.raises(ConfigError, match=r"diverged, its weights are not finite; lower the learning rates"):
        train(load(tiny_bert), privacy, training=wild)


def test_a_start_that_is_not_finite_is_no_fault_of_the_model(tiny_bert: Path) -> None:
    model = attached(tiny_bert)
    model.parameters()[1][0].data.fill_(math.nan)
    with pytest.raises(ConfigError, match="diverged"):
        check_separable(model)
