# SPDX-License-Identifier: GPL-2.0-or-later
"""Volume groups and logical volumes, by the tools of lvm2."""
