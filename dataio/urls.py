"""Recognition of URLs, and their redaction for messages."""

import re
from pathlib import Path


def is_url(path_or_url: str | Path) -> bool:
    """Tell a URL from a path."""
    return "://" in str(path_or_url)


def redact_url(text: str) -> str:
    """Remove names, passwords and query strings from a URL, or from all URLs in a text.

    Passwords may hold characters that should be percent-encoded, like `/` and `?`; so all up to the last @ is removed,
    even if it belongs to the path.
    """
    text = re.sub(r"://\S*@", "://…@", text)
    return re.sub(r"(://[^?\s]*\?)\S+", r"\1…", text)
