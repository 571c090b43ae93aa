"""Requests to a remote store: what is tried again and for how long, and what it says as a sentence.

A store that was there may be away for a minute: when connections are refused or break, answers do not come, or
say that the server is at fault (500, 502 to 504) or overloaded (429), it is asked again, more and more seldom.
One that never answered is given up after some seconds, since its address is most likely wrong.
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from .addresses import without_credentials
from .errors import RemoteError

__all__ = ["ForbiddenError", "NoBucketError", "NothingThereError", "request", "request_async"]

logger = logging.getLogger(__name__)

AWAY_S = 60.0
"""How long a store may be away that answered before."""
NEVER_THERE_S = 4.0
"""How long one may that never did."""
PAUSE_S = (0.25, 8.0)
"""Before the first try again, and the longest; each is twice the one before."""
SAID_EVERY_S = 10.0

Answer = TypeVar("Answer")


class ForbiddenError(RemoteError):
    """The store does not let this be read or written."""


class NothingThereError(RemoteError):
    """There is no such object."""


class NoBucketError(RemoteError):
    """There is no such bucket."""


class _Roots:
    """Which stores have answered, and when it was last said that one does not; shared by all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answered: set[str] = set()
        self._said: dict[str, float] = {}

    def answered(self, root: str) -> None:
        """A store answered; if it was said that it does not, this is said as well."""
        with self._lock:
            self._answered.add(root)
            was_away = self._said.pop(root, None)
        if was_away is not None:
            logger.warning("%s answers again.", root)

    def patience(self, root: str) -> float:
        """Seconds that a store may be away."""
        with self._lock:
            return AWAY_S if root in self._answered else NEVER_THERE_S

    def say(self, root: str, why: str, seconds: float) -> None:
        """Say that a store does not answer, once in a while."""
        now = time.monotonic()
        with self._lock:
            if now - self._said.get(root, -SAID_EVERY_S) < SAID_EVERY_S:
                return
            self._said[root] = now
        logger.warning("%s: %s; trying again for %.0f s.", root, why, seconds)


_ROOTS = _Roots()


class _Tries:
    """The tries of one request."""

    def __init__(self, root: str, address: str, to: str) -> None:
        self.root, self.what = root, f"{address} cannot be {to}"
        self.pause, self.longest = PAUSE_S
        self.patience = _ROOTS.patience(root)
        self.since: float | None = None

    def pause_after(self, error: Exception) -> float:
        """Seconds to wait before the next try; raises if there is none."""
        now = time.monotonic()
        why, is_passing = _reason(error)
        if not is_passing:
            _ROOTS.answered(self.root)
            raise _final(error, self.what, why) from error
        self.since = now if self.since is None else self.since
        left = self.patience - (now - self.since)
        if left <= 0:
            raise RemoteError(
                f"{self.what}: {why}, for {self.patience:.0f} s; check the address and the network, "
                "then run the same command again: what is done is kept."
            ) from error
        _ROOTS.say(self.root, why, left)
        pause, self.pause = min(self.pause, left), min(2 * self.pause, self.longest)
        return pause


def request(root: str, address: str, call: Callable[[], Answer], to: str = "read") -> Answer:
    """Ask a store, with patience.

    Parameters
    ----------
    root : str
        The store, as ``"s3://bucket"``.
    address : str
        What is asked for, for messages.
    call : callable
        Asks with obstore; may be called several times.
    to : str
        What is tried, for messages: ``"read"`` or ``"written"``.

    Returns
    -------
    answer : object
        Of `call`.

    Raises
    ------
    NothingThereError, NoBucketError, ForbiddenError
        If there is no such thing, or it is not for us.
    RemoteError
        If the store is away for longer than it may be, or answers with an error.
    """
    tries = _Tries(root, address, to)
    while True:
        try:
            answer = call()
        except _errors() as error:
            time.sleep(tries.pause_after(error))
        else:
            _ROOTS.answered(root)
            return answer


async def request_async(root: str, address: str, call: Callable[[], Awaitable[Answer]], to: str = "read") -> Answer:
    """The same for what is awaited.

    Parameters
    ----------
    root, address : str
        As for `request`.
    call : callable
        Gives an awaitable, a new one for each try.
    to : str
        As for `request`.

    Returns
    -------
    answer : object

    Raises
    ------
    RemoteError
        As for `request`.
    """
    tries = _Tries(root, address, to)
    while True:
        try:
            answer = await call()
        except _errors() as error:
            await asyncio.sleep(tries.pause_after(error))
        else:
            _ROOTS.answered(root)
            return answer


def _errors() -> tuple[type[Exception], ...]:
    """What obstore raises for what a store says; a missing object is a FileNotFoundError."""
    from obstore.exceptions import BaseError

    return (BaseError, FileNotFoundError)


_PASSING = (
    ("dns error", "its name is not known"),
    ("Connection refused", "the connection is refused"),
    ("kind: Timeout", "there is no answer in time"),
    ("kind: Connect", "there is no connection"),
    ("HTTP error", "the connection broke off"),
    ("decoding response body", "the connection broke off"),
)


def _reason(error: Exception) -> tuple[str, bool]:
    """What an error of obstore means, and whether it may pass."""
    text = str(error)
    found = re.search(r"status code: (\d{3})|status: (\d{3})", text)
    status = int(found[1] or found[2]) if found else 0
    if "certificate" in text and "HTTP error" in text:
        return "its certificate is not trusted", False
    if status in (408, 429, 500, 502, 503, 504):
        return f"the server answers with status {status}", True
    if status:
        return f"the server answers with status {status}", False
    if "redirect" in text:
        return "the bucket is in another region; set AWS_REGION", False
    for sign, why in _PASSING:
        if sign in text:
            return why, True
    return without_credentials(text.split("\n", 1)[0])[:200].rstrip("."), False


def _final(error: Exception, what: str, why: str) -> RemoteError:
    """The sentence for an error that does not pass."""
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    text = str(error)
    if "NoSuchBucket" in text:
        return NoBucketError(f"{what}: there is no such bucket; check the address.")
    if isinstance(error, FileNotFoundError):
        return NothingThereError(f"{what}: there is nothing at that address; check it.")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        detail = "" if why.startswith("the server") else f" ({why})"
        return ForbiddenError(
            f"{what}: access is forbidden{detail}; check the credentials in the environment "
            "(AWS_PROFILE, AWS_ACCESS_KEY_ID, ...), or set AWS_SKIP_SIGNATURE=true for a public bucket."
        )
    return RemoteError(f"{what}: {why}; check the address and what the server says.")
