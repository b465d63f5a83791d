"""What docstrings say of settings."""

from __future__ import annotations

import pytest

from fedlean.cli import main
from fedlean.described import described
from fedlean.runtime.method import available, find_method, hyperparameters


@pytest.mark.parametrize("name", available())
def test_every_setting_of_every_method_is_described(name):
    method = find_method(name)
    settings = hyperparameters(method)
    texts = described(method, settings)
    assert texts.keys() == settings.keys()
    assert all(text[0].strip() and "\n" not in text for text in texts.values())


def test_lines_belong_to_the_names_before_them():
    def method(server, *, a: int = 1, b: int = 2, c: float = 0.5):
        """Something.

        Args:
          server: not a setting.
          a, b: of the first
            and of its next line.
          c: one with a: colon in it.

        c: not this, since the first counts.
        """

    assert described(method, ("a", "b", "c")) == {
        "a": "of the first and of its next line.",
        "b": "of the first and of its next line.",
        "c": "one with a: colon in it.",
    }
    assert described(lambda server: None, ("a",)) == {}


def test_help_of_a_method(capsys):
    main(["run", "prunefl", "--help"])
    said = capsys.readouterr().out
    assert "Train one model across simulated clients" in said
    own = said[said.index("Hyper-parameters of prunefl") :]
    assert "--batch" in own and "batch_size=" not in own
    assert "reconfigure_every=" in own and "[default: 50]" in own
    assert own.count("D_lim and D_tgt") == 1 and "see size_limit" in own
    assert max(map(len, own.splitlines()[1:])) <= 80


def test_help_of_a_method_that_is_none(capsys):
    main(["run", "--help"])
    assert "Hyper-parameters" not in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(["run", "prunefll", "--help"])
    assert left.value.code == 2
    assert "no method named 'prunefll'; nearest: prunefl" in capsys.readouterr().err
