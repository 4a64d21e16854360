"""The long-lived process of a client: loads the model once and trains whenever its relay asks.

Flower starts a fresh process for every message; importing torch and loading a model there would cost more than the
training. So that process only hands the message over a local socket to this one (:mod:`pomona.client.relay`).
Run as ``python -m pomona.client.daemon``; ``pomona join`` does.
"""

import argparse
import logging
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection, Listener

from pomona.client.relay import receive, send
from pomona.datasets import Dataset, load_dataset
from pomona.processes import die_with_parent

_log = logging.getLogger("pomona")

Handler = Callable[[str, str, bytes], tuple[str, str, bytes]]


def main(arguments: list[str] | None = None) -> int:
    """Open the socket, then load what takes long, then serve."""
    options = _parser().parse_args(arguments)
    die_with_parent()
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
    with Listener(options.socket, family="AF_UNIX", backlog=8) as listener:
        serve(listener, _trainer(options))
    return 0


def serve(listener: Listener, handle: Handler) -> None:
    """Answer one request per connection, for ever."""
    while True:
        try:
            with listener.accept() as connection:
                _serve_one(connection, handle)
        except (EOFError, OSError) as error:
            _log.warning("a request broke off: %r", error)


def _serve_one(connection: Connection, handle: Handler) -> None:
    send(connection, *handle(*receive(connection)))


def _trainer(options: argparse.Namespace) -> Handler:
    import torch  # noqa: PLC0415 - takes seconds, during which requests already queue at the socket

    from pomona.client.trainer import Profile, Trainer  # noqa: PLC0415

    torch.set_num_threads(options.threads)

    def load(task: str) -> Dataset:
        return load_dataset(options.data, split=None, task="causal-lm" if task == "causal-lm" else "classification")

    profile = Profile(name=options.name, rank=options.rank, load_data=load, model_folder=options.model)
    _log.info("%s: ready; rank %d, data %s", options.name, options.rank, options.data)
    return Trainer(profile).answer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pomona.client.daemon", description=__doc__)
    parser.add_argument("--socket", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="")
    parser.add_argument("--threads", type=int, default=1)
    return parser


if __name__ == "__main__":
    sys.exit(main())
