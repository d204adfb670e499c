"""URLs of remote data sets, told from paths, and printed without their secrets."""

import re
from pathlib import Path


def is_url(path_or_url: str | Path) -> bool:
    return "://" in str(path_or_url)


def redact_url(text: str) -> str:
    """A URL, or a text with some, for people: without name and password, and without what follows a question mark.

    A password may hold what should be written as %2F or %3F; so all up to the last @ goes, even that of a path.
    """
    text = re.sub(r"://\S*@", "://…@", text)
    return re.sub(r"(://[^?\s]*\?)\S+", r"\1…", text)
