"""A frozen encoder whose upper blocks take one adapter at a time, as an argument.

::

    h = blocks_1..k(embed(x))             once per example, whatever is learned later
    f(x; theta) = m / ||m||,   m = mean over tokens of norm(blocks_k+1..L(h; theta))

An adapter is never put into the model: the layers look up their factors for the time of one call. So using an adapter
cannot change it, and neither the order of examples nor what else is in their batch changes a feature by more than
rounding. (In the published code of MOS, the forward pass of a stored adapter overwrites it.)

Blocks below the first adapted one see no adapter, so what they give is computed once and kept.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from pomona.adapters import LoraFactors
from pomona.base_model import base_model_sha256
from pomona.batches import batch_indices
from pomona.errors import BaseModelError, PayloadError
from pomona.kernels.lora_linear import lora_linear
from pomona.manifest import AdapterManifest
from pomona.seeds import generator_of

Adapter = Mapping[str, LoraFactors]

NO_ADAPTER: Adapter = {}

_BATCH = 128
_PROBE_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class States:
    """What the blocks below the first adapted one make of each example.

    Attributes:
        rows: For each example ``(tokens, width)``, float32.
    """

    rows: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, chosen: Sequence[int]) -> "States":
        """Return the states of the chosen examples, in that order."""
        return States(tuple(self.rows[i] for i in chosen))

    def __add__(self, other: "States") -> "States":
        return States(self.rows + other.rows)


class FrozenEncoder:
    """An encoder for texts or images; its weights never change.

    Attributes:
        manifest: Shapes of the layers that an adapter may have; no heads.
        width: Dimensions of a feature.
    """

    def __init__(self, path: Path, *, adapted_blocks: int | None = None) -> None:
        """Load an encoder.

        Args:
            path: Folder in Hugging Face's layout with safetensors weights: a text encoder like BERT, or a ViT.
            adapted_blocks: Transformer blocks that adapters may change, counted from the top; None: all.

        Raises:
            BaseModelError: The folder cannot be loaded, its model is not a stack of blocks between embeddings and an
                optional norm, or it has fewer blocks.
        """
        self._model = _load(path)
        self._blocks = _blocks(self._model)
        count = len(self._blocks) if adapted_blocks is None else adapted_blocks
        if not 1 <= count <= len(self._blocks):
            raise BaseModelError(f"expected 1 to {len(self._blocks)} adapted blocks for {path}, got {count}")
        self._first = len(self._blocks) - count
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        nn.Module.to(self._model.requires_grad_(False).train(False), self._device)
        self._tokenizer = None if self.takes_images else AutoTokenizer.from_pretrained(path, local_files_only=True)
        self.width: int = self._model.config.hidden_size
        self._adapter: Adapter = NO_ADAPTER
        layers = dict(_widening_layers(self._model, self._blocks[self._first :]))
        for name, layer in layers.items():
            layer.forward = partial(self._linear, name, layer)  # type: ignore[method-assign]
        self.manifest = AdapterManifest(
            base_sha256=base_model_sha256(path),
            layers={name: (layer.out_features, layer.in_features) for name, layer in layers.items()},
            heads={},
        )
        self._check_split(path)

    @property
    def parameter_count(self) -> int:
        """Numbers that the encoder has, none of which is trained."""
        return sum(each.numel() for each in self._model.parameters())

    @property
    def takes_images(self) -> bool:
        """Whether it reads images rather than texts."""
        return self._model.main_input_name == "pixel_values"

    def of_texts(self, texts: Sequence[str], *, max_length: int) -> States:
        """Return the states of texts, cut at ``max_length`` tokens.

        Raises:
            BaseModelError: The encoder reads images, or has fewer positions.
        """
        if self._tokenizer is None:
            raise BaseModelError("expected images for this base model, got texts")
        positions = getattr(self._model.config, "max_position_embeddings", max_length)
        if max_length > positions:
            raise BaseModelError(f"the base model takes at most {positions} tokens, got max_length={max_length}")
        encoded = self._tokenizer(list(texts), truncation=True, max_length=max_length, return_attention_mask=False)
        tokens = [torch.tensor(row) for row in encoded["input_ids"]]
        found: dict[int, Tensor] = {}
        for chosen in batch_indices([len(row) for row in tokens], batch_size=_BATCH, generator=None):
            ids, mask = _padded([tokens[i] for i in chosen])
            lower = self._lower(ids, mask)
            found |= {int(i): lower[at, : len(tokens[i])].clone() for at, i in enumerate(chosen)}
        return States(tuple(found[i] for i in range(len(tokens))))

    def of_images(self, images: Tensor) -> States:
        """Return the states of images ``(examples, channels, height, width)``.

        Raises:
            BaseModelError: The encoder reads texts.
        """
        if not self.takes_images:
            raise BaseModelError("expected texts for this base model, got images")
        parts = [self._lower(batch, None) for batch in torch.split(images, _BATCH)]
        return States(tuple(row for part in parts for row in part.unbind()))

    def features(self, states: States, adapter: Adapter = NO_ADAPTER) -> Tensor:
        """Return features of length 1, ``(examples, width)`` float32, with gradient to the adapter's factors.

        Args:
            states: One batch.
            adapter: Factors by layer; what is absent is not adapted.

        Raises:
            PayloadError: The adapter has a layer or a shape that the encoder has not.
        """
        rows, mask = _padded(states.rows)
        with self._under(adapter):
            hidden = self._upper(rows.to(self._device), mask.to(self._device))
        weights = mask.to(hidden)[..., None]
        return nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)

    @torch.no_grad()
    def all_features(self, states: States, adapter: Adapter = NO_ADAPTER, *, batch_size: int = _BATCH) -> Tensor:
        """Return the features of many examples in their order, ``(examples, width)`` on the CPU, without gradient."""
        found = torch.zeros(len(states), self.width)
        for chosen in batch_indices([len(row) for row in states.rows], batch_size=batch_size, generator=None):
            found[torch.from_numpy(chosen)] = self.features(states.subset(chosen.tolist()), adapter).cpu()
        return found

    def digest(self) -> str:
        """Return a hash of the weights as they are in memory."""
        found = hashlib.sha256()
        for _, parameter in sorted(self._model.named_parameters()):
            found.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    @contextmanager
    def _under(self, adapter: Adapter) -> Iterator[None]:
        for name, factors in adapter.items():
            shape = (factors.b.shape[0], factors.a.shape[1])
            if self.manifest.layers.get(name) != shape:
                raise PayloadError(
                    f"the adapter's layer {name!r} is {shape}, this encoder's is {self.manifest.layers.get(name)}"
                )
        self._adapter = adapter
        try:
            yield
        finally:
            self._adapter = NO_ADAPTER

    def _linear(self, name: str, layer: nn.Linear, x: Tensor) -> Tensor:
        factors = self._adapter.get(name)
        if factors is None:
            return nn.functional.linear(x, layer.weight, layer.bias)
        a, b = factors.a.to(self._device), factors.b.to(self._device)
        return lora_linear(x, layer.weight, layer.bias, (a, b, factors.scale))

    @torch.no_grad()
    def _lower(self, given: Tensor, mask: Tensor | None) -> Tensor:
        hidden = self._embed(given.to(self._device))
        extended = None if mask is None else _additive(mask.to(self._device), hidden)
        for block in self._blocks[: self._first]:
            hidden = _called(block, hidden, extended)
        return hidden.cpu()

    def _embed(self, given: Tensor) -> Tensor:
        embeddings: Any = self._model.embeddings
        embedded: Tensor = embeddings(given) if self.takes_images else embeddings(input_ids=given)
        return embedded

    def _upper(self, hidden: Tensor, mask: Tensor) -> Tensor:
        extended = None if bool(mask.all()) else _additive(mask, hidden)
        for block in self._blocks[self._first :]:
            hidden = _called(block, hidden, extended)
        norm = getattr(self._model, "layernorm", None)
        return hidden if norm is None else norm(hidden)

    @torch.no_grad()
    def _check_split(self, path: Path) -> None:
        """Compare with the model's own forward pass, on two examples of unequal length."""
        config, generator = self._model.config, generator_of("probe")
        if self.takes_images:
            size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
            given = torch.rand(2, config.num_channels, size, size, generator=generator)
            mask, arguments = None, {"pixel_values": given.to(self._device)}
        else:
            given = torch.randint(5, config.vocab_size, (2, 4), generator=generator)
            mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
            arguments = {"input_ids": given.to(self._device), "attention_mask": mask.to(self._device)}
        lower = self._lower(given, mask)
        kept = torch.ones(lower.shape[:2], dtype=torch.long) if mask is None else mask
        upper = self._upper(lower.to(self._device), kept.to(self._device)).cpu()
        expected = self._model(**arguments).last_hidden_state.cpu()
        if not torch.allclose(upper[kept > 0], expected[kept > 0], atol=_PROBE_TOLERANCE):
            raise BaseModelError(
                f"the model in {path} computes something else between its embeddings and its output than its blocks; "
                "expected a text encoder like BERT or a vision transformer"
            )


def _load(path: Path) -> PreTrainedModel:
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model: PreTrainedModel = AutoModel.from_pretrained(
            path, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BaseModelError(f"cannot load the encoder in {path}: {error}") from error
    if getattr(model.config, "is_decoder", False) or not hasattr(model, "embeddings"):
        raise BaseModelError(f"expected a text encoder or a vision transformer in {path}, got {type(model).__name__}")
    return model


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    stacks = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    if not stacks:
        raise BaseModelError(f"expected a stack of transformer blocks, {type(model).__name__} has none")
    return max(stacks, key=lambda stack: sum(each.numel() for block in stack for each in block.parameters()))


def _widening_layers(model: PreTrainedModel, blocks: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the feed-forward layers of some blocks: those that do not keep the width. Names have the model's prefix."""
    names = {id(module): name for name, module in model.named_modules()}
    for block in blocks:
        for module in block.modules():
            if isinstance(module, nn.Linear) and module.in_features != module.out_features:
                yield f"{model.base_model_prefix}.{names[id(module)]}", module


def _called(block: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
    output = block(hidden, mask)
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return rows of unequal length as one tensor, and which entries are real, ``(examples, tokens)``."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True), mask.long()


def _additive(mask: Tensor, hidden: Tensor) -> Tensor:
    """Return the mask as attention adds it to its logits, ``(examples, 1, 1, tokens)``."""
    return (1.0 - mask.to(hidden))[:, None, None, :] * torch.finfo(hidden.dtype).min
