# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

from pathlib import Path

import pytest

from vdsm_storage import config
from vdsm_storage.errors import InvalidConfiguration


def test_dropins_win_in_name_order(tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    text = "[addresses]\nmanagement_port = 1\n[tls]\nenabled = false\n"
    (tmp_path / "agent.conf").write_text(text)
    (tmp_path / "conf.d" / "20-b.conf").write_text("[addresses]\nmanagement_port = 3\n")
    (tmp_path / "conf.d" / "10-a.conf").write_text("[addresses]\nmanagement_port = 2\n")
    result = config.load(str(tmp_path))
    assert result.addresses.management_port == 3
    assert result.tls.enabled is False
    assert result.rpc == config.Rpc()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[nowhere]\na = 1\n", "nowhere.*no such section"),
        ("[rpc]\nnothing = 1\n", "nothing.*no such option"),
        ("[rpc]\nmax_frame = many\n", "max_frame.*'many' is not of the type int"),
        ("[rpc]\nstrict = perhaps\n", "strict.*neither true nor false"),
        ("no section\n", "agent.conf"),
    ],
)
def test_mistakes_name_the_file_and_the_option(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "agent.conf").write_text(text)
    with pytest.raises(InvalidConfiguration, match=f"(?s)agent.conf.*{words}|{words}"):
        config.load(str(tmp_path))
