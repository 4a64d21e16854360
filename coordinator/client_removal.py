"""Forgetting a client: what its updates went into is found by lineage, and replaced by what never had them.

With ``v_1 ... v_T`` the versions of an adapter and ``v_k`` the first that an update of the client counts in,

* ``drop-block``: round ``k`` is aggregated again without the client. The others trained on ``v_{k-1}``, which it never
  touched, so the result is what a run would have published in which it did not answer, to the byte;
* ``rollback``: ``v_{k-1}`` itself, where round ``k`` cannot be made again, or would have failed without the client, or
  is a task: its sums could be taken out, but its adapter was trained with the client's.

The rounds after ``k`` are lost: others trained them on what the client had a part in, so their blocks carry it, and no
algebra takes it out. Training goes on from the new version. What was made under client-level differential privacy
stays: of whom it was made nobody wrote down, and its bound holds for whoever is removed.

All affected versions go into quarantine, the bytes of the client's updates are deleted, and a certificate for each
adapter says what was done. Exports that were made before, and what others hold, are out of reach; so are the bytes of
the versions in quarantine, which stay until somebody deletes them with the registry.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from pomona.adapters import AdapterWeights
from pomona.coordinator.certificate import certify, population_of
from pomona.coordinator.increments import State, encode_increment
from pomona.coordinator.memory import KINDS, StreamRecord, recall
from pomona.coordinator.recovery import coordinated, settings_of
from pomona.coordinator.replay import Replay, weights_of
from pomona.coordinator.round_loop import exactness_of
from pomona.errors import AdapterNotFound, BaseModelError, BlobCorrupt, ConfigError, DataError, NotEnoughClients
from pomona.storage.certificates import Certificate, NewCertificate
from pomona.storage.learned import NewLearned
from pomona.storage.records import Exactness, Parent, Run, Version
from pomona.storage.registry import Registry

_IMPOSSIBLE = (AdapterNotFound, BaseModelError, BlobCorrupt, ConfigError, DataError, NotEnoughClients)


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """What was done about one adapter.

    Attributes:
        certificate: As it was recorded.
        rounds_lost: Versions after the one that was made again.
    """

    certificate: Certificate
    rounds_lost: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Remedy:
    """What takes the place of the affected versions of an adapter."""

    method: str
    reason: str
    evidence: Mapping[str, object]
    new: NewLearned | None
    rounds_lost: int


def remove_client(
    registry: Registry, client: str, *, told: Callable[[str], None] = lambda _line: None
) -> tuple[list[Removal], int]:
    """Forget a client in every adapter of a registry.

    Interrupted, it is asked for again: what is done already is not done twice.

    Args:
        registry: Open for writing.
        client: Its name.
        told: Is called with a line before each step that takes long.

    Returns:
        One removal for each adapter that it is in, and how many of its updates were deleted.

    Raises:
        ConfigError: No run knows the client, or one that it is in goes on at this moment.
    """
    runs = [run for run in registry.runs() if any(each.name == client for each in registry.clients(run.id))]
    touched = [each for each in registry.touched_by(client) if client not in _left_out(each)]
    touched.sort(key=lambda each: (each.adapter, each.number))
    if not runs and not touched:
        raise ConfigError(f"no run of this registry has a client {client!r}; `pomona registry runs` lists the runs")
    for run in runs:
        if coordinated(registry, run.id) != "nowhere":
            raise ConfigError(f"{client!r} takes part in run {run.id}, which goes on at this moment; stop it first")
    removals = [_bounded(registry, client, run) for run in runs]
    for name, of_name in groupby(touched, lambda each: each.adapter):
        versions = list(of_name)
        if any(not each.quarantined for each in versions):
            told(f"{name}: making it again without {client}")
            removals.append(_removed(registry, client, versions))
    count = registry.withdraw(client, f"{client} was forgotten on request")
    for run in runs:
        _end(registry, run, client)
    return [each for each in removals if each is not None], count


def _removed(registry: Registry, client: str, touched: Sequence[Version]) -> Removal:
    affected = [each for each in touched if not each.quarantined]
    remedy = _remedy(registry, client, touched)
    certificate = NewCertificate(
        adapter=affected[0].adapter,
        scope="client",
        subjects=(client,),
        method=remedy.method,
        exactness="exact",
        reason=remedy.reason,
        evidence=remedy.evidence,
        affected=tuple(each.ref for each in affected),
    )
    if remedy.new is not None:
        registry.publish_learned(remedy.new, certificate=certificate, quarantined=certificate.affected)
        recorded = registry.certificates(affected[0].adapter)[-1]
    else:
        recorded = registry.record_certificate(certificate, quarantined=certificate.affected)
    return Removal(certificate=recorded, rounds_lost=remedy.rounds_lost)


def _remedy(registry: Registry, client: str, touched: Sequence[Version]) -> _Remedy:
    first = touched[0]
    affected = [each for each in touched if not each.quarantined]
    try:
        return _without_block(registry, client, touched)
    except _IMPOSSIBLE as error:
        why = str(error)
    earlier = [each for each in registry.versions(first.adapter) if each.number < first.number and not each.quarantined]
    lost = sum(each.kind in {"round", "task"} for each in affected)
    evidence: dict[str, object] = {"why_no_block_was_dropped": why, "rounds_lost": lost, **_before(affected)}
    if not earlier:
        reason = f"{client} is in every version of {first.adapter}, so nothing is left: {why}"
        return _Remedy(method="rollback", reason=reason, evidence=evidence, new=None, rounds_lost=lost)
    back = earlier[-1]
    reason = f"{back.ref} was published before {client} had a part in {first.adapter}; {lost} rounds are lost"
    evidence |= {"rolled_back_to": back.ref, **{f"{key}_after": value for key, value in _scores(back.metrics).items()}}
    recipe = {"rolled_back_to": back.ref, "without": [*_left_out(back), client], **_ended_stream(back)}
    new = _version(back, _payload_of(registry, back), back.metrics, back.exactness, recipe)
    new = replace(
        new, kind="forget" if back.kind in KINDS else "remainder", parents=(Parent(ref=back.ref, kind="forget"),)
    )
    return _Remedy(method="rollback", reason=reason, evidence=evidence, new=new, rounds_lost=lost)


def _ended_stream(back: Version) -> dict[str, object]:
    """Return the stream of a learned version as one that ends there, so that another can be learned on it."""
    if back.kind not in KINDS:
        return {}
    stream = StreamRecord.model_validate(back.recipe["stream"])
    ended = {"classes": stream.classes[: stream.done], "examples": stream.examples[: stream.done]}
    return {"stream": stream.model_copy(update=ended).model_dump(mode="json")}


def _payload_of(registry: Registry, back: Version) -> bytes:
    """Return the bytes of a version that says what another said: one that was learned adds nothing to that.

    But for classes that were forgotten since: they were to be learned again by nobody who does not ask for it.
    """
    if back.kind not in KINDS:
        return registry.blobs.get(back.sha256)
    memory = recall(registry, back.ref)
    asked = [label for each in registry.certificates(back.adapter) if each.scope == "class" for label in each.subjects]
    since = [label for label in asked if label not in memory.knowledge.classes]
    forgotten = list(dict.fromkeys([*memory.forgotten, *since]))
    return encode_increment(memory.state, State(memory.state.tensors, {**memory.state.facts, "forgotten": forgotten}))


def _without_block(registry: Registry, client: str, touched: Sequence[Version]) -> _Remedy:
    """Make the first affected round again without the client.

    Raises:
        One of ``_IMPOSSIBLE``: That cannot be, or the round would have failed.
    """
    first, affected = touched[0], [each for each in touched if not each.quarantined]
    if first.kind in KINDS:
        raise ConfigError(
            f"{first.ref} is a task, whose adapter was trained with {client} and is not trained again here"
        )
    if first.run_id is None or first.round_number is None:
        raise ConfigError(f"{first.ref} was made of affected versions, not of updates")
    settings = settings_of(registry.run(first.run_id))
    (made,) = registry.rounds(first.run_id, first.round_number)
    replay = Replay(settings)
    if replay.base_sha256 != first.base_sha256:
        raise BaseModelError(f"the base model of {first.ref} is not here")
    # without the clients that were forgotten before, the round has been made again already
    as_it_is = [first, *(each for each in touched if each.recipe.get("made_again") == first.ref)][-1]
    if replay.payload(registry, made) != registry.blobs.get(as_it_is.sha256):
        raise ConfigError(f"{as_it_is.ref} cannot be made again to the byte here: its machine or libraries were others")
    combined, _ = replay.combined(registry, made, without={client})
    scores = replay.scores(combined.weights)
    metrics = {"accuracy": scores.accuracy, "loss": scores.loss}
    lost = sum(each.kind == "round" and each.ref != first.ref for each in affected)
    left = sorted(combined.client_weights)
    energy = min(combined.retained_energy.values(), default=1.0)
    recipe = {"made_again": first.ref, "clients": left, "without": [*_left_out(as_it_is), client]}
    new = _version(first, replay.encoded(combined.weights, made), metrics, exactness_of(settings, energy), recipe)
    return _Remedy(
        method="drop-block",
        reason=f"round {made.number} of run {made.run_id} was aggregated again without {client}, from updates trained "
        f"before it had a part; {lost} later rounds are lost",
        evidence={
            "rounds_lost": lost,
            "clients_left": len(left),
            "round_was_made_again_to_the_byte": True,
            "distance": _distance(weights_of(registry, as_it_is), combined.weights),
            **_before(affected),
            **{f"{key}_after": value for key, value in metrics.items()},
        },
        new=replace(new, rank=combined.weights.rank, parents=_lineage(made.parent, first.ref)),
        rounds_lost=lost,
    )


def _version(
    like: Version, payload: bytes, metrics: Mapping[str, float], exactness: Exactness, recipe: Mapping[str, object]
) -> NewLearned:
    kept = {key: value for key, value in like.recipe.items() if key not in {"method_state", "request"}}
    return NewLearned(
        adapter=like.adapter,
        payload=payload,
        base_sha256=like.base_sha256,
        base_model=like.base_model,
        base_source="",
        rank=like.rank,
        kind="remainder",
        exactness=exactness,
        recipe={**kept, **recipe},
        metrics=metrics,
    )


def _lineage(trained_on: str | None, made_again: str) -> tuple[Parent, ...]:
    """The edge to the version that was made again finds the new one, when another of its clients is to be forgotten."""
    parents = () if trained_on is None else (Parent(ref=trained_on, kind="parent"),)
    return (*parents, Parent(ref=made_again, kind="forget"))


def _bounded(registry: Registry, client: str, run: Run) -> Removal | None:
    """Certify that a bound on every client's influence was promised beforehand; None where it was not."""
    made = [each for each in registry.versions(run.adapter) if each.run_id == run.id and _hides_clients(each)]
    known = [each for each in registry.certificates(run.adapter) if each.subjects == (client,)]
    if not made or any(each.method == "differential-privacy" and each.version == made[-1].ref for each in known):
        return None
    promise = certify(made[-1], registry.ledger(population_of(made[-1])))
    recorded = registry.record_certificate(
        NewCertificate(
            adapter=run.adapter,
            scope="client",
            subjects=(client,),
            method="differential-privacy",
            exactness="certified-DP",
            reason="whether it took part was hidden from the beginning, within epsilon and delta, and is not recorded",
            evidence={"epsilon": promise.epsilon, "delta": promise.delta, "adjacency": promise.adjacency},
            version=made[-1].ref,
        )
    )
    return Removal(certificate=recorded, rounds_lost=0)


def _hides_clients(version: Version) -> bool:
    told = version.recipe.get("privacy")
    plan = told.get("plan") if isinstance(told, Mapping) else None
    return isinstance(plan, Mapping) and plan.get("unit") == "client"


def _end(registry: Registry, run: Run, client: str) -> None:
    """A run whose versions are in quarantine does not go on; another run may begin from what is left."""
    (me,) = [each for each in registry.clients(run.id) if each.name == client]
    reason = f"{client} was forgotten on request"
    registry.enrol_client(run.id, name=client, rank=me.rank or 0, num_examples=me.num_examples or 0, excluded=reason)
    spoiled = any(each.run_id == run.id and each.quarantined for each in registry.versions(run.adapter))
    if run.state != "finished" and spoiled:
        registry.finish_run(run.id, "finished", f"{reason}, and it had a part in what was published")


def _left_out(version: Version) -> list[str]:
    """Return the clients that a version was made without on request."""
    names = version.recipe.get("without", ())
    return [str(each) for each in names] if isinstance(names, Sequence) and not isinstance(names, str) else []


def _before(affected: Sequence[Version]) -> dict[str, object]:
    newest = affected[-1]
    return {"newest_before": newest.ref, **{f"{key}_before": value for key, value in _scores(newest.metrics).items()}}


def _scores(metrics: Mapping[str, float]) -> dict[str, float]:
    return {key: metrics[key] for key in ("accuracy", "loss") if key in metrics}


def _distance(before: AdapterWeights, after: AdapterWeights) -> float:
    """Return ``||dW - dW'|| / ||dW||`` over all layers: how much of the version was the client's doing."""
    moved = total = 0.0
    for name, factors in before.layers.items():
        delta = factors.delta()
        other = after.layers[name].delta() if name in after.layers else 0.0 * delta
        moved, total = moved + float((delta - other).pow(2).sum()), total + float(delta.pow(2).sum())
    return (moved / total) ** 0.5 if total else 0.0
