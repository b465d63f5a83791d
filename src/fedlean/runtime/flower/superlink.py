"""One node's connection to a stock Flower SuperLink, in a process without the rest of flwr.

A stock SuperNode starts a fresh process for every message and needs 385 MB before it trains; this
calls the same endpoints from the process that trains.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlean.runtime.flower.address import Address, parse_address
from fedlean.runtime.flower.calls import Calls
from fedlean.runtime.flower.channel import (
    Channel,
    LinkError,
    clock_line,
    delays,
    plain,
)
from fedlean.runtime.flower.heartbeat import CALL_SECONDS, INTERVAL_SECONDS, Heartbeat, Presence
from fedlean.runtime.flower.identity import PrivateKey, new_key
from fedlean.runtime.flower.objects import NotOurs, ObjectError, pack_content
from fedlean.runtime.flower.protobufs import protobufs
from fedlean.runtime.flower.proxy import Proxy
from fedlean.runtime.flower.receiving import (
    UPLOAD_SECONDS,
    Gone,
    Incoming,
    Late,
    described,
    is_over,
    receive,
)
from fedlean.runtime.flower.replying import reply
from fedlean.runtime.flower.trust import trust

__all__ = ["Incoming", "LinkError", "SuperLink"]

_CLOCK_SLACK_SECONDS = 6.0  # of two clocks, by which a message may seem older than it is
_LIST_BYTES = 1 << 22  # of a pulled message's description, a foreign one's too

# flwr's ApiErrorCode, and the code of a message's Error that stands for any reason.
_KEY_IN_USE, _NO_SELF_REGISTRATION, _ACTIVATION_FAILED = 23, 2001, 2004
_UNKNOWN = 0


class SuperLink:
    """Pull, train, push.  For one thread; the heartbeat has its own and its own connection."""

    def __init__(
        self,
        address: str,
        *,
        proxy: Proxy | None = None,
        key: PrivateKey | None,
        root_certificates: Path | None,
        insecure: bool,
        limit_bytes: int,
        say: Callable[[str], None],
        timeout_seconds: float = 30.0,
        patience_seconds: float = math.inf,
        activation_seconds: float = 90.0,
    ) -> None:
        """Connects to nothing yet.  Raises ValueError.

        address: HOST:PORT or https://HOST:PORT.  proxy: on the way to it.  key: of a registered
        node; None: a fresh one, for a SuperLink that takes any node.  insecure: do without what is
        missing of key and certificates.  limit_bytes: of a message's content.  timeout_seconds:
        without a byte.  patience_seconds: how long a call tries to reach a SuperLink that is away
        before it raises.  activation_seconds: how long it tries to be let in.
        """
        where = parse_address(address)
        _check_scheme(where, root_certificates, insecure)
        _check_security(key, root_certificates, insecure)
        self._protos = protobufs()
        self._address, self._say, self._limit_bytes = str(where), say, limit_bytes
        self._registers, self._key = key is None, key or new_key()
        self.device = key.device if key else ""  # by a key that stays
        self._activation_seconds = activation_seconds
        context = None if root_certificates is None else trust(root_certificates)

        def channel(seconds: float) -> Channel:
            version = self._protos.version
            return Channel(where, proxy, context, self._key, version, timeout_seconds=seconds)

        self._presence = Presence(self._address, say)
        main, side = channel(timeout_seconds), channel(min(CALL_SECONDS, timeout_seconds))
        self._calls = Calls(main, self._protos, self._presence, patience_seconds)
        side.met = True  # it is used once the main one has met the SuperLink
        self._side_calls = Calls(side, self._protos, None, 0)
        self._heartbeat: Heartbeat | None = None
        self._node = self._protos.node.Node()
        # messages announced and not uploaded yet, with their trees and when they were announced:
        # a sender that died must not keep the node from others
        self._aside: deque[tuple[Incoming, Any, float]] = deque()
        self._empty = time.monotonic()  # when the SuperLink last had nothing for this node
        self._watched: tuple[Incoming, threading.Event] | None = None

    def activate(self) -> int:
        """This node's id.  Raises LinkError where it is not let in.

        The key of a node that died is refused until the SuperLink takes that one for dead, up to a
        minute; this is waited for.
        """
        if self._registers:
            self._register()
        fleet = self._protos.fleet
        request = fleet.ActivateNodeRequest(
            public_key=self._key.public_pem, heartbeat_interval=INTERVAL_SECONDS
        )
        end, waits, waited = time.monotonic() + self._activation_seconds, delays(1.0, 10.0), False
        while True:
            try:
                answer = self._calls.ask("activate-node", request, fleet.ActivateNodeResponse)
                break
            except LinkError as error:
                if error.code != _ACTIVATION_FAILED:
                    raise
                seconds = next(waits)
                if time.monotonic() + seconds > end:
                    raise LinkError(
                        f"{error}; is the key registered there (flwr supernode register KEY.pub), "
                        "and does no other node use it?",
                        retry=False,
                        code=error.code,
                    ) from None
            if not waited:
                self._say(
                    f"SuperLink {self._address} does not let this node in yet, as after a crash; "
                    f"trying for {self._activation_seconds:.0f} s"
                )
            waited = True
            time.sleep(seconds)
        if not answer.node_id:  # as of an empty answer, which any server may give
            raise LinkError(
                f"{self._address} gave this node no number: is it a SuperLink?", retry=False
            )
        self._node = self._protos.node.Node(node_id=answer.node_id)
        self._say(f"connected to SuperLink {self._address} as node {answer.node_id}")
        if ahead := self._calls.channel.clock_ahead_seconds:
            self._say(clock_line(ahead))
        self._start_heartbeat()
        return answer.node_id

    def pull(self) -> Incoming | None:
        """The next message for this node, None where there is none now.

        A sound message that is not ours is answered with an error here, and said.  So is one whose
        objects are corrupt, for which this raises LinkError: the next pull gets the next message.
        """
        if self._heartbeat is not None and self._heartbeat.unknown.is_set():
            self.activate()
        try:
            answer = self._pull_messages()
        except LinkError as error:
            if error.status != 401:
                raise
            self.activate()  # after a restart without memory; raises where the key is refused
            answer = self._pull_messages()
        if not answer.messages_list:
            self._empty = time.monotonic()
            return self._received(*self._aside.popleft()) if self._aside else None
        if len(answer.messages_list) != 1 or len(answer.message_object_trees) != 1:
            raise LinkError("a pull was answered with more than one message", retry=True)
        incoming = described(answer.messages_list[0].metadata)
        if incoming.dst_node_id != self._node.node_id:
            raise LinkError(f"a message for node {incoming.dst_node_id} came here", retry=True)
        return self._received(incoming, answer.message_object_trees[0], time.monotonic())

    def _received(self, incoming: Incoming, tree: Any, announced: float) -> Incoming | None:
        try:
            try:
                content = receive(self._calls, incoming, tree, self._limit_bytes)
            except Late as late:
                if time.monotonic() - announced > UPLOAD_SECONDS:
                    raise ObjectError(str(late)) from None
                self._aside.append((incoming, tree, announced))
                return None
            return replace(incoming, content=content)
        except Gone as gone:
            self._say(f"message {plain(incoming.message_id, 8)} dropped: {gone}")
            return None
        except NotOurs as refusal:
            self._refuse(incoming, refusal)
            return None
        except (LinkError, ObjectError) as error:
            self._refuse(incoming, error)
            raise LinkError(
                f"message {plain(incoming.message_id, 8)} could not be received: {error}",
                retry=True,
            ) from None
        finally:
            self._calls.channel.forget()

    def age_seconds(self, incoming: Incoming) -> float:
        """For how long the message has been on its way here, at least.

        Not from the clocks alone: nobody promises that the server app's is right.
        """
        now = time.time() - self._calls.channel.clock_ahead_seconds
        by_clock = now - incoming.created_at - _CLOCK_SLACK_SECONDS
        return max(0.0, min(by_clock, time.monotonic() - self._empty))

    def watch(self, incoming: Incoming) -> Callable[[], bool]:
        """A function that says whether the message's run is over, until it is answered.

        The SuperLink is asked beside each heartbeat.  That a run goes on and does not want this
        one reply any more it cannot be asked: the message's own deadline is for that.
        """
        over = threading.Event()
        self._watched = incoming, over
        return over.is_set

    def push(self, incoming: Incoming, content: bytes) -> None:
        """Returns once the SuperLink holds the reply.  Raises LinkError.

        Where its `retry` is False this reply is lost: its run is over, or it came too late.
        """
        self._watched = None
        reply(self._calls, incoming, pack_content(memoryview(content).cast("B")))

    def push_error(self, incoming: Incoming, code: int, reason: str) -> None:
        """Tells the server that no other reply will come; raises as `push` does."""
        error = self._protos.error.Error(code=code, reason=plain(reason, 1000))
        reply(self._calls, incoming, None, error)

    def close(self) -> None:
        """Signs off, so that the same key is let in again at once.  Raises nothing of the link."""
        try:
            if self._heartbeat is not None:
                self._heartbeat.stop()
                self._heartbeat = None
                self._sign_off()
        finally:
            self._side_calls.channel.close()
            self._calls.channel.close()

    def _sign_off(self) -> None:
        fleet, node_id = self._protos.fleet, self._node.node_id
        try:
            self._side_calls.raw("deactivate-node", fleet.DeactivateNodeRequest(node_id=node_id))
            if self._registers:
                request = fleet.UnregisterNodeFleetRequest(node_id=node_id)
                self._side_calls.raw("unregister-node", request)
            self._say(f"left SuperLink {self._address}")
        except LinkError as error:
            self._say(f"left SuperLink {self._address}, which did not hear it: {error}")

    def _register(self) -> None:
        fleet = self._protos.fleet
        request = fleet.RegisterNodeFleetRequest(public_key=self._key.public_pem)
        try:
            self._calls.ask("register-node", request, fleet.RegisterNodeFleetResponse)
        except LinkError as error:
            if error.code == _NO_SELF_REGISTRATION:
                raise LinkError(f"{error}  Give this node a key.", retry=False) from None
            if error.code != _KEY_IN_USE:  # by this node itself, earlier
                raise

    def _start_heartbeat(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.stop()
        self._heartbeat = Heartbeat(self._beat, self._side_calls.channel.abort, self._presence)
        self._heartbeat.start()

    def _beat(self) -> bool:
        """One heartbeat; False where the SuperLink does not know this node."""
        heartbeat = self._protos.heartbeat
        request = heartbeat.SendNodeHeartbeatRequest(
            node=self._node, heartbeat_interval=INTERVAL_SECONDS
        )
        answer_type = heartbeat.SendNodeHeartbeatResponse
        success = self._side_calls.ask("send-node-heartbeat", request, answer_type).success
        if self._watched is not None:
            incoming, over = self._watched
            if is_over(self._side_calls, incoming):
                over.set()
        return success

    def _pull_messages(self) -> Any:
        fleet = self._protos.fleet
        request = fleet.PullMessagesRequest(node=self._node)
        return self._calls.ask("pull-messages", request, fleet.PullMessagesResponse, _LIST_BYTES)

    def _refuse(self, incoming: Incoming, why: Exception) -> None:
        """Not confirmed: the server may still be uploading it, and breaks where it is deleted."""
        self._say(f"message {plain(incoming.message_id, 8)} refused: {plain(why)}")
        with suppress(LinkError):  # the server's own time limit tells it, too
            self.push_error(incoming, _UNKNOWN, f"refused by the node: {why}")


def _check_scheme(address: Address, certificates: Path | None, insecure: bool) -> None:
    if address.tls and insecure:
        raise ValueError(
            f"https://{address} and --insecure contradict each other: give one of the two"
        )
    if address.tls is False and (certificates is not None or not insecure):
        raise ValueError(
            f"http:// has no TLS: give https://{address} with --tls-ca and --key, or --insecure "
            "without --tls-ca for a trial"
        )


def _check_security(key: PrivateKey | None, certificates: Path | None, insecure: bool) -> None:
    if not insecure and certificates is None:
        raise ValueError(
            "no root certificates: give the PEM file of the authority that signed the SuperLink's "
            "certificate (--tls-ca), or for a trial --insecure"
        )
    if not insecure and key is None:
        raise ValueError(
            "no key: make one (ssh-keygen -t ecdsa -b 384 -N '' -f node.key), register its public "
            "half (flwr supernode register node.key.pub) and give --key, or for a trial --insecure"
        )
    if key is not None and certificates is None:
        raise ValueError(
            "a key without root certificates: its signatures could be read and used by others; "
            "give certificates, or no key"
        )
