# SPDX-License-Identifier: GPL-2.0-or-later
"""StorageDomain.dump of a domain with volumes, against the reply of another host."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.domains.conftest import GOLDEN, World
from vdsm_storage.base.uuids import new_uuid
from vdsm_storage.domains.metadata import decode, encode

SAMPLE = GOLDEN / "file-domain" / "local-v5"


def golden(file: str) -> Any:
    return json.loads((SAMPLE / file).read_text())


@pytest.fixture
def root(world: World, data: str) -> Path:
    """The sample's directory, as its listing tells; only data is missing."""
    texts = {}
    for path in SAMPLE.glob("3-vol*.meta"):
        lines = dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line)
        texts[lines["IMAGE"], lines["PUUID"], lines["CTIME"]] = path.read_bytes()
    dump = golden("5-dump.json")
    values = decode((SAMPLE / "2-pool-created.metadata").read_bytes())
    values["REMOTE_PATH"] = data
    made = Path(data) / dump["metadata"]["uuid"]
    inodes: dict[str, Path] = {}
    for entry in golden("3-volumes.listing.json"):
        path = made / entry["path"]
        if entry["type"] == "dir":
            path.mkdir(parents=True)
        elif path.name in inodes:
            os.link(inodes[path.name], path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.truncate(entry["size"])
            if entry["links"] > 1:
                inodes[path.name] = path
        path.chmod(int(entry["mode"], 8))
    for volume, found in dump["volumes"].items():
        key = (found["image"], found["parent"], str(found["ctime"]))
        (made / "images" / found["image"] / f"{volume}.meta").write_bytes(texts[key])
    (made / "dom_md" / "metadata").write_bytes(encode(values))
    world.connect(data)
    return made


def test_golden(world: World, root: Path, data: str) -> None:
    expected = golden("5-dump.json")
    expected["metadata"]["remotePath"] = data
    found = world.services.dump(root.name, True)
    for volumes in (expected["volumes"], found["volumes"]):
        for volume in volumes.values():
            assert volume.pop("truesize") >= 0  # depends on the data, which is not here
    assert found == expected


def test_broken_and_removed(world: World, root: Path) -> None:
    """What cannot be used is shown, with all that is known of it."""
    volumes = world.services.dump(root.name, False)["volumes"]
    by_name = {entry["description"]: volume for volume, entry in volumes.items()}
    broken, removed = by_name["template"], by_name["preallocated"]
    meta = root / "images" / volumes[broken]["image"] / f"{broken}.meta"
    meta.write_bytes(meta.read_bytes().replace(b"CTIME=", b"CTIME=x"))
    other = root / "images" / by_name_image(root, broken, meta.parent.name) / meta.name
    other.write_bytes(meta.read_bytes())
    image = volumes[removed]["image"]
    images = root / "images"
    (images / image).rename(images / f"_remove_me_{image}")
    found = world.services.dump(root.name, False)["volumes"]
    assert found[broken]["status"] == "INVALID"
    assert found[broken]["format"] == volumes[broken]["format"]
    assert "ctime" not in found[broken]
    assert found[removed] == {"image": image, "status": "REMOVED"}


def by_name_image(root: Path, volume: str, image: str) -> str:
    """The other image that has the template."""
    paths = (root / "images").glob(f"*/{volume}.meta")
    return next(path.parent.name for path in paths if path.parent.name != image)


def test_an_empty_domain(world: World, data: str) -> None:
    world.connect(data)
    sd_id = world.domain(data, id=new_uuid())
    found = world.services.dump(sd_id, False)
    assert found["volumes"] == {}
    assert set(found) == {"metadata", "volumes"}
