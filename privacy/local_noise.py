"""Local differential privacy: a client clips and noises what it sends, and trusts nobody.

::

    u' = u min(1, C / ||u||) + N(0, (2 C sigma)^2 I)        u: how far its trained parameters moved

Whoever sees ``u'`` knows that the client sent something, so what is hidden is which of any two updates it was: they are
up to ``2 C`` apart, which is where the 2 comes from. Each round is one release, without any sampling to count on. An
update that is not finite counts as zero, like at a coordinator: a client that refused instead would tell of its data.
The mean over ``n`` clients has noise of ``2 C sigma / sqrt(n)``, where a trusted coordinator's has ``C sigma / n``: so
little is learned from few, and this is the last resort.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pomona.privacy.clipping import clip
from pomona.privacy.randomness import SecureRandom
from pomona.protocol import LocalPrivacy


@torch.no_grad()
def hide_move(
    parameters: Sequence[Tensor], before: Sequence[Tensor], *, privacy: LocalPrivacy, noise: SecureRandom
) -> None:
    """Move parameters back to what they may be sent as: where they were, and the clipped and noised move from there.

    Args:
        parameters: All that was trained and is sent; changed in place.
        before: What they were before training, in the same order.
        privacy: Bound and noise.
        noise: Where the noise comes from.

    Raises:
        ValueError: They are not as many, or of other shapes.
    """
    moves = {
        str(i): (after - old).to("cpu", torch.float64)
        for i, (after, old) in enumerate(zip(parameters, before, strict=True))
    }
    scale = 2.0 * privacy.clip * privacy.noise_multiplier
    for move, parameter, old in zip(clip(moves, privacy.clip).values(), parameters, before, strict=True):
        drawn = torch.from_numpy(noise.normal(move.numel())).reshape(move.shape)
        parameter.copy_(old.to("cpu", torch.float64) + move + scale * drawn)
