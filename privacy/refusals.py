"""Combinations that would not keep their promise: each is refused with the reason and with what is sound instead."""

from collections.abc import Callable

from pomona.aggregation_settings import changed
from pomona.errors import ConfigError
from pomona.privacy.secure_sum.terms import MAX_CLIENTS
from pomona.settings import RunSettings
from pomona.strategies import BY_NAME

Rule = Callable[[RunSettings], str]


def check(settings: RunSettings) -> None:
    """Refuse what cannot be promised.

    Raises:
        ConfigError: With the first reason.
    """
    for rule in RULES:
        if reason := rule(settings):
            raise ConfigError(f"privacy: {reason}")


def _tasks(settings: RunSettings) -> str:
    """Tasks one after another: one mechanism, one sampler, one account; what is asked for besides is named."""
    wanted, continual = settings.privacy, settings.continual
    if wanted is None or continual is None:
        return ""
    fixed: dict[str, object] = {
        "unit": "client",
        "trust": "central",
        "ranks": None,
        "bands": None,
        "adaptive_clip": None,
    }
    if other := [f"privacy.{name}" for name, value in fixed.items() if getattr(wanted, name) != value]:
        return (
            f"[continual] hides clients by noise on the coordinator's sums, of a fixed clip; got {', '.join(other)}. "
            "Choose unit='client' and trust='central', a sample_rate to ask fewer in a release, and leave the rest out"
        )
    if not continual.tasks:
        return (
            "how many releases a run takes must stand in its file, and continual.classes_per_task leaves the number of "
            "tasks to the data; name the classes of each task as continual.tasks"
        )
    if continual.mos.keeps_ridge_sums:
        return (
            f"head={continual.mos.head!r} needs sums over all pairs of its {continual.mos.ridge_dimensions} random "
            "features, over which noise would be spread too; choose continual.mos.head='combined', 'gaussian' or "
            "'aligned'"
        )
    return ""


def _sums_clip(settings: RunSettings) -> str:
    if settings.privacy is None or settings.continual is not None or not changed(settings.privacy, "sums_clip"):
        return ""
    return "privacy.sums_clip bounds the sums at the end of a task, and the run has no [continual]; leave it out"


def _stacking(settings: RunSettings) -> str:
    name = settings.aggregation.strategy
    if not _is_central(settings) or settings.continual is not None or name in {"fedit", "ffa", "ffa-nested"}:
        return ""
    if name in {"flora", "flora-bounded", "fedex"}:
        return (
            f"{name} keeps every client's factors in a block of their own, so noise would have to go on every block "
            "and hide each client as if it were alone; choose strategy='ffa-nested', which equals the stack and is a "
            "sum"
        )
    if not BY_NAME[name].client_dp:
        return (
            f"{name} is no plain sum of what clients send, so no bound on one client's share of it is known; choose "
            "strategy='ffa-nested' for unequal ranks, 'fedit' with privacy.ranks for DP-DyLoRA"
        )
    return f"{name} is not among the mechanisms; choose 'fedit', 'ffa' or 'ffa-nested'"


def _robust(settings: RunSettings) -> str:
    if not _is_central(settings) or settings.defence.kind == "none":
        return ""
    return (
        f"defence {settings.defence.kind} weighs a client by what others sent, which no bound on its own share covers; "
        "leave it out: the clipping bound limits every client"
    )


def _rank_of_clients(settings: RunSettings) -> str:
    wanted = settings.privacy
    if wanted is None or wanted.ranks is None:
        return ""
    if settings.aggregation.strategy != "fedit":
        return (
            f"privacy.ranks draws one rank for all clients of a round, which is DP-DyLoRA on strategy='fedit'; got "
            f"strategy={settings.aggregation.strategy!r}"
        )
    if wanted.ranks[1] != settings.aggregation.rank:
        return (
            f"privacy.ranks={list(wanted.ranks)} should end at the rank of the global adapter, "
            f"aggregation.rank={settings.aggregation.rank}"
        )
    return ""


def _cohort(settings: RunSettings) -> str:
    if not _is_central(settings) or (settings.cohort.fraction is None and settings.cohort.size is None):
        return ""
    return (
        "cohort.fraction and cohort.size draw a fixed number of the clients that happen to be connected, and the "
        "account is for independent coins over all that are enrolled; leave them out and give privacy.sample_rate"
    )


def _size(settings: RunSettings) -> str:
    wanted = settings.privacy
    if wanted is None or wanted.population_size is None or settings.cohort.min_clients <= wanted.population_size:
        return ""
    return (
        f"the run waits for {settings.cohort.min_clients} clients, and the population has room for "
        f"{wanted.population_size}; raise privacy.population_size"
    )


def _replies(settings: RunSettings) -> str:
    if not _is_central(settings) or settings.cohort.min_replies == 1:
        return ""
    return (
        "cohort.min_replies lets a round end by how many answered, which tells who did without noise; leave it out: a "
        "round under privacy.unit='client' always releases"
    )


def _pattern(settings: RunSettings) -> str:
    if settings.privacy is None or settings.privacy.ranks is None or not settings.training.rank_pattern:
        return ""
    return "privacy.ranks draws one rank for all layers, and training.rank_pattern gives each its own; leave one out"


def _bands(settings: RunSettings) -> str:
    wanted = settings.privacy
    if wanted is None or wanted.bands is None:
        return ""
    if settings.aggregation.strategy not in {"fedit", "ffa"} or wanted.ranks is not None:
        return (
            "privacy.bands lets the noise of a round take back that of the rounds before, so what is summed must keep "
            "its coordinates: choose strategy='fedit' or 'ffa' without privacy.ranks"
        )
    if wanted.sample_rate != 1.0:
        return "privacy.bands and privacy.sample_rate are two ways to choose who is asked; give one"
    if wanted.adaptive_clip is not None:
        return "privacy.bands sizes the noise of all rounds at once, so no bound can adapt; leave adaptive_clip out"
    return ""


def _steps(settings: RunSettings) -> str:
    if settings.privacy is None or settings.privacy.unit != "example" or settings.training.max_steps > 0:
        return ""
    return (
        "under unit='example' each step of a client's training is a release, and how many there are must be public: "
        "give training.max_steps (a number of epochs would tell how many examples a client has)"
    )


def _tail(settings: RunSettings) -> str:
    if settings.privacy is None or settings.aggregation.self_pruning is None:
        return ""
    return "aggregation.self_pruning tells by a client's rank what its data need; leave it out"


def _local(settings: RunSettings) -> str:
    if settings.privacy is None or settings.privacy.unit != "local" or settings.privacy.sample_rate == 1.0:
        return ""
    return (
        "under unit='local' everybody sees who sent what, so privacy.sample_rate hides nobody; leave it out, and give "
        "cohort.fraction or cohort.size to ask fewer"
    )


def _trust(settings: RunSettings) -> str:
    wanted = settings.privacy
    if wanted is None or wanted.trust == "central":
        return ""
    if (wanted.population_size or 0) > MAX_CLIENTS:
        return (
            f"under trust='distributed' every client agrees on keys with every other, which {MAX_CLIENTS} can and "
            f"population_size={wanted.population_size} cannot; choose trust='central', or several populations"
        )
    if wanted.sample_rate != 1.0:
        return (
            "under trust='distributed' the coordinator knows who was asked, so sampling hides nobody from it and only "
            "makes sums smaller; leave privacy.sample_rate out: whoever is connected takes part"
        )
    return ""


def _noise_shares(settings: RunSettings) -> str:
    wanted = settings.privacy
    if wanted is None or wanted.trust == "central":
        return ""
    if wanted.bands is not None:
        return (
            "under trust='distributed' clients draw the noise, each afresh in every round, so none can be taken back "
            "later; leave privacy.bands out, or choose trust='central'"
        )
    if wanted.adaptive_clip is not None:
        return (
            "under trust='distributed' nobody sees how many norms are below the bound, which adaptive_clip follows; "
            "give a fixed privacy.clip, or choose trust='central'"
        )
    if wanted.accountant != "rdp":
        return (
            f"accountant={wanted.accountant!r} is for Gaussian noise, and clients add integers whose sum is not quite "
            "that; what is proved of it is a bound on Renyi divergences: choose privacy.accountant='rdp'"
        )
    return ""


def _is_central(settings: RunSettings) -> bool:
    return settings.privacy is not None and settings.privacy.unit == "client"


RULES: tuple[Rule, ...] = (
    _tasks, _sums_clip, _local, _stacking, _robust, _rank_of_clients, _pattern, _trust, _noise_shares, _bands, _cohort,
    _size, _replies, _steps, _tail,
)  # fmt: skip
