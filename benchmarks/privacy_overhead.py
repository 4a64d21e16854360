"""What example-level privacy adds to a training step, on MiniLM with LoRA in every linear layer and a head.

Three ways to take one AdamW step with the same batch of WordNet glosses:

* ``plain``: without privacy, as the package trains;
* ``private``: each example's own gradient, the bound over all parameters, the noise, the division, the step;
* ``hooks``: the same, with all gradients from Opacus' hooks, which need PEFT's two products instead of the fused layer.

The three take turns, batch by batch, in one thread, and CPU time of the thread is counted, which others on the machine
disturb least; ratios are of medians. Drawing the sample and padding it are left out everywhere. The check that a
private round begins with, on made-up texts, is timed by itself.

Before anything is timed, both private ways are compared with a loop over single examples, and what one example adds
with its bound. Nothing is reported when one differs. Run as ``python benchmarks/privacy_overhead.py``.
"""

import argparse
import json
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from opacus import GradSampleModule
from peft.tuners.lora import Linear as LoraLayer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from pomona import __version__
from pomona.adapters import AdapterWeights, LoraFactors
from pomona.base_model import find_base_model
from pomona.batches import Encoded, batch_indices, collate
from pomona.datasets import load_dataset
from pomona.lora_model import AdaptedModel
from pomona.privacy.clipping import clipped_sum
from pomona.privacy.example_level import Gradients, check_separable, example_gradients, private_mean
from pomona.privacy.randomness import SecureRandom
from pomona.protocol import ExamplePrivacy

RESULTS = Path(__file__).parent / "results" / "privacy_overhead.json"
PIECES = ((4, 32), (8, 32), (16, 32), (8, 64))  # rank, batch size
GLOBAL_RANK = 16
PRIVACY = ExamplePrivacy(noise_multiplier=1.0, clip=0.1, sample_rate=0.01, steps=1)
AIM = 1.15
_AGREEMENT = 1e-5

Batch = dict[str, Tensor]


def attached(rank: int) -> AdaptedModel:
    """Return MiniLM under a global adapter and a trainable one."""
    labels = sorted(set(load_dataset("wordnet-nouns", split="train", task="classification").labels))
    model = AdaptedModel(find_base_model("all-minilm-l6-v2"), task="classification", labels=labels)
    gen = torch.Generator().manual_seed(0)

    def factors(out: int, in_: int) -> LoraFactors:
        a, b = torch.randn(GLOBAL_RANK, in_, generator=gen), torch.randn(out, GLOBAL_RANK, generator=gen)
        return LoraFactors(a=0.02 * a, b=0.02 * b)

    layers = {name: factors(*shape) for name, shape in model.manifest.layers.items()}
    weights = AdapterWeights(layers=layers, heads=model.initial_heads(seed=1))
    model.attach(weights, rank=rank, alpha=2.0 * rank, seed=1, trainable=rank // 2)
    return model


def parameters_of(model: AdaptedModel) -> list[nn.Parameter]:
    """Return the trained parameters."""
    return [parameter for group in model.parameters() for parameter in group]


@contextmanager
def hooked_gradients(model: AdaptedModel) -> Iterator[Gradients]:
    """Lend the gradients of each example as Opacus alone finds them."""
    trained = parameters_of(model)
    for module in model.network.modules():
        if isinstance(module, LoraLayer):
            module.forward = MethodType(_two_products, module)  # type: ignore[method-assign]
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            module.training = True
    hooks = GradSampleModule(model.network, loss_reduction="sum")

    def gradients(batch: Batch) -> tuple[Tensor, list[Tensor]]:
        losses = model.example_losses(batch)
        with warnings.catch_warnings():  # the first layer's inputs need no gradients
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            losses.sum().backward()  # type: ignore[no-untyped-call]
        found = [vars(each)["grad_sample"] for each in trained]
        hooks.zero_grad(set_to_none=True)
        return losses.detach(), found

    yield gradients
    hooks.cleanup()


def _two_products(layer: LoraLayer, x: Tensor) -> Tensor:
    fixed = layer.lora_B["global"](layer.lora_A["global"](x))
    return layer.get_base_layer()(x) + fixed + layer.scaling["local"] * layer.lora_B["local"](layer.lora_A["local"](x))


# correctness


def check(model: AdaptedModel, other: AdaptedModel, data: Encoded) -> dict[str, float]:
    """Refuse to go on unless both ways give each example its own gradient, and the bound holds."""
    trained = parameters_of(model)
    expected = [torch.autograd.grad(model.loss(collate(data, [i])), trained) for i in range(len(data))]
    worst = {}
    for name, lend in (("private", partial(example_gradients, model)), ("hooks", partial(hooked_gradients, other))):
        with lend() as gradients:
            _, found = gradients(collate(data, range(len(data))))
        worst[name] = max(
            _norm([mine[i] - own for mine, own in zip(found, each, strict=True)]) / _norm(each)
            for i, each in enumerate(expected)
        )
        _refuse(not worst[name] <= _AGREEMENT, f"{name}: gradients are {worst[name]:.1e} off those of single examples")
        for i in range(len(data)):
            added = _norm(clipped_sum([each[i : i + 1] for each in found], PRIVACY.clip))
            _refuse(not 0.999 * PRIVACY.clip < added <= PRIVACY.clip, f"{name}: an example adds {added}")
    return worst


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def _refuse(red: bool, why: str) -> None:
    if red:
        raise SystemExit(f"training is wrong, so no speed is reported: {why}")


# measuring


def plain_step(model: AdaptedModel, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """Take a step without privacy."""
    model.loss(batch).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


def private_step(
    model: AdaptedModel, optimizer: torch.optim.Optimizer, gradients: Gradients, noise: SecureRandom, batch: Batch
) -> None:
    """Take a step with privacy."""
    trained, summands = parameters_of(model), [gradients(batch)[1]]
    released = private_mean(trained, summands, privacy=PRIVACY, divisor=len(batch["labels"]), noise=noise)
    for parameter, gradient in zip(trained, released, strict=True):
        parameter.grad = gradient.to(parameter.dtype)
    optimizer.step()
    optimizer.zero_grad()


def measure(rank: int, batch_size: int, *, steps: int) -> dict[str, Any]:
    """Time the three ways in turns; the first two steps warm up and do not count."""
    models = {name: attached(rank) for name in ("plain", "private", "hooks")}
    data = _glosses(models["plain"])
    checked = check(attached(rank), attached(rank), _first(data, 6))
    order = batch_indices([len(row) for row in data.tokens], batch_size=batch_size, generator=np.random.default_rng(0))
    optimizers = {name: torch.optim.AdamW(parameters_of(each), lr=1e-4, fused=True) for name, each in models.items()}
    noise, seconds = SecureRandom(), {name: [] for name in (*models, "gradients", "check")}
    with ExitStack() as stack:
        lent = {
            "private": stack.enter_context(example_gradients(models["private"])),
            "hooks": stack.enter_context(hooked_gradients(models["hooks"])),
        }
        ways: dict[str, Callable[[Batch], object]] = {
            name: partial(private_step, models[name], optimizers[name], lent[name], noise) for name in lent
        }
        ways |= {"plain": partial(plain_step, models["plain"], optimizers["plain"]), "gradients": lent["private"]}
        for number in range(steps + 2):
            batch = collate(data, order[number % len(order)])
            for name, way in ways.items():
                seconds[name].append(_timed(partial(way, batch)))
    seconds["check"] = [_timed(partial(check_separable, models["private"])) for _ in range(5)]
    medians = {name: statistics.median(each[2:]) for name, each in seconds.items()}
    return {
        "rank": rank,
        "batch_size": batch_size,
        "steps": steps,
        "trained_numbers": sum(each.numel() for each in parameters_of(models["plain"])),
        "worst_gradient_error": checked,
        "median_ms": {name: 1e3 * each for name, each in medians.items()},
        "ratio": {name: medians[name] / medians["plain"] for name in ("private", "hooks", "gradients")},
        "load": os.getloadavg()[0],
    }


def _timed(what: Callable[[], object]) -> float:
    began = time.thread_time()
    what()
    return time.thread_time() - began


def _glosses(model: AdaptedModel) -> Encoded:
    data = load_dataset("wordnet-nouns", split="train", task="classification")
    return model.encode(data.texts, data.labels, max_length=64)


def _first(data: Encoded, count: int) -> Encoded:
    return Encoded(data.tokens[:count], data.targets[:count], data.pad_id)


def report(document: dict[str, Any]) -> None:
    """Print the table."""
    table = Table("rank", "batch", "trained numbers", "plain", "private", "ratio", "gradients alone", "hooks")
    for run in document["runs"]:
        ratio, median = run["ratio"], run["median_ms"]
        cells = [f"{run['trained_numbers']:,}", f"{median['plain']:.0f} ms", f"{median['private']:.0f} ms"]
        cells += [f"{ratio[name]:.3f}" for name in ("private", "gradients", "hooks")]
        table.add_row(str(run["rank"]), str(run["batch_size"]), *cells)
    table.caption = f"CPU time of a step, one thread; aim: a ratio of at most {AIM}"
    Console(width=110).print(table)


def main() -> None:
    """Check, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="how often each way is timed")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = {"pomona": __version__, "torch": torch.__version__, "python": platform.python_version()}
    machine |= {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    facts = {"cores": os.cpu_count(), "command": "python benchmarks/privacy_overhead.py"}
    document = {"machine": machine | facts, "privacy": PRIVACY.model_dump(), "aim": AIM, "runs": list[Any]()}
    for rank, batch_size in PIECES:
        document["runs"].append(measure(rank, batch_size, steps=options.steps))
        Console(stderr=True).print(f"rank {rank}, batches of {batch_size}: done")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    report(document)


if __name__ == "__main__":
    main()
