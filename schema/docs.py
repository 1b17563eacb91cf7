# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes the reference of all verbs: `python -m vdsm_storage.schema.docs OUTDIR [--built FILE]`.

One page a namespace, one for the shared types, one for events and errors, and an index that
counts what is built; each of them in HTML and in Markdown.  FILE is a JSON list of the verbs that
are built (`-` reads it from standard input); the schema itself cannot know.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vdsm_storage.schema import docs_html, docs_markdown
from vdsm_storage.schema.docs_pages import Reference, build
from vdsm_storage.schema.loader import Schema


def write(reference: Reference, folder: Path) -> list[Path]:
    """Every page in both forms; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for form in (docs_html, docs_markdown):
        for name, text in form.pages(reference).items():
            path = folder / name
            path.write_text(text, encoding="utf-8")
            written.append(path)
    return written


def read_built(source: str | None) -> frozenset[str] | None:
    """The verbs that are built; None when nobody told."""
    if source is None:
        return None
    names = json.load(sys.stdin) if source == "-" else json.loads(Path(source).read_text())
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SystemExit(f"{source}: expected a JSON list of verb names")
    return frozenset(names)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vdsm_storage.schema.docs", description=__doc__)
    parser.add_argument("outdir", type=Path)
    parser.add_argument("--built", metavar="FILE", help="JSON list of the verbs that are built")
    options = parser.parse_args(argv)
    reference = build(Schema(), read_built(options.built))
    written = write(reference, options.outdir)
    sys.stdout.write(f"{len(written)} pages, {options.outdir / 'index.html'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
