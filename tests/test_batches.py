"""Batches lose nothing, pad little, and come in an order that the seed alone decides."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pomona.batches import Encoded, batch_indices, batches, collate, encode

LENGTHS = st.lists(st.integers(1, 12), min_size=0, max_size=70)


def numbered(lengths: list[int], *, causal: bool = False) -> Encoded:
    """Texts that can be told apart: text ``i`` is ``100 + i``, as often as it is long."""
    tokens = tuple((100 + i,) * length for i, length in enumerate(lengths))
    return Encoded(tokens, () if causal else tuple(i % 5 for i in range(len(lengths))), pad_id=7)


def padding(lengths: np.ndarray[tuple[int], np.dtype[np.int64]], chosen: list[np.ndarray]) -> int:
    return sum(int(lengths[part].max() * len(part) - lengths[part].sum()) for part in chosen)


@given(LENGTHS, st.integers(1, 9), st.integers(0, 2**32), st.booleans())
@settings(deadline=None, max_examples=120)
def test_every_example_comes_once(lengths: list[int], batch_size: int, seed: int, shuffled: bool) -> None:
    """A text that is dropped, or comes twice, would be weighted wrongly."""
    data = numbered(lengths)
    generator = np.random.default_rng(seed) if shuffled else None
    found = list(batches(data, batch_size=batch_size, generator=generator))
    rows = [
        (tuple(ids[mask == 1].tolist()), int(label))
        for batch in found
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ]
    assert sorted(rows) == sorted(zip(data.tokens, data.targets, strict=True))
    sizes = sorted(len(batch["labels"]) for batch in found)
    assert all(size <= batch_size for size in sizes)
    assert len(sizes) == -(-len(lengths) // batch_size)


@given(LENGTHS.filter(bool), st.integers(1, 9), st.integers(0, 2**32), st.booleans())
@settings(deadline=None, max_examples=80)
def test_padding_is_masked_and_is_no_longer_than_it_must(
    lengths: list[int],
    batch_size: int,
    seed: int,
    causal: bool,
) -> None:
    """Padding that counts as text would change what the model sees."""
    data = numbered(lengths, causal=causal)
    for batch in batches(data, batch_size=batch_size, generator=np.random.default_rng(seed)):
        ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
        assert bool(mask.sum(dim=1).eq(mask.shape[1]).any()), "the longest text is padded too"
        assert torch.equal(mask, mask.sort(dim=1, descending=True).values), "padding lies at the end"
        assert bool((ids[mask == 0] == 7).all())
        assert bool((ids[mask == 1] >= 100).all())
        if causal:
            assert torch.equal(labels[mask == 1], ids[mask == 1])
            assert bool((labels[mask == 0] == -100).all())
        else:
            assert labels.tolist() == [(row[0] - 100) % 5 for row in ids.tolist()]
        assert {ids.dtype, mask.dtype, labels.dtype} == {torch.int64}


@given(LENGTHS, st.integers(1, 9), st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_the_order_is_a_function_of_the_seed(lengths: list[int], batch_size: int, seed: int) -> None:
    """The same round trained again would give another update."""
    one, other = (
        [part.tolist() for part in batch_indices(lengths, batch_size=batch_size, generator=np.random.default_rng(seed))]
        for _ in range(2)
    )
    assert one == other


def test_seeds_and_epochs_have_different_orders() -> None:
    """The same order in every epoch would be no stochastic descent."""
    lengths = [1 + i % 9 for i in range(60)]
    generator = np.random.default_rng(0)
    orders = [
        [part.tolist() for part in batch_indices(lengths, batch_size=4, generator=chosen)]
        for chosen in (generator, generator, np.random.default_rng(1))
    ]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]


def test_batches_of_like_length_need_far_less_padding() -> None:
    """Without bucketing, most of the work on short texts would be padding."""
    lengths = np.random.default_rng(3).integers(3, 60, size=1000)
    order = np.random.default_rng(4).permutation(len(lengths))
    shuffled = padding(lengths, [order[i : i + 16] for i in range(0, len(order), 16)])
    bucketed = padding(lengths, batch_indices(lengths.tolist(), batch_size=16, generator=np.random.default_rng(4)))
    by_length = padding(lengths, batch_indices(lengths.tolist(), batch_size=16, generator=None))
    assert bucketed < 0.25 * shuffled
    assert by_length < bucketed


def test_batches_are_not_in_order_of_length() -> None:
    """From short to long, an epoch would end on long texts alone."""
    lengths = [1 + i % 50 for i in range(800)]
    longest = [
        max(lengths[i] for i in part)
        for part in batch_indices(lengths, batch_size=8, generator=np.random.default_rng(0))
    ]
    steps = np.sign(np.diff(longest))
    assert 0.3 < float((steps > 0).mean()) < 0.7
    assert abs(float(np.corrcoef(np.arange(len(longest)), longest)[0, 1])) < 0.3


def test_for_scoring_the_longest_come_first() -> None:
    """Memory that does not suffice is then found out at once."""
    lengths = [3, 9, 1, 9, 4]
    order = [part.tolist() for part in batch_indices(lengths, batch_size=2, generator=None)]
    assert order == [[1, 3], [4, 0], [2]]


def test_texts_are_cut_and_carry_the_padding_of_their_tokenizer(tiny_bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    encoded = encode(["cat " * 20, "the cat"], [1, 0], tokenizer=tokenizer, max_length=8)
    assert [len(row) for row in encoded.tokens] == [8, 4]
    assert encoded.tokens[0][0] == encoded.tokens[1][0] == tokenizer.cls_token_id
    assert encoded.tokens[0][-1] == tokenizer.sep_token_id
    assert encoded.pad_id == tokenizer.pad_token_id == 0
    assert encoded.targets == (1, 0)


@pytest.mark.parametrize(("pad", "eos", "expected"), [(None, "[SEP]", 3), (None, None, 0), ("[MASK]", "[SEP]", 4)])
def test_a_tokenizer_without_padding_pads_with_the_end_of_text(
    tiny_bert: Path, pad: str | None, eos: str | None, expected: int
) -> None:
    """Many language models have no padding token; ``None`` would end the first batch."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.pad_token, tokenizer.eos_token = pad, eos
    assert encode(["cat"], [], tokenizer=tokenizer, max_length=8).pad_id == expected


def test_labels_of_a_language_model_are_its_tokens() -> None:
    batch = collate(Encoded(((5, 6, 7), (8,)), (), pad_id=0), [1, 0])
    assert batch["input_ids"].tolist() == [[8, 0, 0], [5, 6, 7]]
    assert batch["labels"].tolist() == [[8, -100, -100], [5, 6, 7]]


def test_a_padding_token_inside_a_text_is_text() -> None:
    """Where the end of text pads, one that was written must still be predicted."""
    batch = collate(Encoded(((5, 0, 7), (8, 0)), (), pad_id=0), [0, 1])
    assert batch["labels"].tolist() == [[5, 0, 7], [8, 0, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
