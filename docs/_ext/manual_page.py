"""The directive `manual-page`: a page of man(1) as a part of the site.

mandoc(1) translates it, so the page is written once.  Its sections become those of the site,
and names of our other pages become links.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, ClassVar

from bs4 import BeautifulSoup
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

OURS = {("mshare", "1"): "command", ("mshare", "3"): "c", ("msharefsd", "8"): "daemon"}
"""Where on the site our pages are."""
_REFERENCE = re.compile(r"<b>(\w+)</b>\((\d)\)")


def linked(html: str) -> str:
    """The same, with links to our own pages."""

    def link(match: re.Match[str]) -> str:
        place = OURS.get((match[1], match[2]))
        return match[0] if place is None else f'<a href="{place}.html">{match[0]}</a>'

    return _REFERENCE.sub(link, html)


def title(capitals: str) -> str:
    """A section's heading as the site has headings: what is all capitals becomes a word."""
    return capitals.capitalize() if capitals.isupper() else capitals


class ManualPage(SphinxDirective):
    """`manual-page:: FILE`, beside the document."""

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = {}

    def run(self) -> list[nodes.Node]:
        """The page's sections, but for its name, which is the document's title."""
        _, path = self.env.relfn2path(self.arguments[0])
        self.env.note_dependency(path)
        done = subprocess.run(  # noqa: S603 - with fixed arguments and a file of ours
            ["mandoc", "-T", "html", "-O", "fragment", path],  # noqa: S607 - the system's
            check=True,
            capture_output=True,
            text=True,
        )
        found: list[nodes.Node] = []
        for part in BeautifulSoup(done.stdout, "html.parser").select("section.Sh"):
            heading = part.find("h1")
            if heading is None or heading.text == "NAME":
                continue
            name = heading.text
            heading.decompose()
            for below in part.select("h2"):
                below.name = "h3"
            section = nodes.section(ids=[nodes.make_id(f"{Path(path).name}-{name}")])
            section += nodes.title(text=title(name))
            body = f'<div class="manual-page">{linked(part.decode_contents())}</div>'
            section += nodes.raw("", body, format="html")
            found.append(section)
        return found


def setup(app: Sphinx) -> dict[str, bool]:
    """What Sphinx calls."""
    app.add_directive("manual-page", ManualPage)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
