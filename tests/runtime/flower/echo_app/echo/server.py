"""One message of each size and some that a node refuses, to the one node there is."""

import time
from hashlib import sha256

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.2)
    (node,) = nodes
    for size in map(int, str(context.run_config["sizes"]).split()):
        sent = _bytes(size)
        began = time.monotonic()
        reply = _ask(grid, node, _record(sent))
        seconds = time.monotonic() - began
        assert reply.has_content(), reply.error
        array = reply.content["fedlean"]["message"]
        assert (array.dtype, array.shape, array.stype) == ("uint8", (size,), "fedlean")
        assert array.data == sent[::-1]
        print(f"ECHOED {size} in {seconds:.2f} s")  # noqa: T201
    limit = int(context.run_config["limit-bytes"])
    refused = {
        "large": _record(_bytes(limit + 1)),
        "config": RecordDict({"fedlean": ConfigRecord({"a": 1})}),
        "name": RecordDict({"other": _record(b"x")["fedlean"]}),
        "stype": _record(b"x", stype="numpy.ndarray"),
        "two": RecordDict({"fedlean": _record(b"x")["fedlean"], "b": _record(b"y")["fedlean"]}),
        "empty": RecordDict(),
    }
    for name, content in refused.items():
        reply = _ask(grid, node, content)
        assert reply.has_error(), name
        print(f"REFUSED {name}: {reply.error.reason}")  # noqa: T201


def _ask(grid: Grid, node: int, content: RecordDict) -> Message:
    message = Message(content, dst_node_id=node, message_type="train", group_id="7")
    (sent,) = grid.push_messages([message])
    end = time.monotonic() + 30
    while not (replies := list(grid.pull_messages([sent]))):  # send_and_receive looks every 3 s
        assert time.monotonic() < end
        time.sleep(0.05)
    (reply,) = replies
    assert reply.metadata.group_id == "7"
    return reply


def _record(data: bytes, stype: str = "fedlean") -> RecordDict:
    return RecordDict(
        {"fedlean": ArrayRecord({"message": Array("uint8", (len(data),), stype, data)})}
    )


def _bytes(size: int) -> bytes:
    """Half of them zero, so that some chunks are equal."""
    noise = b"".join(sha256(str(each).encode()).digest() for each in range(size // 64 + 1))
    return (noise + bytes(size))[:size]
