"""Whose number is whose: devices that claim another's, come back, or never say who they are."""

from __future__ import annotations

import logging

import pytest
from federation import CLIENTS, client_data, run, server
from loopback import Loopback, kind_of, remote

from fedlean.methods.fedavg import fedavg
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.remote import envelope as env
from fedlean.runtime.remote.dispatch import RemoteDispatch
from fedlean.runtime.remote.envelope import Envelope, seal, unseal
from fedlean.runtime.remote.worker import Worker

pytestmark = pytest.mark.usefixtures("clock")

ROGUE = 999


def device(post: Loopback, node: int, client: int | None, identity: str) -> None:
    """A device of that name, connected as `node`, claims a number, or none."""
    folder = post.folder / f"device {node}"
    data = client_data()[client or 0]
    post.workers[node] = Worker(folder, data, client=client, engine="native", identity=identity)
    post.there.add(node)


def nodes(dispatch: RemoteDispatch, step: int = 1) -> dict[int, int]:
    """Client -> node, of those that a step may choose from."""
    present = dispatch.begin(ClientStore(), step)
    return {each.id: dispatch._roster.node[each.id] for each in present}


def rounds(dispatch: RemoteDispatch, count: int = 1) -> None:
    run(fedavg(server(count), lr=0.05, local_steps=1, batch_size=4), dispatch=dispatch)


def told(post: Loopback, node: int) -> list[str]:
    """Why this node was refused, as often as it was told."""
    hellos = [content for to, content in post.sent if to == node and kind_of(content) == env.HELLO]
    reasons = (unseal(each, expected=(env.HELLO,)).fields["refused"] for each in hellos)
    return [reason for reason in reasons if reason]


# One number, two devices


def test_the_first_keeps_it_and_the_second_is_told(post, caplog):
    """Fingerprints are for the server's log; the second is let in once the first is gone."""
    device(post, 101, 2, "SHA256:first secret1")
    device(post, 102, 2, "SHA256:second secret2")
    dispatch, lines = remote(post, min_clients=3)
    with caplog.at_level(logging.ERROR, "fedlean"):
        rounds(dispatch)
    claimed = (
        "number 2 is claimed twice: by node 101 (SHA256:first), which has it, and by node 102 "
        "(SHA256:second): give each its own --client"
    )
    assert f"node 102 cannot take part: {claimed}" in lines
    said = (
        "number 2 is claimed twice: by node 101, which has it, and by node 102: give each its own"
    )
    assert any(said in record.message for record in caplog.records)
    post.there.discard(101)
    assert nodes(dispatch) == {0: 100, 2: 102, 3: 103}


def test_nobody_is_told_what_another_device_is_known_by(post):
    """A device that knew it could sign in as the other, and have its number."""
    device(post, 100, 0, "SHA256:honest secret")
    dispatch, lines = remote(post)
    device(post, ROGUE, 0, "SHA256:honest ")
    assert nodes(dispatch)[0] == 100
    (why,) = told(post, ROGUE)
    assert "number 0 is claimed twice" in why and "SHA256" not in why
    assert not any("secret" in line for line in [*lines, *dispatch.notes(), why])
    assert not any("secret" in why for why in dispatch._roster.refused())


def test_a_device_that_starts_again_has_its_number_at_once(post):
    """By the newest connection: the old one is not known to be dead yet."""
    device(post, 101, 1, "SHA256:mine secret")
    dispatch, lines = remote(post)
    assert nodes(dispatch)[1] == 101
    device(post, 201, 1, "SHA256:mine secret")
    assert nodes(dispatch)[1] == 201
    assert not any("claimed twice" in line for line in lines)


def test_who_is_back_has_its_number_again_although_another_has_come(post):
    """An update of the first has counted; none of who came later makes the number its own."""
    dispatch, lines = remote(post, min_clients=1)
    rounds(dispatch)
    post.there.discard(101)
    device(post, ROGUE, 1, "SHA256:rogue x")
    assert nodes(dispatch, 2)[1] == ROGUE
    rounds(dispatch)
    post.there.add(101)
    assert nodes(dispatch, 4)[1] == 101
    assert "node 999 cannot take part: node 101 is client 1 now" in lines
    nodes(dispatch, 5)
    assert told(post, ROGUE) == ["node 101 is client 1 now"]


def test_a_device_without_a_number_has_the_one_back_that_it_was_given(post):
    """Under another node id, and although a lower one is free."""
    device(post, 103, None, "SHA256:mine secret")
    dispatch, _ = remote(post, min_clients=1)
    rounds(dispatch)
    post.there -= {101, 103}
    assert nodes(dispatch, 2) == {0: 100, 2: 102}
    device(post, 203, None, "SHA256:mine secret")
    assert nodes(dispatch, 3) == {0: 100, 2: 102, 3: 203}


def test_a_node_that_the_checkpoint_names_keeps_its_number_until_it_answers(post):
    """Whoever answers first after the server has started again is not yet its owner."""
    first, _ = remote(post)
    rounds(first)
    second, lines = remote(post, min_clients=1)
    second.restore(first.client_states())
    device(post, 100, 3, "SHA256:rogue x")  # answers before node 103
    assert nodes(second, 2) == {1: 101, 2: 102, 3: 103}
    claimed = "number 3 is claimed twice: by node 103, which had it before the server started again"
    assert any(line.startswith(f"node 100 cannot take part: {claimed}") for line in lines)
    assert told(post, 100)
    post.there.discard(103)
    assert nodes(second, 3)[3] == 100


def test_a_node_that_is_not_admitted_any_more_has_no_number(post):
    """It comes back with data of another shape."""
    dispatch, _ = remote(post, min_clients=1)
    assert 3 in nodes(dispatch)
    post.there.discard(103)
    assert 3 not in nodes(dispatch)
    post.there.add(103)

    def other_shape(node: int, content: bytes) -> bytes:
        envelope = unseal(content, expected=tuple(env.KINDS))
        if node != 103 or envelope.kind != env.WELCOME:
            return content
        return seal(Envelope(env.WELCOME, {**envelope.fields, "input_shape": [3, 8, 8]}))

    post.on_the_way_up = other_shape
    assert 3 not in nodes(dispatch)


# Nodes that do not answer


@pytest.mark.parametrize("new", [True, False])
def test_a_node_that_comes_and_goes_costs_a_second_a_step(new, post, clock):
    """It never answers a greeting, under one id or under a new one each time."""
    dispatch, _ = remote(post, join_seconds=600.0)
    assert len(nodes(dispatch)) == CLIENTS
    honest = set(post.there)
    post.on_the_way_down = lambda node, content: content if node in honest else None
    began = clock.now
    for number in range(10):
        post.there = honest | {ROGUE + number if new else ROGUE}
        nodes(dispatch, number)
        post.there = set(honest)
        nodes(dispatch, number)
    assert clock.now - began < 11


def test_a_device_that_answers_its_greeting_late_is_told_what_is_wrong(post):
    """Nobody waits for it while enough clients are there."""
    dispatch, _ = remote(post, min_clients=1)
    assert len(nodes(dispatch)) == CLIENTS
    device(post, ROGUE, 0, "SHA256:second x")
    held = []

    def late(node: int, content: bytes) -> bytes | None:
        if node != ROGUE or held:
            return content
        held.append((f"m{len(post.sent) - 1}", content))
        return None

    post.on_the_way_up = late
    nodes(dispatch)
    assert held and not told(post, ROGUE)
    post.waiting += held
    nodes(dispatch)
    assert len(told(post, ROGUE)) == 1 and "claimed twice" in told(post, ROGUE)[0]
