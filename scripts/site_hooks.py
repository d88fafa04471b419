"""For the site: links of a page to files outside of docs/ lead to the repository."""

from __future__ import annotations

import posixpath
import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Replace links that leave docs/."""
    folder = posixpath.dirname(page.file.src_uri)

    def replaced(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", folder, match[1]))
        return match[0] if path.startswith("docs/") else f"]({config['extra']['repository']}/blob/main/{path})"

    return re.sub(r"\]\((\.\./[^)\s]+)\)", replaced, markdown)
