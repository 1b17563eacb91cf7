# SPDX-License-Identifier: GPL-2.0-or-later
"""What a lease says about the job that it guards: JSON in the lease's data.

    {"created": 1700000000, "generation": 3, "host_hardware_id": "4c4c...", "job_id": "8f1e...",
     "job_status": "PENDING", "modified": 1700000000, "type": "JOB"}

An engine that lost touch with a job reads here how it ended, or fences it: a job of an older
generation does not start any more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

TYPE: Final = "JOB"
PENDING: Final = "PENDING"
FAILED: Final = "FAILED"
SUCCEEDED: Final = "SUCCEEDED"
FENCED: Final = "FENCED"
STATUSES: Final = (PENDING, FAILED, SUCCEEDED, FENCED)
MAX_GENERATION: Final = 999  # it starts again from 0 after this, like a volume's
SIZE: Final = 512  # bytes


@dataclass(frozen=True)
class JobMetadata:
    """Times in seconds since the epoch."""

    job_id: str
    generation: int
    job_status: str
    created: int = 0
    modified: int = 0
    host_hardware_id: str = ""

    def ended(self, status: str, now: int) -> JobMetadata:
        """The next generation, with the status that the job ended with."""
        generation = self.generation + 1 if self.generation < MAX_GENERATION else 0
        return replace(self, generation=generation, job_status=status, modified=now)

    def as_dict(self) -> dict[str, Any]:
        found = {"type": TYPE, **asdict(self)}
        if not self.host_hardware_id:
            del found["host_hardware_id"]
        return found

    def encode(self) -> bytes:
        """512 bytes, NUL-padded."""
        return json.dumps(self.as_dict(), sort_keys=True).encode().ljust(SIZE, b"\0")


def from_request(given: Mapping[str, Any], now: int, hardware_id: str) -> JobMetadata:
    """From a verb's parameter, which the schema has checked."""
    return JobMetadata(
        job_id=str(given["job_id"]),
        generation=int(given["generation"]),
        job_status=str(given.get("job_status") or PENDING),
        created=int(given.get("created") or now),
        modified=int(given.get("modified") or now),
        host_hardware_id=str(given.get("host_hardware_id") or hardware_id),
    )


def decode(data: bytes) -> JobMetadata | None:
    """None when the lease has no such data.  Raises ValueError for data that is none."""
    text = data.rstrip(b"\0")
    if not text:
        return None
    found = json.loads(text)
    if not isinstance(found, dict) or found.get("type") != TYPE:
        raise ValueError("it does not describe a job")
    try:
        status = str(found["job_status"])
        if status not in STATUSES:
            raise ValueError(f"the job status {status!r} is unknown")
        return JobMetadata(
            job_id=str(found["job_id"]),
            generation=int(found["generation"]),
            job_status=status,
            created=int(found.get("created") or 0),
            modified=int(found.get("modified") or 0),
            host_hardware_id=str(found.get("host_hardware_id") or ""),
        )
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{error!r} is missing or unusable") from error
