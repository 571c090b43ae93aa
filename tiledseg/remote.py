"""Remote stores: Zarr on S3 or behind a web server, and the few operations on files that labels need.

Only an address travels to other processes; each opens it itself, and finds the credentials itself: boto3 looks
where the tools of AWS do (environment, profiles, roles), obstore moves the bytes. Servers of http need not list:
what is there is found by asking for it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import shutil
import zlib
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from zarr.storage import ObjectStore

from .addresses import is_remote, split_address
from .errors import RemoteError
from .patience import ForbiddenError, NothingThereError, request, request_async

__all__ = ["Location", "RemotePath", "absent", "location", "read_file", "remove_tree", "zarr_store"]

logger = logging.getLogger(__name__)

ASKED_AT_ONCE = 16
"""Objects."""
_CLIENT: dict[str, Any] = {"timeout": "600s", "read_timeout": "60s", "connect_timeout": "10s"}
_NO_RETRIES: Any = {"max_retries": 0, "retry_timeout": timedelta(0)}  # those are ours, and said


@dataclass(frozen=True)
class RemotePath:
    """An object of a remote store, or all below a prefix: what `pathlib.Path` is to a disk.

    Parameters
    ----------
    root : str
        The bucket or server, as ``"s3://bucket"``.
    key : str
        Without slashes at its ends, not percent-encoded.
    """

    root: str
    key: str

    def __str__(self) -> str:
        key = quote(self.key) if self.root.startswith("http") else self.key
        return f"{self.root}/{key}" if key else self.root

    def __truediv__(self, component: object) -> RemotePath:
        parts = [part for part in (self.key, str(component)) if part not in ("", ".")]
        return RemotePath(self.root, "/".join(parts))

    @property
    def name(self) -> str:
        """The last part of the key; of a bucket or server itself its name."""
        return self.key.rpartition("/")[2] or self.root.partition("://")[2]

    @property
    def parent(self) -> RemotePath:
        """What it lies in; of a bucket itself the bucket."""
        return RemotePath(self.root, self.key.rpartition("/")[0])

    @property
    def is_writable(self) -> bool:
        """Whether a store of this kind can be written, and listed."""
        return self.root.startswith("s3://")

    def absolute(self) -> RemotePath:
        """Itself: there is no folder it could be relative to."""
        return self

    def resolve(self) -> RemotePath:
        """Itself: there are no links."""
        return self

    def is_file(self) -> bool:
        """Whether the object is there, found by asking for it."""
        import obstore

        if not self.key:
            return False
        try:
            self._ask(lambda: obstore.head(_client(self.root), self.key))
        except NothingThereError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether anything lies below it."""
        return any(self.iterdir())

    def exists(self) -> bool:
        """Whether there is an object of that name, or anything below it."""
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator[RemotePath]:
        """What lies directly below it."""
        import obstore

        found = self._ask(lambda: obstore.list_with_delimiter(_client(self.root), prefix=self.key or None))
        for key in [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]:
            yield RemotePath(self.root, key)

    def read_bytes(self) -> bytes:
        """The object."""
        import obstore

        return bytes(self._ask(lambda: obstore.get(_client(self.root), self.key).bytes()))

    def upload(self, file: Path) -> None:
        """Make the object from a file; it is there completely or not at all."""
        import obstore

        self._ask(lambda: obstore.put(_client(self.root), self.key, file), "written")

    def check_writable(self) -> None:
        """Write and delete an object below it; raises what the store says if that is not allowed."""
        import obstore

        client, key = _client(self.root), (self / ".tiledseg").key
        self._ask(lambda: obstore.put(client, key, b""), "written")
        self._ask(lambda: obstore.delete(client, key), "written")

    def remove_below(self) -> None:
        """Delete all that lies below it, never a whole bucket."""
        import obstore

        if not self.key:
            raise ValueError(f"{self} is a whole bucket")
        client, prefix = _client(self.root), f"{self.key}/"
        found = self._ask(lambda: [[entry["path"] for entry in page] for page in obstore.list(client, prefix)])
        for keys in found:
            self._ask(functools.partial(obstore.delete, client, keys), "written")

    def _ask(self, call: Callable[[], Any], to: str = "read") -> Any:
        """Ask the store, with patience."""
        return request(self.root, str(self), call, to)


Location = Path | RemotePath
"""A place on a disk or in a remote store."""


def location(source: str | os.PathLike[str]) -> Location:
    """A path, or what an address means.

    Parameters
    ----------
    source : str or path

    Returns
    -------
    location : Path or RemotePath

    Raises
    ------
    RemoteError
        If it is an address that cannot be used, or what is needed for it is not installed.
    """
    return RemotePath(*split_address(os.fspath(source))) if is_remote(source) else Path(source)


def read_file(place: Location) -> tuple[bytes, int] | None:
    """A small file, and a number that is another one when it was written anew.

    Parameters
    ----------
    place : Path or RemotePath

    Returns
    -------
    content : bytes
    stamp : int
        Nothing at all if there is no such file.

    Raises
    ------
    OSError, RemoteError
        If it cannot be read.
    """
    if isinstance(place, Path):
        return (place.read_bytes(), place.stat().st_mtime_ns) if place.is_file() else None
    try:
        content = place.read_bytes()
    except NothingThereError:
        return None
    return content, zlib.crc32(content)


def absent(folder: Location, keys: Sequence[str]) -> list[str]:
    """Which files are not there.

    Parameters
    ----------
    folder : Path or RemotePath
    keys : sequence of str
        Paths below the folder.

    Returns
    -------
    keys : list of str
        In the same order.
    """
    if isinstance(folder, Path):
        return [key for key in keys if not (folder / key).is_file()]
    with ThreadPoolExecutor(ASKED_AT_ONCE, "tiledseg-asking") as pool:
        are_there = list(pool.map(lambda key: (folder / key).is_file(), keys))
    return [key for key, is_there in zip(keys, are_there, strict=True) if not is_there]


def remove_tree(place: Location) -> None:
    """Delete a folder with all that is in it; of a link the link. Nothing happens if it is not there.

    Parameters
    ----------
    place : Path or RemotePath
    """
    if isinstance(place, RemotePath):
        place.remove_below()
    elif place.is_symlink():
        place.unlink()
    elif place.exists():
        shutil.rmtree(place)


def zarr_store(place: Location) -> Any:
    """What zarr opens, whose root is this place.

    Parameters
    ----------
    place : Path or RemotePath

    Returns
    -------
    store : Path or zarr.abc.store.Store
    """
    return place if isinstance(place, Path) else PatientStore(place)


class PatientStore(ObjectStore[Any]):
    """zarr's own store, asked with patience; it pickles as its address."""

    def __init__(self, place: RemotePath, *, read_only: bool = False) -> None:
        super().__init__(_client(str(place)), read_only=read_only)
        self.place = place

    def __reduce__(self) -> Any:
        return functools.partial(PatientStore, read_only=self.read_only), (self.place,)

    def __str__(self) -> str:
        return str(self.place)

    def with_read_only(self, read_only: bool = False) -> Self:
        """The same place."""
        return type(self)(self.place, read_only=read_only)

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        """An object or a part of it, None if it is not there."""
        from obstore.exceptions import NotSupportedError

        get = super().get
        try:
            found = await self._ask(key, lambda: get(key, prototype, byte_range))
        except RemoteError as error:
            if isinstance(error, ForbiddenError) and key.endswith(".zattrs"):
                return None  # need not be there, and where listing is forbidden so is what is not there
            if not isinstance(error.__cause__, NotSupportedError):
                raise
            _say_no_ranges(self.place.root)
            found = await self._ask(key, lambda: get(key, prototype))
            found = None if found is None else found[_slice_of(byte_range)]
        if found is not None and not len(found):
            # zarr would take it for an array of zeros.
            raise ValueError("the stored object is empty")
        return found

    async def get_partial_values(self, prototype: Any, key_ranges: Iterable[tuple[str, Any]]) -> list[Any]:
        """Parts of objects."""
        return list(await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges)))

    async def exists(self, key: str) -> bool:
        """Whether an object is there."""
        exists = super().exists
        return bool(await self._ask(key, lambda: exists(key)))

    async def set(self, key: str, value: Any) -> None:
        """Write an object."""
        put = super().set
        await self._ask(key, lambda: put(key, value), "written")

    async def set_if_not_exists(self, key: str, value: Any) -> None:
        """Write an object that is not there."""
        put = super().set_if_not_exists
        await self._ask(key, lambda: put(key, value), "written")

    async def delete(self, key: str) -> None:
        """Delete an object."""
        delete = super().delete
        await self._ask(key, lambda: delete(key), "written")

    def list(self) -> AsyncGenerator[str, None]:
        """All keys."""
        return self._listed("", super().list)

    def list_prefix(self, prefix: str) -> AsyncGenerator[str, None]:
        """All keys that begin so."""
        return self._listed(prefix, functools.partial(super().list_prefix, prefix))

    def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        """What lies directly below a prefix."""
        return self._listed(prefix, functools.partial(super().list_dir, prefix))

    async def _listed(self, key: str, listing: Callable[[], AsyncGenerator[str, None]]) -> AsyncGenerator[str, None]:
        """A listing that is whole."""

        async def collected() -> Sequence[str]:
            return [name async for name in listing()]

        for name in await self._ask(key, collected):
            yield name

    async def _ask(self, key: str, call: Callable[[], Any], to: str = "read") -> Any:
        """Ask the store, with patience."""
        return await request_async(self.place.root, str(self.place / key), call, to)


def _slice_of(byte_range: Any) -> slice:
    """The bytes that zarr asks for."""
    if hasattr(byte_range, "suffix"):
        return slice(-byte_range.suffix, None)
    return slice(getattr(byte_range, "offset", getattr(byte_range, "start", None)), getattr(byte_range, "end", None))


@functools.cache
def _say_no_ranges(root: str) -> None:
    """Say once that shards are read whole."""
    logger.warning("%s gives no parts of files: shards are read whole, again and again; use another server.", root)


@functools.lru_cache(maxsize=256)
def _client(address: str) -> Any:
    """What talks to a store whose root is this address, made once per process."""
    try:
        import obstore.store

        root, key = split_address(address)
        if root.startswith("s3://"):
            config = _s3_config()
            options: Any = {**_CLIENT, "allow_http": str(config.get("endpoint", "")).startswith("http://")}
            bucket = root.removeprefix("s3://")
            return obstore.store.S3Store(
                bucket, prefix=key or None, client_options=options, retry_config=_NO_RETRIES, **config
            )
    except ImportError as error:
        raise RemoteError(
            f"{address} needs the package {error.name}, which is not installed: pip install 'tiledseg[remote]'."
        ) from error
    options = {**_CLIENT, "allow_http": root.startswith("http://")}
    return obstore.store.HTTPStore.from_url(
        str(RemotePath(root, key)), client_options=options, retry_config=_NO_RETRIES
    )


@functools.cache
def _s3_config() -> dict[str, Any]:
    """Region, endpoint and what gives credentials, as boto3 finds them; a public bucket's without."""
    import boto3
    from botocore.exceptions import BotoCoreError
    from obstore.auth.boto3 import Boto3CredentialProvider

    try:
        session = boto3.Session()
        where = session.client("s3").meta
        has_credentials = session.get_credentials() is not None
    except (BotoCoreError, ValueError) as error:
        raise RemoteError(f"S3 cannot be used: {error}; check the settings of AWS in the environment.") from error
    config: dict[str, Any] = {"region": session.region_name or "us-east-1"}
    if not where.endpoint_url.endswith(".amazonaws.com"):
        config["endpoint"] = where.endpoint_url
    is_public = os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("true", "1")
    if has_credentials and not is_public:
        return {**config, "credential_provider": Boto3CredentialProvider(session)}
    if not is_public:
        logger.info("no credentials for S3 are found: only public buckets can be read.")
    return {**config, "skip_signature": True}
