"""Bytes of a `ClientTask` and of a `ClientUpdate`, and back.  No pickle; versioned; bounded.

A message is a fixed header (`header.py`), a small canonical JSON part (`fields.py`) and a payload:

    task      [spec] [frozen] [masks] [values of the frozen] names of the other tensors carried,
              their values, arrays
    update    [masks] names of the tensors carried, their values, statistics

A section in brackets is there if its flag is set: a spec, a pattern or the values of a frozen
tensor travel only when the receiver does not hold their hash (a random pattern as the seed and
counts that it was drawn from).  An update is of the task's spec and frozen tensors, which no client
changes: those are left out of it, whether or not the client's half of a method gives them.
An update of statistics alone is small, so what goes without saying is left out of it: the names,
"mean", and the weights worked on where they are those of the masks.
Whatever the bytes, decoding gives a valid object or raises `WireError`; lengths are checked before
anything is allocated.  This package knows no transport and does not judge what a client claims
(counts, accuracies): the runtime does.
"""

from fedlean.wire.bfloat16 import round_bfloat16 as round_bfloat16
from fedlean.wire.errors import OverLimit as OverLimit
from fedlean.wire.errors import UnknownFrozen as UnknownFrozen
from fedlean.wire.errors import UnknownPattern as UnknownPattern
from fedlean.wire.errors import UnknownSpec as UnknownSpec
from fedlean.wire.errors import WireError as WireError
from fedlean.wire.expected import METRICS_BYTES as METRICS_BYTES
from fedlean.wire.expected import answer_bytes as answer_bytes
from fedlean.wire.frozen import NO_FROZEN as NO_FROZEN
from fedlean.wire.frozen import frozen_hash as frozen_hash
from fedlean.wire.frozen import frozen_hashes as frozen_hashes
from fedlean.wire.frozen import frozen_params as frozen_params
from fedlean.wire.frozen import hash_of as hash_of
from fedlean.wire.frozen import packed_hash as packed_hash
from fedlean.wire.frozen import pattern_of as pattern_of
from fedlean.wire.header import HEADER_BYTES as HEADER_BYTES
from fedlean.wire.header import VERSION as VERSION
from fedlean.wire.pattern import pattern_hash as pattern_hash
from fedlean.wire.pattern import pattern_payload_bytes as pattern_payload_bytes
from fedlean.wire.receiving import DEFAULT_LIMIT_BYTES as DEFAULT_LIMIT_BYTES
from fedlean.wire.receiving import decode_task as decode_task
from fedlean.wire.receiving import decode_update as decode_update
from fedlean.wire.scaled_int8 import round_int8 as round_int8
from fedlean.wire.sending import Known as Known
from fedlean.wire.sending import encode_task as encode_task
from fedlean.wire.sending import encode_update as encode_update
from fedlean.wire.sending import task_bytes as task_bytes
from fedlean.wire.sending import update_bytes as update_bytes
from fedlean.wire.values import ValueDtype as ValueDtype
from fedlean.wire.values import params_payload_bytes as params_payload_bytes
