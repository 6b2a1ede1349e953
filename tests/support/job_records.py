"""Records of jobs."""

from __future__ import annotations

from typing import Any

from stepweave.store import JobRecord


def record(number: int = 0, **changes: Any) -> JobRecord:
    values: dict[str, Any] = {
        "id": f"{number:032x}",
        "owner": None,
        "kind": "generation",
        "state": "queued",
        "created": 1000.0 + number,
        "updated": 1000.0 + number,
        "total_steps": 20,
        "request": {"prompt": "a red circle"},
        "warnings": [],
    }
    return JobRecord(**values | changes)
