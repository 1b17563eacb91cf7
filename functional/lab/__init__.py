# SPDX-License-Identifier: GPL-2.0-or-later
"""The laboratory: guests with a real kernel under QEMU, for what this machine's kernel lacks.

One command in a guest that has this tree at its own path (root, a copy: nothing comes back but
output and exit code):

    .venv/bin/python -m functional.lab run --disk 20 -- 'lsblk; vgcreate vg /dev/vdb; vgs'
    .venv/bin/python -m functional.lab run -- .venv/bin/python -m pytest -q -n0 tests/lvm

From Python: guest.guest() for one, cluster.cluster() for several that share disks.  Tests that run
in a guest, or on a machine with device-mapper: functional/lab_tests.  `inner/` is for those: dm.py
(slow, failing and hanging devices), lio.py (iSCSI targets).
"""
