"""One run of tiledseg in a process of its own, so that its time and memory can be watched.

    python tiledseg_run.py job.json

The job holds ``image``, ``output``, ``report`` (paths) and ``options``, which go to `tiledseg.segment`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tiledseg

if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    found = tiledseg.segment(job["image"], job["output"], **job["options"])
    Path(job["report"]).write_text(json.dumps(found.report.as_dict()))
