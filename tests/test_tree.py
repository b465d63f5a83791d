"""The merge against a naive oracle, coordinate by coordinate, and by hand."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlean import sums, tree
from fedlean.core import ClientUpdate, Statistic, SubModel
from fedlean.tree import (
    Fold,
    apply_mask,
    fold,
    kept_count,
    kept_values,
    num_kept,
    pack,
    pattern_hash,
    read_only,
    unpack,
)


def floats(*values):
    return np.array(values, np.float32)


def update(client, weight, params, *, masks=None, frozen=(), statistics=None):
    sub_model = SubModel(masks or {}, frozenset(frozen))
    return ClientUpdate(client, weight, params, sub_model, statistics or {})


def merged_slices(base, updates, indices, **settings):
    """Of updates with the index of each beside them."""
    result = Fold(base, **settings)
    for one, index in zip(updates, indices, strict=True):
        result.add(one, index)
    return result


def bits(array):
    return array.dtype, array.shape, array.tobytes()


@dataclass
class Scene:
    """A base model and the updates that come in."""

    base: dict[str, np.ndarray]
    updates: list[ClientUpdate] = field(default_factory=list)
    indices: list[dict[str, tuple]] = field(default_factory=list)  # of each update

    def fold(self, updates=None):
        return merged_slices(self.base, updates or self.updates, self.indices)


def ids_of(index, shape):
    return [
        range(side)[axis] if isinstance(axis, slice) else list(axis)
        for axis, side in zip(index, shape, strict=True)
    ]


@st.composite
def axes(draw, side):
    """Some ids of an axis in any order, in a row, around its end, in pairs, or as a slice."""
    count, start = draw(st.integers(0, side)), draw(st.integers(0, side - 1))
    kind = draw(st.sampled_from(["any", "prefix", "window", "pairs", "slice", "whole"]))
    if kind == "slice":
        return slice(start, min(start + count, side), draw(st.sampled_from([None, 1, 2])))
    if kind == "pairs" and side % 2 == 0:
        pairs = draw(st.permutations(range(side // 2)))[: count // 2]
        return np.array([2 * pair + i for pair in pairs for i in (0, 1)], np.int64)
    window = (start + np.arange(count)) % side
    chosen = {"any": draw(st.permutations(range(side)))[:count], "window": window}
    return np.array(chosen.get(kind, range(side if kind == "whole" else count)), np.int64)


@st.composite
def scenes(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sides = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)
    shapes = draw(st.lists(sides, min_size=1, max_size=3))
    base = {
        f"t{i}": rng.standard_normal(shape).astype(np.float32) for i, shape in enumerate(shapes)
    }
    next(iter(base.values())).flat[0] = -0.0  # bit for bit: -0 is not +0
    shared = {name: rng.random(value.shape) < 0.6 for name, value in base.items()}
    scene = Scene(base)
    for client in range(draw(st.integers(1, 5))):
        params, masks, index, frozen = {}, {}, {}, set()
        for name, value in base.items():
            if draw(st.booleans()) and draw(st.booleans()):
                continue  # not sent
            kind = draw(st.sampled_from(["dense", "shared", "private", "index", "index+mask"]))
            shape = value.shape
            if kind.startswith("index"):
                index[name] = tuple(draw(axes(side)) for side in shape)
                shape = tuple(map(len, ids_of(index[name], shape)))
            if kind == "shared":
                masks[name] = shared[name]
            elif kind in ("private", "index+mask"):
                masks[name] = rng.random(shape) < 0.5
            params[name] = rng.standard_normal(shape).astype(np.float32)
            if draw(st.integers(0, 4)) == 0:
                frozen.add(name)
        weight = draw(st.integers(1, 10**9))
        scene.updates.append(update(client, weight, params, masks=masks, frozen=frozen))
        scene.indices.append(index)
    return scene


def oracle(scene):
    """One coordinate at a time, in Python's own floats."""
    merged = {}
    for name, base in scene.base.items():
        total, weight = np.zeros(base.shape), np.zeros(base.shape)
        for one, index in zip(scene.updates, scene.indices, strict=True):
            if name not in one.params or name in one.sub_model.frozen:
                continue
            values = one.params[name]
            axes = ids_of(index.get(name, [slice(None)] * base.ndim), base.shape)
            mask = one.sub_model.masks.get(name, np.ones(values.shape, bool))
            for local in product(*map(range, values.shape)):
                if not mask[local]:
                    continue
                where = tuple(axis[i] for axis, i in zip(axes, local, strict=True))
                total[where] += one.num_examples * float(values[local])
                weight[where] += one.num_examples
        merged[name] = (total, weight)
    return merged


@settings(deadline=None, max_examples=150)
@given(scenes())
def test_fold_is_the_covered_mean(scene):
    before = {name: bits(value) for name, value in scene.base.items()}
    result = scene.fold()
    assert result.count == len(scene.updates)
    merged = result.params()
    assert list(merged) == list(scene.base)
    for name, (total, weight) in oracle(scene).items():
        base, got = scene.base[name], merged[name]
        assert got.dtype == np.float32 and got.shape == base.shape
        covered = weight > 0
        assert got[~covered].tobytes() == base[~covered].tobytes()  # bit for bit
        np.testing.assert_allclose(got[covered], (total / np.where(covered, weight, 1))[covered],
                                   rtol=1e-6, atol=1e-7)  # fmt: skip
    assert {name: bits(value) for name, value in scene.base.items()} == before


@settings(deadline=None, max_examples=150)
@given(scenes(), st.integers(0, 2**5 - 1))
def test_packed_updates_fold_to_the_same_bits(scene, which):
    """Some clients send kept values alone, some the dense tensors."""
    updates = [
        replace(one, params=pack(one.params, one.sub_model.masks)) if which >> i & 1 else one
        for i, one in enumerate(scene.updates)
    ]
    got, want = scene.fold(updates).params(), scene.fold().params()
    assert {name: bits(v) for name, v in got.items()} == {n: bits(v) for n, v in want.items()}


def test_pack_and_unpack_by_hand():
    mask = np.array([[True, False], [False, True]])
    dense = floats(1, 2, 3, 4).reshape(2, 2)
    packed = pack({"w": dense, "b": floats(5)}, {"w": mask})
    assert packed["w"].tolist() == [1, 4] and packed["b"].tolist() == [5]
    assert pack(packed, {"w": mask})["w"] is packed["w"]
    assert unpack(packed["w"], mask).tolist() == [[1, 0], [0, 4]]
    assert unpack(dense, mask) is dense
    with pytest.raises(ValueError, match=r"shape \(3,\), expected \(2, 2\)"):
        fold({"w": dense}, [update(0, 1, {"w": floats(1, 2, 3)}, masks={"w": mask})])


@pytest.mark.parametrize("piece", [1, 3, 1 << 15])
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_kept_values_are_those_of_numpy_in_pieces_of_any_size(monkeypatch, piece, density):
    monkeypatch.setattr(tree, "_PIECE", piece)
    rng = np.random.default_rng(0)
    mask, value = rng.random((5, 7)) < density, rng.random((5, 7), np.float32)
    assert bits(kept_values(value, mask)) == bits(value[mask])
    turned = kept_values(np.asfortranarray(value), np.asfortranarray(mask))
    assert bits(turned) == bits(value[mask])
    assert bits(unpack(value[mask], mask)) == bits(np.where(mask, value, np.float32(0)))
    whole = update(0, 3, {"w": value}, masks={"w": mask})
    packed = update(0, 3, {"w": value[mask]}, masks={"w": mask})
    for one in (whole, packed):
        merged = fold({"w": -value}, [one, one]).params()["w"]
        assert bits(merged) == bits(np.where(mask, value, -value))


def test_a_mask_is_counted_anew_while_it_can_change():
    mask = np.array([True, False, False])
    assert kept_count(mask) == 1
    mask[1] = True
    assert kept_count(mask) == 2
    view = mask[:2]
    view.flags.writeable = False  # what it looks at can still change
    assert kept_count(view) == 2
    mask[0] = False
    assert kept_count(view) == 1


def test_a_fixed_mask_is_counted_once_and_forgotten_with_it(monkeypatch):
    before = len(tree._counted)
    mask = np.array([True, False, True])
    mask.flags.writeable = False
    assert kept_count(mask) == 2 and len(tree._counted) == before + 1
    monkeypatch.setattr(np, "count_nonzero", lambda mask: pytest.fail("counted again"))
    assert kept_count(mask) == 2
    del mask
    assert len(tree._counted) == before


def test_sets_of_fixed_masks_are_hashed_once_each_and_forgotten_with_any_of_theirs(monkeypatch):
    """As many sets as are alive, two that share a mask too, and no more."""
    before = len(tree._hashed)
    shared, one, other = (np.array([True, False, last]) for last in (False, True, True))
    sets = [read_only({"a": shared, "b": each}) for each in (one, other)]
    sets += [read_only({"a": shared}), read_only({"b": shared})]
    hashes = [pattern_hash(masks) for masks in sets]
    assert len(set(hashes)) == 3 and hashes[0] == hashes[1]  # as many as differ in name or bits
    assert len(tree._hashed) == before + 4
    monkeypatch.setattr(np, "packbits", lambda mask: pytest.fail("hashed again"))
    assert [pattern_hash(dict(masks)) for masks in reversed(sets)] == hashes[::-1]
    del one, sets[0]
    assert len(tree._hashed) == before + 3
    del shared, sets
    assert len(tree._hashed) == before


def test_a_set_with_a_mask_that_can_change_is_hashed_anew():
    masks = {**read_only({"a": np.array([True])}), "b": np.array([True, False])}
    before = pattern_hash(masks)
    masks["b"][1] = True
    assert pattern_hash(masks) != before


def test_an_id_that_was_another_mask_s_is_not_taken_for_it():
    """Of thousands of masks made and dropped, many at the same place in memory."""
    for number in range(2000):
        bits = np.array([bool(number >> i & 1) for i in range(11)])
        fresh = {"a": bits.copy()}
        assert pattern_hash(read_only({"a": bits})) == pattern_hash(fresh)


def test_read_only_goes_down_to_what_a_view_looks_at():
    """And memory that is no array's own is copied, for others may write there."""
    whole = np.array([[True, False], [True, True]])
    (turned,) = read_only({"a": whole.reshape(4)}).values()
    assert turned.base is whole and not whole.flags.writeable
    memory = bytearray([1, 0, 1])
    (mask,) = read_only({"a": np.frombuffer(memory, bool)}).values()
    memory[0] = 0
    assert mask.tolist() == [True, False, True]
    for each in (turned, mask):
        before = len(tree._hashed)
        pattern_hash({"a": each})
        assert len(tree._hashed) == before + 1


@settings(deadline=None, max_examples=60)
@given(scenes(), st.integers(1, 10**9))
def test_one_client_gets_its_own_values_back(scene, weight):
    """Exact: a float32 times a count below 2^29 fits float64."""
    only = scene.updates[0]
    only = ClientUpdate(0, weight, only.params, only.sub_model)
    index = scene.indices[0]
    merged = merged_slices(scene.base, [only], [index]).params()
    for name, values in only.params.items():
        if name in only.sub_model.frozen:
            assert bits(merged[name]) == bits(scene.base[name])
            continue
        axes = ids_of(index.get(name, [slice(None)] * values.ndim), scene.base[name].shape)
        got = merged[name][np.ix_(*(np.array(ids, np.int64) for ids in axes))]
        mask = only.sub_model.masks.get(name, np.ones(values.shape, bool))
        if weight < 2**29:
            assert got[mask].tobytes() == values[mask].tobytes()
        else:
            np.testing.assert_allclose(got[mask], values[mask], rtol=2e-7)


def test_one_client_extremes_come_back():
    tiny, huge = np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).max
    values = np.array([tiny, -tiny, huge, -huge, 0, -0.0, 1 / 3], np.float32)
    merged = fold({"w": np.ones(7, np.float32)}, [update(0, 12345677, {"w": values})]).params()
    assert bits(merged["w"]) == bits(values)


def test_weighted_mean_by_hand():
    base = {"w": floats(9, 9)}
    merged = fold(base, [update(0, 1, {"w": floats(0, 4)}), update(1, 3, {"w": floats(4, 0)})])
    np.testing.assert_array_equal(merged.params()["w"], floats(3, 1))


def test_masks_and_slices_mixed_by_hand():
    """A (weight 1) has all, B (3) row 1 of columns 2 and 0, C (2) all but column 0."""
    base = {"w": np.full((2, 3), 100, np.float32)}
    a = update(0, 1, {"w": np.full((2, 3), 8, np.float32)})
    b = update(1, 3, {"w": np.array([[4, 16]], np.float32)})
    part = {"w": (np.array([1]), np.array([2, 0]))}
    mask = np.array([[False, True, True], [False, True, True]])
    c = update(2, 2, {"w": np.full((2, 3), 2, np.float32)}, masks={"w": mask})
    merged = merged_slices(base, [a, b, c], [None, part, None]).params()["w"]
    # (0,1): (8 + 2*2)/3; (1,0): (8 + 3*16)/4; (1,2): (8 + 3*4 + 2*2)/6
    np.testing.assert_array_equal(merged, floats(8, 4, 4, 14, 4, 4).reshape(2, 3))
    merged = merged_slices(base, [b], [part]).params()["w"]
    np.testing.assert_array_equal(merged, floats(100, 100, 100, 16, 100, 4).reshape(2, 3))


def test_slice_of_a_mask_covers_only_what_it_keeps():
    base = {"w": floats(1, 2, 3)}
    sliced = update(0, 2, {"w": floats(10, 0)}, masks={"w": np.array([True, False])})
    merged = merged_slices(base, [sliced], [{"w": (np.array([2, 0]),)}]).params()["w"]
    np.testing.assert_array_equal(merged, floats(1, 2, 10))


@pytest.mark.parametrize(
    ("axis", "why"),
    [
        ((), "0 axes, expected 1"),
        ((np.array([0, 3]),), "ids from 0 to 3 leave their axis of length 3"),
        ((np.array([-1, 0]),), "ids from -1 to 0 leave"),
        ((np.array([1, 1]),), "name one twice"),
        ((np.array([0.0, 1.0]),), "are float64 of shape"),
        ((np.array([[0, 1]]),), r"of shape \(1, 2\)"),
    ],
)
def test_an_index_that_does_not_fit_is_refused_by_name(axis, why):
    with pytest.raises(ValueError, match=f"the slice of 'w': .*{why}"):
        Fold({"w": floats(1, 2, 3)}).add(update(0, 1, {"w": floats(1, 2)}), {"w": axis})


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.booleans())
def test_slices_of_everything_fold_to_the_bits_of_whole_tensors(seed, clients, shuffled):
    """In their own order, and in another."""
    rng = np.random.default_rng(seed)
    base = {"w": rng.standard_normal((7, 6, 2)).astype(np.float32), "bn.running_mean": floats(1, 2)}
    base["bn.running_var"] = floats(3, 4)
    updates, parts, indices = [], [], []
    for client in range(clients):
        sent = {
            name: np.abs(rng.normal(size=v.shape)).astype(np.float32) for name, v in base.items()
        }
        sent["w"].flat[:3] = -0.0
        order = rng.permutation if shuffled else np.arange
        index = {name: tuple(order(side) for side in v.shape) for name, v in base.items()}
        if shuffled:  # a mean and its variance are cut alike
            index["bn.running_var"] = index["bn.running_mean"]
        weight = int(rng.integers(1, 1000))
        updates.append(update(client, weight, sent))
        parts.append(update(client, weight, {n: v[np.ix_(*index[n])] for n, v in sent.items()}))
        indices.append(index)
    got = merged_slices(base, parts, indices, variances=OF).params()
    want = fold(base, updates, variances=OF).params()
    assert {name: bits(v) for name, v in got.items()} == {n: bits(v) for n, v in want.items()}


@pytest.mark.parametrize("piece", [1, 7, 1 << 15])
def test_slices_of_many_runs_fold_the_same_in_pieces_of_any_size(monkeypatch, piece):
    """Scattered rows beside columns in threes: moved in chunks of three, and one by one."""
    monkeypatch.setattr(sums, "_native", None)
    monkeypatch.setattr(sums, "PIECE", piece)
    rng = np.random.default_rng(0)
    base = {"w": rng.standard_normal((80, 90)).astype(np.float32)}
    total, weights = np.zeros((80, 90)), np.zeros((80, 90))
    result = Fold(base)
    for client in range(6):
        rows, threes = rng.permutation(80)[:41], np.sort(rng.permutation(30)[:17])
        columns = (3 * threes[:, None] + np.arange(3)).ravel() if client % 2 else threes
        sent = rng.standard_normal((rows.size, columns.size)).astype(np.float32)
        result.add(update(client, client + 1, {"w": sent}), {"w": (rows, columns)})
        where = np.ix_(rows, columns)
        total[where] += (client + 1) * sent.astype(np.float64)
        weights[where] += client + 1
    mean = (total / np.where(weights, weights, 1)).astype(np.float32)
    assert bits(result.params()["w"]) == bits(np.where(weights > 0, mean, base["w"]))


def test_shared_mask_and_equal_masks_give_the_same_bits():
    """One mask object for all is a fast path; equal masks in different objects are not."""
    rng = np.random.default_rng(0)
    base = {"w": rng.standard_normal((5, 4)).astype(np.float32)}
    mask = rng.random((5, 4)) < 0.5

    def updates(copied):
        drawn = np.random.default_rng(1)
        for client in range(4):
            held = mask.copy() if copied else mask
            values = drawn.standard_normal((5, 4)).astype(np.float32)
            yield update(client, client + 1, {"w": values * held}, masks={"w": held})

    shared, private = (fold(base, updates(copied)).params()["w"] for copied in (False, True))
    assert bits(shared) == bits(private)
    assert shared[~mask].tobytes() == base["w"][~mask].tobytes()


def test_what_a_mask_excludes_cannot_poison_the_mean():
    base = {"w": floats(1, 2)}
    first = update(0, 1, {"w": floats(np.nan, 4)}, masks={"w": np.array([False, True])})
    second = update(1, 1, {"w": floats(6, np.inf)}, masks={"w": np.array([True, False])})
    for updates in ([first, second], [second, first]):
        np.testing.assert_array_equal(fold(base, updates).params()["w"], floats(6, 4))
    np.testing.assert_array_equal(fold(base, [first]).params()["w"], floats(1, 4))


def test_nobody_answered_keeps_the_base():
    base = {"w": floats(-0.0, np.pi), "bn.running_mean": floats(2), "bn.running_var": floats(3)}
    variances = {"bn.running_var": "bn.running_mean"}
    frozen = update(0, 1, {"w": floats(1, 1)}, frozen={"w"})
    for updates in ([], [frozen]):
        merged = fold(base, updates, variances=variances).params()
        assert {k: bits(v) for k, v in merged.items()} == {k: bits(v) for k, v in base.items()}


@pytest.mark.parametrize(
    ("params", "index"),
    [
        ({"other": floats(1)}, {}),
        ({"w": floats(1, 2)}, {}),
        ({"w": np.zeros((2, 2), np.float32)}, {}),
        ({"w": floats(1, 2, 3)}, {"w": (np.array([0, 2]),)}),
    ],
)
def test_misfits_name_client_and_tensor(params, index):
    (name,) = params
    bad = update(73, 1, params)
    with pytest.raises(ValueError, match=f"client 73 .*{name}") as error:
        Fold({"w": floats(1, 2, 3)}).add(bad, index)
    assert "\n" not in str(error.value)


def test_shape_message_gives_both_shapes():
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        Fold({"w": floats(1, 2, 3)}).add(update(0, 1, {"w": floats(1, 2)}))


def test_statistics_by_hand():
    """mean: weighted by examples; sum: plain.  (1*1 + 3*5)/4 = 4 and 1 + 5 = 6."""

    def sent(client, weight, value):
        tensors = {"a": floats(value)}
        statistics = {"avg": Statistic(tensors, "mean"), "all": Statistic(tensors, "sum")}
        return update(client, weight, {}, statistics=statistics)

    folded = fold({}, [sent(0, 1, 1), sent(1, 3, 5)])
    assert folded.statistic("avg")["a"].tolist() == [4]
    assert folded.statistic("all")["a"].tolist() == [6]
    assert folded.statistic("avg")["a"].dtype == np.float32
    assert folded.statistic("none") == {}
    assert folded.params() == {}


def test_statistics_mean_over_those_who_sent_them():
    with_it = update(0, 2, {}, statistics={"s": Statistic({"a": floats(3)}, "mean")})
    folded = fold({}, [with_it, update(1, 1000, {})])
    assert folded.statistic("s")["a"].tolist() == [3]


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 2)])
def test_statistics_of_another_shape_name_client_and_statistic(shape):
    """Also those which NumPy would broadcast."""
    folded = Fold({})
    first = Statistic({"a": np.ones(2, np.float32)}, "mean")
    folded.add(update(0, 1, {}, statistics={"sums": first}))
    bad = Statistic({"a": np.ones(shape, np.float32)}, "mean")
    with pytest.raises(ValueError, match=r"client 73 .*sums.*a"):
        folded.add(update(73, 1, {}, statistics={"sums": bad}))


def test_statistics_of_slices_by_hand():
    """Rows 0-1, ids 2 and 0 of the columns, weight 1; row 1 whole, weight 3; by coordinate.

    [0, 0]: 4 of one, 4.  [1, 0]: (1*8 + 3*2)/4 = 3.5.  [1, 1]: 3 of one.  [0, 1] and row 2: nobody.
    """
    base = {"w": np.zeros((3, 3), np.float32)}
    parts = [
        (1, [[7, 4], [6, 8]], (slice(0, 2), np.array([2, 0]))),
        (3, [[2, 3, 10]], (slice(1, 2), slice(0, 3))),
    ]
    folded = Fold(base)
    for weight, values, index in parts:
        tensors = {"w": np.array(values, np.float32), "loss": floats(weight)}
        statistics = {"g": Statistic(tensors, "mean"), "all": Statistic(tensors, "sum")}
        folded.add(update(weight, weight, {}, statistics=statistics), index={"w": index})
    assert folded.statistic("g")["w"].tolist() == [[4, 0, 7], [3.5, 3, 9], [0, 0, 0]]
    assert folded.statistic("all")["w"].tolist() == [[4, 0, 7], [10, 3, 16], [0, 0, 0]]
    assert folded.statistic("g")["loss"].tolist() == [2.5], "no tensor of the model: as it comes"
    sent = [[True, False, True], [True, True, True], [False, False, False]]
    for key in ("g", "all"):
        assert folded.sent(key)["w"].tolist() == sent
        assert folded.sent(key)["loss"].all()
    assert folded.sent("none") == {}


@pytest.mark.parametrize("seed", range(5))
def test_statistics_of_slices_are_those_of_a_loop(seed):
    """Whole tensors, slices and ids in any order together; a whole index changes no bit."""
    rng = np.random.default_rng(seed)
    shape = (5, 4, 3)
    base = {"w": np.zeros(shape, np.float32)}
    folded, total, weights = Fold(base), np.zeros(shape), np.zeros(shape)
    for client in range(6):
        ids = [rng.permutation(side)[: rng.integers(1, side + 1)] for side in shape]
        if client == 2:
            ids = [np.arange(side) for side in shape]
        values = rng.standard_normal([one.size for one in ids]).astype(np.float32)
        weight = int(rng.integers(1, 50))
        statistics = {"g": Statistic({"w": values}, "mean")}
        index = {"w": tuple(ids)}
        folded.add(update(client, weight, {}, statistics=statistics), index=index)
        total[np.ix_(*ids)] += weight * values.astype(np.float64)
        weights[np.ix_(*ids)] += weight
    expected = np.where(weights > 0, total / np.maximum(weights, 1), 0).astype(np.float32)
    assert np.array_equal(folded.statistic("g")["w"], expected)
    assert np.array_equal(folded.sent("g")["w"], weights > 0)


def test_statistics_of_whole_cuts_are_those_without_an_index():
    rng = np.random.default_rng(0)
    plain, indexed = Fold({"w": np.zeros((7, 5), np.float32)}), Fold({"w": np.zeros((7, 5), "f4")})
    for client in range(3):
        values = rng.standard_normal((7, 5)).astype(np.float32)
        sent = update(client, 3 + client, {}, statistics={"g": Statistic({"w": values}, "mean")})
        plain.add(sent)
        indexed.add(sent, index={"w": (slice(0, 7), slice(0, 5))})
    assert plain.statistic("g")["w"].tobytes() == indexed.statistic("g")["w"].tobytes()
    assert indexed.sent("g")["w"].all()


def test_a_statistic_that_does_not_fit_its_slice_names_client_and_tensor():
    statistics = {"g": Statistic({"w": np.ones((2, 2), np.float32)}, "mean")}
    folded = Fold({"w": np.zeros((3, 3), np.float32)})
    with pytest.raises(ValueError, match=r"client 7 sent g of 'w' .*\(2, 2\).*\(2, 3\)"):
        folded.add(update(7, 1, {}, statistics=statistics), index={"w": (slice(0, 2), slice(0, 3))})


NORM = {"bn.running_mean": floats(7), "bn.running_var": floats(5)}
OF = {"bn.running_var": "bn.running_mean"}


def norm(client, weight, mean, var, *, order=1):
    sent = {"bn.running_mean": floats(mean), "bn.running_var": floats(var)}
    return update(client, weight, dict(list(sent.items())[::order]))


@pytest.mark.parametrize("order", [1, -1])
def test_variance_merge_by_hand(order):
    """Means 0 and 2, variances 1: second moments 1 and 5, so 3 - 1 = 2."""
    clients = [norm(0, 10, 0, 1, order=order), norm(1, 10, 2, 1, order=order)]
    merged = fold(NORM, clients, variances=OF).params()
    assert merged["bn.running_mean"].tolist() == [1]
    assert merged["bn.running_var"].tolist() == [2]
    assert merged["bn.running_var"].dtype == np.float32


def test_variance_merge_is_that_of_the_pooled_data():
    rng = np.random.default_rng(0)
    data = [rng.normal(loc, 1 + loc, size).astype(np.float64) for loc, size in ((0, 40), (3, 90))]
    clients = [norm(i, x.size, x.mean(), x.var()) for i, x in enumerate(data)]
    merged = fold(NORM, clients, variances=OF).params()
    pooled = np.concatenate(data)
    np.testing.assert_allclose(merged["bn.running_mean"], pooled.mean(), rtol=1e-6)
    np.testing.assert_allclose(merged["bn.running_var"], pooled.var(), rtol=1e-6)


def test_variance_survives_a_large_mean():
    """Moments in float32 would lose 1e-3 beside 1e4."""
    merged = fold(NORM, [norm(0, 7, 100, 1e-3)], variances=OF).params()
    np.testing.assert_allclose(merged["bn.running_var"], [1e-3], rtol=1e-5)
    merged = fold(NORM, [norm(0, 1, 100.1, 1e-3), norm(1, 2, 100.1, 1e-3)], variances=OF).params()
    np.testing.assert_allclose(merged["bn.running_var"], [1e-3], rtol=1e-5)


def test_the_largest_means_and_variances_that_are_taken_merge_to_finite_ones():
    """Means of ±1e18: the squares of their distances are float32 numbers, and so is the result."""
    merged = fold(NORM, [norm(0, 1, 1e18, 1e18), norm(1, 1, -1e18, 1e18)], variances=OF).params()
    assert merged["bn.running_var"] == pytest.approx(np.full_like(NORM["bn.running_var"], 1e36))
    assert (merged["bn.running_mean"] == 0).all()


def test_a_variance_to_the_last_bit_beside_a_mean_ten_million_times_as_large():
    """E[x²] - E[x]² in float64 has lost 3 of 7 digits here."""
    clients = [norm(i, 1, 1e7, 0.1 + i / 10) for i in range(3)]
    merged = fold(NORM, clients, variances=OF).params()["bn.running_var"]
    assert (merged == np.float32(np.mean(np.float32([0.1, 0.2, 0.3]), dtype=np.float64))).all()


def test_variance_is_never_negative():
    rng = np.random.default_rng(0)
    for _ in range(50):
        mean = float(rng.normal(0, 1000))
        merged = fold(NORM, [norm(i, i + 1, mean, 0) for i in range(3)], variances=OF).params()
        assert merged["bn.running_var"] >= 0


def test_uncovered_variance_keeps_the_base():
    """Channel 1 is in no client's slice."""
    base = {"bn.running_mean": floats(3, 3), "bn.running_var": floats(5, 5)}
    index = {name: (np.array([0]),) for name in base}
    sent = {"bn.running_mean": floats(1), "bn.running_var": floats(2)}
    merged = merged_slices(base, [update(0, 4, sent)], [index], variances=OF).params()
    np.testing.assert_array_equal(merged["bn.running_mean"], floats(1, 3))
    np.testing.assert_array_equal(merged["bn.running_var"], floats(2, 5))


def test_apply_mask_leaves_every_bit_of_what_it_keeps():
    values = np.array([-0.0, np.nan, -np.inf, 1e-45, -2.5, -np.nan, np.inf, -1e-45], np.float32)
    for w in (values, np.stack([values, values[::-1]]).T):
        mask = np.arange(w.size).reshape(w.shape) % 3 > 0
        found = apply_mask({"w": w}, {"w": mask})["w"]
        assert found.dtype == np.float32
        assert found[mask].tobytes() == w[mask].tobytes()
        assert found[~mask].tobytes() == bytes(4 * np.count_nonzero(~mask))


def test_apply_mask_prunes_to_positive_zero():
    params = {"w": floats(-1, -0.0, np.nan, 5, -0.0), "b": floats(-0.0)}
    masked = apply_mask(params, {"w": np.array([False, False, False, True, True])})
    assert bits(masked["w"]) == bits(floats(0.0, 0.0, 0.0, 5, -0.0))
    assert bits(masked["b"]) == bits(params["b"])
    assert bits(params["w"]) == bits(floats(-1, -0.0, np.nan, 5, -0.0))


def test_num_kept():
    assert num_kept({}) == 0
    masks = {"a": np.array([[True, False], [True, True]]), "b": np.zeros(3, bool)}
    assert num_kept(masks) == 3
    assert type(num_kept(masks)) is int
