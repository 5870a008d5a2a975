"""How `make docs` builds the site."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

project = "msharefs"
html_title = "msharefs"
project_copyright = "the authors of msharefs, MIT licence"
extensions = ["myst_parser", "sphinx.ext.autodoc", "manual_page"]
root_doc = "index"
exclude_patterns = ["_ext"]

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["manual-page.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"
# Some lines that run by a test say more than a lexer of the language knows.
highlight_language = "text"

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

# Docstrings of this project are plain text with code in single backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88


def as_list(
    _app: Sphinx, _what: str, _name: str, _of: object, _options: object, lines: list[str]
) -> None:
    """Have "`parameter`: what it is" of a docstring be an item of a list."""
    found: list[str] = []
    inside = False
    for line in lines:
        if re.match(r"`\w+`: ", line):
            found += [*([] if inside else [""]), f"* {line}"]
            inside = True
        else:
            inside = inside and bool(line)
            found.append(f"  {line}" if inside else line)
    lines[:] = found


def without_arguments(
    _app: Sphinx,
    what: str,
    _name: str,
    _of: object,
    _options: object,
    signature: str | None,
    _returns: str | None,
) -> tuple[str, None] | None:
    """Nobody calls our classes: methods make their objects."""
    return ("", None) if what == "class" and signature else None


def setup(app: Sphinx) -> None:
    """What Sphinx calls."""
    app.connect("autodoc-process-signature", without_arguments)
    app.connect("autodoc-process-docstring", as_list)
