"""``pomona privacy plan``: what a run would promise, what it would cost, and whether anything would be learned."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pomona.cli import privacy_ledger
from pomona.cli.options import Json
from pomona.cli.output import console, exit_on_error, print_json, print_table

if TYPE_CHECKING:
    from pomona.privacy.class_sums import SumsLayout
    from pomona.privacy.plan import PrivacyPlan

app = typer.Typer(name="privacy", help="Plan what a run promises, and see what was spent.", no_args_is_help=True)
app.command("ledger")(privacy_ledger.ledger)
app.command("certificate")(privacy_ledger.certificate)
app.command("confirm")(privacy_ledger.confirm)

_SHOWN_ROUNDS = 8


@app.command("plan")
def plan(
    path: Annotated[Path, typer.Argument(metavar="FILE", help=r"A run file with a section \[privacy].")],
    *,
    as_json: Json = False,
) -> None:
    """Show what the rounds of a run cost, the noise they need, and how that compares with what clients can say."""
    with exit_on_error(as_json=as_json):
        from pomona.coordinator.dimensions import task_dimensions, trained_dimensions  # noqa: PLC0415 - imports torch
        from pomona.privacy.plan import plan_of  # noqa: PLC0415
        from pomona.privacy.secure_sum.requests import terms_of  # noqa: PLC0415
        from pomona.run_file import load_settings  # noqa: PLC0415

        settings = load_settings(path)
        planned = plan_of(settings)
        layout = task_dimensions(settings)[1] if planned.sums_clip is not None else None
        dimensions = trained_dimensions(settings)
        if planned.secure_sum is not None:
            terms_of(planned.secure_sum, round_id="plan", dimensions=dimensions)  # refuses too coarse a grid
        facts = _facts(planned, dimensions, layout)
        if as_json:
            print_json(facts)
            return
        _show(planned, facts)


def _facts(planned: "PrivacyPlan", dimensions: int, layout: "SumsLayout | None") -> dict[str, object]:
    ratio, sigma = planned.noise_to_signal(dimensions), planned.update_noise_multiplier
    summed = {} if layout is None else layout.noise_of_class(noise_multiplier=sigma, divisor=planned.divisor)
    return {
        **planned.model_dump(mode="json"),
        "plan_sha256": planned.sha256,
        "epsilon": planned.epsilon_after(planned.rounds),
        "epsilon_by_round": {number: planned.epsilon_after(number) for number in _some(planned.rounds)},
        "epsilon_without_sampling": planned.epsilon_without_sampling,
        "dimensions": dimensions,
        "feasibility": ratio,
        "feasible": ratio <= 1.0,
        "advice": _advice(planned, dimensions),
        **({} if layout is None else {"sums_dimensions": layout.dimensions, "noise_of_class": summed}),
    }


def _some(rounds: int) -> list[int]:
    """Return about eight rounds, the first and the last among them."""
    step = max(1, rounds // (_SHOWN_ROUNDS - 1))
    return sorted({1, *range(step, rounds + 1, step), rounds})


def _advice(planned: "PrivacyPlan", dimensions: int) -> str:
    if (ratio := planned.noise_to_signal(dimensions)) <= 1.0:
        return ""
    if planned.unit == "example":
        return (
            f"the noise of one step is {ratio:.3g} times as long as the longest mean of gradients: take fewer steps of "
            "more records (training.batch_size with privacy.sample_rate), train fewer numbers (a lower rank, fewer "
            "target_modules), or allow a larger epsilon. The mean over steps and clients has less noise than this"
        )
    if planned.unit == "local":
        return (
            f"the noise on the mean of {planned.divisor**2 * 4:.0f} clients (cohort.min_clients), each of which adds "
            f"its own, is {ratio:.3g} times as long as the longest update: ask {ratio**2:.3g} times as many, or "
            "protect records (unit='example') or clients (unit='client', trust='distributed')"
        )
    fewer, instead = "a lower rank, ffa-nested, fewer target_modules", "protect single records with unit='example'"
    if planned.sums_clip is not None:
        fewer, instead = "a lower continual.mos.rank, fewer adapted_blocks", "learn fewer tasks in fewer rounds"
    return (
        f"the noise on the mean is {ratio:.3g} times as long as the longest update, so little will be learned: ask "
        f"{ratio:.3g} times as many clients a round, train {ratio**2:.3g} times fewer numbers ({fewer}), allow a "
        f"larger epsilon, or {instead}"
    )


def _size(planned: "PrivacyPlan") -> str:
    return "" if planned.population_size is None else f" of {planned.population_size:,}"


def _hidden(planned: "PrivacyPlan") -> str:
    if planned.unit == "local":
        return f"what one client of {planned.population} has"
    if planned.trust == "distributed":
        return f"what one {planned.unit}{_size(planned)} in {planned.population} contributed"
    return f"whether one {planned.unit}{_size(planned)} in {planned.population} took part"


def _sampling(planned: "PrivacyPlan") -> str:
    if planned.unit == "local":
        return "whoever is asked sends an update of its own, which everybody may see"
    if planned.unit == "example":
        return (
            f"each example of a client with probability {planned.sample_rate:g}, in each of "
            f"{planned.releases_per_round} steps a round"
        )
    if planned.trust == "distributed":
        return f"all of {planned.divisor:g} that are connected"
    if (made := planned.factorization) is not None:
        return f"each client once in {made.bands} rounds, by a public schedule, about {planned.divisor:g} a round"
    return f"each client with probability {planned.sample_rate:g}, about {planned.divisor:g} a round"


def _without_sampling(planned: "PrivacyPlan") -> list[tuple[str, str]]:
    """Return what is left of a promise that counts on a secret sample, for whoever knows the sample."""
    if not planned.amplified:
        return []
    known = "which examples a step took" if planned.unit == "example" else "who was asked"
    return [(f"for whoever knows {known}", f"epsilon {planned.epsilon_without_sampling:.4g}")]


def _spare(planned: "PrivacyPlan") -> str:
    return f", and room for {planned.spare_rounds} more that are tried again" if planned.spare_rounds else ""


def _clip(planned: "PrivacyPlan") -> str:
    if planned.sums_clip is not None:
        return f"{planned.clip:g}, of a task's sums {planned.sums_clip:g} rows"
    return f"{planned.clip:g}" + (", then adapting" if planned.count_noise else "")


def _noise_of_class(facts: dict[str, object]) -> list[tuple[str, str]]:
    """Return how large the noise on a class is, at best."""
    of_class = facts.get("noise_of_class")
    if not isinstance(of_class, dict):
        return []
    told = ", ".join(f"{kind} {value:.3g}" for kind, value in of_class.items())
    return [("noise / a class, at best", f"{told} (over {facts['sums_dimensions']:,} summed numbers)")]


def _show(planned: "PrivacyPlan", facts: dict[str, object]) -> None:
    ranks = f", ranks {planned.ranks[0]} to {planned.ranks[1]}" if planned.ranks else ""
    rows = [
        ("hidden", _hidden(planned)),
        ("from", "whoever sees the adapter" if planned.trust == "central" else "the coordinator, too"),
        ("mechanism", planned.mechanism + ranks),
        (
            "promise",
            f"epsilon {facts['epsilon']:.4g} at delta {planned.delta:g} after {planned.rounds} "
            f"{'rounds' if planned.sums_clip is None else 'releases'}{_spare(planned)}",
        ),
        ("budget", f"epsilon {planned.budget:g}, of all runs on {planned.population}"),
        *_without_sampling(planned),
        ("account", f"{planned.accountant} of {planned.library}, {planned.adjacency}"),
        ("sampling", _sampling(planned)),
        ("clip", _clip(planned)),
        ("noise multiplier", f"{planned.noise_multiplier:.4g}"),
        ("noise / longest update", f"{facts['feasibility']:.3g} over {facts['dimensions']:,} trained numbers"),
        *_noise_of_class(facts),
        ("plan", planned.sha256),
    ]
    print_table(("", ""), rows, title="Privacy plan")
    by_round = facts["epsilon_by_round"]
    assert isinstance(by_round, dict)
    print_table(
        ("after round" if planned.sums_clip is None else "after release", "epsilon"),
        [(number, f"{value:.4g}") for number, value in by_round.items()],
    )
    if facts["advice"]:
        grade = "Much noise" if planned.unit == "example" else "Hopeless as it is"
        console().print(f"[yellow]{grade}:[/] {facts['advice']}.")
