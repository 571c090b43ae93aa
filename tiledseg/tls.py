"""Certificates of encrypted connections: whether there are any before Dask is asked to use them."""

from __future__ import annotations

import json
from pathlib import Path

from .errors import ClusterError

__all__ = ["are_configured", "require_certificates"]


def are_configured() -> bool:
    """Whether Dask's configuration or environment names an authority to trust."""
    import dask

    return bool(dask.config.get("distributed.comm.tls.ca-file", None))


def require_certificates(scheduler: str) -> None:
    """Refuse a scheduler behind TLS where no certificates are configured.

    Dask itself would raise a TypeError, and then keep the process from ending for half a minute.

    Parameters
    ----------
    scheduler : str
        Address, or a scheduler file that exists.

    Raises
    ------
    ClusterError
        If they are missing.
    """
    address = scheduler
    if "://" not in scheduler and Path(scheduler).exists():
        try:
            address = str(json.loads(Path(scheduler).read_text())["address"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ClusterError(
                f"{scheduler} is no scheduler file; give the one that 'dask scheduler --scheduler-file' wrote."
            ) from error
    if address.startswith("tls://") and not are_configured():
        raise ClusterError(
            f"no Dask scheduler answers at {scheduler} without certificates, and none are configured; name them in "
            "DASK_DISTRIBUTED__COMM__TLS__CA_FILE, DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT and "
            "DASK_DISTRIBUTED__COMM__TLS__CLIENT__KEY, or in Dask's configuration."
        )
