# SPDX-License-Identifier: GPL-2.0-or-later
"""Print the names of the verbs that are built, as a JSON list: `schema.docs --built -` reads it."""

from __future__ import annotations

import json
import sys

from vdsm_storage.verbs.tables import VERBS

if __name__ == "__main__":
    json.dump(sorted(VERBS), sys.stdout)
