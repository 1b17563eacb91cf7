# SPDX-License-Identifier: GPL-2.0-or-later
"""Check a block domain that nobody changes meanwhile.

    python -P -m functional.checker [--allow initializing|removed]... DEVICE... DOMAIN

Exit code 1 when something is wrong; each problem is a line.
"""

from __future__ import annotations

import argparse
import sys

from functional.checker.check import HALF_MADE, MARKED, check


def main() -> int:
    parser = argparse.ArgumentParser(prog="functional.checker", description="Is a domain sound?")
    parser.add_argument("--allow", action="append", choices=(HALF_MADE, MARKED), default=[])
    parser.add_argument("devices", nargs="+", metavar="DEVICE", help="all devices of the domain")
    parser.add_argument("domain", metavar="DOMAIN", help="the domain's UUID")
    options = parser.parse_args()
    problems = check(options.devices, options.domain, allow=options.allow)
    print(*problems or ("no problem found",), sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
