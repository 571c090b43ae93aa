"""What zarr reads from and writes to: folders whose files last, and remote stores on obstore, asked with patience."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from zarr.storage import ObjectStore

from .errors import RemoteError
from .folders import FolderStore, new_folder
from .patience import ForbiddenError, request_async
from .remote import Location, RemotePath
from .remote_clients import client_of

__all__ = ["PatientStore", "new_store", "zarr_store"]

logger = logging.getLogger(__name__)


def zarr_store(
    place: Location, *, read_only: bool = False, home: Location | None = None, drafts: Location | None = None
) -> Any:
    """What zarr opens, whose root is this place; of a folder one that lasts and is waited for, see `folders`.

    Parameters
    ----------
    place : Path or RemotePath
    read_only : bool
    home, drafts : Path or RemotePath, optional
        Of a folder, see `folders.FolderStore`.

    Returns
    -------
    store : zarr.abc.store.Store
    """
    if isinstance(place, RemotePath):
        return PatientStore(place, read_only=read_only)
    return FolderStore(place, read_only=read_only, home=_as_path(home), drafts=_as_path(drafts))


def new_store(place: Location) -> Any:
    """The same where there need not be anything yet: a folder is made."""
    return PatientStore(place) if isinstance(place, RemotePath) else new_folder(place)


def _as_path(place: Location | None) -> Path | None:
    return place if isinstance(place, Path) else None


class PatientStore(ObjectStore[Any]):
    """zarr's own store, asked with patience; it pickles as its address."""

    def __init__(self, place: RemotePath, *, read_only: bool = False) -> None:
        super().__init__(client_of(str(place)), read_only=read_only)
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
