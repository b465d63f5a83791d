"""The methods that docs/adding-a-method.md shows, as its reader would have them."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "adding-a-method.md"


def method_of(name: str) -> Callable[..., Any]:
    """The function of that name, from the one block of the page that defines it."""
    blocks = [part.partition("```")[0] for part in PAGE.read_text().split("```python\n")[1:]]
    (code,) = (block for block in blocks if f"def {name}(" in block)
    module = types.ModuleType(f"docs_{name}")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(code, f"<{PAGE.name}>", "exec"), module.__dict__)
    return getattr(module, name)
