"""Makes the site of docs/ out of what a reader of the repository sees.

The cards of experiments/ are pages of it.  Links between both folders are those of the repository;
a link to source files, which the site does not have, becomes its text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
KEPT = {".md", ".svg", ".py", ".toml", ".json"}  # of an experiment's folder
_OUTSIDE = re.compile(
    r"\[([^\]]+)\]\((?:\.\./)+(?:src|native|tests|benchmarks|README|CHANGELOG|Makefile)[^)]*\)"
)


def on_files(files: Files, *, config: Any) -> Files:
    """With the files of experiments/ beside the pages."""
    for path in sorted((ROOT / "experiments").rglob("*")):
        if path.suffix in KEPT and "__pycache__" not in path.parts:
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """With the links that hold in the site."""
    markdown = _OUTSIDE.sub(r"\1", markdown)
    if page.file.src_uri.startswith("experiments/"):
        return re.sub(r"\]\(((?:\.\./)+)docs/", r"](\1", markdown)
    return markdown.replace("](../experiments/", "](experiments/")
