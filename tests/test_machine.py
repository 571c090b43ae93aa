"""What a machine has: memory, as far as control groups allow it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tiledseg import machine

GIB = 2**30


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {"memory.max": "max"}, None),
        ("0::/", {"memory.max": f"{GIB}"}, GIB),
        ("0::/slurm/job_7/step_0", {"slurm/job_7/memory.max": f"{GIB}\n", "memory.max": f"{2 * GIB}"}, GIB),
        ("0::/slurm/job_7", {"other/memory.max": "1", "slurm/job_7/memory.max": "max"}, None),
        ("4:cpu,memory:/a/b\n0::/", {"memory/a/memory.limit_in_bytes": f"{GIB}"}, GIB),
        ("4:memory:/a", {"memory/memory.limit_in_bytes": f"{GIB}", "memory.max": "1"}, GIB),
        ("3:cpu:/a", {"memory/a/memory.limit_in_bytes": "1"}, None),
        ("0::/", {"memory.max": f"{2**70}"}, None),
        (None, {"memory.max": "1"}, None),
    ],
)
def test_memory_is_what_the_machine_has_and_its_control_groups_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str | None, files: dict[str, str], expected: int | None
) -> None:
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "GROUPS", tmp_path / "cgroup")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    if groups is not None:
        (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
    for name, text in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(text)
    assert machine.machine_memory() == (expected or psutil.virtual_memory().total)
