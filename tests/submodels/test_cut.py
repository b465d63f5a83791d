"""Taking tensors and masks by an index, and cuts of cuts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from engine.cases import CONV, MLP, start

from fedlean.layers import Linear
from fedlean.spec import sequential
from fedlean.submodels.cut import Cut, axis_of, whole

SMALL = sequential((7,), [("fc1", Linear(3)), ("fc2", Linear(4))])
FULL = sequential((7,), [("fc1", Linear(6)), ("fc2", Linear(4))])
KEPT = np.array([0, 3, 4])
INDEX = {
    "fc1.weight": (KEPT, slice(0, 7)),
    "fc1.bias": (KEPT,),
    "fc2.weight": (slice(0, 4), KEPT),
    "fc2.bias": (slice(0, 4),),
}
CUT = Cut(SMALL, INDEX, FULL)


def test_taken_by_hand():
    params = start(FULL)
    taken = CUT.take(params | {"extra.weight": np.zeros(3, np.float32)})
    assert set(taken) == set(SMALL.tensor_shapes)
    for row, full_row in enumerate((0, 3, 4)):
        assert np.array_equal(taken["fc1.weight"][row], params["fc1.weight"][full_row])
        assert taken["fc1.bias"][row] == params["fc1.bias"][full_row]
        assert np.array_equal(taken["fc2.weight"][:, row], params["fc2.weight"][:, full_row])
    assert taken["fc2.bias"] is params["fc2.bias"]
    assert all(value.flags.c_contiguous for value in taken.values())


def test_what_is_put_back_is_what_was_taken():
    params = start(FULL)
    changed = {name: value + 1 for name, value in CUT.take(params).items()}
    full = CUT.put(params, {n: v for n, v in changed.items() if n != "fc1.bias"})
    assert full["fc1.bias"] is params["fc1.bias"]
    for name in ("fc1.weight", "fc2.weight", "fc2.bias"):
        assert np.array_equal(CUT.take(full)[name], changed[name])
    assert np.array_equal(full["fc1.weight"][[1, 2, 5]], params["fc1.weight"][[1, 2, 5]])
    assert params["fc1.weight"][0, 0] == start(FULL)["fc1.weight"][0, 0], "the caller's stay"
    with pytest.raises(ValueError, match=r"'fc1.weight' must have the cut's shape \(3, 7\)"):
        CUT.put(params, {"fc1.weight": params["fc1.weight"]})


def test_masks_are_taken_as_the_tensors_are():
    mask = np.random.default_rng(0).random((4, 6)) < 0.5
    taken = CUT.take_masks({"fc2.weight": mask, "dropped.weight": mask})
    assert set(taken) == {"fc2.weight"} and taken["fc2.weight"].dtype == np.bool_
    assert np.array_equal(taken["fc2.weight"], mask[:, [0, 3, 4]])
    assert not taken["fc2.weight"].flags.writeable and mask.flags.writeable


def test_whole_takes_everything():
    params = start(CONV)
    cut = whole(CONV)
    assert cut.spec is CONV
    assert all(value is params[name] for name, value in cut.take(params).items())
    assert all(
        [(axis.start, axis.stop) for axis in axes] == [(0, side) for side in CONV.tensor_shapes[n]]
        for n, axes in cut.index.items()
    )


@pytest.mark.parametrize("inner_ids", [[0, 2], [1, 2], [0, 1]])
def test_a_cut_of_a_cut_takes_as_both_do(inner_ids):
    ids = np.array(inner_ids)
    spec = sequential((7,), [("fc1", Linear(2)), ("fc2", Linear(4))])
    axis = axis_of(ids)
    inner = Cut(
        spec,
        INDEX
        | {
            "fc1.weight": (axis, slice(0, 7)),
            "fc1.bias": (axis,),
            "fc2.weight": (slice(0, 4), axis),
        },
        SMALL,
    )
    both = CUT.compose(inner)
    assert both.full == FULL and both.spec == spec
    assert np.array_equal(np.r_[both.index["fc1.bias"][0]], KEPT[ids])
    params = start(FULL)
    taken = inner.take(CUT.take(params))
    assert all(np.array_equal(value, taken[name]) for name, value in both.take(params).items())


def test_contiguous_ids_are_slices():
    assert axis_of(np.array([5])) == slice(5, 6)
    assert axis_of(np.array([1, 2, 3])) == slice(1, 4)
    assert axis_of(np.array([2, 1])).tolist() == [2, 1]


def test_slices_compose_to_slices():
    outer = replace(CUT, index=INDEX | {"fc1.bias": (slice(2, 5),)})
    inner = replace(whole(SMALL), spec=SMALL)
    assert outer.compose(inner).index["fc1.bias"] == (slice(2, 5),)


def test_a_cut_of_another_model_is_refused():
    with pytest.raises(ValueError, match="the inner cut must be one of the model"):
        CUT.compose(whole(MLP))


def test_what_does_not_fit_is_named():
    params = start(FULL)
    missing = {name: value for name, value in params.items() if name != "fc2.weight"}
    with pytest.raises(ValueError, match=r"'fc2\.weight' is missing: params must hold every"):
        CUT.take(missing)
    with pytest.raises(
        ValueError, match=r"tensor 'fc1\.bias' must have the full model's shape \(6,\), got \(3,\)"
    ):
        CUT.take(params | {"fc1.bias": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match=r"mask of 'fc1\.weight' must .* \(6, 7\), got \(6, 8\)"):
        CUT.take_masks({"fc1.weight": np.ones((6, 8), bool)})


@pytest.mark.parametrize(
    ("tensor", "axes"),
    [
        ("fc1.bias", (np.array([0, 3, 6]),)),
        ("fc1.bias", (np.array([0, 3, -1]),)),
        ("fc1.bias", (np.array([0, 3, 3]),)),
        ("fc1.bias", (slice(4, 7),)),
        ("fc1.bias", (slice(0, 2),)),
        ("fc1.weight", (KEPT,)),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tensor, axes):
    with pytest.raises(ValueError, match=f"the index of tensor '{tensor}' must pick"):
        Cut(SMALL, INDEX | {tensor: axes}, FULL)


def test_an_index_of_other_tensors_is_refused():
    with pytest.raises(ValueError, match=r"'fc1\.bias' of a cut is in its spec, not in index"):
        Cut(SMALL, {n: axes for n, axes in INDEX.items() if n != "fc1.bias"}, FULL)
    with pytest.raises(ValueError, match=r"'fc3\.bias' of a cut is in its index, not in spec"):
        Cut(SMALL, INDEX | {"fc3.bias": (slice(0, 1),)}, FULL)
    with pytest.raises(ValueError, match=r"'fc1\.weight' of a cut is not in the full model"):
        Cut(SMALL, INDEX, sequential((7,), [("fc2", Linear(4))]))
