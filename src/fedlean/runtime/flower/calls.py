"""Calls of a SuperLink's endpoints: protobuf out and in, again while it is away."""

from __future__ import annotations

import time
from typing import Any

from fedlean.runtime.flower.channel import Away, Channel, LinkError, delays, plain
from fedlean.runtime.flower.heartbeat import Presence
from fedlean.runtime.flower.objects import Buffer
from fedlean.runtime.flower.protobufs import Protobufs

ANSWER_BYTES = 1 << 16  # of answers that hold no more than numbers and names


class Calls:
    """patience_seconds: for how long a call is repeated; at 0 it is made once.

    presence: who is told that the SuperLink is away or back; None: nobody.
    """

    def __init__(
        self,
        channel: Channel,
        protos: Protobufs,
        presence: Presence | None,
        patience_seconds: float,
    ) -> None:
        self.channel, self.protos = channel, protos
        self._presence, self._patience = presence, patience_seconds

    def ask(
        self,
        endpoint: str,
        request: Any,
        answer_type: Any,
        limit_bytes: int = ANSWER_BYTES,
        *more: Buffer,
    ) -> Any:
        """The answer, as a message of answer_type; at most limit_bytes.  Raises LinkError.

        more: protobuf fields that follow the request's.
        """
        raw = bytes(self.raw(endpoint, request, *more, limit_bytes=limit_bytes))
        answer = answer_type()
        try:
            answer.ParseFromString(raw)
        except self.protos.decode_error as error:
            raise LinkError(
                f"the answer to {endpoint} is no {answer_type.__name__} ({plain(error)}): "
                "is it a SuperLink?",
                retry=True,
            ) from None
        return answer

    def raw(
        self, endpoint: str, request: Any, *more: Buffer, limit_bytes: int = ANSWER_BYTES
    ) -> memoryview:
        """The answer's bytes, good until the next call."""
        parts = (request.SerializeToString(), *more)
        began = time.monotonic()
        waits = delays()
        while True:
            try:
                answer = self.channel.post(f"/v1/fleet/{endpoint}", parts, limit_bytes)
            except Away as error:
                if self._presence is not None:
                    self._presence.lost(error)
                seconds = next(waits)
                if time.monotonic() + seconds - began > self._patience:
                    raise
                time.sleep(seconds)
            else:
                if self._presence is not None:
                    self._presence.found()
                return answer
