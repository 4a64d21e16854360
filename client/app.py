"""Flower ClientApp of a real client: a relay to the trainer process that ``pomona join`` keeps. Imports no torch."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from pomona.client.relay import ask
from pomona.errors import PomonaError
from pomona.messages import pack, unpack
from pomona.protocol import refusal

app = ClientApp()


def relay(message: Message, context: Context) -> Message:
    """Hand a message to the trainer and return its answer; what fails is answered with a refusal."""
    name = str(context.node_config.get("name", ""))
    try:
        _, json, payload = unpack(message)
        answer = ask(str(context.node_config.get("trainer", "")), message.metadata.message_type, json, payload)
    except PomonaError as error:
        answer = ("refusal", refusal(name, error).model_dump_json(), b"")
    return Message(pack(*answer), reply_to=message)


app.query()(relay)
app.train()(relay)
app.train("task")(relay)
app.train("edit")(relay)
for _action in ("tell", "advertise", "share", "mask", "unmask", "sums"):
    app.query(_action)(relay)
