# SPDX-License-Identifier: GPL-2.0-or-later
"""The YAML against the published signatures, and what the YAML must hold by itself.

tests/data/schema/published.json has every published verb (parameters in order, `?` optional, with
their types) and the names in every published type.  What the wire really carries differs in
places; each such place is listed here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vdsm_storage import errors
from vdsm_storage.schema.docs_pages import RUNS
from vdsm_storage.schema.loader import FILES, Schema
from vdsm_storage.schema.scalars import SCALARS

PUBLISHED = json.loads((Path(__file__).parents[1] / "data/schema/published.json").read_text())

# Engines send decimal strings here.
DECIMAL = {
    "ISCSIConnection.discoverSendTargets.port",
    "StorageDomain.create.version",
    "StoragePool.spmStart.domVersion",
    "StoragePool.spmStart.prevLver",
    "StoragePool.upgrade.targetDomVersion",
    "VM.diskSizeExtend.newSize",
    "VM.merge.bandwidth",
    "Volume.create.initialSize",
    "Volume.create.size",
    "Volume.extendSize.newSize",
}
RETYPED = {
    **dict.fromkeys(DECIMAL, "IntString"),
    # Flat maps of strings, not the typed connections.
    "StoragePool.connectStorageServer.connectionParams": "[ConnectionParameters]",
    "StoragePool.disconnectStorageServer.connectionParams": "[ConnectionParameters]",
    "StoragePool.spmStart.enableScsiFencing": "BoolString",
    "ISCSIConnection.discoverSendTargets.ipv6_enabled": "BoolString",
    "Volume.create.sequence": "ulong",
    # Identifiers of devices and of LVM, which are no UUIDs of that form.
    "Host.getDevicesVisibility.guidList": "[string]",
    "LVMVolumeGroup.create.lvmvolumegroupID": "string",
    "LVMVolumeGroup.getInfo.lvmvolumegroupID": "string",
    "LVMVolumeGroup.remove.lvmvolumegroupID": "string",
    # Never to be shown.
    "GlusterEvent.webhookAdd.bearerToken": "password",
    "GlusterEvent.webhookUpdate.bearerToken": "password",
    "ISCSIConnection.discoverSendTargets.password": "password",
    # Defaults that were of another type.
    "GlusterTask.list.taskID": "[UUID]",
    "GlusterVolume.profileInfo.nfs": "boolean",
}
# Parameters that only this agent has; a caller of another never sends them.
OWN = {
    "Volume.create": ["secretID?"],
    "Volume.extendSize": ["secretID?"],
}
OWN_VERBS = {
    "rpc.discover", "Host.setJobBandwidth", "VM.setReplicationBandwidth", "VM.getThinHistory",
    "Volume.extendStorage",
}  # fmt: skip
RETURNS = {
    "Host.dumpxmls": "DomainXmlMap",  # a map, not a list of maps
    "StorageDomain.resizePV": "IntString",
    "VM.diskSizeExtend": "IntString",
    "LVMVolumeGroup.create": "string",
    "VM.cont": "VmList",
    "VM.pause": "VmList",
    "VM.delete_checkpoints": "CheckpointsResponse",
    "VM.redefine_checkpoints": "CheckpointsResponse",
    "VM.dump_checkpoint": "CheckpointInfo",
    # Names that storage has, too.
    "GlusterTask.list": "[GlusterTaskInfo]",
    "GlusterVolume.list": "[GlusterVolumeInfo]",
    "GlusterVolume.status": "[GlusterVolumeStatus]",
}
# Published fields that no reply carries, and no request.
DROPPED = {
    "BackupDisk": {"sd_id", "img_id", "vol_id"},  # engines write domainID and so on
    "VolumeInfoResponse": {"allocType"},  # the wire has `type`
}
OPEN_TYPES = {"ManagedVolumeConnection"}
# Enumerations that have names where numbers were published, or fewer spellings.
RENUMBERED = {"StorageDomainType", "StorageDomainStatus", "Qcow2Compat"}


@pytest.fixture(scope="module")
def schema() -> Schema:
    return Schema()


def test_every_published_verb_and_no_other(schema: Schema) -> None:
    assert {verb.name for verb in schema.verbs()} == {*PUBLISHED["verbs"], *OWN_VERBS}


@pytest.mark.parametrize("name", sorted(PUBLISHED["verbs"]))
def test_signature(schema: Schema, name: str) -> None:
    published = PUBLISHED["verbs"][name]
    verb = schema.verb(name)
    ours = [param.name + ("?" if param.optional else "") for param in verb.params]
    assert ours == [text.split()[0] for text in published["params"]] + OWN.get(name, [])
    for param, text in zip(verb.params, published["params"], strict=False):
        expected = RETYPED.get(f"{name}.{param.name}", text.split()[1])
        assert param.type == expected, param.name
    assert verb.returns == RETURNS.get(name, published["returns"])
    assert verb.since == published["since"]


@pytest.mark.parametrize("name", sorted(PUBLISHED["types"]))
def test_type(schema: Schema, name: str) -> None:
    published = PUBLISHED["types"][name]
    found = schema.type(name)
    if "fields" in published and name not in OPEN_TYPES:
        missing = set(published["fields"]) - {param.name for param in found.fields}
        if name != "VMFullInfo":
            assert missing == DROPPED.get(name, set())
    if "values" in published and name not in RENUMBERED:
        assert set(published["values"]) <= set(found.values)


def test_every_dropped_name_is_still_understood(schema: Schema) -> None:
    aliases = {alias for param in schema.type("BackupDisk").fields for alias in param.aliases}
    assert aliases >= DROPPED["BackupDisk"]


def test_storage_domain_types_have_the_published_numbers(schema: Schema) -> None:
    found = schema.type("StorageDomainType")
    published = {int(number) for number in PUBLISHED["types"]["StorageDomainType"]["values"]}
    assert published <= set(found.numbers)


def test_everything_is_described(schema: Schema) -> None:
    for verb in schema.verbs():
        assert len(verb.description) > 10, verb.name
        assert verb.runs in RUNS, verb.name
        assert verb.since, verb.name
        for param in verb.params:
            assert param.description, f"{verb.name}.{param.name}"
        if verb.returns is not None:
            assert verb.returns_description, verb.name
    for found in schema.types():
        assert len(found.description) > 3, found.name
    for event in schema.events():
        assert event.description, event.name


def test_every_error_of_a_verb_is_in_the_table(schema: Schema) -> None:
    known = schema.errors()
    for verb in schema.verbs():
        assert set(verb.errors) <= set(known), verb.name
    assert all(error.description for error in known.values())
    codes = [error.code for error in known.values()]
    assert len(codes) == len(set(codes))


def test_every_named_type_exists_and_names_are_unique(schema: Schema) -> None:
    names = [found.name for found in schema.types()]
    assert len(names) == len(set(names))
    known = set(names)
    used = {param.type for verb in schema.verbs() for param in verb.params}
    used |= {verb.returns for verb in schema.verbs() if verb.returns}
    for found in schema.types():
        used |= {param.type for param in found.fields}
        used |= {name for name in (found.key, found.value) if name}
        used |= set(found.variants.values())
        if found.kind == "union":
            used |= set(found.of)
    assert {name.strip("[]") for name in used} <= known
    assert set(SCALARS) == {found.name for found in schema.types() if found.kind == "scalar"}


def test_files_are_the_namespaces(schema: Schema) -> None:
    folder = Path(__file__).parents[2] / "schema"
    on_disk = {path.stem for path in folder.glob("*.yml")}
    assert on_disk == {*FILES.values(), "types", "types_vm", "events", "errors"}
    assert {verb.namespace for verb in schema.verbs()} == set(FILES)


def test_a_namespace_reads_only_its_own_file(tmp_path: Path) -> None:
    folder = Path(__file__).parents[2] / "schema"
    for name in ("volume", "types"):
        (tmp_path / f"{name}.yml").write_bytes((folder / f"{name}.yml").read_bytes())
    schema = Schema(tmp_path)
    assert schema.verb("Volume.getInfo").returns == "VolumeInfoResponse"
    assert schema.type("VolumeInfoResponse", "Volume").kind == "object"
    assert schema.find("Nothing.here") is None
    assert schema.find("Volume.nothing") is None


def test_type_summary(schema: Schema) -> None:
    assert schema.type_summary("[UUID]") == "list of UUID"
    assert schema.type_summary("VolumeFormat") == "VolumeFormat: COW | RAW"
    assert schema.type_summary("Lease") == "Lease {sd_id, lease_id}"
    assert "base_generation?" in schema.type_summary("SubchainInfo")
    assert schema.type_summary("TasksStatus") == "TasksStatus: map of UUID to TaskStatus"


def test_the_table_has_every_code_that_the_agent_answers(schema: Schema) -> None:
    """A new class in vdsm_storage/errors wants a row in schema/errors.yml."""
    known = {error.code for error in schema.errors().values()}
    ours = {
        found.code: name
        for name, found in vars(errors).items()
        if isinstance(found, type) and issubclass(found, errors.AgentError)
    }
    assert {code: name for code, name in ours.items() if code not in known} == {}
