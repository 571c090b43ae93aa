"""Addresses of remote stores: which text is one, and what it means.

An address says where, never who: credentials come from the environment, as the library that talks to the
store finds them. So one with a password or a query in it is refused, and those that are left can be shown.
"""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import unquote, urlsplit

from .addresses import without_credentials
from .errors import RemoteError

__all__ = ["is_remote", "split_address"]

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}://")


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
        If it is of another kind, names no bucket or server, or holds a user, a password, a query or, where
        ``#`` is no part of a name, a fragment.
    """
    scheme, _, rest = address.partition("://")
    scheme = scheme.lower()
    host, _, key = rest.partition("/")
    plain = re.split("[?#]" if scheme != "s3" else "[?]", address, maxsplit=1)[0]
    named = plain.partition("#")[0]
    shown = without_credentials(named)
    if shown == named and "@" in host:
        shown = f"{scheme}://..."  # not to be taken apart
    if scheme not in ("s3", "http", "https"):
        raise RemoteError(f"{shown} cannot be opened: only s3://, http:// and https:// can; copy it to a local disk.")
    if plain != address or shown != named or "#" in host:
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
