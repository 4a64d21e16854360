"""A plan holds everything together; what it cannot promise it refuses, and says what would be sound."""

import hashlib
import json
from typing import Any

import pytest
from pydantic import ValidationError

from pomona.coordinator.dimensions import dimensions_of
from pomona.errors import ConfigError
from pomona.manifest import AdapterManifest
from pomona.privacy.accounting import Event, epsilon
from pomona.privacy.plan import PrivacyPlan, plan_of
from pomona.privacy.secure_sum.requests import terms_of
from pomona.privacy.secure_sum.terms import effective_noise_multiplier
from pomona.settings import RunSettings

CLIENT = {
    "unit": "client",
    "population": "phones",
    "population_size": 10_000,
    "epsilon": 4.0,
    "delta": 1e-5,
    "sample_rate": 0.02,
    "accountant": "rdp",
}
FEDIT = {"strategy": "fedit", "rank": 8}


def run(privacy: dict[str, Any] | None = None, **sections: object) -> RunSettings:
    facts: dict[str, Any] = {"name": "private", "rounds": 50, "aggregation": FEDIT, "privacy": CLIENT | (privacy or {})}
    return RunSettings.model_validate(facts | sections)


def test_a_plan_spends_the_budget_and_hardly_less() -> None:
    plan = plan_of(run())
    assert 0.98 * 4.0 < plan.epsilon_after(50) <= 4.0
    assert plan.divisor == 200.0
    assert plan.event(50) == Event(noise_multiplier=plan.noise_multiplier, sample_rate=0.02, count=50)


def test_epsilon_grows_round_by_round_to_what_is_promised() -> None:
    plan = plan_of(run())
    spent = [plan.epsilon_after(rounds) for rounds in (0, 1, 10, 50)]
    assert spent[0] == 0.0
    assert spent == sorted(set(spent))
    assert spent[-1] == epsilon([plan.event(50)], delta=1e-5, accountant="rdp")


def test_rank_and_dimensions_cost_nothing() -> None:
    """Noise is on a sum of clipped vectors, however long they are; only what is learned depends on it."""
    fixed, dynamic = plan_of(run()), plan_of(run({"ranks": (1, 8)}))
    assert (fixed.mechanism, dynamic.mechanism) == ("dp-lora", "dp-dylora")
    assert fixed.noise_multiplier == dynamic.noise_multiplier
    assert fixed.sha256 != dynamic.sha256


@pytest.mark.parametrize(
    ("strategy", "mechanism"), [("fedit", "dp-lora"), ("ffa", "ffa"), ("ffa-nested", "ffa-nested")]
)
def test_each_sum_has_its_mechanism(strategy: str, mechanism: str) -> None:
    rank = {} if strategy == "ffa-nested" else {"rank": 8}
    assert plan_of(run(aggregation={"strategy": strategy, **rank})).mechanism == mechanism


def test_a_cohort_that_others_see_is_not_amplified() -> None:
    open_, secret = plan_of(run({"cohort_secret": False})), plan_of(run())
    assert (open_.amplified, secret.amplified) == (False, True)
    assert open_.noise_multiplier > 5 * secret.noise_multiplier
    assert open_.epsilon_without_sampling == pytest.approx(open_.epsilon_after(50), rel=0.2)
    assert secret.epsilon_without_sampling > 10 * secret.epsilon_after(50)


def test_adapting_the_bound_has_its_price() -> None:
    plan = plan_of(run({"adaptive_clip": {}}))
    assert plan.count_noise == 10.0
    assert plan.update_noise_multiplier > plan.noise_multiplier == plan_of(run()).noise_multiplier
    assert plan.update_noise_multiplier**-2 + (2 * plan.count_noise) ** -2 == pytest.approx(plan.noise_multiplier**-2)


def test_the_hash_is_of_everything_and_of_nothing_else() -> None:
    plan = plan_of(run())
    assert plan.sha256 == PrivacyPlan.model_validate_json(plan.model_dump_json()).sha256
    for change in ({"clip": 2.0}, {"delta": 1e-6}, {"population": "others"}, {"sample_rate": 0.01}):
        assert plan_of(run(change)).sha256 != plan.sha256


def test_the_noise_against_the_signal_is_what_the_note_says() -> None:
    """sigma sqrt(d) / (q N); above 1 nothing can be learned."""
    plan = plan_of(run({"noise_multiplier": 1.0, "epsilon": 1000.0}))
    assert plan.noise_to_signal(40_000) == pytest.approx(1.0)


def test_dimensions_count_what_is_trained() -> None:
    manifest = AdapterManifest(base_sha256="0" * 64, layers={"q": (30, 20), "v": (10, 20)}, heads={"head.bias": (3, 4)})
    assert dimensions_of(run(), manifest) == 8 * (50 + 30) + 12
    assert dimensions_of(run(aggregation={"strategy": "ffa", "rank": 8}), manifest) == 8 * (30 + 10) + 12
    assert dimensions_of(run(aggregation={"strategy": "ffa-nested", "max_rank": 16}), manifest) == 16 * 40 + 12


def test_a_run_that_would_cost_more_than_its_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cost epsilon .* more than privacy.epsilon=4"):
        plan_of(run({"noise_multiplier": 0.3}))


def test_without_the_section_nothing_is_promised() -> None:
    with pytest.raises(ConfigError, match=r"expected a section \[privacy\]"):
        plan_of(RunSettings(name="plain"))


@pytest.mark.parametrize(
    ("change", "reason", "alternative"),
    [
        ({"aggregation": {"strategy": "flora-bounded"}}, "a block of their own", "ffa-nested"),
        ({"aggregation": {"strategy": "flora"}}, "a block of their own", "ffa-nested"),
        ({"aggregation": {"strategy": "fedex", "rank": 8}}, "a block of their own", "ffa-nested"),
        ({"aggregation": {"strategy": "hetlora"}}, "no plain sum", "fedit"),
        ({"aggregation": {"strategy": "flexlora"}}, "no plain sum", "fedit"),
        ({"aggregation": {"strategy": "rolora", "rank": 8}}, "not among the mechanisms", "fedit"),
        ({"aggregation": {"strategy": "ffa-nested"}, "defence": {"kind": "norm-bounding"}}, "what others sent", "clip"),
        ({"cohort": {"fraction": 0.1}}, "a fixed number", "sample_rate"),
        ({"cohort": {"size": 10}}, "a fixed number", "sample_rate"),
        ({"cohort": {"min_replies": 3}}, "by how many answered", "always releases"),
    ],
)
def test_what_is_unsound_is_refused_with_what_is_sound(change: dict[str, Any], reason: str, alternative: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        plan_of(run(**change))
    assert alternative in str(caught.value)


def test_ranks_are_drawn_for_all_clients_of_one_strategy() -> None:
    with pytest.raises(ConfigError, match="DP-DyLoRA on strategy='fedit'"):
        plan_of(run({"ranks": (1, 8)}, aggregation={"strategy": "ffa", "rank": 8}))
    with pytest.raises(ConfigError, match="end at the rank"):
        plan_of(run({"ranks": (1, 4)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta": 1e-4}, "published whole"),
        ({"population_size": None}, "population_size goes with"),
        ({"unit": "example"}, "population_size goes with"),
        ({"unit": "example", "population_size": None, "ranks": (1, 8)}, "ranks goes with unit='client'"),
        ({"ranks": (8, 1)}, "least, most"),
        ({"noise_multiplier": 0.0}, "greater than 0"),
        ({"epsilon": -1.0}, "greater than 0"),
        ({"sample_rate": 0.0}, "greater than 0"),
        ({"accountant": "gdp"}, "'prv' or 'rdp'"),
        ({"seed": 1}, "Extra inputs"),
        ({"population": "a b"}, "pattern"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        run(change)


@pytest.mark.parametrize(
    ("privacy", "aggregation", "told"),
    [
        ({"bands": 5}, {"strategy": "ffa-nested"}, "keep its coordinates"),
        ({"bands": 5, "ranks": (1, 8)}, FEDIT, "keep its coordinates"),
        ({"bands": 5, "sample_rate": 0.5}, FEDIT, "two ways"),
        ({"bands": 5, "adaptive_clip": {}}, FEDIT, "no bound can adapt"),
    ],
)
def test_bands_go_with_sums_that_keep_their_coordinates(
    privacy: dict[str, Any], aggregation: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        plan_of(run({"sample_rate": 1.0, **privacy}, aggregation=aggregation))


def test_bands_cost_what_their_participations_do_and_count_on_no_sampling() -> None:
    plan = plan_of(run({"bands": 5, "sample_rate": 1.0, "accountant": "prv"}))
    assert (plan.sampler, plan.amplified, plan.divisor) == ("min-separation", False, 2000.0)
    assert 0.98 * 4.0 < plan.epsilon_after(50) <= 4.0
    assert plan.epsilon_after(50) == plan.epsilon_after(1) == plan.epsilon_without_sampling
    spared = plan_of(run({"bands": 5, "sample_rate": 1.0, "spare_rounds": 1, "accountant": "prv"}))
    assert spared.noise_multiplier > plan.noise_multiplier
    assert spared.epsilon_after(51) > spared.epsilon_after(50)


EXAMPLE = {
    "unit": "example", "population": "wards", "epsilon": 4.0, "delta": 1e-5, "sample_rate": 0.02, "accountant": "rdp",
}  # fmt: skip


def of_examples(privacy: dict[str, Any] | None = None, **sections: object) -> RunSettings:
    facts = {"name": "wards", "rounds": 10, "training": {"max_steps": 5}, "privacy": EXAMPLE | (privacy or {})}
    return RunSettings.model_validate(facts | sections)


def test_a_plan_for_examples_pays_for_every_step_and_allows_any_aggregation() -> None:
    plan = plan_of(of_examples())
    assert (plan.unit, plan.mechanism, plan.releases_per_round, plan.population_size) == ("example", "dp-sgd", 5, None)
    assert plan.event(10).count == 50
    assert 0.98 * 4.0 < plan.epsilon_after(10) <= 4.0
    for strategy in ("flora", "flora-bounded", "flexlora", "hetlora"):
        assert plan_of(of_examples(aggregation={"strategy": strategy})).noise_multiplier == plan.noise_multiplier


def test_a_plan_for_examples_needs_a_public_number_of_steps() -> None:
    with pytest.raises(ConfigError, match="max_steps"):
        plan_of(of_examples(training={"local_epochs": 2}))
    with pytest.raises(ConfigError, match="self_pruning"):
        plan_of(of_examples(aggregation={"strategy": "hetlora", "self_pruning": {}}))


def test_a_run_cannot_wait_for_more_clients_than_its_population_has() -> None:
    with pytest.raises(ConfigError, match="room for"):
        plan_of(run({"population_size": 100, "delta": 1e-3}, cohort={"min_clients": 101}))


DISTRIBUTED = {"trust": "distributed", "population_size": 100, "sample_rate": 1.0, "delta": 1e-3}


def test_a_plan_for_clients_that_trust_nobody_promises_what_its_terms_keep() -> None:
    plan = plan_of(run(DISTRIBUTED, aggregation={"strategy": "ffa-nested"}))
    assert plan.secure_sum is not None
    assert (plan.trust, plan.adjacency, plan.amplified, plan.divisor) == ("distributed", "zero-out-one", False, 100.0)
    assert (plan.secure_sum.clients, plan.secure_sum.threshold, plan.secure_sum.least_survivors) == (100, 51, 51)
    assert 0.98 * 4.0 < plan.epsilon_after(50) == plan.epsilon_without_sampling <= 4.0
    terms = terms_of(plan.secure_sum, round_id="run-1.1.1", dimensions=100_000)
    assert plan.noise_multiplier <= effective_noise_multiplier(terms) < 1.0001 * plan.noise_multiplier
    assert plan.event() == Event(noise_multiplier=plan.noise_multiplier, sample_rate=1.0, count=1)
    assert plan.noise_to_signal(10_000) == pytest.approx(plan.noise_multiplier * (100 / 51) ** 0.5, rel=1e-4)


@pytest.mark.parametrize(
    "change",
    [{"least_survivors": 60}, {"threshold": 60, "least_survivors": 70}, {"colluding": 5}, {"fraction_bits": 20}],
)
def test_the_hash_is_of_the_terms_too(change: dict[str, Any]) -> None:
    plans = [plan_of(run({**DISTRIBUTED, "secure_sum": each})) for each in ({}, change)]
    assert plans[0].sha256 != plans[1].sha256
    assert plans[1].sha256 == PrivacyPlan.model_validate_json(plans[1].model_dump_json()).sha256


@pytest.mark.parametrize(
    ("change", "reason", "alternative"),
    [
        ({"population_size": 513, "delta": 1e-4}, "agrees on keys with every other", "several populations"),
        ({"sample_rate": 0.5}, "sampling hides nobody", "leave privacy.sample_rate out"),
        ({"bands": 5}, "draw the noise, each afresh", "leave privacy.bands out"),
        ({"adaptive_clip": {}}, "nobody sees how many norms", "fixed privacy.clip"),
        ({"accountant": "prv"}, "bound on Renyi divergences", "'rdp'"),
        ({"secure_sum": {"least_survivors": 101}}, "never comes about", "trust='central'"),
        ({"secure_sum": {"threshold": 50}}, "lies about who survived", "at least 51"),
        ({"secure_sum": {"threshold": 60, "least_survivors": 55}}, "threshold <= least_survivors", "60, 55"),
        ({"secure_sum": {"fraction_bits": 0}}, "variance of", "raise fraction_bits"),
        ({"population_size": 1, "delta": 0.1}, "never comes about", "trust='central'"),
    ],
)
def test_sums_behind_masks_that_would_not_keep_their_promise_are_refused(
    change: dict[str, Any], reason: str, alternative: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        plan_of(run({**DISTRIBUTED, **change}))
    assert alternative in str(caught.value)


@pytest.mark.parametrize("strategy", ["flora-bounded", "flora", "fedex", "hetlora", "flexlora", "rolora"])
def test_only_plain_sums_go_behind_masks(strategy: str) -> None:
    rank = {"rank": 8} if strategy in {"fedex", "rolora"} else {}
    with pytest.raises(ConfigError, match="choose"):
        plan_of(run(DISTRIBUTED, aggregation={"strategy": strategy, **rank}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"secure_sum": {"least_survivors": 3}}, "secure_sum goes with trust='distributed'"),
        ({"trust": "distributed", "unit": "example", "population_size": None}, "trust goes with unit='client'"),
        ({"trust": "nobody"}, "'central' or 'distributed'"),
    ],
)
def test_trust_and_its_section_go_together(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        run(change)


def local(privacy: dict[str, Any] | None = None, **sections: object) -> RunSettings:
    given = {"unit": "local", "population": "sites", "epsilon": 8.0, "delta": 1e-5} | (privacy or {})
    facts = {"name": "sites", "rounds": 4, "privacy": given, "cohort": {"min_clients": 16}}
    return RunSettings.model_validate(facts | sections)


def test_a_local_plan_counts_on_no_sampling_and_on_noise_for_any_two_updates() -> None:
    plan = plan_of(local())
    assert (plan.unit, plan.mechanism, plan.adjacency, plan.amplified) == (
        "local", "local-gaussian", "replace-one", False,
    )  # fmt: skip
    assert 0.98 * 8.0 < plan.epsilon_after(4) == plan.epsilon_without_sampling <= 8.0
    assert plan.noise_to_signal(10_000) == pytest.approx(plan.noise_multiplier * 100.0 / 2.0)
    with pytest.raises(ConfigError, match="who sent what"):
        plan_of(local({"sample_rate": 0.5}))


@pytest.mark.parametrize("unit", ["example", "local"])
def test_a_delta_that_publishes_units_whole_is_refused_of_whatever_unit(unit: str) -> None:
    given = {"unit": unit, "population": "wards", "epsilon": 1.0, "delta": 0.011}
    with pytest.raises(ValidationError, match="be published whole"):
        RunSettings.model_validate({"name": "wards", "training": {"max_steps": 1}, "privacy": given})
    RunSettings.model_validate({"name": "wards", "training": {"max_steps": 1}, "privacy": given | {"delta": 0.009}})


TASKS = {"tasks": [["a", "b"], ["c"], ["d", "e", "f"]], "rounds_per_task": 4}


def of_tasks(privacy: dict[str, Any] | None = None, continual: dict[str, Any] | None = None) -> RunSettings:
    facts = {"name": "tasks", "privacy": CLIENT | (privacy or {}), "continual": TASKS | (continual or {})}
    return RunSettings.model_validate(facts)


def test_a_plan_for_tasks_pays_for_each_round_and_each_task_s_sums() -> None:
    plan = plan_of(of_tasks({"sums_clip": 3.0, "spare_rounds": 2}))
    assert (plan.mechanism, plan.sampler, plan.divisor, plan.sums_clip) == ("ffa-tasks", "poisson", 200.0, 3.0)
    assert plan.rounds == (4 + 1) + 1 + (4 + 1)
    assert 0.98 * 4.0 < plan.epsilon_after(plan.rounds + 2) <= 4.0
    assert plan.sha256 != plan_of(of_tasks({"sums_clip": 4.0, "spare_rounds": 2})).sha256
    assert PrivacyPlan.model_validate_json(plan.model_dump_json()) == plan


def test_a_plan_without_tasks_has_the_hash_that_it_had_before_there_were_any() -> None:
    """Else what was released under it could not be certified any more."""
    plan = plan_of(run())
    facts = plan.model_dump(mode="json")
    assert facts.pop("sums_clip") is None
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    assert plan.sha256 == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("privacy", "continual", "says"),
    [
        ({"unit": "example", "population_size": None}, {}, "got privacy.unit. Choose unit='client'"),
        ({"unit": "local", "population_size": None, "sample_rate": 1.0}, {}, "got privacy.unit. Choose unit='client'"),
        ({"trust": "distributed", "sample_rate": 1.0}, {}, "got privacy.trust. Choose unit='client'"),
        ({"bands": 2, "sample_rate": 1.0}, {}, "of a fixed clip; got privacy.bands. Choose"),
        ({"adaptive_clip": {}}, {}, "of a fixed clip; got privacy.adaptive_clip. Choose"),
        ({"ranks": (1, 8)}, {}, "of a fixed clip; got privacy.ranks. Choose"),
        ({}, {"tasks": [], "classes_per_task": 2}, "name the classes of each task as continual.tasks"),
        ({}, {"mos": {"head": "ridge"}}, "choose continual.mos.head='combined', 'gaussian' or 'aligned'"),
        ({}, {"mos": {"head": "ridge-own"}}, "choose continual.mos.head='combined', 'gaussian' or 'aligned'"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_tasks_is_refused_with_what_does(
    privacy: dict[str, Any], continual: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        plan_of(of_tasks(privacy, continual))


def test_a_bound_on_sums_goes_with_tasks() -> None:
    with pytest.raises(ConfigError, match=r"the run has no \[continual\]; leave it out"):
        plan_of(run({"sums_clip": 2.0}))
    with pytest.raises(ConfigError, match=r"cohort.min_replies lets a round end by how many answered"):
        plan_of(run(cohort={"min_replies": 2}, aggregation={}, rounds=3, continual=TASKS))
