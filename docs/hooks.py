"""What the pages need beyond markdown when mkdocs makes a site of them."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to files of the repository, which the site does not hold, become their names."""
    return OUTSIDE.sub(r"\1", markdown)
