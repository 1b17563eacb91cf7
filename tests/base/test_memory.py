# SPDX-License-Identifier: GPL-2.0-or-later
"""Large buffers go back to the system, whatever was allocated before."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import threading
from pathlib import Path
from vdsm_storage.base import memory

def resident():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])

def work():
    large = [bytes(size * 1024) for size in range(200, 4000, 50)]
    small = [b"".join([piece[:9], b"kept"]) for piece in large]
    del large
    kept.append(small)

memory.give_back_large_buffers()
kept = []
before = resident()
for _ in range(8):
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
print(resident() - before)
"""


def test_large_buffers_go_back() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 4096  # KiB
