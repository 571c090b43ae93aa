"""Files of models from Cellpose's store."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import ModelError

__all__ = ["STORE_VARIABLES", "fetch"]

STORE_VARIABLES = {"cellpose3": "CELLPOSE3_MODELS_URL", "cellpose4": "CELLPOSE4_MODELS_URL"}
"""Environment variables that say where the models of Cellpose 1-3 and of Cellpose 4 are."""

RETRIES = 3


def fetch(store: str, path: Path) -> None:
    """Fetch a file into its place, with a progress bar and three retries.

    The address of the store is that of the environment variable in `STORE_VARIABLES`, else the one the installed
    Cellpose has.

    Raises
    ------
    ModelError
        If it cannot be fetched; says where the file belongs.
    """
    import pooch

    address = _address(store)
    if address is None:
        install = "pip install 'tiledseg[cellpose]', which knows it, or set " if store == "cellpose4" else "set "
        raise ModelError(
            f"model file {path.name} is not here and the address of its store is not known; {install}"
            f"{STORE_VARIABLES[store]} to it, or put the file into {path.parent}: a Cellpose of that version fetches "
            "it there when it first uses the model."
        )
    files = pooch.create(path.parent, address.rstrip("/") + "/", registry={path.name: None}, retry_if_failed=RETRIES)
    try:
        files.fetch(path.name, progressbar=True)
    except (OSError, ValueError) as error:  # requests raises kinds of OSError
        raise ModelError(
            f"model file {path.name} could not be fetched ({error}); try again, or put the file into {path.parent}."
        ) from error


def _address(store: str) -> str | None:
    """Where a store is; None if nobody says so."""
    given = os.environ.get(STORE_VARIABLES[store])
    if given or store != "cellpose4":
        return given or None
    try:
        from cellpose.models import _MODEL_URL
    except ImportError:
        return None
    return str(_MODEL_URL)
