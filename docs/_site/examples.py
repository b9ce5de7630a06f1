"""An extension of the reader of docstrings: sections called "Example" are read as code."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Rename the section for Griffe, which knows "Examples" alone."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the text of a docstring."""
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = text
