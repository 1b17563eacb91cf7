# SPDX-License-Identifier: GPL-2.0-or-later
"""vdsm-storaged on a kernel without device-mapper.

    python -P -m functional.standin.agent --standin SOCKET <what vdsm-storaged takes>
"""

from __future__ import annotations

import argparse
import functools
import sys

from functional.standin.activation import StandIn
from vdsm_storage import __main__ as program
from vdsm_storage.agent import Agent


def main() -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--standin", required=True)
    options, rest = parser.parse_known_args()
    make_agent = functools.partial(Agent, activation=StandIn(options.standin))
    return program.main(rest, make_agent)


if __name__ == "__main__":
    sys.exit(main())
