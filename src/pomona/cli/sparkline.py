"""Numbers as a line of blocks, one character each."""

import math
from collections.abc import Sequence

WIDTH = 40
_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII = "_.-~=+*#"


def sparkline(values: Sequence[float], *, encoding: str = "utf-8") -> str:
    """Return the newest numbers as heights between the lowest and the highest of them; a blank for one not finite.

    Args:
        values: The numbers, oldest first; only the last 40 are drawn.
        encoding: What the terminal understands; one without blocks gets plain characters.

    Example:
        >>> sparkline([1.0, 2.0, 3.0, float("nan"), 1.0])
        '▁▅█ ▁'
        >>> sparkline([2.0, 2.0]), sparkline([]), sparkline([0.0, 1.0], encoding="ascii")
        ('▁▁', '', '_#')
    """
    marks = _BLOCKS if encoding.lower().startswith("utf") else _ASCII
    drawn = values[-WIDTH:]
    finite = [value for value in drawn if math.isfinite(value)]
    lowest = min(finite, default=0.0)
    span = max(finite, default=0.0) / 2 - lowest / 2  # halves: the whole might overflow
    return "".join(marks[_height(value, lowest, span)] if math.isfinite(value) else " " for value in drawn)


def _height(value: float, lowest: float, span: float) -> int:
    return round((value / 2 - lowest / 2) / span * (len(_BLOCKS) - 1)) if span > 0 else 0
