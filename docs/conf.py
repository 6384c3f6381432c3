"""The site: `make docs` builds it from the Markdown of the repository, every warning an error.

Pages are plain Markdown that reads well without a site. What a site needs besides is added here:
the navigation from the lists of links in docs/index.md (a page that no list names comes under
"More"), the API reference from wagontrain's public names, and the benchmark results.
"""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]

project = "wagontrain"
html_title = "wagontrain"
html_theme = "furo"
html_copy_source = False
html_show_copyright = False
templates_path: list[str] = []

extensions = ["myst_parser"]
if "links" not in tags:  # noqa: F821  a name that Sphinx gives; to check links, torch is not needed
    extensions += ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
root_doc = "docs/index"
# The root of the repository is the source, so that links between files lead to the same places
# here as in a clone.
include_patterns = [
    "docs/**.md", "benchmarks/results/*.md", "README.md", "CONTRIBUTING.md", "CHANGELOG.md",
]  # fmt: skip
exclude_patterns = ["docs/_build", ".venv", "runs", "**/.*"]

myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # results begin at whatever level their programs write

default_role = "code"  # docstrings mark code with single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True
napoleon_google_docstring = True

_LINK = re.compile(r"^- \[([^\]]+)\]\(([\w./-]+)\.md\)", re.MULTILINE)
_FIRST = ("Task", "fit", "connect", "Run", "Result", "make_strategy", "discover", "Strategy")
"""Names that the API reference begins with; the others follow by the alphabet."""
_COMPLETED = (root_doc, "docs/api", "docs/results", "docs/decisions")


def _listed(text: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """Headings of the index, with the title and name of each page that is listed below it."""
    parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    return [
        (title, _LINK.findall(body)) for title, body in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _tree(caption: str, pages: list[str], options: str = "") -> str:
    head = f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n{options}\n"
    return head + "\n".join(pages) + "\n```\n"


def navigation(text: str) -> str:
    """The trees of contents that the index stands for."""
    found = _listed(text)
    named = {name for _, pages in found for _, name in pages}
    rest = sorted(
        path.stem for path in (ROOT / "docs").glob("*.md") if path.stem not in {*named, "index"}
    )
    trees = [
        _tree(heading, [f"{title} <{name}>" for title, name in pages]) for heading, pages in found
    ]
    if rest:
        trees.append(_tree("More", rest))
    return "".join(trees)


def reference() -> str:
    """Directives that print the docstrings of all public names."""
    import wagontrain

    return "\n".join(
        f"```{{eval-rst}}\n.. autoclass:: wagontrain.{name}\n```\n"
        if isinstance(getattr(wagontrain, name), type)
        else f"```{{eval-rst}}\n.. autofunction:: wagontrain.{name}\n```\n"
        for name in [*_FIRST, *(each for each in wagontrain.__all__ if each not in _FIRST)]
        if callable(getattr(wagontrain, name))
    )


def _read(app: Sphinx, name: str, content: list[str]) -> None:
    """Completes a page before it is read."""
    # What a repository browser shows of a folder is a page here.
    content[0] = re.sub(r"\]\((\.\./)?benchmarks/results\)", r"](/docs/results.md)", content[0])
    if name == root_doc:
        content[0] += navigation(content[0])
    elif name == "docs/api" and "sphinx.ext.autodoc" in app.extensions:
        content[0] += reference()
    elif name == "docs/results":
        content[0] += _tree("Results", ["../benchmarks/results/*"], ":glob:\n:reversed:\n")
    elif name == "docs/decisions":
        content[0] += _tree("Decisions", ["decisions/*"], ":glob:\n")


def _completed(app: Sphinx, env: object, added: object, changed: object, gone: object) -> list[str]:
    """Pages that `_read` completes are read anew each time: what they get may have changed."""
    return [name for name in _COMPLETED if name in app.env.found_docs]


def _literal(
    app: Sphinx, what: str, name: str, of: object, options: object, lines: list[str]
) -> None:
    """Indented blocks of a docstring are code or tables, as in Markdown, and not quotations."""
    made: list[str] = []
    for number, line in enumerate(lines):
        before = next((each for each in reversed(lines[:number]) if each.strip()), "")
        begins = line.startswith("    ") and number > 0 and not lines[number - 1].strip()
        if begins and before and not before.startswith(" "):
            made += ["::", ""]
        made.append(line)
    lines[:] = made


def _lead_in(app: Sphinx, error: Exception | None) -> None:
    """The site's own first page leads to that of the docs."""
    if error is None and app.builder.format == "html":
        page = '<!doctype html><meta http-equiv="refresh" content="0; url=docs/index.html">\n'
        (Path(app.outdir) / "index.html").write_text(page)


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", _read)
    app.connect("env-get-outdated", _completed)
    if "sphinx.ext.autodoc" in app.extensions:
        app.connect("autodoc-process-docstring", _literal, priority=100)  # before napoleon
    app.connect("build-finished", _lead_in)
    return {"parallel_read_safe": True}
