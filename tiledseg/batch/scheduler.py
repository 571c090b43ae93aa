"""The scheduler of a run, and who may talk to it."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ClusterError, SettingsError
from ..tls import are_configured
from .config import ClusterConfig
from .scripts import SCHEDULER_FILE, TLS_FOLDER
from .systems import System

__all__ = ["require_tls", "scheduler_of"]

logger = logging.getLogger(__name__)


def require_tls(config: ClusterConfig) -> None:
    """Refuse settings of security that cannot work here."""
    if config.cluster.security == "tls":
        try:
            import cryptography  # noqa: F401
        except ImportError as error:
            raise SettingsError(
                "to encrypt what the jobs say to each other a package is missing: pip install 'tiledseg[cluster]', or "
                'set security = "none" under [cluster] where nobody else can reach the machines.'
            ) from error
    if config.cluster.security == "dask" and not are_configured():
        raise SettingsError(
            'security = "dask" needs the certificates in Dask\'s configuration, distributed.comm.tls, or in '
            "DASK_DISTRIBUTED__COMM__TLS__CA_FILE and the like; name them there, or leave security out."
        )


@contextlib.contextmanager
def scheduler_of(system: System, config: ClusterConfig, folder: Path) -> Iterator[Any]:
    """A scheduler in this process, without workers; its file and its certificate go with the context."""
    from distributed import Scheduler, SpecCluster

    scheduler_file, tls = folder / SCHEDULER_FILE, folder / TLS_FOLDER
    where = {"host": system.host} if system.host else {"interface": config.cluster.interface}
    options = {
        **where,
        "protocol": "tcp://" if config.cluster.security == "none" else "tls://",
        "scheduler_file": str(scheduler_file),
        "dashboard": False,
        "dashboard_address": "127.0.0.1:0",
    }
    scheduler_file.unlink(missing_ok=True)
    security = _security(config, tls)
    spec = {"cls": Scheduler, "options": {**options, "security": security}}
    try:
        try:
            cluster = SpecCluster(scheduler=spec, security=security, silence_logs=logging.CRITICAL)
        except RuntimeError as error:
            reason = str(error.__cause__.__cause__ if error.__cause__ else error)
            raise ClusterError(f"the scheduler does not start: {reason}; see [cluster] of the cluster file.") from error
        with cluster:
            yield cluster
    finally:
        scheduler_file.unlink(missing_ok=True)
        shutil.rmtree(tls, ignore_errors=True)


def _security(config: ClusterConfig, folder: Path) -> Any:
    """How connections are secured; a certificate of this run goes into a folder that nobody else may read."""
    from distributed import Security

    require_tls(config)
    if config.cluster.security == "none":
        logger.warning("security is 'none': whoever reaches the port of the scheduler can run code in your name.")
        return Security()
    if config.cluster.security == "dask":
        return Security(require_encryption=True)
    security = Security.temporary()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    for name, text in (("cert.pem", security.tls_ca_file), ("key.pem", security.tls_scheduler_key)):
        with os.fdopen(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
    return security
