"""How a secure sum is asked for in a round of a run: what the first and the third stage carry beside its records.

====================  =================  ===========================================================
stage                 message type       request
====================  =================  ===========================================================
advertise keys        query.advertise    :class:`SumRequest`
share keys            query.share        :class:`~pomona.privacy.secure_sum.records.Roster`
masked input          query.mask         :class:`MaskRequest`, and the global adapter as its payload
unmask                query.unmask       :class:`~pomona.privacy.secure_sum.records.UnmaskRequest`
====================  =================  ===========================================================

No request states terms: both sides derive them from what the invitation promises (:func:`terms_of`), so a round can ask
for no weaker ones than the run was joined for.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from pomona.errors import ConfigError
from pomona.privacy.secure_sum.records import Delivery
from pomona.privacy.secure_sum.terms import Terms, effective_noise_multiplier
from pomona.protocol import Invitation, Rank, SecureSumPrivacy, TrainRequest

_HEADROOM = 1.0 + 2.0**-20  # for what sums of discrete Gaussians lack to one

_Number = Annotated[int, Field(ge=1, le=2**31)]


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SumRequest(_Request):
    """Opens a secure sum.

    Attributes:
        invitation: Repeated, so that a client that restarted can go on.
        round_number: From 1.
        attempt: From 1, at this round; one that was burnt is not tried again under its number.
        rank: Of what is summed: the widest that a client of this round trains.
    """

    invitation: Invitation
    round_number: _Number
    attempt: _Number
    rank: Rank

    @property
    def round_id(self) -> str:
        """The name of this sum, of which there is no other."""
        return f"{self.invitation.run_id}.{self.round_number}.{self.attempt}"


class MaskRequest(_Request):
    """Asks for a round's work, and for what comes of it, masked.

    Attributes:
        delivery: What the others sealed for this client.
        train: The work.
    """

    delivery: Delivery
    train: TrainRequest


def terms_of(promised: SecureSumPrivacy, *, round_id: str, dimensions: int) -> Terms:
    """Return the terms of a sum that keeps what was promised.

    Args:
        promised: To the clients of the run.
        round_id: Of the sum.
        dimensions: Numbers in a contribution.

    Raises:
        ConfigError: The promise contradicts itself, or cannot be kept for so many numbers.
    """
    terms = Terms(
        round_id=round_id,
        clients=promised.clients,
        threshold=promised.threshold,
        least_survivors=promised.least_survivors,
        colluding=promised.colluding,
        dimensions=dimensions,
        clip=promised.clip,
        noise_multiplier=promised.noise_multiplier * _HEADROOM,
        fraction_bits=promised.fraction_bits,
    )
    if (found := effective_noise_multiplier(terms)) < promised.noise_multiplier:
        raise ConfigError(
            f"the noise of so many shares over {dimensions} numbers counts as {found:.6g}, below the "
            f"{promised.noise_multiplier:.6g} that is promised; raise fraction_bits"
        )
    return terms
