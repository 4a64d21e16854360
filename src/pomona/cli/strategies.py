"""``pomona strategies``."""

from pomona.cli.options import Json
from pomona.cli.output import console, exit_on_error, print_json, print_table

_YES = {True: "yes", False: "no"}


def strategies(*, as_json: Json = False) -> None:
    """List the aggregation strategies that a run file can name."""
    with exit_on_error(as_json=as_json):
        from pomona.strategies import STRATEGIES  # noqa: PLC0415

        if as_json:
            print_json([facts.model_dump() for facts in STRATEGIES])
            return
        columns = ("strategy", "exact", "any ranks", "no-op kept", "download grows", "plain sums")
        rows = [
            (
                facts.name,
                _YES[facts.exact],
                _YES[facts.heterogeneous_ranks],
                _YES[facts.keeps_no_op],
                _YES[facts.download_grows_with_clients],
                _YES[facts.secure_aggregation],
            )
            for facts in STRATEGIES
        ]
        print_table(columns, rows)
        for facts in STRATEGIES:
            console().print(f"{facts.name}: {facts.summary}")
