"""Four classes of things in two files, and how to learn them in moments."""

from collections.abc import Callable
from pathlib import Path

from pomona.coordinator.continual_settings import ContinualSettings, EncoderSettings
from pomona.forget_settings import ForgetSettings
from pomona.mos_settings import LoopSettings, MosSettings

ROOT = Path(__file__).parents[2]
ANIMAL_FOOD, TOOL_WEATHER = ("animal", "food"), ("tool", "weather")
SETTINGS = ContinualSettings(
    encoder=EncoderSettings(max_length=32),
    mos=MosSettings(rank=2, training=LoopSettings(epochs=1, min_steps=8)),
    forget=ForgetSettings(steps=6, rank=2),
)

Write = Callable[..., str]
