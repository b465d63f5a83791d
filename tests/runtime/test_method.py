"""Finding methods and reading their hyper-parameters from text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

import pytest
from federation import server

from fedlean.methods.fedavg import fedavg
from fedlean.methods.prunefl import prunefl
from fedlean.runtime.method import (
    available,
    build,
    complete,
    find_method,
    given_settings,
    hyperparameters,
    parse_settings,
    unused_settings,
)

if TYPE_CHECKING:
    from fedlean.algorithm import FederatedAlgorithm, Server


def sample(
    server: Any,
    *,
    steps: int = 5,
    rate: float = 0.1,
    nesterov: bool = False,
    loss: Literal["ce", "bce"] = "ce",
    blocks: Literal[2, 4] = 2,
    cohort: int | None = None,
    limit: float | None = 0.5,
    name: str = "x",
) -> Any:
    return steps, rate, nesterov, loss, blocks, cohort, limit, name


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("steps=7", 7),
        ("steps=-7", -7),
        ("rate=0.25", 0.25),
        ("rate=1", 1.0),
        ("rate=1e-3", 0.001),
        ("nesterov=true", True),
        ("nesterov=False", False),
        ("loss=bce", "bce"),
        ("blocks=4", 4),
        ("cohort=3", 3),
        ("limit=0.75", 0.75),
        ("name=a=b", "a=b"),
        ("name=", ""),
        ("name=3", "3"),
    ],
)
def test_types(text, value):
    (parsed,) = parse_settings("sample", sample, [text]).values()
    assert (type(parsed), parsed) == (type(value), value)


def test_none_means_none_whatever_the_default():
    assert parse_settings("sample", sample, ["cohort=none"]).get("cohort") is None
    assert parse_settings("sample", sample, ["limit=None"]) == {"limit": None}


def test_a_key_is_given_once():
    with pytest.raises(ValueError, match=r"--set steps=\.\.\. is given twice: give it once"):
        parse_settings("sample", sample, ["steps=1", "rate=2", "steps=3"])
    assert parse_settings("sample", sample, []) == {}


def test_an_option_and_a_setting_of_one_name_are_refused():
    """Either alone counts."""
    assert given_settings("fedavg", ["lr=0.05"]) == {"lr": 0.05}
    assert given_settings("fedavg", [], {"lr": 0.2}) == {"lr": 0.2}
    with pytest.raises(ValueError, match=r"--set lr=\.\.\. and the option for lr are one setting"):
        given_settings("fedavg", ["lr=0.05"], {"lr": 0.2})


UNUSED = [
    ("fedavg", ["warmup_client=1"], "warmup_client has no effect on fedavg, since warmup_steps is"),
    ("prunefl", ["initial_pruning=false", "initial_passes=3"], "initial_pruning is false"),
    ("prunefl", ["reconfigure_every=0", "importance_rounds=2"], "reconfigure_every is 0"),
    (
        "prunefl",
        ["initial_pruning=false", "reconfigure_every=0", "size_limit=0.1"],
        "size_limit has no effect on prunefl, since nothing is pruned",
    ),
    ("snip", ["score=update", "snip_batches=3"], "score is 'update'"),
    ("synflow", ["density=1", "synflow_steps=3"], "density is 1"),
    ("iterative", ["density=1", "spacing=geometric"], "density is 1"),
    ("online", ["adapt_every=0", "adapt_from=3"], "adapt_every is 0"),
    ("dpf", ["density=1", "target_share=0.2"], "density is 1"),
    ("prunetrain", ["penalty_ratio=0", "threshold=0.1"], "penalty_ratio is 0"),
    ("allsmall", ["width=0.5", "widths=1 0.5"], "width says which one"),
    ("heterofl", ["widths=0.5", "assign=drawn"], "widths names one width"),
    ("heterofl", ["widths=1", "scaler=false"], "widths is 1 alone"),
    ("fiarse", ["densities=0.5", "assign=drawn"], "densities names one density"),
    ("fiarse", ["densities=1", "biased=step"], "densities is 1 alone"),
    ("ssfl", ["density=1", "score_batches=2"], "density is 1"),
    ("depthfl", ["distillation=0", "distillation_rounds=9"], "distillation is 0"),
    ("ntk_zo", ["momentum=0.5"], "optimizer is 'adam'"),
    ("ntk_zo", ["density=1", "criterion=node"], "density is 1"),
    ("ntk_zo", ["criterion=random", "epsilon=0.1"], "criterion 'random' takes no scores"),
]


@pytest.mark.parametrize(("method", "texts", "reason"), UNUSED)
def test_a_setting_that_the_method_ignores_is_refused(method, texts, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        given_settings(method, texts)


@pytest.mark.parametrize("name", sorted(available()))
def test_no_default_is_refused_and_all_unused_settings_exist(name):
    method = find_method(name)
    settings = complete(name, {})
    assert unused_settings(method, settings).keys() <= settings.keys()
    assert given_settings(name, []) == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps=2.5", ("steps", "integer", "'2.5'")),
        ("steps=many", ("steps", "integer", "'many'")),
        ("steps=", ("steps", "integer")),
        ("rate=fast", ("rate", "number", "'fast'")),
        ("nesterov=yes", ("nesterov", "true or false", "'yes'")),
        ("loss=mse", ("loss", "ce, bce", "'mse'")),
        ("blocks=3", ("blocks", "2, 4", "'3'")),
        ("cohort=all", ("cohort", "integer", "'all'")),
        ("limit=half", ("limit", "number", "'half'")),
        ("step=3", ("sample", "'step'", "steps")),
        ("STEPS=3", ("'STEPS'",)),
        ("server=3", ("'server'",)),
        ("steps", ("'steps'", "key=value")),
        ("", ("key=value",)),
    ],
)
def test_what_is_wrong_is_said(text, said):
    with pytest.raises(ValueError) as error:
        parse_settings("sample", sample, [text])
    assert all(part in str(error.value) for part in said)
    assert "\n" not in str(error.value)


def test_an_unknown_key_far_from_all_lists_all():
    with pytest.raises(ValueError) as error:
        parse_settings("sample", sample, ["zzzzzz=3"])
    assert all(name in str(error.value) for name in hyperparameters(sample))


def test_names_that_only_type_checkers_import_do_not_matter():
    def typed(server: Server, *, steps: int = 5) -> FederatedAlgorithm: ...

    assert parse_settings("typed", typed, ["steps=2"]) == {"steps": 2}


@pytest.mark.parametrize("method", [fedavg, prunefl])
def test_every_hyperparameter_of_a_method_can_be_given(method):
    """Each default, written as text, reads back as itself."""
    for name, parameter in hyperparameters(method).items():
        read = parse_settings(method.__name__, method, [f"{name}={parameter.default}"])
        value = read.get(name)
        assert (type(value), value) == (type(parameter.default), parameter.default)


def test_available_and_found():
    names = available()
    assert {"fedavg", "prunefl"} <= names.keys()
    for name, text in names.items():
        assert find_method(name).__name__ == name
        assert text and "\n" not in text


def test_unknown_method_names_the_nearest():
    with pytest.raises(ValueError, match=r"'prunfl'.*prunefl"):
        find_method("prunfl")
    with pytest.raises(ValueError, match=r"fedavg.*prunefl"):
        find_method("zzz")


@pytest.mark.parametrize(
    "name",
    [
        "nosuchmodule:f",
        "fedlean.methods.fedavg:nosuch",
        ":f",
        "fedlean.core:",
        "fedlean.methods.fedavg:__doc__",
    ],
)
def test_what_cannot_be_imported(name):
    with pytest.raises(ValueError, match="method"):
        find_method(name)


def test_module_and_function():
    assert find_method("fedlean.methods.fedavg:fedavg") is fedavg


def test_build():
    assert build("fedavg", server(3), {"lr": 0.5}).done is not None
    with pytest.raises(ValueError, match=r"'local_step'.*local_steps"):
        build("fedavg", server(3), {"local_step": 3})
    with pytest.raises(ValueError, match="lr"):
        build("fedavg", server(3), {"lr": -1.0})
