# SPDX-License-Identifier: GPL-2.0-or-later
"""Limits of disks: those in force, and the policy that somebody asked for.

What is in force is libvirt's affair (<iotune>).  The policy stands in the VM's metadata, where
engines and their policy daemons look for it, and lives as long as the VM:

    <ovirt-tune:qos xmlns:ovirt-tune="http://ovirt.org/vm/tune/1.0">
      <ovirt-tune:vcpuLimit>50</ovirt-tune:vcpuLimit>
      <ovirt-tune:ioTune>
        <ovirt-tune:device name="vda" path="/…/volume">
          <ovirt-tune:maximum><ovirt-tune:total_bytes_sec>…</…></ovirt-tune:maximum>
          <ovirt-tune:guaranteed>…</ovirt-tune:guaranteed>

A new policy is in force at once: the maximum of each disk.  A disk that is taken away and added
again gets it again, unless the request has limits of its own.
"""

from __future__ import annotations

import contextlib
import logging
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from vdsm_storage.errors import (
    AgentError,
    NoSuchVM,
    UpdateIOTuneError,
    UpdateVMPolicyFailed,
    VMIsDown,
)
from vdsm_storage.host.libvirt_model import VmError, Why
from vdsm_storage.vms import records
from vdsm_storage.vms.choose import describe, matches
from vdsm_storage.vms.disk_xml import LIMITS, limits_of
from vdsm_storage.vms.drives import Drive, VolumePath, parse, volume_of
from vdsm_storage.vms.keeping import DiskTools, Keeping
from vdsm_storage.vms.registry import Definition

URI: Final = "http://ovirt.org/vm/tune/1.0"
PREFIX: Final = "ovirt-tune"
MAXIMUM, GUARANTEED = "maximum", "guaranteed"
NO_LIMITS: Final[Mapping[str, int]] = dict.fromkeys(LIMITS, 0)

log = logging.getLogger("vms.iotune")

Limits = Mapping[str, int]


class IoTune:
    def __init__(self, tools: DiskTools, keeping: Keeping) -> None:
        self._tools = tools
        self._keeping = keeping

    # -- looking -----------------------------------------------------------------------------

    def in_force(self, vm: str) -> list[dict[str, Any]]:
        """[{name, path, ioTune}] of every disk.  Raises 1, 6, 59."""
        return self._limits(vm, self._keeping.running(vm))

    def policy(self, vm: str) -> list[dict[str, Any]]:
        """[{name, path, maximum, guaranteed}] as asked for.  Raises 1, 6, 59."""
        return policy(self._keeping.running(vm).xml)

    def all(self) -> dict[str, dict[str, Any]]:
        """{vm: {policy, current_values}} of every VM.  Raises 59."""
        found = {}
        for state in self._tools.registry.running():
            with contextlib.suppress(NoSuchVM, VMIsDown):
                definition = self._tools.registry.definition(state.id)
                found[state.id] = {
                    "policy": policy(definition.xml),
                    "current_values": self._limits(state.id, definition),
                }
        return found

    def _limits(self, vm: str, definition: Definition) -> list[dict[str, Any]]:
        """A disk that the agent slows for a moment has those that its user gave it."""
        found = in_force(definition)
        for each in found:
            user = self._tools.throttles.user(vm, each["name"])
            if user is not None:
                each["ioTune"] = _all_six(user)
        return found

    # -- changing ----------------------------------------------------------------------------

    def set(self, vm: str, tunables: Sequence[Mapping[str, Any]]) -> None:
        """Limit disks, by {name | path, ioTune}: all of them or none.

        Raises 1, 6, 59, UpdateIOTuneError (64).
        """

        def failure(reason: str) -> AgentError:
            return UpdateIOTuneError(vm=vm, reason=reason)

        with self._keeping.turn(vm):
            definition = self._keeping.running(vm)
            wanted = {
                _drive(definition, each, failure).name: each.get("ioTune") or {}
                for each in tunables
            }
            self._apply(vm, definition, wanted, failure)

    def update_policy(self, vm: str, params: Mapping[str, Any]) -> None:
        """Change the policy, by {vcpuLimit?, ioTune?: [{name | path | volume, maximum,
        guaranteed}]}; what is not named stays.  A processor limit is only kept.

        Raises 1, 6, 59, UpdateVMPolicyFailed (63).
        """

        def failure(reason: str) -> AgentError:
            return UpdateVMPolicyFailed(vm=vm, reason=reason)

        entries = params.get("ioTune") or []
        with self._keeping.turn(vm):
            definition = self._keeping.running(vm)
            drives = [(_drive(definition, each, failure), each) for each in entries]
            before = _element(definition.xml)
            qos = _element(definition.xml)
            if params.get("vcpuLimit") is not None:
                _set_text(qos, "vcpuLimit", str(params["vcpuLimit"]))
            for drive, each in drives:
                _put(qos, drive, each)
            self._save(vm, qos, failure)
            try:
                wanted = {drive.name: each.get(MAXIMUM) or {} for drive, each in drives}
                self._apply(vm, definition, wanted, failure)
            except AgentError:
                self._save(vm, before, failure)
                raise

    def _apply(
        self,
        vm: str,
        definition: Definition,
        wanted: Mapping[str, Limits],
        failure: Callable[[str], AgentError],
    ) -> None:
        """All or none."""
        before = {each["name"]: each["ioTune"] for each in self._limits(vm, definition)}
        done: list[str] = []
        try:
            for name, limits in wanted.items():
                self._tools.throttles.set_limits(vm, name, _all_six(limits))
                done.append(name)
        except VmError as error:
            for name in done:
                with contextlib.suppress(VmError):
                    self._tools.throttles.set_limits(vm, name, before[name])
            raise self._error(vm, error, failure) from error
        finally:
            self._tools.registry.changed(vm)

    def _save(self, vm: str, qos: ET.Element, failure: Callable[[str], AgentError]) -> None:
        try:
            self._tools.libvirt.set_metadata(vm, ET.tostring(qos, encoding="unicode"), PREFIX, URI)
        except VmError as error:
            raise self._error(vm, error, failure) from error
        finally:
            self._tools.registry.changed(vm)

    def _error(self, vm: str, error: VmError, failure: Callable[[str], AgentError]) -> Exception:
        if error.why is Why.NO_VM:
            return self._tools.registry.gone(vm, error)
        return failure(error.text)


def in_force(definition: Definition) -> list[dict[str, Any]]:
    disks = parse(definition.xml).findall("./devices/disk")
    return [
        {"name": drive.name, "path": drive.path, "ioTune": limits_of(disk)}
        for drive, disk in zip(definition.drives, disks, strict=True)
        if drive.device in ("disk", "lun")
    ]


def policy(xml: str) -> list[dict[str, Any]]:
    return [
        {
            **{key: value for key in ("name", "path") if (value := device.get(key))},
            MAXIMUM: _limits(device.find(MAXIMUM)),
            GUARANTEED: _limits(device.find(GUARANTEED)),
        }
        for device in _element(xml).iterfind("./ioTune/device")
    ]


def maximum(xml: str, name: str, volume: VolumePath | None) -> Limits:
    """What the policy of a VM allows a disk that is added to it; {} for no policy."""
    for entry in policy(xml):
        there = volume_of(entry.get("path", ""))
        if there is None or volume is None:
            found = there is volume and entry.get("name") == name
        else:
            found = there.image == volume.image
        if found:
            limits: Limits = entry[MAXIMUM]
            return limits
    return {}


def _element(xml: str) -> ET.Element:
    """<ovirt-tune:qos> without its name space; an empty one if there is none."""
    found = parse(xml).find(f"./metadata/{{{URI}}}qos")
    return ET.Element("qos") if found is None else records.bare(found)


def _put(qos: ET.Element, drive: Drive, entry: Mapping[str, Any]) -> None:
    """One entry a disk: by its image, else by its target."""
    tune = qos.find("ioTune")
    if tune is None:
        tune = ET.SubElement(qos, "ioTune")
    for device in tune.findall("device"):
        there = volume_of(device.get("path", ""))
        same_image = there and drive.volume and there.image == drive.volume.image
        if device.get("name") == drive.name or same_image:
            tune.remove(device)
    device = ET.SubElement(tune, "device", name=drive.name, path=drive.path)
    for kind in (MAXIMUM, GUARANTEED):
        element = ET.SubElement(device, kind)
        for key, value in _all_six(entry.get(kind) or {}).items():
            _set_text(element, key, str(value))


def _set_text(parent: ET.Element, tag: str, text: str) -> None:
    child = parent.find(tag)
    if child is None:
        child = ET.SubElement(parent, tag)
    child.text = text


def _limits(element: ET.Element | None) -> dict[str, int]:
    if element is None:
        return dict(NO_LIMITS)
    return {key: int(element.findtext(key) or 0) for key in LIMITS}


def _all_six(limits: Limits) -> dict[str, int]:
    return {key: int(limits.get(key) or 0) for key in LIMITS}


def _drive(
    definition: Definition, spec: Mapping[str, Any], failure: Callable[[str], AgentError]
) -> Drive:
    for drive in definition.drives:
        if matches(drive, spec):
            return drive
    raise failure(f"it has no such disk ({describe(spec)})")
