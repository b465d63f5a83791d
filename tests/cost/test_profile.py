"""Profiles: the built-in ones, where the Raspberry Pi's numbers come from, and what is refused."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, fields, replace
from importlib import resources
from math import prod

import pytest

from fedlean.core import Work
from fedlean.cost.flops import layer_flops, step_flops
from fedlean.cost.profile import (
    Profile,
    available,
    faster,
    from_document,
    load_profile,
    to_document,
)
from fedlean.cost.time import activations, work_seconds
from fedlean.models.conv2 import conv2

BUILT_IN = ["generic", "raspberry_pi_4"]
NUMBERS = [field.name for field in fields(Profile) if field.type == "float"] + ["memory_bytes"]


def document(**changes):
    return {**asdict(load_profile("generic")), **changes}


def written(tmp_path, content):
    path = tmp_path / "board.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_built_in_profiles():
    assert list(available()) == BUILT_IN
    for name, description in available().items():
        profile = load_profile(name)
        assert profile.name == name
        assert profile.description == description and description
        assert profile.source


def test_the_raspberry_pi_is_derived_from_published_numbers():
    """From the derivation block: the link is taken out, then seconds per FLOP and activation."""
    text = (resources.files("fedlean.cost") / "profiles" / "raspberry_pi_4.json").read_text()
    published = json.loads(text)["derivation"]["published"]
    coefficients = published["seconds_per_coefficient_per_round"]
    link = published["link_seconds_per_parameter_up_plus_down"]
    spec, batch, steps = conv2((1, 28, 28), 62), 20, 5
    profile = load_profile("raspberry_pi_4")

    dense = steps * step_flops(spec, {}, batch) / published["dense_compute_seconds_per_round"]
    assert profile.dense_flops_per_s == pytest.approx(dense, rel=1e-9)

    def flops(name):
        return steps * layer_flops(spec, spec.by_name[name], {}, batch).step

    def seconds(name):
        return (coefficients[name] - link) * prod(spec.param_shapes[f"{name}.weight"])

    conv = seconds("conv2") / flops("conv2")
    assert profile.sparse_conv_seconds_per_flop == pytest.approx(conv, rel=1e-9)
    linear = (seconds("fc1") + seconds("fc2")) / (flops("fc1") + flops("fc2"))
    assert profile.sparse_linear_seconds_per_flop == pytest.approx(linear, rel=1e-9)
    spread = published["constant_seconds_per_round"] / (activations(spec) * batch * steps)
    assert profile.sparse_seconds_per_activation == pytest.approx(spread, rel=1e-9)
    # 4 bytes up and 4 down at one rate
    assert profile.uplink_bytes_per_s == profile.downlink_bytes_per_s
    assert profile.uplink_bytes_per_s == pytest.approx(8 / link, rel=1e-9)
    # conv1's published coefficient is all link
    assert abs(coefficients["conv1"] - link) < 1e-3 * link


@pytest.mark.parametrize("name", ["raspberry_pi_5", "Generic", "nothing of the kind", ""])
def test_unknown_name_lists_the_nearest(name):
    with pytest.raises(ValueError, match="no device profile named") as error:
        load_profile(name)
    message = str(error.value)
    assert repr(name) in message and "\n" not in message
    assert any(known in message for known in BUILT_IN)
    if name == "raspberry_pi_5":
        assert "nearest: raspberry_pi_4 (" in message


def test_a_file_of_the_user(tmp_path):
    profile = load_profile(written(tmp_path, document(name="mine", uplink_bytes_per_s=5)))
    assert profile.name == "mine" and profile.uplink_bytes_per_s == 5


def test_a_derivation_is_ignored(tmp_path):
    path = written(tmp_path, document(derivation={"anything": 1}))
    assert load_profile(path) == load_profile("generic")


def refused(path):
    with pytest.raises(ValueError) as error:
        load_profile(path)
    message = str(error.value)
    assert "\n" not in message
    assert repr(path) in message
    return message


def test_missing_file(tmp_path):
    assert "no such file" in refused(str(tmp_path / "absent.json"))


@pytest.mark.parametrize(
    "content", ["", "{", "[" * 100_000, "[]", "null", "3", '"generic"', '{"name": }']
)
def test_bad_json(tmp_path, content):
    refused(written(tmp_path, content))


@pytest.mark.parametrize("name", ["board", "board.txt"])
def test_a_file_needs_no_ending(tmp_path, monkeypatch, name):
    """A path serves wherever a name does; a built-in name comes first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(json.dumps(document(name="mine")))
    assert load_profile(name).name == "mine"
    (tmp_path / "generic").write_text(json.dumps(document(name="mine")))
    assert load_profile("generic").name == "generic"
    assert load_profile("./generic").name == "mine"


@pytest.mark.parametrize("name", ["absent/board", "."])
def test_a_path_that_is_no_file(name, tmp_path):
    refused(str(tmp_path / name))


@pytest.mark.parametrize("content", [b"\xff\xfe{\0}\0", b"\xfe\xff\0{\0}", b'{"name": "\xe4"}'])
def test_bytes_that_are_not_utf_8(tmp_path, content):
    path = tmp_path / "board.json"
    path.write_bytes(content)
    assert "another encoding (UTF-16?): save it as UTF-8" in refused(str(path))


def test_a_file_as_a_windows_editor_saves_it(tmp_path):
    path = tmp_path / "board.json"
    text = json.dumps(document(description="Prüfstand"), indent=1, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert load_profile(str(path)).description == "Prüfstand"


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize(
    "value", [-1, float("nan"), float("inf"), True, None, "5", [1], pytest.param(10**400, id="big")]
)
def test_bad_number_names_the_field(tmp_path, field, value):
    assert field in refused(written(tmp_path, document(**{field: value})))


@pytest.mark.parametrize("value", [1e-320, 1e-31, 1e31, 1e308])
@pytest.mark.parametrize("field", NUMBERS)
def test_a_rate_that_makes_seconds_infinite_names_the_field(tmp_path, field, value):
    path = written(tmp_path, document(**{field: value}))
    if field.startswith("sparse_") and value < 1:  # costs: next to none
        assert getattr(load_profile(path), field) == value
    else:
        assert f"{field} must be from 1e-30 to 1e+30" in refused(path)


def test_seconds_that_were_measured_to_be_beyond_a_float(tmp_path):
    layers = {"fc1.weight": {"seconds_per_weight": 0, "full_seconds": None, "r_squared": 1}}
    operation = {"constant_seconds": 1.0, "dense_seconds": None, "layers": layers}
    measured = {
        "model": "mlp",
        "spec_hash": "0",
        "batch_size": 1,
        "session": operation,
        "step": operation,
        "forward": operation,
        "importance_seconds": 0.0,
        "dense_importance_seconds": 0.0,
        "conditions": {},
    }
    load_profile(written(tmp_path, document(measured=measured)))
    for change, said in (
        ({"step": {**operation, "constant_seconds": 1e308}}, "measured.step.constant_seconds"),
        ({"importance_seconds": float("nan")}, "measured.importance_seconds"),
        ({"batch_size": 10**400}, "measured.batch_size"),
        ({"conditions": {"date": float("inf")}}, "measured.conditions"),
    ):
        assert said in refused(written(tmp_path, document(measured={**measured, **change})))


@pytest.mark.parametrize(
    "content", ["[" * 10**6, '{"a":' * 10**6, "9" * 5000, '{"name": "a", "name": "b"}']
)
def test_what_no_writer_of_profiles_writes(tmp_path, content):
    refused(written(tmp_path, content))


@pytest.mark.parametrize("field", NUMBERS)
def test_only_sparse_costs_may_be_zero(tmp_path, field):
    path = written(tmp_path, document(**{field: 0}))
    if field.startswith("sparse_"):
        assert getattr(load_profile(path), field) == 0
    else:
        assert field in refused(path)


@pytest.mark.parametrize("field", [f.name for f in fields(Profile) if f.default is MISSING])
def test_missing_field_is_named(tmp_path, field):
    rest = document()
    del rest[field]
    assert f"missing ['{field}']" in refused(written(tmp_path, rest))


def test_unknown_field_is_named(tmp_path):
    assert "dense_flop_per_s" in refused(written(tmp_path, document(dense_flop_per_s=1)))


@pytest.mark.parametrize("field", ["name", "description", "source"])
def test_text_must_be_text(tmp_path, field):
    assert field in refused(written(tmp_path, document(**{field: 3})))


@pytest.mark.parametrize("value", [0, 1, "false", None])
def test_a_dense_way_is_there_or_not(tmp_path, value):
    assert load_profile(written(tmp_path, document())).dense_way, "files from before it was said"
    without = load_profile(written(tmp_path, document(dense_way=False)))
    assert not without.dense_way
    assert from_document(to_document(without)) == without
    path = written(tmp_path, document(dense_way=value))
    assert "dense_way must be true or false" in refused(path)


@pytest.mark.parametrize("name", BUILT_IN)
def test_twice_as_fast_takes_half_the_time_of_everything(name):
    spec, work = conv2((1, 28, 28), 62), Work(3, 20, 1)
    kept = dict.fromkeys(spec.prunable, 1000)
    slow = load_profile(name)
    for each in (work, replace(work, kept=kept), Work(forward_examples=40)):
        seconds, half = (work_seconds(spec, each, one) for one in (slow, faster(slow, 2.0)))
        assert half == pytest.approx(seconds / 2)
    assert faster(slow, 1.0) is slow
