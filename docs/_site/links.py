"""A hook of MkDocs: links to files outside docs/ become their paths, as the site has no such files.

In the repository the links work as they are.
"""

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]*)\]\((?:\.\./)+([^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Return the page with links that leave docs/ written as text."""
    depth = page.file.src_uri.count("/")

    def plain(found: re.Match[str]) -> str:
        up = found[0].count("../")
        return found[0] if up <= depth else f"{found[1]} (`{found[2]}` in the repository)"

    return _OUTSIDE.sub(plain, markdown)
