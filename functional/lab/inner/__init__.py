# SPDX-License-Identifier: GPL-2.0-or-later
"""Real storage for tests that run where device-mapper is: in a guest, or on a hypervisor."""
