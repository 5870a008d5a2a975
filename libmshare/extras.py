"""What is to be installed for what this package can do only with others."""

from __future__ import annotations

import site
from pathlib import Path
from typing import Final

_DEBIANS: Final = Path("/usr/lib/python3/dist-packages")
"""Where packages of Debian's have their modules, and nothing else has any."""


def cure(extra: str) -> str:
    """The command that installs an extra of pyproject.toml, as this package was installed."""
    if not Path(__file__).is_relative_to(_DEBIANS):
        return f"pip install 'msharefs[{extra}]'"
    return {
        "daemon": "apt install msharefs",
        # (They recommend 13 packages that nothing here uses.)
        "web": "apt install --no-install-recommends python3-starlette python3-uvicorn",
        # Debian has none; this is where its Python looks for what an administrator adds.
        "images": f"pip install --target {site.getsitepackages()[0]} obstore",
    }[extra]
