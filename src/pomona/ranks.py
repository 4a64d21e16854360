"""The rank of each layer of a client's adapter, where layers differ."""

from collections.abc import Collection

from pomona.errors import ConfigError

RankPattern = tuple[tuple[str, float], ...]


def layer_rank(pattern: RankPattern, module: str, rank: int) -> int:
    """Return the rank of one layer, at least 1.

    Args:
        pattern: Last parts of module names, each with a factor; the longest that fits counts. Layers that none fits
            have the client's rank.
        module: Full name of the layer's module.
        rank: Of the client.

    Example:
        >>> pattern = (("query", 0.5), ("output.dense", 2.0))
        >>> [layer_rank(pattern, name, 8) for name in ("layer.0.query", "layer.0.key", "layer.0.output.dense")]
        [4, 8, 16]
    """
    fitting = [(len(name), factor) for name, factor in pattern if fits(name, module)]
    return max(1, round(max(fitting)[1] * rank)) if fitting else rank


def fits(name: str, module: str) -> bool:
    """Return whether a name is that of a module, or its last parts."""
    return module == name or module.endswith(f".{name}")


def check_pattern(pattern: RankPattern, modules: Collection[str]) -> None:
    """Check that every name of a pattern fits a layer.

    Raises:
        ConfigError: One fits none.
    """
    for name, _ in pattern:
        if not any(fits(name, module) for module in modules):
            known = sorted({module.rsplit(".", 1)[-1] for module in modules})
            raise ConfigError(
                f"training.rank_pattern names {name!r}, which no adapted layer ends with; they end with "
                f"{', '.join(known)}"
            )
