"""Label images and images, with their pyramid and metadata, out as OME-Zarr 0.4 and 0.5."""

from .labels import (
    LabelsPlan,
    LevelZero,
    create_labels,
    finish_labels,
    label_names,
    labels_exist,
    level_array,
    open_labels,
    plan_labels,
    read_level,
    remove_labels,
)
from .shrink import finer_region, halvings, shrink
from .writer import ImagePlan, create_image, finish_image, image_level, write_image

__all__ = [
    "ImagePlan",
    "LabelsPlan",
    "LevelZero",
    "create_image",
    "create_labels",
    "finer_region",
    "finish_image",
    "finish_labels",
    "halvings",
    "image_level",
    "label_names",
    "labels_exist",
    "level_array",
    "open_labels",
    "plan_labels",
    "read_level",
    "remove_labels",
    "shrink",
    "write_image",
]
