"""What a run promises about privacy, as a run file says it."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pomona.aggregation_settings import Fraction, Section, changed

_LARGEST_DELTA = 1e-2

Rank = Annotated[int, Field(ge=1, le=4096)]


class AdaptiveClipSettings(Section):
    """A clipping bound that follows the clients' norms.

    Attributes:
        quantile: Share of clients whose norm should be below the bound.
        learning_rate: How fast the bound moves.
        count_noise: Standard deviation of the noise on how many are below it, in clients; None: a twentieth of the
            expected cohort.
    """

    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    learning_rate: PositiveFloat = 0.2
    count_noise: PositiveFloat | None = None


class SecureSumSettings(Section):
    """How clients that trust nobody with an update of theirs are summed up, for ``trust = "distributed"``.

    Attributes:
        least_survivors: So many clients are in a sum, or its round is burnt. Noise shares are sized for it, so a sum of
            more has more noise than it needs. None: as many as the threshold.
        threshold: So many clients together can unmask a sum; None: the least that a lying server cannot abuse, more
            than half of the population and of those that collude.
        colluding: So many clients may tell the coordinator all they know; their noise counts for nothing.
        fraction_bits: Vectors are rounded to multiples of ``2^-fraction_bits``.
    """

    least_survivors: PositiveInt | None = None
    threshold: PositiveInt | None = None
    colluding: NonNegativeInt = 0
    fraction_bits: Annotated[int, Field(ge=0, le=52)] = 16


class PrivacySettings(Section):
    """Differential privacy of a run.

    Attributes:
        unit: Whose presence is hidden: ``client`` all that a client has, by noise on the sum at the coordinator;
            ``example`` one record of a client, by noise in its training; ``local`` all that a client has, by noise that
            the client itself puts on what it sends.
        trust: Who sees what a client sends, for ``client``: ``central`` the coordinator, which adds the noise;
            ``distributed`` nobody, as clients mask their updates, and add noise shares of their own (a secure sum).
        population: Name of the enrolled clients whose budget this run draws on; runs that ask the same people share it.
        population_size: How many are enrolled, for ``client``: fixed and public.
        epsilon: What the population may spend in all, by all runs together.
        delta: Below 1 over the population's size.
        noise_multiplier: Standard deviation of the noise over ``clip``; None: the least with which this run's rounds
            fit into ``epsilon``.
        clip: Bound on the norm of what one client (or one example) contributes, over all layers and the head.
        sums_clip: Bound on the norm of the sums that one client contributes at the end of a task of ``[continual]``, in
            rows: one row has norm 1.
        sample_rate: Probability with which each enrolled client is asked in a round, for ``client``; of each example in
            a step, for ``example``.
        ranks: ``[least, most]``: each round trains one rank drawn between them, for ``fedit`` under ``client``.
        accountant: ``prv`` for runs whose every release is fixed beforehand, ``rdp`` for those that adapt.
        adaptive_clip: Let the bound follow the norms, for ``client``.
        bands: Each client takes part in every so many-th round, by a public schedule, and the noise of a round takes
            back some of that before it (DP-FTRL by a banded matrix); counts on no sampling; for ``fedit`` and ``ffa``.
        spare_rounds: So many releases more than rounds fit into ``epsilon``: a round that a crash cuts off, or a secure
            sum that comes to nothing, is paid, and tried again.
        cohort_secret: Nobody but the coordinator learns who was asked; without that sampling hides nobody, and none is
            claimed.
        secure_sum: How clients are summed up, for ``distributed``.
    """

    unit: Literal["client", "example", "local"]
    trust: Literal["central", "distributed"] = "central"
    population: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    population_size: PositiveInt | None = None
    epsilon: PositiveFloat
    delta: Annotated[float, Field(gt=0, lt=1)]
    noise_multiplier: PositiveFloat | None = None
    clip: PositiveFloat = 1.0
    sums_clip: PositiveFloat = 1.0
    sample_rate: Fraction = 1.0
    ranks: tuple[Rank, Rank] | None = None
    accountant: Literal["prv", "rdp"] = "prv"
    adaptive_clip: AdaptiveClipSettings | None = None
    bands: PositiveInt | None = None
    spare_rounds: NonNegativeInt = 0
    cohort_secret: bool = True
    secure_sum: SecureSumSettings = SecureSumSettings()

    @model_validator(mode="after")
    def _unit_has_them(self) -> Self:
        if (self.unit == "client") != (self.population_size is not None):
            raise ValueError(
                "privacy.population_size goes with unit='client' and with no other; "
                f"got unit={self.unit!r} and population_size={self.population_size}"
            )
        names = ("trust", "ranks", "adaptive_clip", "bands", "cohort_secret")
        given = {name for name in names if changed(self, name)}
        if self.unit != "client" and given:
            raise ValueError(f"privacy.{min(given)} goes with unit='client', got unit={self.unit!r}")
        if self.trust == "central" and changed(self, "secure_sum"):
            raise ValueError("privacy.secure_sum goes with trust='distributed'; give that too, or leave it out")
        if self.ranks is not None and self.ranks[0] > self.ranks[1]:
            raise ValueError(f"expected privacy.ranks as [least, most], got {list(self.ranks)}")
        return self

    @model_validator(mode="after")
    def _delta_of_others_is_small(self) -> Self:
        if self.unit != "client" and self.delta > _LARGEST_DELTA:
            raise ValueError(
                f"privacy.delta={self.delta} lets one {self.unit if self.unit == 'example' else 'client'} in "
                f"{1.0 / self.delta:.0f} be published whole; choose it far below one over their number, and at most "
                f"{_LARGEST_DELTA:g}"
            )
        return self

    @model_validator(mode="after")
    def _delta_is_small(self) -> Self:
        if self.population_size is not None and self.delta >= 1.0 / self.population_size:
            raise ValueError(
                f"privacy.delta={self.delta} lets the data of one client in {self.population_size} be published whole; "
                f"choose it below {1.0 / self.population_size:g}"
            )
        return self
