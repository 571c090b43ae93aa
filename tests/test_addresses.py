"""No password and no token is written or said."""

from __future__ import annotations

import pytest

from tiledseg.addresses import cleaned, without_credentials

SECRET = "S3cr3t"


@pytest.mark.parametrize(
    ("given", "left"),
    [
        (f"https://me:{SECRET}@host/slide.zarr", "https://host/slide.zarr"),
        (f"https://{SECRET}@host:443/slide.zarr", "https://host:443/slide.zarr"),
        (f"https://host/slide.zarr?X-Amz-Credential={SECRET}%2Fx&sig={SECRET}", "https://host/slide.zarr"),
        (f"https://host/slide.zarr#token={SECRET}", "https://host/slide.zarr"),
        (f"https://host/a?next=https://me:{SECRET}@b/", "https://host/a"),
        (f"s3://AKIA:{SECRET}/with+slash@bucket/slide.zarr", "s3://bucket/slide.zarr"),
        (f"simplecache::https://me:{SECRET}@host/slide.zarr", "simplecache::https://host/slide.zarr"),
        (f"tls://me:p@{SECRET}@10.0.0.1:8786", "tls://10.0.0.1:8786"),
        (f"me:{SECRET}@host:8786", "host:8786"),
        (f"https://me:{SECRET}@[::1]:80/a", "https://[::1]:80/a"),
        (f"cannot read 'https://host/a?t={SECRET}', (see https://b/?t={SECRET}).", None),
        ("tcp://127.0.0.1:8786", "tcp://127.0.0.1:8786"),
        ("s3://bucket/me@lab/slide.zarr", "s3://bucket/me@lab/slide.zarr"),
        ("s3://bucket:9000/me@lab/slide.zarr", "s3://bucket:9000/me@lab/slide.zarr"),
        ("/data/what?/me:you@lab/slide#1.zarr", "/data/what?/me:you@lab/slide#1.zarr"),
        ("ask me@lab at 12:30", "ask me@lab at 12:30"),
    ],
)
def test_addresses_lose_what_gives_access_and_nothing_else(given: str, left: str | None) -> None:
    found = without_credentials(given)
    assert SECRET not in found
    assert found == (left if left is not None else "cannot read 'https://host/a', (see https://b/).")
    assert without_credentials(found) == found


def test_documents_are_cleaned_to_the_last_text() -> None:
    secret = f"https://me:{SECRET}@host/a"
    document = {secret: [1, (secret, None)], "b": {"c": secret, "d": True}}
    assert cleaned(document) == {
        "https://host/a": [1, ("https://host/a", None)],
        "b": {"c": "https://host/a", "d": True},
    }


@pytest.mark.parametrize("letter", ["a", "!", "a:", "?", ")", "@", "://"])
def test_a_long_name_takes_no_long_time(letter: str) -> None:
    """Names of channels come from images: none may keep a run busy. In quadratic time this would be minutes."""
    long = letter * 100_000
    assert without_credentials(long) == long
    assert without_credentials(f"https://host/{long}?token={SECRET}") in (
        f"https://host/{long}",
        "https://host/",
    )
