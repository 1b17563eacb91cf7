# SPDX-License-Identifier: GPL-2.0-or-later
"""The RPM is built from the last commit and looked into; the example configuration is true."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vdsm_storage import config
from vdsm_storage.secrets.key import CREDENTIAL

ROOT = Path(__file__).resolve().parents[2]
RPM_DIR = ROOT / "packaging" / "rpm"
CLEAN_ENV = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

needs_rpmbuild = pytest.mark.skipif(
    not (shutil.which("rpmbuild") and shutil.which("cpio") and (ROOT / ".git").exists()),
    reason="needs rpmbuild, cpio and a git checkout (make venv installs the first two)",
)


def run(*argv: str, cwd: Path = ROOT, stdin: bytes | None = None) -> bytes:
    result = subprocess.run(
        argv, cwd=cwd, input=stdin, capture_output=True, timeout=200, env=CLEAN_ENV, check=False
    )
    assert result.returncode == 0, (result.stdout + result.stderr).decode(errors="replace")
    return result.stdout


@pytest.fixture(scope="module")
def rpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rpm")
    run("packaging/rpm/build", str(out))
    (built,) = out.glob("*.noarch.rpm")
    return built


@pytest.fixture(scope="module")
def payload(rpm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("payload")
    run("cpio", "-idm", "--quiet", cwd=root, stdin=run("rpm2cpio", str(rpm)))
    return root


@needs_rpmbuild
def test_rpm_carries_all_that_a_host_needs(rpm: Path) -> None:
    listed = run("rpm", "-qpl", "--nosignature", str(rpm)).decode().split("\n")
    for name in (
        "/usr/bin/vdsm-storaged",
        "/usr/bin/vdsm-client",
        "/usr/lib/systemd/system/vdsm-storaged.service",
        "/usr/lib/sysusers.d/vdsm-storage.conf",
        "/usr/lib/tmpfiles.d/vdsm-storage.conf",
        "/usr/lib/udev/rules.d/60-vdsm-storage.rules",
        "/etc/vdsm-storage/agent.conf",
        "/etc/vdsm-storage/conf.d",
        "/etc/multipath/conf.d/vdsm-storage.conf",
        "/etc/sudoers.d/50_vdsm-storage",
        "/etc/multipath/conf.d/vdsm-storage.conf",
        "/usr/share/bash-completion/completions/vdsm-client",
        "/usr/share/zsh/site-functions/_vdsm-client",
    ):
        assert name in listed
    assert any("man8/vdsm-storaged.8" in name for name in listed)
    assert not [name for name in listed if "/tests/" in name or "__pycache__" in name]


@needs_rpmbuild
def test_rpm_asks_for_what_setup_cfg_asks_for(rpm: Path) -> None:
    required = run("rpm", "-qp", "--requires", "--nosignature", str(rpm)).decode()
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for row in setup["options"]["install_requires"].strip().split("\n"):
        name, _, version = row.partition(",")[0].partition(">=")
        assert f"python3dist({name.strip().lower()}) >= {version.strip()}" in required
    fields = run("rpm", "-qp", "--nosignature", "--qf", "%{version} %{license} %{arch}", str(rpm))
    assert fields.decode() == f"{setup['metadata']['version']} GPL-2.0-or-later noarch"


@needs_rpmbuild
def test_payload_is_the_commit_and_imports(payload: Path) -> None:
    (site,) = payload.glob("usr/lib/python3*/site-packages")
    tops = ("vdsm_storage", "verbs", "schema", "lvm", "secrets")
    folders = [name for name in tops if (ROOT / name).exists()]
    committed = run("git", "ls-tree", "-r", "--name-only", "HEAD", *folders).decode().split()
    kept = [name for name in committed if name.endswith((".py", ".yml"))]
    sources = {name.removeprefix("vdsm_storage/") for name in kept}
    installed = {
        str(path.relative_to(site / "vdsm_storage"))
        for path in (site / "vdsm_storage").rglob("*")
        if path.suffix in (".py", ".yml")
    }
    assert installed == sources
    # Found before the editable installation, for PYTHONPATH comes first.
    script = (
        "import vdsm_storage, vdsm_storage.verbs.table, vdsm_storage.__main__, vdsm_storage.cli;"
        "print(vdsm_storage.__file__, vdsm_storage.verbs.table.__file__)"
    )
    python = ("/usr/bin/env", f"PYTHONPATH={site}", sys.executable, "-P", "-B")
    found = run(*python, "-c", script, cwd=payload).decode().split()
    assert len(found) == 2
    assert all(Path(name).is_relative_to(site) for name in found)


@needs_rpmbuild
def test_programs_do_not_import_from_the_current_directory(payload: Path) -> None:
    for name in ("vdsm-storaged", "vdsm-client"):
        first = (payload / "usr/bin" / name).read_text().splitlines()[0]
        assert re.fullmatch(r"#!/usr/bin/python3[.\d]* -P", first), first


@needs_rpmbuild
def test_sudoers_gives_no_root(payload: Path) -> None:
    path = payload / "etc/sudoers.d/50_vdsm-storage"
    assert path.stat().st_mode & 0o777 == 0o440
    grants = [row for row in path.read_text().splitlines() if "ALL=" in row]
    assert grants
    assert all("ALL=(vdsm) " in row for row in grants)
    if visudo := shutil.which("visudo"):
        run(visudo, "-cf", str(path))


def test_service_stays_in_the_hosts_mount_namespace() -> None:
    """What it mounts must be seen by QEMU."""
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(RPM_DIR / "vdsm-storaged.service")
    private = ("Private", "Protect", "ReadO", "ReadW", "Inaccessible", "Bind", "Temporary", "Mount")
    assert [name for name in unit["Service"] if name.startswith(private)] == []
    assert unit["Service"]["ExecStart"] == "/usr/bin/vdsm-storaged"


def test_example_configuration_is_up_to_date() -> None:
    wanted = run(sys.executable, "-P", "scripts/example_config.py").decode()
    text = (RPM_DIR / "agent.conf").read_text()
    assert text == wanted, "python scripts/example_config.py > packaging/rpm/agent.conf"


def test_example_configuration_uncommented_is_the_default(tmp_path: Path) -> None:
    text = (RPM_DIR / "agent.conf").read_text()
    (tmp_path / "agent.conf").write_text(re.sub(r"(?m)^#(?=\w)", "", text))
    assert config.load(str(tmp_path)) == config.Config()


def test_multipath_settings_stand_one_a_line() -> None:
    """multipath reads no second setting of a line."""
    rows = [row.strip() for row in (RPM_DIR / "multipath.conf").read_text().splitlines()]
    rows = [row for row in rows if row and not row.startswith("#")]
    shape = re.compile(r'\w+ \{|\}|\w+ ([\w]+|"[^"]+")')
    assert [row for row in rows if not shape.fullmatch(row)] == []
    text = "\n".join(rows)
    for setting in (
        "polling_interval 5",
        "no_path_retry 16",
        "user_friendly_names no",
        "find_multipaths no",
        "fast_io_fail_tmo 5",
        "dev_loss_tmo 30",
        "flush_on_last_del yes",
        "max_fds 4096",
    ):
        assert f"\n{setting}\n" in text


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_packaged_completion_is_what_the_client_prints(shell: str) -> None:
    printed = run(str(Path(sys.executable).parent / "vdsm-client"), "--completion", shell).decode()
    path = RPM_DIR / f"vdsm-client.{shell}"
    assert path.read_text() == printed, f"vdsm-client --completion {shell} > {path}"


def test_example_of_a_credential_names_the_one_that_is_read() -> None:
    text = (RPM_DIR / "secrets-key.conf.example").read_text()
    stored = f"/etc/credstore.encrypted/{CREDENTIAL}"
    assert f"\nLoadCredentialEncrypted={CREDENTIAL}:{stored}\n" in text
    assert f"--name={CREDENTIAL} - {stored}\n" in text


@pytest.mark.parametrize("name", ["lab.conf.example", "logging.conf.example"])
def test_drop_in_examples_load(name: str, tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    shutil.copy(RPM_DIR / name, tmp_path / "conf.d" / name.removesuffix(".example"))
    assert config.load(str(tmp_path)) != config.Config()
