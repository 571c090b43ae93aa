"""When freed memory is given back: before another kind of task, and now and then."""

from __future__ import annotations

import pytest

from tiledseg import malloc


def test_memory_is_kept_from_one_task_to_the_next_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [
        (100.0, "flows", True),
        (105.0, "flows", False),
        (105.5, "masks", True),
        (106.0, "flows", False),  # kinds take turns
        (106.4, "masks", False),
        (106.6, "flows", True),
        (109.0, "flows", False),
        (116.7, "flows", True),
    ]
    times = iter([at for at, _, _ in calls])
    monkeypatch.setattr(malloc.time, "monotonic", lambda: next(times))
    clock = malloc._Clock()
    assert [clock.is_due(kind) for _, kind, _ in calls] == [is_due for _, _, is_due in calls]
