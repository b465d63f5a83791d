"""What the server remembers that each client holds."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
from federation import SPEC, params

from fedlean import wire
from fedlean.core import ClientTask, ClientUpdate, SubModel
from fedlean.runtime.checkpoint import load_checkpoint, save_checkpoint
from fedlean.runtime.clientstore import ClientStore

MASKS = {"fc1.weight": np.indices(SPEC.tensor_shapes["fc1.weight"]).sum(0) % 2 == 0}
GROWN = {"fc1.weight": np.indices(SPEC.tensor_shapes["fc1.weight"]).sum(0) % 3 == 0}
TASK = ClientTask(3, "train", 5, 1, SPEC, params(), SubModel(masks=MASKS), {})
UPDATE = ClientUpdate(5, 10, params(), SubModel(masks=MASKS))


def filled() -> ClientStore:
    store = ClientStore()
    store.acknowledge(TASK, UPDATE)
    dense = replace(TASK, client=12, sub_model=SubModel(), round=4)
    store.acknowledge(dense, replace(UPDATE, client=12, sub_model=SubModel()))
    return store


def test_holds_nothing_at_first():
    assert ClientStore().known(5) == wire.Known()
    assert filled().known(6) == wire.Known()


def test_holds_what_it_answered_with():
    known = filled().known(5)
    assert known == wire.Known(frozenset({SPEC.hash}), frozenset({wire.pattern_hash(MASKS)}))


def test_the_pattern_is_that_of_the_answer():
    """A client that pruned by itself holds the new pattern, no longer the one it was sent."""
    store = filled()
    store.acknowledge(TASK, replace(UPDATE, sub_model=SubModel(masks=GROWN)))
    assert store.known(5).patterns == {wire.pattern_hash(GROWN)}


def test_round_trip(tmp_path):
    store = filled()
    tree = store.to_tree()
    save_checkpoint(tmp_path, 1, {"store": tree})
    for back in (load_checkpoint(tmp_path)[0]["store"], json.loads(json.dumps(tree))):
        again = ClientStore(back)
        assert all(again.known(client) == store.known(client) for client in range(15))
        assert {key: tuple(entry) for key, entry in again.to_tree().items()} == tree


FROZEN = replace(TASK, sub_model=SubModel(MASKS, frozenset({"conv.weight", "fc1.weight"})))
HASHES = wire.frozen_hashes(wire.frozen_params(FROZEN), MASKS)


def test_frozen_values_are_held_until_others_come():
    store = filled()
    assert store.known(5).frozen == frozenset()
    store.acknowledge(FROZEN, UPDATE)
    assert store.known(5).frozen == set(HASHES.values()) and len(HASHES) == 2
    store.acknowledge(TASK, UPDATE)  # it has none, and takes none away
    assert store.known(5).frozen == set(HASHES.values())
    moved = {**params(), "conv.weight": params()["conv.weight"] + np.float32(1)}
    store.acknowledge(replace(FROZEN, params=moved), UPDATE)
    known = store.known(5).frozen
    assert HASHES["fc1.weight"] in known and HASHES["conv.weight"] not in known
    assert len(known) == 2


def test_one_more_frozen_tensor_takes_none_away():
    store = filled()
    store.acknowledge(FROZEN, UPDATE)
    more = replace(FROZEN, sub_model=SubModel(MASKS, frozenset({"fc1.weight", "fc2.bias"})))
    store.acknowledge(more, UPDATE)
    assert store.known(5).frozen > set(HASHES.values()) and len(store.known(5).frozen) == 3


def test_what_many_hold_is_kept_once():
    """And goes when nobody holds it any more."""
    store = filled()
    for client in (5, 6, 7):
        store.acknowledge(replace(FROZEN, client=client), replace(UPDATE, client=client))
    assert len(store.to_tree()["frozen"]) == 1
    moved = {name: value + np.float32(1) for name, value in params().items()}
    for client in (5, 6, 7):
        later = replace(FROZEN, client=client, params=moved)
        store.acknowledge(later, replace(UPDATE, client=client))
    assert len(store.to_tree()["frozen"]) == 1
    assert not store.known(6).frozen & set(HASHES.values())


def test_what_an_earlier_version_remembered_is_read():
    entry = [SPEC.hash, wire.pattern_hash(MASKS), 3]
    for more in ([], ["0" * 32], ["5e" * 16]):  # one named a set that cannot be told apart now
        assert ClientStore({"5": [*entry, *more]}).known(5) == filled().known(5)


def test_a_restored_store_charges_as_the_one_that_was_kept(tmp_path):
    store = filled()
    store.acknowledge(FROZEN, UPDATE)
    save_checkpoint(tmp_path, 1, {"store": store.to_tree()})
    again = ClientStore(load_checkpoint(tmp_path)[0]["store"])
    kept = int(MASKS["fc1.weight"].sum()) + 4 * 9
    known = replace(again.known(5), frozen=frozenset())
    bytes_of = [wire.task_bytes(FROZEN, one) for one in (known, again.known(5))]
    assert bytes_of[0] - bytes_of[1] == 1 + 4 * kept  # a byte of names


def test_what_is_held_is_not_charged_again():
    store = ClientStore()
    first = wire.task_bytes(TASK, store.known(5))
    store.acknowledge(TASK, UPDATE)
    second = wire.task_bytes(TASK, store.known(5))
    assert second == len(wire.encode_task(TASK, store.known(5)))
    assert first - second > wire.pattern_payload_bytes(MASKS)  # the spec as well
    changed = replace(TASK, sub_model=SubModel(masks=GROWN))
    kept = (int(GROWN["fc1.weight"].sum()) - int(MASKS["fc1.weight"].sum())) * 4
    assert wire.task_bytes(changed, store.known(5)) - kept > second
