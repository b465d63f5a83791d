"""Models in files: sparse storage, early files, and files that somebody damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from federation import SPEC, params, same
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fedlean.core import Model
from fedlean.models.brought import Names, TensorName
from fedlean.normalisation import Normalisation
from fedlean.runtime.modelfile import About, read_model, read_stored, write_model
from fedlean.tree import apply_mask

FIRST = SPEC.prunable[0]


def pruned(density: float) -> Model:
    rng = np.random.default_rng(1)
    masks = {name: rng.random(SPEC.param_shapes[name]) < density for name in SPEC.prunable}
    return Model(SPEC, apply_mask(params(), masks), masks)


@pytest.mark.parametrize("density", [0.0, 0.01, 0.3, 1.0])
def test_what_is_written_is_read(density, tmp_path):
    model = pruned(density)
    write_model(tmp_path / "m", model, SPEC)
    back = read_model(tmp_path / "m", SPEC)
    assert same(back.params, model.params) and same(dict(back.masks), dict(model.masks))


def test_the_form_by_hand(tmp_path):
    mask = np.zeros(SPEC.param_shapes[FIRST], bool)
    mask.flat[[3, 8]] = True
    model = Model(SPEC, apply_mask(params(), {FIRST: mask}), {FIRST: mask})
    write_model(tmp_path / "m", model, SPEC)
    stored = load_file(tmp_path / "m")
    assert stored[f"{FIRST}.kept"].tolist() == model.params[FIRST].ravel()[[3, 8]].tolist()
    bits = np.packbits(mask).tolist()  # of so few coordinates a bitmap is the smallest
    assert stored[f"{FIRST}.pattern"].tolist() == [2, *bits] and bits[:2] == [16, 128]
    assert FIRST not in stored
    with safe_open(tmp_path / "m", "numpy") as file:
        assert json.loads(file.metadata()["sparse"]) == {FIRST: list(mask.shape)}


def test_an_early_file(tmp_path):
    model = pruned(0.3)
    masks = {f"{name}.mask": mask.astype(np.uint8) for name, mask in model.masks.items()}
    save_file({**model.params, **masks}, tmp_path / "m")
    back = read_model(tmp_path / "m", SPEC)
    assert same(back.params, model.params) and same(dict(back.masks), dict(model.masks))


def test_a_file_that_says_all_of_itself(tmp_path):
    of = {name: TensorName(f"net.{name}", (value.size,)) for name, value in params().items()}
    rest = {"unused.weight": np.arange(3.0)}
    normal = Normalisation(np.array([0.1], "f4"), np.array([0.7], "f4"), 255.0)
    about = About(Names(of, rest), normal, ("a", "b"))
    write_model(tmp_path / "m", pruned(0.3), about=about, rest=rest)
    stored = read_stored(tmp_path / "m", None)
    assert same(stored.model.params, pruned(0.3).params)
    assert stored.about.class_names == ("a", "b") and stored.about.names is not None
    assert stored.about.names.of == of and same(dict(stored.rest), rest)
    assert stored.about.normalisation is not None
    x = np.arange(12, dtype=np.uint8).reshape(3, 1, 2, 2)
    assert np.array_equal(stored.about.normalisation(x), normal(x))
    plain = tmp_path / "plain"
    write_model(plain, pruned(0.3), SPEC)
    with pytest.raises(ValueError, match="does not say its spec: give the run folder"):
        read_stored(plain, None)


def changed(folder: Path, change) -> Path:
    write_model(folder / "m", pruned(0.3), SPEC)
    tensors = load_file(folder / "m")
    change(tensors)
    save_file(tensors, folder / "m")
    return folder / "m"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{FIRST}.pattern"), "places of the kept values .* are missing"),
        (lambda t: t.pop(f"{FIRST}.kept"), "is in the spec but not in params"),
        (lambda t: t.update({f"{FIRST}.kept": t[f"{FIRST}.kept"][:-1]}), "values .* kept float32"),
        (lambda t: t.update({f"{FIRST}.pattern": np.array([9], np.uint8)}), "unknown code 9"),
        (lambda t: t.update({f"{FIRST}.pattern": t[f"{FIRST}.pattern"][:-1]}), "truncated"),
        (lambda t: t.update({f"{FIRST}.pattern": np.zeros(3, np.uint8)}), "trailing bytes"),
        (lambda t: t.update({f"{FIRST}.pattern": np.zeros(1, np.float32)}), "are missing"),
        (lambda t: t.update({"odd.kept": np.zeros(1, np.float32)}), "fits no prunable weight"),
        (lambda t: t[f"{FIRST}.kept"].fill(np.inf), "NaN or infinite"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, change, message):
    with pytest.raises(ValueError, match=f"damaged or holds another model: .*{message}"):
        read_model(changed(tmp_path, change), SPEC)


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_byte_that_is_wrong_is_a_line_or_harmless(tmp_path_factory, at, value):
    folder = tmp_path_factory.mktemp("fuzz")
    write_model(folder / "m", pruned(0.3), SPEC)
    content = bytearray((folder / "m").read_bytes())
    content[at % len(content)] = value
    (folder / "m").write_bytes(content)
    try:
        back = read_model(folder / "m", SPEC)
    except ValueError as error:
        assert "damaged or holds another model" in str(error)
    else:
        assert all(np.isfinite(each).all() for each in back.params.values())
