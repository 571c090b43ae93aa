"""Addresses: what is one, and that nothing secret in it is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiledseg.errors import RemoteError
from tiledseg.urls import is_remote, split_address


def test_what_is_an_address() -> None:
    assert is_remote("s3://bucket/a")
    assert is_remote("HTTP://host/a")
    for local in ("a.zarr", "/s3:/bucket", Path("a"), "C:/a", 3, None, b"s3://a"):
        assert not is_remote(local)


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("s3://bucket", ("s3://bucket", "")),
        ("S3://bucket/a/b.zarr/", ("s3://bucket", "a/b.zarr")),
        ("s3://bucket/a%20b/c #1", ("s3://bucket", "a%20b/c #1")),
        ("s3://bucket/me@lab/c#1", ("s3://bucket", "me@lab/c#1")),
        ("http://host:8000/a%20b/c.zarr", ("http://host:8000", "a b/c.zarr")),
        ("https://[::1]:80/a", ("https://[::1]:80", "a")),
    ],
)
def test_addresses_are_taken_apart(address: str, parts: tuple[str, str]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("gs://bucket/a", "only s3://, http:// and https:// can"),
        ("ftp://me:SECRET@host/a", "ftp://host/a cannot be opened"),
        ("s3://KEY:SEC/RET@bucket/a", "the address of s3://bucket/a holds a user"),
        ("s3://KEY:SECRET@bucket/a", "the address of s3://bucket/a holds a user, a password, a query"),
        ("https://host/a.zarr?X-Amz-Signature=SECRET", "the address of https://host/a.zarr holds a user"),
        ("https://host/a.zarr#SECRET", "holds a user, a password, a query or a fragment"),
        ("https://host/a b.zarr?token=SECRET", "the address of https://host/a b.zarr holds"),
        ("https://user:SEC RET@host/a.zarr", "the address of https://... holds"),
        ("https://user@host/a.zarr", "holds a user, a password, a query or a fragment"),
        ("s3://", "s3:// is no address that can be opened"),
        ("http:///a.zarr", "is no address that can be opened"),
        ("http://host:port/a.zarr", "is no address that can be opened"),
        ("s3://bucket/a/../b", "is no address that can be opened"),
        ("http://host/a/%2e%2e/b", "is no address that can be opened"),
        ("s3://bucket//a", None),
        ("s3://bucket/a//b", "is no address that can be opened"),
    ],
)
def test_addresses_that_cannot_be_used_are_refused(address: str, message: str | None) -> None:
    if message is None:
        assert split_address(address) == ("s3://bucket", "a")
        return
    with pytest.raises(RemoteError) as caught:
        split_address(address)
    assert message in str(caught.value)
    assert "SEC" not in str(caught.value)
