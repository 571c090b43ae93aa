"""Label images with their pyramid and metadata, and small images, out as OME-Zarr 0.4 and 0.5."""

from .labels import (
    LabelsPlan,
    LevelZero,
    create_labels,
    finish_labels,
    labels_exist,
    level_array,
    open_labels,
    plan_labels,
    read_level,
    remove_labels,
)
from .writer import write_image

__all__ = [
    "LabelsPlan",
    "LevelZero",
    "create_labels",
    "finish_labels",
    "labels_exist",
    "level_array",
    "open_labels",
    "plan_labels",
    "read_level",
    "remove_labels",
    "write_image",
]
