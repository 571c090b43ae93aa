"""Submitting a run to a batch system, as a job of its own that looks after its workers.

- `config`: what is asked for, from a TOML file.
- `systems`: how SLURM, LSF and PBS are spoken to.
- `scripts`: what the jobs do.
- `scheduler`: the scheduler of a run, and who may talk to it.
- `supervisor`: the job of the run: scheduler, client, and replacement of workers that are lost.
- `submission`: from the command to the queue.
"""

from .submission import Submission, folder_of, submission_of
from .systems import SYSTEMS

__all__ = ["SYSTEMS", "Submission", "folder_of", "submission_of"]
