# SPDX-License-Identifier: GPL-2.0-or-later
"""Small files that the kernel and the distribution keep about the host: /proc, /sys, /etc."""

from __future__ import annotations

import os


class KernelFiles:
    """Reads below `root`, which is another directory only in tests."""

    def __init__(self, root: str = "/") -> None:
        self._root = root

    def text(self, path: str, default: str = "") -> str:
        """The file without surrounding white space; `default` when it cannot be read."""
        try:
            with open(self.path(path), encoding="utf-8", errors="replace") as file:
                return file.read().strip("\n\t \0")
        except OSError:
            return default

    def number(self, path: str, default: int = 0) -> int:
        """The file as a decimal number; `default` when it is none."""
        try:
            return int(self.text(path))
        except ValueError:
            return default

    def names(self, path: str) -> list[str]:
        """What a directory holds, sorted; [] when there is no such directory."""
        try:
            return sorted(os.listdir(self.path(path)))
        except OSError:
            return []

    def exists(self, path: str) -> bool:
        return os.path.exists(self.path(path))

    def real(self, path: str) -> str:
        """Where a path leads to when all links in it are followed."""
        return os.path.realpath(self.path(path))

    def path(self, path: str) -> str:
        return os.path.join(self._root, path.lstrip("/"))


def parse_list(text: str) -> list[int]:
    """The kernel's lists of numbers: "0-2,5" -> [0, 1, 2, 5]; "" -> []."""
    numbers: list[int] = []
    for part in text.replace(" ", ",").split(","):
        low, dash, high = part.partition("-")
        if dash:
            numbers.extend(range(int(low), int(high) + 1))
        elif low:
            numbers.append(int(low))
    return numbers


def parse_fields(text: str, separator: str = ":") -> dict[str, str]:
    """Lines of `name: value`; later lines of the same name are dropped."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, mark, value = line.partition(separator)
        if mark:
            found.setdefault(name.strip(), value.strip())
    return found
