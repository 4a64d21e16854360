"""Asking Flower which replies are there, without taking any of them in.

Flower's ``pull_messages`` is a request that says which replies have come, and then some more for the objects of each.
Asked for one message alone it costs the server the same queries as for a thousand, so a round that asks for each of its
silent clients again and again keeps the server from taking in the updates of the others. Here one request asks for all,
and each reply can be fetched by itself.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

from flwr.app import Message
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects
from flwr.superlink.grid.http_grid import HttpGrid

from pomona.errors import PayloadError

Fetch: TypeAlias = Callable[[], Sequence[Message]]


def landed(grid: Grid, message_ids: Sequence[str]) -> dict[str, Fetch]:
    """Return how to fetch each reply that is there, by the id of the message it answers.

    Fetching can take long, where the rest of a reply is still on its way, and raises whatever Flower raises over bytes
    that it cannot read. A reply is named once, and never again: who asks must fetch it.

    Args:
        grid: Flower's grid. One that cannot say what is there, because it lives in this process, names every message,
            and fetching returns nothing where there is no reply yet.
        message_ids: The messages that wait for a reply.
    """
    if not isinstance(grid, HttpGrid):
        return {each: partial(_pull, grid, each) for each in message_ids}
    found = grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=message_ids))
    pairs = zip(found.messages_list, found.message_object_trees, strict=True)
    return {reply.metadata.reply_to_message_id: partial(_fetch, grid, reply, tree) for reply, tree in pairs}


def _pull(grid: Grid, message_id: str) -> Sequence[Message]:
    return list(grid.pull_messages([message_id]))


def _fetch(grid: HttpGrid, reply: MessageProto, tree: ObjectTree) -> Sequence[Message]:
    """Take in one reply, as Flower's grid does it."""
    client, message_id, run_id = grid._runtime_client, reply.metadata.message_id, grid.run.run_id
    contents = pull_objects(
        [each.object_id for each in iterate_object_tree(tree)],
        make_pull_object_fn_protobuf(client.PullObject, grid.node, run_id),
    )
    confirmed = ConfirmMessageReceivedRequest(node=grid.node, run_id=run_id, message_object_id=message_id)
    client.ConfirmMessageReceived(confirmed)
    message = inflate_object_from_contents(message_id, contents)
    if not isinstance(message, Message):
        raise PayloadError(f"expected a message, got {type(message).__name__}")
    message.metadata.__dict__["_message_id"] = message_id
    return [message]
