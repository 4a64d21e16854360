"""The coordinator's own update, trained on data that it trusts: what FLTrust measures clients by."""

from dataclasses import replace

from pomona.adapters import AdapterWeights
from pomona.aggregation.defence import change
from pomona.aggregation.verify import update_norm
from pomona.client.train import train_locally
from pomona.coordinator.beginning import load_trusted
from pomona.coordinator.method import Work
from pomona.errors import ConfigError
from pomona.lora_model import AdaptedModel
from pomona.protocol import Invitation
from pomona.seeds import seed_of
from pomona.settings import RunSettings


class TrustedTrainer:
    """Trains as a client does, on ``defence.trusted_data``; the model is the coordinator's.

    Raises:
        DataError: The data are missing, malformed, or have a label that the run does not know.
    """

    def __init__(self, settings: RunSettings, invitation: Invitation, model: AdaptedModel) -> None:
        dataset = load_trusted(settings, invitation.labels)
        self._settings, self._model = settings, model
        self._data = model.encode(dataset.texts, dataset.labels, max_length=settings.model.max_length)

    def change(self, weights: AdapterWeights, work: Work, *, round_number: int) -> AdapterWeights:
        """Return what one round of training on the trusted data changes, from what a client of that work starts from.

        Args:
            weights: The global adapter.
            work: As of a client.
            round_number: From 1.
        """
        assignment = work.assignment
        trained = train_locally(
            self._model,
            self._data,
            start=AdapterWeights(layers=assignment.layers, heads=weights.heads),
            rank=assignment.rank,
            training=self._settings.training,
            adapter_seed=assignment.adapter_seed,
            batch_seed=seed_of(self._settings.seed, round_number, "trusted"),
            trainable=assignment.trainable,
            trains=assignment.trains,
            initial=assignment.initial,
        ).weights
        if update_norm(trained.layers, {}) == 0.0:
            raise ConfigError(
                f"the trusted data {self._settings.defence.trusted_data} change nothing, so nothing can be measured by "
                "them; give more of them, or a higher learning rate"
            )
        layers = {name: replace(each, scale=work.scale) for name, each in trained.layers.items()}
        return change(
            AdapterWeights(layers=layers, heads=trained.heads),
            start=work.start if assignment.trainable else {},
            heads=weights.heads,
        )
