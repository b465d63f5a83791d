"""The methods that the pages of docs show, as their reader would have them."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
PAGE = "adding-a-method.md"


def method_of(name: str, page: str = PAGE) -> Callable[..., Any]:
    """The function of that name, from the one block of the page that defines it."""
    blocks = [part.partition("```")[0] for part in _code(page)[1:]]
    (code,) = (block for block in blocks if f"def {name}(" in block)
    module = types.ModuleType(f"docs_{name}")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(code, f"<{page}>", "exec"), module.__dict__)
    return getattr(module, name)


def _code(page: str) -> list[str]:
    return (DOCS / page).read_text().split("```python\n")
