# SPDX-License-Identifier: GPL-2.0-or-later
"""vdsm-client: the verbs from a shell."""
