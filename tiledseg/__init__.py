"""Cellpose segmentation of images that do not fit: the same cells whatever the blocks.

The pipeline, in the order in which a run goes through it:

1. `survey`: percentiles, diameter and foreground of the whole image.
2. `flows`: the network on every tile of a fixed lattice, once.
3. `masks`: from flows to the cells of every block and its halo.
4. `stitch`: one identity for what several blocks saw.
5. `publish`: labels with pyramid in OME-Zarr, and a table.

`pipeline` runs them; `config` holds their settings; `store` is where they meet; `cluster` does their `tasks`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .job import Diameter
    from .pipeline import Segmentation, estimate_diameter, preview, segment
    from .report import Report
    from .scoring import Comparison, compare
    from .training import TrainingReport, train

__all__ = [
    "Comparison",
    "Diameter",
    "Report",
    "Segmentation",
    "TrainingReport",
    "compare",
    "estimate_diameter",
    "preview",
    "segment",
    "train",
]

_HOMES = {
    "Comparison": "scoring",
    "Diameter": "job",
    "Report": "report",
    "Segmentation": "pipeline",
    "compare": "scoring",
    "estimate_diameter": "pipeline",
    "preview": "pipeline",
    "segment": "pipeline",
    "TrainingReport": "training",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: the command line's help needs none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tiledseg' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
