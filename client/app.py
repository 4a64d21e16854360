"""Flower ClientApp of a real client: a relay to the trainer process that ``pomona join`` keeps. Imports no torch."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from pomona.client.relay import ask
from pomona.errors import PomonaError
from pomona.messages import pack, unpack
from pomona.protocol import refusal

app = ClientApp()


@app.query()
def enrol(message: Message, context: Context) -> Message:
    """Relay an invitation."""
    return relay(message, context)


@app.query("tell")
def tell(message: Message, context: Context) -> Message:
    """Relay why the client takes no part."""
    return relay(message, context)


@app.query("advertise")
def advertise(message: Message, context: Context) -> Message:
    """Relay the first stage of a secure sum."""
    return relay(message, context)


@app.query("share")
def share(message: Message, context: Context) -> Message:
    """Relay its second stage."""
    return relay(message, context)


@app.query("mask")
def mask(message: Message, context: Context) -> Message:
    """Relay its third stage, which has the round's work."""
    return relay(message, context)


@app.query("unmask")
def unmask(message: Message, context: Context) -> Message:
    """Relay its last stage."""
    return relay(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Relay one round's work."""
    return relay(message, context)


def relay(message: Message, context: Context) -> Message:
    """Hand a message to the trainer and return its answer; what fails is answered with a refusal."""
    name = str(context.node_config.get("name", ""))
    try:
        _, json, payload = unpack(message)
        answer = ask(str(context.node_config.get("trainer", "")), message.metadata.message_type, json, payload)
    except PomonaError as error:
        answer = ("refusal", refusal(name, error).model_dump_json(), b"")
    return Message(pack(*answer), reply_to=message)
