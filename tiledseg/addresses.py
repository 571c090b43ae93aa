"""Addresses of remote stores: which text is one, and how to tell it without what is secret in it.

An address says where, never who: credentials come from the environment, as the library that talks to
the store finds them. So one with a password or a query in it is refused, and whatever is shown, logged
or written goes through :func:`clean_address` if it may hold one.
"""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import unquote, urlsplit

from .errors import RemoteError

__all__ = ["clean_address", "is_remote", "split_address"]

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_USER = r"(?:[^\s/?#'\"<>]*@|[^\s/@:?#'\"<>]+:(?!\d{1,5}(?:[/?#\s'\"<>]|$))[^\s@'\"<>]*@)?"
"""Also where the password holds slashes, as those of S3 do; a number after the colon is a port."""
_ADDRESS = re.compile(
    rf"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://){_USER}(?P<where>[^\s?'\"<>]*)(?:\?[^\s'\"<>]*)?",
)


def is_remote(source: Any) -> bool:
    """Whether something is an address such as ``s3://bucket/key``, and no local path.

    Parameters
    ----------
    source : object

    Returns
    -------
    is_remote : bool
        False for what is neither text nor a path.
    """
    return isinstance(source, str | os.PathLike) and _SCHEME.match(os.fspath(source)) is not None


def clean_address(text: str) -> str:
    """Text without the users, passwords, queries and fragments of the addresses in it.

    Parameters
    ----------
    text : str
        An address, or a sentence with some.

    Returns
    -------
    text : str
        For example ``"s3://bucket/a.zarr cannot be read"``; text without addresses as it is. A ``#`` is part
        of a name in ``s3://`` and stays.
    """

    def clean(found: re.Match[str]) -> str:
        scheme, where = found["scheme"], found["where"]
        return scheme + (where if scheme.lower() == "s3://" else where.partition("#")[0])

    return _ADDRESS.sub(clean, text)


def split_address(address: str) -> tuple[str, str]:
    """Take an address apart.

    Parameters
    ----------
    address : str
        ``s3://BUCKET/KEY`` or ``http(s)://HOST/PATH``.

    Returns
    -------
    root, key : str
        The bucket or server, as ``"s3://bucket"``, and the key in it without slashes at its ends; of
        http not percent-encoded.

    Raises
    ------
    RemoteError
        If it is of another kind, names no bucket or server, or holds a user, a password or a query.
    """
    shown = clean_address(address.partition("?")[0])
    scheme, _, rest = address.partition("://")
    scheme = scheme.lower()
    if scheme not in ("s3", "http", "https"):
        raise RemoteError(f"{shown} cannot be opened: only s3://, http:// and https:// can; copy it to a local disk.")
    host, _, key = rest.partition("/")
    if "@" in host:
        shown = f"{scheme}://..." if shown == address else shown
    if shown != address or "#" in host:
        raise RemoteError(
            f"the address of {shown} holds a user, a password, a query or a fragment; leave it out: credentials "
            "come from the environment (AWS_PROFILE, AWS_ACCESS_KEY_ID), a public store needs none."
        )
    key = key.strip("/") if scheme == "s3" else unquote(key).strip("/")
    try:
        is_host = bool(host) and (scheme == "s3" or bool(urlsplit(f"{scheme}://{host}").port or True))
    except ValueError:
        is_host = False
    if not is_host or (key and any(part in ("", ".", "..") for part in key.split("/"))):
        raise RemoteError(f"{shown} is no address that can be opened; give s3://BUCKET/KEY or http(s)://HOST/PATH.")
    return f"{scheme}://{host}", key
