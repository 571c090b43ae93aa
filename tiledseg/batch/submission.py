"""From one command to a run on a cluster: scripts in a folder, tried, submitted, and gone on with."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Settings
from ..errors import ClusterError, OutputError, SettingsError
from ..images import open_image
from ..runs import place_of
from .config import ClusterConfig, read_config
from .scheduler import require_tls
from .scripts import run_script, worker_script
from .supervisor import CONTINUED, supervise
from .systems import System, system_of

__all__ = ["Submission", "folder_of", "submission_of"]

logger = logging.getLogger(__name__)

CONFIG, RECORD = "cluster.toml", "jobs.json"
SETTLE_S = 4.0
"""Given to a queue to say that it takes a job and will never start it."""


@dataclass(frozen=True)
class Submission:
    """A run for a cluster; see `submission_of`.

    Attributes
    ----------
    system_name : str
    system : System
    config : ClusterConfig
    config_path : Path
    folder : Path
        For scripts and the output of jobs.
    arguments : tuple of str
        ``segment IMAGE ...``.
    """

    system_name: str
    system: System
    config: ClusterConfig
    config_path: Path
    folder: Path
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """What the names of its jobs begin with: known from the folder alone."""
        return f"tiledseg-{hashlib.sha256(f'{os.getuid()} {self.folder}'.encode()).hexdigest()[:8]}"

    def scripts(self) -> dict[str, str]:
        """Text of the job scripts by name of their file."""
        words = ["cluster", self.system_name, "-c", str(self.folder / CONFIG), "--folder", str(self.folder)]
        command = [sys.executable, "-m", "tiledseg.cli", *words, "--as-job", "--", *self.arguments]
        kinds = {
            f"{kind}.sh": worker_script(self.system, self.name, self.config, self.folder, kind)
            for kind in self.config.workers
        }
        return {"run.sh": run_script(self.system, self.name, self.config, self.folder, command), **kinds}

    def submit(self) -> dict[str, Any]:
        """Try all scripts and submit that of the run; returns ``job``, ``name``, ``folder`` and ``output``.

        Raises
        ------
        ClusterError
            If it is in the queue already, or a script is refused.
        """
        self._refuse_twice()
        self._write()
        for script in self.scripts():
            self.system.check(self.folder / script)
        job = self.system.submit(self.folder / "run.sh", f"{self.name}-run")
        reason = self._first_reason(job) if self.system.hopeless else ""
        if reason in self.system.hopeless:
            self.system.cancel({job})
            raise ClusterError(
                f"job {job} would wait for ever ({reason}) and was cancelled; change [run] of {self.config_path} and "
                "submit again."
            )
        self._record([job])
        return {"job": job, "name": self.name, "folder": str(self.folder), "output": str(self.folder / "logs")}

    def run_here(self) -> int:
        """Submit the workers alone and look after them in this process; the exit code of the run."""
        self._refuse_twice()
        self._write()
        for kind in self.config.workers:
            self.system.check(self.folder / f"{kind}.sh")
        code = supervise(self.system, self.config, self.folder, self.name, self.arguments)
        if code == CONTINUED:
            logger.info("the same command again continues.")
        return code

    def run_as_job(self) -> int:
        """What the submitted job does: as `run_here`, and where its walltime is too short it submits the next."""
        code = supervise(self.system, self.config, self.folder, self.name, self.arguments)
        if code == CONTINUED:
            jobs = json.loads((self.folder / RECORD).read_text())
            if len(jobs) >= self.config.run.jobs:
                raise ClusterError(
                    f"the run did not end in {len(jobs)} jobs; submit it again to go on, with a longer walltime or "
                    "more jobs under [run] for it to go on by itself."
                )
            jobs.append(self.system.submit(self.folder / "run.sh", f"{self.name}-run"))
            self._record(jobs)
            logger.info("job %s goes on.", jobs[-1])
        return code

    def _first_reason(self, job: str) -> str:
        """What the job waits for, as soon as the queue says so."""
        reason, until = "", time.monotonic() + SETTLE_S
        while reason not in self.system.hopeless and time.monotonic() < until:
            time.sleep(0.5)
            reason = self.system.alive(f"{self.name}-run").get(job, "")
        return reason

    def _refuse_twice(self) -> None:
        """Two jobs would cancel each other's workers."""
        require_tls(self.config)
        there = self.system.alive(f"{self.name}-run")
        if there:
            raise ClusterError(
                f"this run is in the queue already, as job {', '.join(sorted(there))}; wait for it or cancel it, then "
                "submit again: what is done is kept."
            )

    def _write(self) -> None:
        """Put the scripts and the cluster file into the folder."""
        try:
            (self.folder / "logs").mkdir(parents=True, exist_ok=True)
            if self.config_path.resolve() != (self.folder / CONFIG).resolve():
                shutil.copyfile(self.config_path, self.folder / CONFIG)
            for script, text in self.scripts().items():
                (self.folder / script).write_text(text)
        except OSError as error:
            raise OutputError(
                f"scripts cannot be written to {self.folder}: {error.strerror}; give --folder."
            ) from error

    def _record(self, jobs: list[str]) -> None:
        """Keep which jobs the run was given, one after another."""
        (self.folder / RECORD).write_text(json.dumps(jobs))


def submission_of(system_name: str, config_path: Path, folder: Path, arguments: tuple[str, ...]) -> Submission:
    """A run for a cluster; reads and checks the cluster file and writes nothing.

    Parameters
    ----------
    system_name : str
        One of `tiledseg.batch.SYSTEMS`.
    config_path : Path
        See `tiledseg.batch.config`.
    folder : Path
        For scripts and the output of jobs, on a disk that all of them see.
    arguments : tuple of str
        ``segment IMAGE ...`` as on the command line, without ``--scheduler`` and ``--workers``.
    """
    config = read_config(config_path)
    return Submission(system_name, system_of(system_name), config, config_path, folder.absolute(), arguments)


def folder_of(image: str, output: str | None, scratch: str | None, axes: str | None, settings: dict[str, Any]) -> Path:
    """The folder for the scripts of a run, beside its scratch; refuses an image or settings that cannot be used."""
    place = place_of(open_image(image, axes=axes), output, scratch, Settings.of(**settings))
    if not isinstance(place.scratch, Path):
        raise SettingsError("say with --folder where the job scripts go: the scratch is on no disk.")
    return place.scratch.with_name(f"{place.scratch.name.removesuffix('.tiledseg')}.cluster")
