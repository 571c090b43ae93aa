"""The exception tree.

Every error a user can cause derives from :class:`TiledsegError` and also from the builtin a
Python reader would expect. The text of each says what is wrong, where, and what to do.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "ClusterError",
    "DeviceError",
    "ImageError",
    "ModelError",
    "OutputError",
    "QuarantineError",
    "RemoteError",
    "ScratchError",
    "SegmenterError",
    "SettingsError",
    "TiledsegError",
]


class TiledsegError(Exception):
    """Base of all errors raised on purpose by this package."""


class ImageError(TiledsegError, ValueError):
    """The input image is missing, unreadable, or not something that can be segmented."""


class SettingsError(TiledsegError, ValueError):
    """A setting is out of range, contradicts another, or differs from the run being resumed."""


class ModelError(TiledsegError, ValueError):
    """A model is unknown or its file is not what it claims to be."""


class DeviceError(TiledsegError, RuntimeError):
    """The device asked for is not there."""


class OutputError(TiledsegError, OSError):
    """The result cannot be written where it was asked for."""


class RemoteError(TiledsegError, RuntimeError):
    """A remote store cannot be reached, refuses, or its address is none that can be used."""


class ScratchError(TiledsegError, ValueError):
    """A file of the scratch is missing or damaged.

    Parameters
    ----------
    folder : path
        The scratch.
    file : str
        Path in it.
    why : object
        What reading it said.
    advice : str
        What to do.
    """

    def __init__(
        self, folder: object, file: str, why: object, advice: str = "run the same command again with --restart."
    ) -> None:
        super().__init__(str(folder), file, str(why).rstrip("."), advice)
        self.file = file

    def __str__(self) -> str:
        folder, file, why, advice = self.args
        return f"{file} of the scratch {folder} is damaged or missing ({why}); {advice}"


class SegmenterError(TiledsegError, RuntimeError):
    """A function given as segmenter failed, or returned something else than labels."""


class ClusterError(TiledsegError, RuntimeError):
    """A scheduler cannot be reached, or work on it failed beyond repair."""


class QuarantineError(TiledsegError, RuntimeError):
    """Some pieces of a run fail whenever they are tried; the rest is done.

    Parameters
    ----------
    message : str
    pieces : tuple of tasks.Quarantined
        What failed, where, and how.
    """

    def __init__(self, message: str, pieces: tuple[Any, ...] = ()) -> None:
        super().__init__(message)
        self.pieces = pieces
