# SPDX-License-Identifier: GPL-2.0-or-later
"""Which volumes may be encrypted; the rest is in functional/test_luks.py."""

from __future__ import annotations

import pytest

from vdsm_storage.errors import IncorrectFormat
from vdsm_storage.images import metadata as md
from vdsm_storage.images.encryption import check_format


def test_a_raw_volume_is_refused_with_what_to_do() -> None:
    with pytest.raises(IncorrectFormat, match=r"volume-1: a raw volume .*make it COW") as caught:
        check_format("volume-1", md.RAW, "secret")
    assert caught.value.code == 202


@pytest.mark.parametrize(("form", "secret"), [(md.RAW, None), (md.COW, None), (md.COW, "secret")])
def test_all_else_is_right(form: str, secret: str | None) -> None:
    check_format("volume-1", form, secret)
