"""What talks to remote stores: obstore moves the bytes, boto3 finds who we are and where S3 is.

boto3 looks where the tools of AWS do (environment, profiles, roles, endpoints); nothing of it is kept but in this
process, and none of it is ours.
"""

from __future__ import annotations

import functools
import logging
import os
from datetime import timedelta
from typing import Any

from .addresses import without_credentials
from .errors import RemoteError
from .urls import split_address

__all__ = ["client_of"]

logger = logging.getLogger(__name__)

OPTIONS: dict[str, Any] = {"timeout": "600s", "read_timeout": "60s", "connect_timeout": "10s"}
_NO_RETRIES: Any = {"max_retries": 0, "retry_timeout": timedelta(0)}  # those are ours, and said


@functools.lru_cache(maxsize=256)
def client_of(address: str) -> Any:
    """What talks to a store, made once per process.

    Parameters
    ----------
    address : str
        Its root: a bucket, a server, or a prefix in one.

    Returns
    -------
    client : obstore.store.S3Store or HTTPStore

    Raises
    ------
    RemoteError
        If a package is missing, or the settings of AWS cannot be used.
    """
    try:
        import obstore.store

        root, key = split_address(address)
        if root.startswith("s3://"):
            config = _s3_config()
            options: Any = {**OPTIONS, "allow_http": str(config.get("endpoint", "")).startswith("http://")}
            bucket = root.removeprefix("s3://")
            return obstore.store.S3Store(
                bucket, prefix=key or None, client_options=options, retry_config=_NO_RETRIES, **config
            )
    except ImportError as error:
        raise RemoteError(
            f"{address} needs the package {error.name}, which is not installed: pip install 'tiledseg[remote]'."
        ) from error
    options = {**OPTIONS, "allow_http": root.startswith("http://")}
    return obstore.store.HTTPStore.from_url(address, client_options=options, retry_config=_NO_RETRIES)


@functools.cache
def _s3_config() -> dict[str, Any]:
    """Region, endpoint and what gives credentials, as boto3 finds them; a public bucket's without."""
    import boto3
    from botocore.exceptions import BotoCoreError
    from obstore.auth.boto3 import Boto3CredentialProvider

    try:
        session = boto3.Session()
        where = session.client("s3").meta
        has_credentials = session.get_credentials() is not None
    except ValueError as error:  # which shows the whole endpoint
        raise RemoteError("S3 cannot be used: its endpoint is no address; check AWS_ENDPOINT_URL.") from error
    except BotoCoreError as error:
        why = without_credentials(str(error)).rstrip(".")
        raise RemoteError(f"S3 cannot be used: {why}; check the settings of AWS in the environment.") from error
    config: dict[str, Any] = {"region": session.region_name or "us-east-1"}
    if not where.endpoint_url.endswith(".amazonaws.com"):
        config["endpoint"] = where.endpoint_url
    is_public = os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("true", "1")
    if has_credentials and not is_public:
        return {**config, "credential_provider": Boto3CredentialProvider(session)}
    if not is_public:
        logger.info("no credentials for S3 are found: only public buckets can be read.")
    return {**config, "skip_signature": True}
