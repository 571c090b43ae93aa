"""Addresses without what gives access: nothing that is written or said may hold a password or a token."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["cleaned", "without_credentials"]

# Lengths are limited, for names in images are not: without, long ones would take forever.
ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{0,30}://)(?P<rest>[^\s\"'<>]*)")
USER_AND_PASSWORD = re.compile(r"(?<![\w/@:.-])[^\s/@:\"'<>]{1,256}:[^\s/@\"'<>]{1,256}@(?=[\w\[])")
"""Before a host without a scheme, as in ``user:password@host:8786``."""
QUERY = re.compile(r"[?#].*", re.DOTALL)
PORT = re.compile(r"\d*$")
PUNCTUATION = ".,;:)]"
"""Of a sentence around an address."""


def without_credentials(text: str) -> str:
    """A text with addresses that give no access.

    Parameters
    ----------
    text : str
        An address, or any text that may hold some.

    Returns
    -------
    cleaned : str
        Without users and passwords before a host, and without queries and fragments, which hold the tokens of
        presigned addresses. Anything else stays, paths of files too.

    Examples
    --------
    >>> without_credentials("https://me:secret@host/slide.zarr?token=abc")
    'https://host/slide.zarr'
    """
    return USER_AND_PASSWORD.sub("", ADDRESS.sub(_cleaned_address, text))


def _cleaned_address(found: re.Match[str]) -> str:
    """One address without users, passwords and query."""
    address = found["rest"].rstrip(PUNCTUATION)
    around, rest = found["rest"][len(address) :], QUERY.sub("", address)
    host, slash, path = rest.partition("/")
    if "@" in host:
        host = host.rpartition("@")[2]
    elif "@" in path and not PORT.match(host.partition(":")[2]):
        # A password with a slash in it, as secrets of S3 may have: what stands before the first one is no port.
        return found["scheme"] + path.rpartition("@")[2] + around
    return f"{found['scheme']}{host}{slash}{path}{around}"


def cleaned(document: Any) -> Any:
    """A document of dicts, lists, tuples and scalars with all its texts cleaned, keys as well."""
    if isinstance(document, str):
        return without_credentials(document)
    if isinstance(document, dict):
        return {cleaned(key): cleaned(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return type(document)(map(cleaned, document))
    return document
