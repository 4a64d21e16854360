"""Facts about the aggregation strategies, for people and programs that choose one. Imports no torch.

The mathematics is in :mod:`pomona.aggregation.strategies`, one module for each name here.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict

StrategyName = Literal["flora-bounded", "flora", "fedit", "hetlora", "ffa", "ffa-nested", "rolora", "flexlora", "fedex"]


class StrategyFacts(BaseModel):
    """What a strategy is and is not.

    Attributes:
        name: As in a run file's ``aggregation.strategy``.
        exact: Whether the new global adapter is the weighted mean of what clients trained, but for a truncation whose
            loss is reported.
        heterogeneous_ranks: Whether clients may train different ranks in one round.
        keeps_no_op: Whether a round in which no client changes anything leaves the global adapter as it was.
        download_grows_with_clients: Whether what a client downloads grows with the size of the cohort.
        client_dp: Whether noise for client-level differential privacy can be added to a plain sum of what is sent.
        secure_aggregation: Whether the server needs no more than a plain sum of what is sent.
        reference: Paper.
        summary: One sentence.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: StrategyName
    exact: bool
    heterogeneous_ranks: bool
    keeps_no_op: bool
    download_grows_with_clients: bool
    client_dp: bool
    secure_aggregation: bool
    reference: str
    summary: str


def _facts(
    name: StrategyName,
    reference: str,
    summary: str,
    *,
    exact: bool = False,
    ranks: bool = False,
    no_op: bool = True,
    grows: bool = False,
    linear: bool = False,
) -> StrategyFacts:
    return StrategyFacts(
        name=name,
        exact=exact,
        heterogeneous_ranks=ranks,
        keeps_no_op=no_op,
        download_grows_with_clients=grows,
        client_dp=linear,
        secure_aggregation=linear,
        reference=reference,
        summary=summary,
    )


STRATEGIES: tuple[StrategyFacts, ...] = (
    _facts(
        "flora-bounded",
        "Wang et al., FLoRA, NeurIPS 2024, arXiv 2409.05976, eq. 5; Eckart and Young 1936",
        "Stacks exactly on top of the global adapter, then truncates optimally to max_rank.",
        exact=True,
        ranks=True,
    ),
    _facts(
        "flora",
        "Wang et al., FLoRA, NeurIPS 2024, arXiv 2409.05976",
        "Stacks exactly and sends the whole stack to everybody; nothing is ever truncated.",
        exact=True,
        ranks=True,
        grows=True,
    ),
    _facts(
        "fedit",
        "Zhang et al., FedIT, ICASSP 2024, arXiv 2305.05644",
        "Averages both factors separately: cheap, but a mean of products is not the product of the means.",
        linear=True,
    ),
    _facts(
        "hetlora",
        "Cho et al., HetLoRA, EMNLP 2024, arXiv 2401.06432",
        "Pads smaller ranks with zeros, averages the factors, truncates for each client.",
        ranks=True,
        no_op=False,
    ),
    _facts(
        "ffa",
        "Sun et al., FFA-LoRA, ICLR 2024, arXiv 2403.12313",
        "Freezes A at its random start and averages B: exact and linear, with half the capacity.",
        exact=True,
        linear=True,
    ),
    _facts(
        "ffa-nested",
        "Sun et al., FFA-LoRA, ICLR 2024; Valipour et al., DyLoRA, EACL 2023 (nested rows)",
        "Draws a public A each round, of which clients take the first rows, so sums of B are exact for any ranks.",
        exact=True,
        ranks=True,
        linear=True,
    ),
    _facts(
        "rolora",
        "Chen et al., RoLoRA, NeurIPS 2025, arXiv 2409.02346",
        "Trains A and B in turn, one a round, so each mean is exact and both factors learn.",
        exact=True,
        linear=True,
    ),
    _facts(
        "flexlora",
        "Bai et al., FlexLoRA, NeurIPS 2024, arXiv 2402.11505",
        "Averages the products, then gives each client the largest components that fit its rank.",
        exact=True,
        ranks=True,
        no_op=False,
    ),
    _facts(
        "fedex",
        "Singhal et al., FedEx-LoRA, ACL 2025, arXiv 2410.09432",
        "Averages the factors and adds what that gets wrong as a frozen residual.",
        exact=True,
        grows=True,
    ),
)

BY_NAME = {facts.name: facts for facts in STRATEGIES}
EQUAL_RANK: frozenset[str] = frozenset(facts.name for facts in STRATEGIES if not facts.heterogeneous_ranks)
REDISTRIBUTING: frozenset[str] = frozenset({"hetlora", "flexlora"})
FACTORS_COUNT: frozenset[str] = frozenset({"flora", "fedit", "hetlora", "ffa", "rolora", "fedex"})
ADDING: frozenset[str] = frozenset({"flora-bounded", "ffa-nested"})
