"""Settings of learning task after task and of forgetting, from an optional TOML file."""

import json
import tomllib
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, ValidationError, model_validator

from pomona.aggregation_settings import Section, changed
from pomona.errors import ConfigError
from pomona.forget_settings import ForgetSettings
from pomona.mos_settings import MosSettings


class EncoderSettings(Section):
    """How texts become features.

    Attributes:
        max_length: Longer texts are cut, in tokens.
    """

    max_length: Annotated[int, Field(ge=4, le=8192)] = 64


class ContinualSettings(Section):
    """A settings file: the tables ``[encoder]``, ``[mos]`` and ``[forget]``, each of which may be absent.

    Attributes:
        encoder: Must stay as it was for as long as an adapter is learned on.
        mos: Of ``pomona learn``, likewise; its seed is said on the command line.
        forget: Of ``pomona forget``.
    """

    encoder: EncoderSettings = EncoderSettings()
    mos: MosSettings = MosSettings()
    forget: ForgetSettings = ForgetSettings()

    @model_validator(mode="after")
    def _one_seed(self) -> Self:
        if changed(self.mos, "seed"):
            raise ValueError("mos.seed: leave it out and say it by --seed")
        return self


def load_continual_settings(path: Path | None) -> ContinualSettings:
    """Read a settings file; without one, return the defaults.

    Raises:
        ConfigError: The file cannot be read, is no TOML, has an unknown key, or a value out of range.
    """
    if path is None:
        return ContinualSettings()
    try:
        text = path.read_text(encoding="utf-8")
        return ContinualSettings.model_validate_json(json.dumps(tomllib.loads(text), default=str), strict=True)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the settings file {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    except ValidationError as error:
        wrong = (
            f"{'.'.join(map(str, item['loc']))}: {item['msg'].removeprefix('Value error, ')}, got {item['input']!r}"
            for item in error.errors(include_url=False)
        )
        raise ConfigError(f"{path}: {'; '.join(wrong)}") from error
