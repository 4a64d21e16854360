"""A grid in one process whose nodes are real trainers and can misbehave."""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run as FlowerRun
from safetensors.torch import load, save
from torch import Tensor

from pomona.client.trainer import Profile, Trainer
from pomona.datasets import Dataset
from pomona.messages import pack, unpack
from pomona.protocol import ADVERTISE, EDIT, ENROL, MASK, SHARE, SUMS, TASK, TELL, UNMASK, Exclusion, TrainRequest

STAGES = (ADVERTISE, SHARE, MASK, UNMASK)

Answer = tuple[str, str, bytes]
Reply = Answer | Error | RecordDict | Exception | None
"""An answer, Flower's own error, other content, what Flower raises over unreadable bytes, or silence."""
Tamper = Callable[[str, Answer], Reply]
Change = Callable[[dict[str, Tensor], dict[str, object]], object]
"""Writes into the tensors and the facts of a payload of a task or of a request to forget."""
MakeNodes = Callable[..., list["Node"]]


def honest(_request: str, answer: Answer) -> Reply:
    return answer


@dataclass
class Node:
    """A client on the grid; ``enrols``, ``trains``, ``sums`` and ``learns`` may replace what its trainer answers.

    ``sums`` is told the type of the message, which is the stage of a secure sum, in place of the request; so is
    ``learns``, where it works on a task.
    """

    profile: Profile
    enrols: Tamper = honest
    trains: Tamper = honest
    sums: Tamper = honest
    learns: Tamper = honest
    worked: list[tuple[str, str, bytes]] = field(default_factory=list)
    joins_after: int = 0
    leaves_after: float = math.inf
    asked: list[tuple[TrainRequest, bytes]] = field(default_factory=list)
    invited: int = 0
    told: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.trainer = Trainer(self.profile)

    def answer(self, message: Message) -> Reply:
        _, request, payload = unpack(message)
        answer = self.trainer.answer(message.metadata.message_type, request, payload)
        if message.metadata.message_type == ENROL:
            self.invited += 1
            return self.enrols(request, answer)
        if message.metadata.message_type == TELL:
            self.told.append(Exclusion.model_validate_json(request).reason)
            return answer
        if message.metadata.message_type in STAGES:
            return self.sums(message.metadata.message_type, answer)
        if message.metadata.message_type in {TASK, SUMS, EDIT}:
            self.worked.append((message.metadata.message_type, request, payload))
            return self.learns(message.metadata.message_type, answer)
        self.asked.append((TrainRequest.model_validate_json(request), payload))
        return self.trains(request, answer)


def nodes_of(rows: Dataset, model: Path, owners: Sequence[int], count: int, **tampers: Tamper) -> list[Node]:
    """Return clients among whom rows are spread: row ``i`` is of client ``owners[i]``, who may tamper."""

    def profile(number: int) -> Profile:
        mine = rows.subset([i for i, each in enumerate(owners) if each == number])
        return Profile(name=f"client-{number}", rank=4, load_data=lambda _task: mine, model_folder=str(model))

    nodes = [Node(profile(number)) for number in range(count)]
    for name, tamper in tampers.items():
        nodes[int(name.removeprefix("client_"))].learns = tamper
    return nodes


def facts_of(payload: bytes) -> dict[str, Any]:
    """Return what a payload of a task or of a request states beside its tensors."""
    size = int.from_bytes(payload[:8], "little")
    facts: dict[str, Any] = json.loads(json.loads(payload[8 : 8 + size])["__metadata__"]["pomona"])
    return facts


def rewritten(answer: Answer, change: Change) -> Answer:
    """Return an answer whose payload was changed."""
    name, record, payload = answer
    tensors, facts = dict(load(payload)), facts_of(payload)
    change(tensors, facts)
    return name, record, save(tensors, {"pomona": json.dumps(facts)})


class InProcessGrid(Grid):
    """Delivers messages at once; their answers can be had in any order, or in that which ``order`` makes of a batch."""

    def __init__(self, nodes: Sequence[Node], *, order: Callable[[list[str]], list[str]] | None = None) -> None:
        self.nodes = dict(enumerate(nodes, start=101))
        self._order = order
        self._round = 0
        self._ids = map("message-{}".format, itertools.count())
        self._landed: dict[str, Message | Exception] = {}
        self._due: list[str] = []

    def set_run(self, run: FlowerRun) -> None:
        raise NotImplementedError

    @property
    def run(self) -> FlowerRun:
        raise NotImplementedError

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        """The nodes that are connected in the round that comes next."""
        return [key for key, node in self.nodes.items() if node.joins_after <= self._round < node.leaves_after]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = []
        for message in messages:
            assert message.metadata.ttl > 0
            message.metadata.__dict__["_message_id"] = next(self._ids)  # as Flower's own grids do
            if message.metadata.group_id:
                self._round = int(message.metadata.group_id)
            sent.append(message.metadata.message_id)
            reply = self.nodes[message.metadata.dst_node_id].answer(message)
            if isinstance(reply, tuple):
                reply = pack(*reply)
            if isinstance(reply, Exception):
                self._landed[message.metadata.message_id] = reply
            elif reply is not None:
                self._landed[message.metadata.message_id] = Message(reply, reply_to=message)
        if self._order is not None:
            self._due += self._order([key for key in sent if key in self._landed])
        return sent

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ready = [key for key in message_ids if key in self._landed and (self._due or [key])[0] == key]
        self._due = [key for key in self._due if key not in ready]
        found = [self._landed.pop(key) for key in ready]
        for each in found:
            if isinstance(each, Exception):
                raise each  # and the others of this call are gone, as with Flower's grids
        return [each for each in found if isinstance(each, Message)]
