"""The aggregation strategies that can be selected and compared, by name."""

from pomona.aggregation.strategies import (
    fedex,
    fedit,
    ffa,
    ffa_nested,
    flexlora,
    flora,
    flora_bounded,
    hetlora,
    rolora,
)
from pomona.aggregation.strategies.contract import AddingStrategy, Strategy
from pomona.strategies import StrategyName

BY_NAME: dict[StrategyName, Strategy] = {
    "flora-bounded": flora_bounded,
    "flora": flora,
    "fedit": fedit,
    "hetlora": hetlora,
    "ffa": ffa,
    "ffa-nested": ffa_nested,
    "rolora": rolora,
    "flexlora": flexlora,
    "fedex": fedex,
}
ADDING: dict[str, AddingStrategy] = {"flora-bounded": flora_bounded, "ffa-nested": ffa_nested}
