# SPDX-License-Identifier: GPL-2.0-or-later
"""open-iscsi: sessions, records, and what iscsiadm says.  Real logins are tested in the lab."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.san_tree import SanTree
from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.run import Command, Result
from vdsm_storage.base.secret import Secret
from vdsm_storage.errors import (
    AgentError,
    CommandError,
    CommandTimeout,
    IscsiAuthFailed,
    IscsiDiscoveryFailed,
    IscsiLoginFailed,
)
from vdsm_storage.host import iscsi as module
from vdsm_storage.host.iscsi import Chap, Iscsi, own_words, parse_targets
from vdsm_storage.host.iscsi_records import Records, changed, value_of
from vdsm_storage.host.iscsi_sessions import Portal, Sessions

DATA = Path(__file__).parent.parent / "data/iscsi"
TARGET = "iqn.2020-01.org.example:t1"
PORTAL = Portal(TARGET, "127.0.0.2")
SECRET = "s3cret pass#word"


# -- sessions ----------------------------------------------------------------------------------


def test_sessions(tmp_path: Path) -> None:
    tree = SanTree(tmp_path)
    tree.session(1, "192.0.2.1", user="bob", password=SECRET)
    tree.session(2, "2001:db8::1", state="FAILED", interface="bond1", port="3261", tpgt="2")
    tree.write("/sys/class/iscsi_session/session3/targetname", "half.made")
    first, second = Sessions(tree.files).all().values()
    assert (first.id, first.host, first.user, first.is_logged_in) == (1, 0, "bob", True)
    assert first.password.reveal() == SECRET
    assert SECRET not in repr(first)
    assert first.portal == Portal(TARGET, "192.0.2.1")
    assert second.portal == Portal(TARGET, "2001:db8::1", 3261, 2, "bond1")
    assert (second.user, second.is_logged_in) == ("", False)
    assert not second.password


def test_a_portal_is_found_however_it_is_written(tmp_path: Path) -> None:
    tree = SanTree(tmp_path)
    tree.session(1, "2001:db8::a")
    tree.session(2, "San.Example")
    sessions = Sessions(tree.files)
    for address, number in (("2001:0DB8:0::A", 1), ("san.example", 2)):
        # The tag may be unknown to who asks: the target tells it at the login.
        found = sessions.find(Portal(TARGET, address, group=7))
        assert found is not None
        assert found.id == number
    assert sessions.find(Portal(TARGET, "2001:db8::a", interface="bond1")) is None
    assert sessions.find(Portal(f"{TARGET}x", "2001:db8::a")) is None


def test_portal_texts() -> None:
    assert Portal(TARGET, "192.0.2.1", 3261, 2).text == "192.0.2.1:3261,2"
    assert Portal(TARGET, "2001:db8::1").text == "[2001:db8::1]:3260,1"


# -- records -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["node-2.1.8.txt", "send-targets-2.1.8.txt"])
def test_records_are_changed_in_place(name: str) -> None:
    text = (DATA / name).read_text()
    assert changed(text, {}) == text
    prefix = "node.session" if name.startswith("node") else "discovery.sendtargets"
    values = {f"{prefix}.auth.authmethod": "CHAP", f"{prefix}.auth.password": Secret(SECRET)}
    new = changed(text, values)
    assert value_of(new, f"{prefix}.auth.authmethod") == "CHAP"
    assert value_of(new, f"{prefix}.auth.password") == SECRET
    assert len(new.splitlines()) == len(text.splitlines()) + 1
    assert new.endswith("# END RECORD\n")
    assert changed(new, values) == new


@given(st.dictionaries(st.from_regex(r"[a-z.]{1,20}", fullmatch=True),
                       st.from_regex(r"[!-~]{1,20}", fullmatch=True)))  # fmt: skip
def test_any_value_comes_back(values: dict[str, str]) -> None:
    text = changed((DATA / "node-2.1.8.txt").read_text(), values)
    assert {key: value_of(text, key) for key in values} == values


def test_a_record_is_roots_alone_and_nothing_lies_beside_it(tmp_path: Path) -> None:
    directory = tmp_path / "nodes" / TARGET / "127.0.0.2,3260,1"
    directory.mkdir(parents=True)
    (directory / "default").write_text((DATA / "node-2.1.8.txt").read_text())
    records = Records((str(tmp_path / "none"), str(tmp_path)))
    path = records.find("nodes", TARGET, "127.0.0.2,3260,1", "default")
    assert path == str(directory / "default")
    records.update(path, {"node.session.auth.password": Secret(SECRET)})
    assert (directory / "default").stat().st_mode & 0o777 == 0o600
    assert os.listdir(directory) == ["default"]
    assert os.listdir(tmp_path) == ["nodes"]
    assert records.find("nodes", TARGET, "127.0.0.3,3260,1", "default") is None


# -- commands ----------------------------------------------------------------------------------


class Iscsiadm:
    """Takes the place of `run`: makes the records and sessions that the real one makes."""

    def __init__(self, tree: SanTree) -> None:
        self.tree = tree
        self.ran: list[list[str]] = []
        self.passwords: list[str] = []  # in the record at the login
        self.fails: dict[str, AgentError] = {}

    def __call__(self, command: Command) -> Result:
        argv = list(command.argv)
        self.ran.append(argv)
        record = self.tree.root / self._record(argv)
        action = argv[-1]
        if action == "new":
            name = "node" if "node" in argv else "send-targets"
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text((DATA / f"{name}-2.1.8.txt").read_text())
        elif action == "delete":
            if not record.exists():
                raise failure(21, "iscsiadm: No records found")
            record.unlink()
        elif action in ("--login", "--discover"):
            text = record.read_text() if record.exists() else ""
            prefix = "node.session" if "node" in argv else "discovery.sendtargets"
            self.passwords.append(value_of(text, f"{prefix}.auth.password"))
            if action in self.fails:
                raise self.fails[action]
            if action == "--login":
                self.tree.session(1, "127.0.0.2")
        return Result((DATA / "discovery-2.1.8.txt").read_bytes(), b"", 0.0)

    def _record(self, argv: list[str]) -> str:
        if "discoverydb" in argv:
            return "etc/iscsi/send_targets/127.0.0.2,3260/st_config"
        return f"etc/iscsi/nodes/{TARGET}/127.0.0.2,3260,1/default"

    def records(self) -> list[Path]:
        return [path for path in (self.tree.root / "etc").rglob("*") if path.is_file()]


def failure(code: int, stderr: str = "iscsiadm: it failed") -> CommandError:
    return CommandError(program="iscsiadm", status=f"exit code {code}", stderr=stderr)


@pytest.fixture
def iscsiadm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iscsiadm:
    made = Iscsiadm(SanTree(tmp_path))
    monkeypatch.setattr(module, "run", made)
    return made


@pytest.fixture
def iscsi(iscsiadm: Iscsiadm) -> Iscsi:
    files = iscsiadm.tree.files
    records = Records((f"{iscsiadm.tree.root}/etc/iscsi",))
    return Iscsi(files, Sessions(files), records, SystemClock(), login_timeout=0.3)


def test_login(iscsi: Iscsi, iscsiadm: Iscsiadm) -> None:
    iscsi.login(PORTAL, Chap("bob", Secret(SECRET)))
    assert iscsiadm.passwords == [SECRET]
    assert SECRET not in str(iscsiadm.ran)
    text = iscsiadm.records()[0].read_text()
    assert value_of(text, "node.startup") == "manual"
    assert value_of(text, "node.session.auth.username") == "bob"
    ran = len(iscsiadm.ran)
    iscsi.login(PORTAL, Chap())  # it is there
    iscsi.login_again(PORTAL)
    assert len(iscsiadm.ran) == ran
    iscsi.forget(PORTAL)
    iscsi.forget(PORTAL)
    assert iscsiadm.records() == []


def test_wrong_password_stays_nowhere(iscsi: Iscsi, iscsiadm: Iscsiadm) -> None:
    iscsiadm.fails["--login"] = failure(24)
    with pytest.raises(IscsiAuthFailed) as error:
        iscsi.login(PORTAL, Chap("bob", Secret(SECRET)))
    assert error.value.code == 476
    assert SECRET not in error.value.message
    assert iscsiadm.records() == []


@pytest.mark.parametrize(
    ("error", "words"),
    [(failure(8, (DATA / "login-timeout-2.1.8.txt").read_text()), "connection timed out"),
     (CommandTimeout(program="iscsiadm", seconds=40, stderr=""), "no answer in 10.3 seconds"),
     (failure(15), "it failed")],
)  # fmt: skip
def test_login_that_fails(iscsi: Iscsi, iscsiadm: Iscsiadm, error: AgentError, words: str) -> None:
    iscsiadm.fails["--login"] = error
    with pytest.raises(IscsiLoginFailed, match=words) as caught:
        iscsi.login(PORTAL, Chap())
    assert caught.value.code == 465


def test_session_that_somebody_else_made_at_the_same_time(
    iscsi: Iscsi, iscsiadm: Iscsiadm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def login(command: Command) -> Result:
        if command.argv[-1] == "--login":
            iscsiadm.tree.session(7, "127.0.0.2")
            raise failure(15)
        return iscsiadm(command)

    monkeypatch.setattr(module, "run", login)
    iscsi.login(PORTAL, Chap())
    assert [one.id for one in Sessions(iscsiadm.tree.files).all().values()] == [7]


def test_session_that_lost_its_connection(iscsi: Iscsi, iscsiadm: Iscsiadm) -> None:
    iscsiadm.tree.session(1, "127.0.0.2", state="FAILED")
    with pytest.raises(IscsiLoginFailed, match="session 1 has lost its connection"):
        iscsi.login(PORTAL, Chap())


def test_discovery(iscsi: Iscsi, iscsiadm: Iscsiadm) -> None:
    found = iscsi.discover("127.0.0.2", 3260, Chap())
    assert found[0] == f"127.0.0.2:3260,1 {TARGET}"
    assert found[3] == "[::1]:3260,1 iqn.2020-01.org.example:chap"
    assert iscsiadm.records() == []


def test_discovery_with_a_password(iscsi: Iscsi, iscsiadm: Iscsiadm) -> None:
    iscsi.discover("127.0.0.2", 3260, Chap("bob", Secret(SECRET)))
    assert iscsiadm.passwords == [SECRET]
    assert SECRET not in str(iscsiadm.ran)
    assert iscsiadm.records() == []


def test_record_of_somebody_elses_discovery_stays_as_it_was(
    iscsi: Iscsi, iscsiadm: Iscsiadm
) -> None:
    path = "etc/iscsi/send_targets/127.0.0.2,3260/st_config"
    iscsiadm.tree.write(path, "discovery.startup = automatic")
    iscsi.discover("127.0.0.2", 3260, Chap("bob", Secret(SECRET)))
    assert iscsiadm.tree.read(path) == "discovery.startup = automatic\n"


@pytest.mark.parametrize(("code", "kind"), [(24, IscsiAuthFailed), (11, IscsiDiscoveryFailed)])
def test_discovery_that_fails(
    iscsi: Iscsi, iscsiadm: Iscsiadm, code: int, kind: type[AgentError]
) -> None:
    iscsiadm.fails["--discover"] = failure(code)
    for chap in (Chap(), Chap("bob", Secret(SECRET))):
        with pytest.raises(kind):
            iscsi.discover("127.0.0.2", 3260, chap)
        assert iscsiadm.records() == []


def test_interface_is_bound_once_and_accepts_answers(iscsi: Iscsi, iscsiadm: Iscsiadm) -> None:
    tree = iscsiadm.tree
    tree.write("/proc/sys/net/ipv4/conf/eth1/rp_filter", "1")
    tree.write("/proc/sys/net/ipv4/conf/all/rp_filter", "0")
    portal = Portal(TARGET, "127.0.0.2", interface="bond1", net_interface="eth1")
    with pytest.raises(IscsiLoginFailed):  # this iscsiadm makes other records
        iscsi.login(portal, Chap())
    bound = [argv[-3:] for argv in iscsiadm.ran if "update" in argv]
    assert bound == [["iface.net_ifacename", "-v", "eth1"]]
    assert tree.read("/proc/sys/net/ipv4/conf/eth1/rp_filter") == "2"


def test_own_words() -> None:
    auth = own_words((DATA / "login-auth-2.1.8.txt").read_text())
    assert auth == "iSCSI login failed due to authorization failure"
    refused = own_words((DATA / "discovery-refused-2.1.8.txt").read_text())
    assert refused.count("Connection refused") == 1
    assert refused.endswith("iSCSI PDU timed out")
    assert own_words("") == "no message"


def test_targets() -> None:
    assert len(parse_targets((DATA / "discovery-2.1.8.txt").read_text() * 2)) == 4
    assert parse_targets("nonsense\n") == []
