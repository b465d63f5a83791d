"""Every code block in README and docs: Python is run, command lines are parsed."""

from __future__ import annotations

import re
import shlex
import sys
import types
from pathlib import Path

import pytest

from fedlean.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "experiments").glob("**/README.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list:
    return [
        pytest.param(code, id=f"{page.parent.name}-{page.name}-{number}")
        for page in PAGES
        for number, (kind, code) in enumerate(BLOCK.findall(page.read_text()))
        if kind == language
    ]


def python_pages() -> list:
    """All blocks of a page, which follow each other."""
    pages = [(page, BLOCK.findall(page.read_text())) for page in PAGES]
    codes = [(page, [code for kind, code in found if kind == "python"]) for page, found in pages]
    return [
        pytest.param(codes_of, id=f"{page.parent.name}-{page.name}")
        for page, codes_of in codes
        if codes_of
    ]


@pytest.mark.parametrize("codes", python_pages())
def test_python_runs(codes):
    module = types.ModuleType("docs_block")
    sys.modules["docs_block"] = module  # dataclasses look their module up
    try:
        for code in codes:
            exec(compile(code, "<docs>", "exec"), module.__dict__)
    finally:
        del sys.modules["docs_block"]


@pytest.mark.parametrize("code", blocks("sh"))
def test_commands_parse(code):
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "fedlean":
            app.parse_args(words[1:], exit_on_error=False, print_error=False)
        elif words and words[0] == "make":
            makefile = (ROOT / "Makefile").read_text()
            assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words[1:])
        elif words and words[0] == "python":
            assert (ROOT / words[1]).is_file(), words


def test_the_site_has_every_page():
    """Of docs/, once."""
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    named = re.findall(r": ([\w-]+\.md)$", nav, re.MULTILINE)
    assert sorted(named) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page}: {target}"
