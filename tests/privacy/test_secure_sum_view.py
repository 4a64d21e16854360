"""What the server receives and keeps says nothing of one client beyond the sum, and why each mask is there."""

import hashlib
from collections.abc import Iterator, Mapping
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from tests.privacy.secure_sum_in_memory import SecureSum, names, terms

from pomona.errors import PayloadError, UpdateRejected
from pomona.privacy.randomness import SecureRandom
from pomona.privacy.secure_sum import keys, masking
from pomona.privacy.secure_sum.fixed_point import contribution
from pomona.privacy.secure_sum.masking import Words
from pomona.privacy.secure_sum.records import Roster, Unmasking, UnmaskRequest
from pomona.privacy.secure_sum.secret_sharing import combine
from pomona.privacy.secure_sum.terms import Terms

FOUR = names(4)
VICTIM, LATE = FOUR[0], FOUR[3]
DIMENSIONS = 4096
UNLIKELY = 1e-7  # keys are new in every run of these tests

Vectors = Mapping[str, NDArray[np.float64]]


def keyed(name: str) -> SecureRandom:
    return SecureRandom(hashlib.sha256(name.encode()).digest())


def contributed(name: str, vector: NDArray[np.float64], made: Terms) -> NDArray[np.int64]:
    return contribution({"a": torch.from_numpy(vector)}, made, keyed(name))


def uniformity(words: Words) -> float:
    """P-value of the worst octet of the words, of a chi-square test against fair ones."""
    octets = np.frombuffer(masking.bytes_of(words), dtype=np.uint8).reshape(-1, words.itemsize)
    tests = [stats.chisquare(np.bincount(octet, minlength=256)).pvalue for octet in octets.T]
    return float(min(tests))


class Curious:
    """A server that keeps all it receives, and takes off every mask that it comes to know."""

    def __init__(self, ours: SecureSum, roster: Roster, own_seeds: Mapping[str, bytes]) -> None:
        self.own_seeds = own_seeds  # which it does not know: for the tests to say what would be without own masks
        self.terms, self.roster = ours.terms, {each.name: each for each in roster.clients}
        self.vectors = {sender: payload for sender, _, payload in ours.received if payload}
        found = [(s, Unmasking.model_validate_json(t)) for s, t, _ in ours.received if "seed_shares" in t]
        self.seeds = self._combined((s, r.peer, r.share) for s, each in found for r in each.seed_shares)
        self.mask_keys = self._combined((s, r.peer, r.share) for s, each in found for r in each.key_shares)

    def _combined(self, revealed: Iterator[tuple[str, str, str]]) -> dict[str, bytes]:
        number = {name: place for place, name in enumerate(self.roster, start=1)}
        shares: dict[str, dict[int, bytes]] = {}
        for holder, owner, share in revealed:
            shares.setdefault(owner, {})[number[holder]] = bytes.fromhex(share)
        return {owner: combine(each) for owner, each in shares.items() if len(each) >= self.terms.threshold}

    def pair_mask(self, owner: str, peer: str) -> Words:
        public = bytes.fromhex(self.roster[peer].mask_key)
        key = keys.mask_key(self.mask_keys[owner], public, round_id=self.terms.round_id, between=(owner, peer))
        return masking.expanded(key, self.terms)

    def left_of(self, name: str) -> Words:
        """A client's vector without the masks that the server knows."""
        left = masking.words_of(self.vectors[name], self.terms).copy()
        if name in self.seeds:
            left -= masking.expanded(self.seeds[name], self.terms)
        if name in self.mask_keys:
            known = [(peer, self.pair_mask(name, peer)) for peer in self.roster if peer != name]
        else:
            known = [(peer, self.pair_mask(peer, name)) for peer in self.mask_keys]
        return left - masking.pairwise(name, known, self.terms)


def played(inputs: Vectors, *, bits: int = 32, late: bool = True) -> tuple[SecureSum, Curious]:
    """Play a round in which the last client's vector comes late, after it was counted as dropped."""
    grid: dict[str, object] = {"noise_multiplier": 0.03, "fraction_bits": 25} if bits == 64 else {}
    made = terms(4, dimensions=inputs[VICTIM].size, clip=50.0, **grid)
    ours = SecureSum(made, FOUR, {LATE: 2} if late else {}, noise=keyed)
    ours.advertise()
    roster = ours.server.roster()
    for name in FOUR:
        ours.server.add_shares(name, ours.arrived(name, ours.clients[name].share_keys(roster)))
    deliveries = ours.server.deliveries()
    seeds = {name: ours.clients[name]._seed for name in FOUR}
    for name in FOUR:
        record, payload = ours.clients[name].masked_input(deliveries[name], {"a": torch.from_numpy(inputs[name])})
        ours.arrived(name, record, payload)
        if name != LATE or not late:
            ours.server.add_masked(name, record, payload)
    ours.unmask()
    return ours, Curious(ours, roster, seeds)


def telling() -> dict[str, NDArray[np.float64]]:
    """Inputs that are far from random: each client says the same thing over and over."""
    return {name: np.full(DIMENSIONS, 0.1 * place) for place, name in enumerate(FOUR)}


@pytest.mark.parametrize("bits", [32, 64])
def test_what_the_server_cannot_take_off_a_vector_makes_it_uniform(bits: int) -> None:
    _, curious = played(telling(), bits=bits)
    assert curious.terms.modulus_bits == bits
    assert curious.seeds.keys() == set(FOUR[:3])
    assert curious.mask_keys.keys() == {LATE}
    for name in FOUR:
        assert uniformity(masking.words_of(curious.vectors[name], curious.terms)) > UNLIKELY
        assert uniformity(curious.left_of(name)) > UNLIKELY
    for one, other in combinations(FOUR[:3], 2):  # pairs of survivors, too: only all of them together give a sum
        assert uniformity(curious.left_of(one) + curious.left_of(other)) > UNLIKELY


def test_the_test_would_notice_a_vector_without_masks() -> None:
    made = terms(4, dimensions=DIMENSIONS)
    bare = contributed(VICTIM, telling()[VICTIM], made).astype(np.uint32)
    assert uniformity(bare) < UNLIKELY


def test_all_survivors_together_give_the_sum_and_nothing_else_does() -> None:
    ours, curious = played(telling())
    left = sum((curious.left_of(name) for name in FOUR[:3]), masking.zeros(curious.terms))
    assert masking.signed(left).tolist() == ours.server.total().tolist()


def test_the_server_keeps_one_vector_and_it_is_the_sum() -> None:
    """Every array and every text that can be reached from it, during and after."""
    ours, curious = played(telling())
    for _ in range(2):
        arrays = [each for each in reachable(ours.server) if isinstance(each, np.ndarray)]
        assert [each.shape for each in arrays] == [(DIMENSIONS,)]
        assert all(arrays[0].tobytes() != payload for payload in curious.vectors.values())
        texts = [each for each in reachable(ours.server) if isinstance(each, (str, bytes))]
        assert max(map(len, texts)) <= 300
        if ours.server._survivors and arrays[0].any():
            ours.server.total()


def reachable(thing: object) -> Iterator[object]:
    yield thing
    match thing:
        case Mapping():
            inside: list[object] = [*thing.keys(), *thing.values()]
        case list() | tuple() | set() | frozenset():
            inside = list(thing)
        case str() | bytes() | int() | float() | np.ndarray():
            inside = []
        case _:
            inside = list(vars(thing).values())
    for each in inside:
        yield from reachable(each)


Tape = tuple[dict[str, Words], dict[frozenset[str], Words]]


def tape(clients: list[str], made: Terms, seed: int) -> Tape:
    """Own masks and pairs' masks, uniform: what the keystreams stand for."""
    generator = np.random.default_rng(seed)

    def mask() -> Words:
        return generator.integers(0, 2**32, size=made.dimensions, dtype=np.uint32)

    return {name: mask() for name in clients}, {frozenset(pair): mask() for pair in combinations(clients, 2)}


def view(inputs: Mapping[str, NDArray[np.int64]], masks: Tape, dropped: set[str], made: Terms) -> dict[str, bytes]:
    """All vectors, the own masks of survivors, and every mask of those that dropped: what a server comes to know."""
    own, pairs = masks
    seen = {}
    for name, vector in inputs.items():
        shared = ((peer, pairs[frozenset({name, peer})]) for peer in inputs if peer != name)
        seen[f"vector of {name}"] = masking.masked(vector, own[name], masking.pairwise(name, shared, made)).tobytes()
    seen |= {f"own of {name}": own[name].tobytes() for name in inputs if name not in dropped}
    seen |= {f"pair {sorted(pair)}": mask.tobytes() for pair, mask in pairs.items() if pair & dropped}
    return seen


def explained(
    before: Mapping[str, NDArray[np.int64]], after: Mapping[str, NDArray[np.int64]], masks: Tape, dropped: set[str]
) -> Tape:
    """The tape under which other inputs look the same.

    Along the survivors, in order, each hands what it has too much to the mask that it shares with the next; a dropped
    client, whose vector came late, hands it to its own mask, which nobody knows. For fixed inputs this maps tapes one
    to one, so it takes uniform ones to uniform ones.
    """
    own, pairs = dict(masks[0]), dict(masks[1])
    for name in dropped:
        own[name] = own[name] + (before[name] - after[name]).astype(np.uint32)
    survivors = sorted(before.keys() - dropped)
    carried = np.zeros_like(own[survivors[0]])
    for name, following in pairwise(survivors):
        carried = carried + (before[name] - after[name]).astype(np.uint32)
        pair = frozenset({name, following})
        pairs[pair] = pairs[pair] + carried
    return own, pairs


@st.composite
def assignments(
    draw: st.DrawFn,
) -> tuple[dict[str, NDArray[np.int64]], dict[str, NDArray[np.int64]], set[str]]:
    """Two inputs whose survivors have one sum, and who dropped."""
    clients = names(draw(st.integers(3, 6)))
    vector = st.lists(st.integers(-(2**24), 2**24), min_size=8, max_size=8).map(np.array)
    dropped = set(draw(st.lists(st.sampled_from(clients), max_size=len(clients) - 2, unique=True)))
    before, after = ({name: draw(vector) for name in clients} for _ in range(2))
    last = max(set(clients) - dropped)
    survivors = [name for name in clients if name not in dropped]
    after[last] = after[last] + sum(before[name] - after[name] for name in survivors)
    return before, after, dropped


@given(assignments(), st.integers(0, 2**32))
@settings(deadline=None)
def test_any_other_inputs_of_the_same_sum_explain_the_view(
    drawn: tuple[dict[str, NDArray[np.int64]], dict[str, NDArray[np.int64]], set[str]], seed: int
) -> None:
    before, after, dropped = drawn
    made = terms(6)
    masks = tape(list(before), made, seed)
    seen = view(before, masks, dropped, made)
    assert view(after, explained(before, after, masks, dropped), dropped, made) == seen


def test_inputs_of_another_sum_explain_nothing() -> None:
    """The sum is in the view: the least that can be known."""
    made = terms(6)
    before = {name: np.full(8, place) for place, name in enumerate(names(4))}
    after = before | {FOUR[3]: before[FOUR[3]] + 1}
    masks = tape(FOUR, made, 0)
    assert view(after, explained(before, after, masks, set()), set(), made) != view(before, masks, set(), made)


def test_the_view_of_the_protocol_is_that_of_the_algebra() -> None:
    """What was proved above of ``view`` is of what clients really send: the same masks give the same words."""
    inputs = telling()
    ours, curious = played(inputs, late=False)
    own = {name: masking.expanded(seed, ours.terms) for name, seed in curious.own_seeds.items()}
    vectors = {name: contributed(name, inputs[name], ours.terms) for name in FOUR}
    shared = {
        name: masking.words_of(curious.vectors[name], ours.terms) - own[name] - vectors[name].astype(np.uint32)
        for name in FOUR
    }
    assert not np.sum(list(shared.values()), axis=0, dtype=np.uint32).any()
    assert all(uniformity(each) > UNLIKELY for each in shared.values())


def test_without_its_own_mask_a_late_client_is_laid_bare() -> None:
    """It was counted as dropped, so the others gave its mask key away; then its vector arrives."""
    inputs = telling()
    ours, curious = played(inputs)
    own = masking.expanded(curious.own_seeds[LATE], ours.terms)
    single = curious.left_of(LATE) - own  # what would be left if there were no own mask
    assert masking.signed(single).tolist() == contributed(LATE, inputs[LATE], ours.terms).tolist()


def test_with_its_own_mask_a_late_client_stays_hidden() -> None:
    ours, curious = played(telling())
    assert LATE in curious.mask_keys
    assert uniformity(curious.left_of(LATE)) > UNLIKELY
    assert LATE not in curious.seeds
    everybody = UnmaskRequest(round_id=ours.terms.round_id, survivors=tuple(FOUR), dropped=())
    for name in FOUR[:3]:
        with pytest.raises(PayloadError, match="stage over"):
            ours.clients[name].unmask(everybody)
    with pytest.raises(UpdateRejected, match="takes no part"):
        ours.server.add_unmasking(LATE, ours.clients[LATE].unmask(everybody))


def test_a_server_that_lies_about_who_survived_has_too_few_shares_of_either_secret() -> None:
    """To some it says that the victim sent its vector, to others that it did not; each answers once."""
    ours = SecureSum(terms(4), FOUR)
    ours.advertise()
    ours.share()
    ours.mask(dict.fromkeys(FOUR, np.zeros(8)))
    truth = UnmaskRequest(round_id=ours.terms.round_id, survivors=tuple(FOUR), dropped=())
    lie = UnmaskRequest(round_id=ours.terms.round_id, survivors=tuple(FOUR[1:]), dropped=(VICTIM,))
    told = {VICTIM: truth, FOUR[1]: truth, FOUR[2]: lie, FOUR[3]: lie}
    answers = [ours.clients[name].unmask(request) for name, request in told.items()]
    of_seed = sum(share.peer == VICTIM for each in answers for share in each.seed_shares)
    of_key = sum(share.peer == VICTIM for each in answers for share in each.key_shares)
    assert (of_seed, of_key) == (2, 2)
    assert max(of_seed, of_key) < ours.terms.threshold  # 3; with 2, which terms refuse, it would have had both
