"""The long-lived process of a client: loads the model once and trains whenever its relay asks.

Flower starts a fresh process for every message; importing torch and loading a model there would cost more than the
training. So that process only hands the message over a local socket to this one (:mod:`pomona.client.relay`).
Run as ``python -m pomona.client.daemon``; ``pomona join`` does.
"""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Listener

from pydantic import BaseModel, ConfigDict, TypeAdapter

from pomona.client.relay import receive, send
from pomona.client.required_privacy import RequiredPrivacy
from pomona.datasets import Dataset, load_dataset
from pomona.logs import configure_logs
from pomona.processes import die_with_parent
from pomona.protocol import refusal

_log = logging.getLogger("pomona")

Handler = Callable[[str, str, bytes], tuple[str, str, bytes]]


class TrainerSpec(BaseModel):
    """One client of this process: its socket and who it is, see :class:`pomona.client.join.JoinSettings`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    socket: str
    name: str
    rank: int | None
    data: str
    model: str = ""
    memory_share: float = 0.5
    round_s: float | None = None
    required_privacy: RequiredPrivacy | None = None


def main(arguments: list[str] | None = None) -> int:
    """Open the sockets, then load what takes long, then serve.

    Several clients of one machine, as in the demo, are children of one process, so that what they import is loaded
    once and its memory is shared; each still trains alone.
    """
    options = _parser().parse_args(arguments)
    die_with_parent()
    configure_logs(text="%(message)s", stream=sys.stdout)
    specs = TypeAdapter(list[TrainerSpec]).validate_json(options.clients)
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(Listener(spec.socket, family="AF_UNIX", backlog=8)) for spec in specs]
        import torch  # noqa: PLC0415 - takes seconds, during which requests already queue at the sockets

        torch.set_num_threads(options.threads)
        if len(specs) > 1:
            import pomona.client.trainer  # noqa: PLC0415, F401 - once for all that are forked

            return _fork_each(specs, listeners)
        serve(listeners[0], _trainer(specs[0]))
    return 0


def _fork_each(specs: Sequence[TrainerSpec], listeners: Sequence[Listener]) -> int:
    for spec, listener in zip(specs, listeners, strict=True):
        if os.fork() == 0:
            die_with_parent()
            serve(listener, _trainer(spec))
    pid, status = os.wait()  # no child ends by itself
    _log.error("the trainer with process id %d ended", pid)
    return os.waitstatus_to_exitcode(status) or 1


def serve(listener: Listener, handle: Handler) -> None:
    """Answer one request per connection, for ever."""
    while True:
        try:
            with listener.accept() as connection:
                _serve_one(connection, handle)
        except (EOFError, OSError, UnicodeDecodeError) as error:
            _log.warning("a request broke off: %r", error)


def _serve_one(connection: Connection, handle: Handler) -> None:
    request = receive(connection)
    try:
        answer = handle(*request)
    except Exception as error:  # a client outlives a request that nobody foresaw
        _log.exception("a request failed")
        answer = ("refusal", refusal("", f"the trainer failed: {type(error).__name__}").model_dump_json(), b"")
    send(connection, *answer)


def _trainer(spec: TrainerSpec) -> Handler:
    from pomona.client.capacity import Budget  # noqa: PLC0415
    from pomona.client.trainer import Profile, Trainer  # noqa: PLC0415

    def load(task: str) -> Dataset:
        return load_dataset(spec.data, split=None, task="causal-lm" if task == "causal-lm" else "classification")

    _log.info("%s: ready; rank %s, data %s", spec.name, spec.rank or "auto", spec.data)
    budget = Budget(memory_share=spec.memory_share, round_s=spec.round_s)
    profile = Profile(
        name=spec.name,
        rank=spec.rank,
        load_data=load,
        model_folder=spec.model,
        budget=budget,
        required_privacy=spec.required_privacy,
    )
    return Trainer(profile).answer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pomona.client.daemon", description=__doc__)
    parser.add_argument("--clients", required=True, help="JSON list of clients")
    parser.add_argument("--threads", type=int, default=1)
    return parser


if __name__ == "__main__":
    sys.exit(main())
