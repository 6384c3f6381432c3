"""The site: `make docs` builds it from the Markdown of the repository, every warning an error.

Pages are plain Markdown that reads well without a site. What a site needs besides is added here:
the navigation from the lists of links in docs/index.md (a page that no list names comes under
"More"), the API reference from wagontrain's public names, and the benchmark results.
"""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

import wagontrain

ROOT = Path(__file__).resolve().parents[1]

project = "wagontrain"
version = release = wagontrain.__version__
html_title = f"wagontrain {release}"
html_theme = "furo"
html_copy_source = False
html_show_copyright = False
templates_path: list[str] = []

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
root_doc = "docs/index"
# The root of the repository is the source, so that links between files lead to the same places
# here as in a clone.
include_patterns = [
    "docs/**.md", "benchmarks/results/*.md", "README.md", "CONTRIBUTING.md", "CHANGELOG.md",
]  # fmt: skip
exclude_patterns = ["docs/_build", ".venv", "runs", "**/.*"]

nitpicky = True
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # results begin at whatever level their programs write

default_role = "code"  # docstrings mark code with single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "show-inheritance": True}
python_use_unqualified_type_names = True
napoleon_google_docstring = True

_LINK = re.compile(r"^- \[[^\]]+\]\(([\w./-]+)\.md\)", re.MULTILINE)


def _listed(text: str) -> list[tuple[str, list[str]]]:
    """Headings of the index, with the pages that are listed below each."""
    parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    return [
        (title, _LINK.findall(body)) for title, body in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _tree(caption: str, pages: list[str], options: str = "") -> str:
    return f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n{options}\n" + "\n".join(pages) + "\n```\n"


def navigation(app: Sphinx, text: str) -> str:
    """The trees of contents that the index stands for."""
    found = _listed(text)
    named = {page for _, pages in found for page in pages}
    rest = sorted(
        path.stem for path in (ROOT / "docs").glob("*.md") if path.stem not in {*named, "index"}
    )
    trees = [_tree(title, pages) for title, pages in found if pages]
    if rest:
        trees.append(_tree("More", rest))
    return "".join(trees)


def reference() -> str:
    """Directives that print the docstrings of all public names."""
    return "\n".join(
        f"```{{eval-rst}}\n.. autoclass:: wagontrain.{name}\n```\n"
        if isinstance(getattr(wagontrain, name), type)
        else f"```{{eval-rst}}\n.. autofunction:: wagontrain.{name}\n```\n"
        for name in wagontrain.__all__
        if callable(getattr(wagontrain, name))
    )


def _read(app: Sphinx, name: str, content: list[str]) -> None:
    if name == root_doc:
        content[0] += navigation(app, content[0])
    elif name == "docs/api":
        content[0] += reference()
    elif name == "docs/results":
        content[0] += _tree("Results", ["../benchmarks/results/*"], ":glob:\n:reversed:\n")


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", _read)
    return {"parallel_read_safe": True}
