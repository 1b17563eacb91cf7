# SPDX-License-Identifier: GPL-2.0-or-later
"""Storage into which somebody put links that lead out of it: none is followed."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from functional.attacks import (
    attacks,
    domain_attacks,
    hostile_lab,
    local,
    plant,
    posix,
    run,
)
from functional.outside import SECRET, Outside
from functional.pool_lab import (
    COW,
    RAW,
    Lab,
    bind_server,
    local_server,
    wait_for,
)
from functional.processes import AgentProcess


@pytest.fixture(scope="module")
def lab(workdir: Path, start_agent: Callable[..., AgentProcess]) -> Iterator[Lab]:
    with hostile_lab(workdir, start_agent) as made:
        yield made


@pytest.mark.parametrize("kind", ["posix", "local"])
@pytest.mark.parametrize("what", ["image", "meta", "data", "lease"])
def test_links_in_an_image_are_not_followed(
    lab: Lab, outside: Outside, kind: str, what: str
) -> None:
    where = lab.create(posix(lab) if kind == "posix" else local(lab))
    directory = lab.directory(where)
    path = {
        "image": directory,
        "meta": directory / f"{where.volume}.meta",
        "data": directory / where.volume,
        "lease": directory / f"{where.volume}.lease",
    }[what]
    if not path.exists():
        pytest.skip("local domains have no leases")
    plant(path, outside)
    answers = run(attacks(lab, where), outside)
    assert "209" in answers["Image.prepare"] or what == "lease"
    assert (outside.path / "copy").exists()
    assert lab.health(where.domain)["valid"]


def test_a_volume_that_leads_to_a_file_of_the_system(lab: Lab, outside: Outside) -> None:
    secret = outside.file("shadow", (SECRET + "\n").encode() * 1000)
    outside.watch()
    for fmt in (RAW, COW):
        where = lab.create(posix(lab), fmt=fmt)
        data = lab.directory(where) / where.volume
        data.unlink()
        data.symlink_to(secret)
        run(attacks(lab, where), outside)
    assert secret.read_bytes() == (SECRET + "\n").encode() * 1000


@pytest.mark.parametrize("kind", ["posix", "local"])
def test_links_in_a_domain_are_not_followed(
    lab: Lab, workdir: Path, outside: Outside, kind: str
) -> None:
    """One domain, each of its parts in turn; it is put back, and works, after each."""
    path = workdir / f"victim-{kind}"
    path.mkdir()
    domain = lab.add_domain(bind_server(path) if kind == "posix" else local_server(path))
    root = lab.root(domain)
    parts = ["dom_md/metadata", "dom_md/ids", "dom_md/leases", "dom_md/xleases", "dom_md",
             "images", "."]  # fmt: skip
    for number, part in enumerate(parts):
        victim = root / part if part != "." else root
        if not victim.exists():
            continue
        here = Outside(outside.path / str(number))
        away = root.parent / "away"
        (shutil.copytree if victim.is_dir() else shutil.copy)(victim, here.path / "copy")
        victim.rename(away)
        victim.symlink_to(here.path / "copy")
        here.watch()
        calls = (c for c in domain_attacks(lab, domain) if c[0] not in (
            "deactivate", "activate", "detach", "format"))  # fmt: skip
        answers = run(calls, here)
        assert not lab.health(domain)["valid"], (part, answers)
        victim.unlink()
        away.rename(victim)
        here.close()
        wait_for(lambda: lab.health(domain)["valid"], "recovery")
    lab.create(domain)
    here = Outside(outside.path / "last")
    plant(root / "dom_md" / "ids", here)
    run(domain_attacks(lab, domain), here)
    here.close()
    lab.code("StorageDomain.detach", storagedomainID=domain, storagepoolID=lab.pool, force=True)
    del lab.servers[domain]


def test_a_planted_domain_is_not_found(lab: Lab, outside: Outside) -> None:
    """A directory of the storage that is a link to a whole, sound domain elsewhere."""
    stranger_id = str(uuid.uuid4())
    shutil.copytree(lab.root(local(lab)), outside.path / stranger_id)
    metadata = outside.path / stranger_id / "dom_md" / "metadata"
    metadata.write_bytes(metadata.read_bytes().replace(local(lab).encode(), stranger_id.encode()))
    link = lab.root(local(lab)).parent / stranger_id
    link.symlink_to(outside.path / stranger_id)
    outside.watch()
    try:
        lab.code("Host.getStorageDomains")
        for verb in ("getInfo", "getStats", "getImages", "validate"):
            assert lab.code(f"StorageDomain.{verb}", storagedomainID=stranger_id) != 0
        assert outside.touched() == []
    finally:
        link.unlink()
