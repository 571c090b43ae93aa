"""The exception tree.

Every error a user can cause derives from :class:`TiledsegError` and also from the builtin a
Python reader would expect. The text of each says what is wrong, where, and what to do.
"""

__all__ = [
    "ClusterError",
    "DeviceError",
    "ImageError",
    "ModelError",
    "OutputError",
    "RemoteError",
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


class SegmenterError(TiledsegError, RuntimeError):
    """A function given as segmenter failed, or returned something else than labels."""


class ClusterError(TiledsegError, RuntimeError):
    """A scheduler cannot be reached, or work on it failed beyond repair."""
