"""Which workers a Dask cluster has, and which of them take tasks of a kind.

Tasks of the network go to workers with ``GPU`` among their resources where there are any, all others to those with
``CPU``. Workers that say nothing take what there is; beside workers with a GPU, what is not of the network.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

from .clients import CPU, GPU

__all__ = ["Workers", "has_slots"]

KNOWN_FOR_S = 1.0
"""How long what the scheduler said of its workers is taken to hold."""


def has_slots(worker: dict[str, Any], resource: str) -> int:
    """How many tasks at once a worker takes by one of its resources."""
    return min(int(worker["nthreads"]), int(worker.get("resources", {}).get(resource, 0)))


class Workers:
    """The workers of a cluster.

    Parameters
    ----------
    client : distributed.Client
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._asked_at = -KNOWN_FOR_S
        self._known: dict[str, Any] = {}
        self._had_gpus = False
        self.is_on_any = False
        """Whether the network was sent to the CPU, of which every worker has one."""

    @property
    def now(self) -> dict[str, Any]:
        """What the scheduler says of each by its address."""
        if time.monotonic() - self._asked_at >= KNOWN_FOR_S:
            # What a lost scheduler means for the tasks in flight, these say themselves.
            with contextlib.suppress(OSError):
                self._known = self._client.scheduler_info(n_workers=-1)["workers"]
            self._asked_at = time.monotonic()
            # A run that began on GPUs waits for another one when the last is lost: bits depend on the device.
            self._had_gpus |= any(has_slots(worker, GPU) for worker in self._known.values())
        return self._known

    def resource(self, kind: str) -> str | None:
        """The resource that tasks of a kind need; None if they go to any worker."""
        workers = self.now.values()
        if kind == "network":
            return GPU if self._had_gpus and not self.is_on_any else None
        return CPU if any(has_slots(worker, CPU) for worker in workers) else None

    def addresses(self, kind: str) -> list[str]:
        """Workers that take tasks of a kind."""
        needed = self.resource(kind)
        if needed is not None:
            return [address for address, worker in self.now.items() if has_slots(worker, needed)]
        if kind == "network":
            return list(self.now)
        # Others than those of the network, if there are any that say nothing.
        free = [address for address, worker in self.now.items() if not has_slots(worker, GPU)]
        return free or list(self.now)

    def slots(self, kind: str) -> int:
        """Tasks of a kind that can be at work at once."""
        needed, workers = self.resource(kind), self.now
        if needed is not None:
            return sum(has_slots(worker, needed) for worker in workers.values())
        return sum(int(workers[address]["nthreads"]) for address in self.addresses(kind))

    def share(self, kind: str) -> frozenset[str]:
        """Those who take tasks of a kind, to tell whether two kinds are done by the same."""
        return frozenset(self.addresses(kind))

    def options(self, kind: str) -> dict[str, Any]:
        """What `distributed.Client.map` is told to send tasks of a kind there."""
        needed = self.resource(kind)
        if needed is not None:
            return {"resources": {needed: 1}}
        addresses = self.addresses(kind)
        if len(addresses) == len(self.now):
            return {}
        return {"workers": addresses, "allow_other_workers": True}
