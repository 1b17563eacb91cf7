# SPDX-License-Identifier: GPL-2.0-or-later
"""What cannot be used is -32602: it names the parameter, says what is wanted, shows no secret."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vdsm_storage import errors
from vdsm_storage.base.secret import Secret
from vdsm_storage.schema.loader import Schema, Type, Verb
from vdsm_storage.schema.normalise import REFUSALS, Checked, Checker
from vdsm_storage.schema.scalars import enum_table

SD = "6513270e-269e-4d37-b2a7-4de452e6b438"
SCHEMA = Schema()
CHECKER = Checker(SCHEMA)
VERBS = sorted(verb.name for verb in SCHEMA.verbs())


def outcome(verb: str, params: Any) -> Checked | errors.AgentError:
    """What is refused is -32602, or what the verb says instead."""
    unusable = SCHEMA.verb(verb).unusable
    try:
        return CHECKER.check_params(verb, params)
    except (errors.InvalidParams, REFUSALS.get(unusable, errors.InvalidParams)) as error:
        return error


def refuse(verb: str, params: Any, strict: bool = False) -> errors.InvalidParams:
    with pytest.raises(errors.InvalidParams) as caught:
        CHECKER.check_params(verb, params, strict)
    assert caught.value.code == -32602
    assert caught.value.method == verb
    return caught.value


LEASE = {"sd_id": SD, "lease_id": SD}
BAD: list[tuple[str, Any, str, str]] = [
    ("StorageDomain.getInfo", {}, "storagedomainID", "is missing, expected UUID"),
    ("StorageDomain.getInfo", {"storagedomainID": None}, "storagedomainID", "must not be null"),
    ("StorageDomain.getInfo", {"storagedomainID": ""}, "storagedomainID", "UUID"),
    ("StorageDomain.getInfo", {"storagedomainID": SD[:-1]}, "storagedomainID", SD[:-1]),
    ("StorageDomain.getInfo", {"storagedomainID": SD + "\n"}, "storagedomainID", "UUID"),
    ("StorageDomain.getInfo", {"storagedomainID": "../" + SD[3:]}, "storagedomainID", "UUID"),
    ("StorageDomain.getInfo", {"storagedomainID": 5}, "storagedomainID", "got 5"),
    ("StorageDomain.getInfo", {"storagedomainID": [SD]}, "storagedomainID", "a list"),
    ("StorageDomain.getInfo", {"storagedomainId": SD}, "storagedomainID", "storagedomainId was"),
    ("StorageDomain.getInfo", "text", "(params)", "a string"),
    ("Host.startMonitoringDomain", {"sdUUID": SD, "hostID": "one"}, "hostID", '"one"'),
    ("Host.startMonitoringDomain", {"sdUUID": SD, "hostID": 1.5}, "hostID", "1.5"),
    ("Host.startMonitoringDomain", {"sdUUID": SD, "hostID": True}, "hostID", "true"),
    ("Host.startMonitoringDomain", {"sdUUID": SD, "hostID": 2**63}, "hostID", "64 bits"),
    ("Host.extend_image_ticket", {"uuid": SD, "timeout": -1}, "timeout", "not negative"),
    ("Lease.info", {"lease": SD}, "lease", "expected an object (Lease), got a string"),
    ("Lease.info", {"lease": {"sd_id": SD}}, "lease.lease_id", "is missing"),
    ("Lease.info", {"lease": {**LEASE, "sd_id": 1}}, "lease.sd_id", "UUID"),
    ("Host.getJobs", {"job_ids": [SD, "x"]}, "job_ids[1]", '"x"'),
    ("Host.getJobs", {"job_ids": SD}, "job_ids", "expected a list, got a string"),
    ("Host.getJobs", {"job_type": "disk"}, "job_type", "storage, v2v, virt"),
    ("StoragePool.connectStorageServer", {
        "storagepoolID": SD, "domainType": 9, "connectionParams": [],
    }, "domainType", "NFS, FCP, ISCSI"),
    ("StoragePool.connectStorageServer", {
        "storagepoolID": SD, "domainType": True, "connectionParams": [],
    }, "domainType", "got true"),
    ("StoragePool.connectStorageServer", {
        "storagepoolID": SD, "domainType": 1, "connectionParams": [{"port": "nfs"}],
    }, "connectionParams[0].port", "whole number"),
    ("SDM.copy_data", {
        "job_id": SD, "source": {"endpoint_type": "tape"}, "destination": {},
    }, "source.endpoint_type", "div, external"),
    ("SDM.copy_data", {
        "job_id": SD, "source": {"endpoint_type": "div", "sd_id": SD}, "destination": {},
    }, "source.img_id", "is missing"),
    ("VM.snapshot", {
        "vmID": SD, "snapDrives": [{"domainID": SD, "imageID": SD, "volumeID": SD}],
    }, "snapDrives[0].baseVolumeID", "is missing"),
    ("StorageDomain.create", {
        "storagedomainID": SD, "domainType": 4, "typeArgs": {"where": "x"}, "name": "n",
        "domainClass": 1,
    }, "typeArgs", "a string, or an object with one of remotePath"),
]  # fmt: skip


@pytest.mark.parametrize(("verb", "params", "parameter", "hint"), BAD)
def test_bad(verb: str, params: Any, parameter: str, hint: str) -> None:
    error = refuse(verb, params)
    assert error.parameter == parameter
    assert hint in error.message
    assert parameter in error.message


def test_long_values_are_cut() -> None:
    assert len(refuse("StorageDomain.getInfo", {"storagedomainID": "x" * 10_000}).message) < 250


# -- any verb, any junk ------------------------------------------------------------------------

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(VERBS), st.data())
def test_junk_is_refused_or_understood(verb: str, data: st.DataObject) -> None:
    """Nothing but InvalidParams comes out, it names one of the parameters, and what passes is
    JSON of the canonical kind."""
    names = [param.name for param in SCHEMA.verb(verb).params]
    params = data.draw(st.dictionaries(st.sampled_from(names), JUNK) if names else st.just({}))
    result = outcome(verb, params)
    if isinstance(result, Checked):
        assert list(result.values) == names
    else:
        parameter = str(result.parameter)
        assert any(parameter.startswith(name) for name in names), parameter


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(VERBS), JUNK)
def test_junk_instead_of_parameters(verb: str, junk: Any) -> None:
    result = outcome(verb, junk)
    assert isinstance(result, Checked) or result.parameter


# -- values that fit ---------------------------------------------------------------------------

UUIDS = st.uuids().map(str)
SCALARS: dict[str, st.SearchStrategy[Any]] = {
    "string": st.text(max_size=20),
    "password": st.text(max_size=20),
    "UUID": UUIDS | UUIDS.map(str.upper),
    "int": st.integers(-(2**31), 2**31),
    "long": st.integers(-(2**63), 2**63 - 1),
    "uint": st.integers(0, 2**31),
    "ulong": st.integers(0, 2**63 - 1),
    "IntString": st.integers(0, 2**62).map(str) | st.integers(-1, 2**62),
    "IntLike": st.integers(0, 2**62).map(str) | st.integers(0, 2**62),
    "float": st.floats(allow_nan=False, allow_infinity=False),
    "FloatString": st.integers(0, 10**6).map(lambda number: f"{number / 1000}"),
    "boolean": st.booleans() | st.sampled_from(["true", "false", "True", "FALSE"]),
    "BoolString": st.sampled_from(["true", "false"]) | st.booleans(),
    "any": st.just({"a": [1]}),
}


def values(name: str, namespace: str, depth: int = 0) -> st.SearchStrategy[Any]:
    """Everything that a peer may send for a type."""
    if name in SCALARS:
        return SCALARS[name]
    if name.startswith("["):
        return st.lists(values(name[1:-1], namespace, depth + 1), max_size=2)
    found = SCHEMA.type(name, namespace)
    if found.kind == "object":
        return objects(found, namespace, depth)
    if found.kind == "enum":
        return st.sampled_from(sorted(enum_table(found), key=str))
    if found.kind == "map":
        key, value = (values(part, namespace, depth + 1) for part in (found.key, found.value))
        return st.dictionaries(key, value, max_size=2)
    if found.kind == "flat":
        return st.text() | st.fixed_dictionaries({found.of[0]: st.text()})
    if found.tag:
        return st.one_of(
            *[
                values(member, namespace, depth + 1).map(lambda v, t=tag: {**v, found.tag: t})
                for tag, member in found.variants.items()
            ]
        )
    return st.one_of(*[values(member, namespace, depth + 1) for member in found.of])


def objects(found: Type, namespace: str, depth: int) -> st.SearchStrategy[Any]:
    required, optional = {}, {}
    for param in found.fields:
        if not param.optional:
            required[param.name] = values(param.type, namespace, depth + 1)
        elif depth < 3 and param.type in SCALARS:
            optional[param.name] = st.none() | values(param.type, namespace, depth + 1)
    return st.fixed_dictionaries(required, optional=optional)


def requests(verb: Verb) -> st.SearchStrategy[dict[str, Any]]:
    made = {param.name: values(param.type, verb.namespace) for param in verb.params}
    return st.fixed_dictionaries(
        {param.name: made[param.name] for param in verb.params if not param.optional},
        optional={
            param.name: st.none() | made[param.name] for param in verb.params if param.optional
        },
    )


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(VERBS), st.data())
def test_normalising_twice_changes_nothing(verb: str, data: st.DataObject) -> None:
    sent = data.draw(requests(SCHEMA.verb(verb)))
    before = repr(sent)
    first = CHECKER.check_params(verb, sent)
    assert repr(sent) == before  # what came in is left alone
    second = CHECKER.check_params(verb, first.values)
    assert second.values == first.values
    assert second.warnings == []


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(VERBS), st.data())
def test_positions_are_the_same_as_names(verb: str, data: st.DataObject) -> None:
    found = SCHEMA.verb(verb)
    sent = data.draw(requests(found))
    listed = [sent.get(param.name) for param in found.params]
    assert CHECKER.check_params(verb, listed).values == CHECKER.check_params(verb, sent).values


# -- secrets -----------------------------------------------------------------------------------

PASSWORD = "correct-horse-battery"
WRAPPINGS: list[Any] = [
    [PASSWORD],
    {"x": PASSWORD},
    {PASSWORD: "x"},
    [[PASSWORD]],
    [{"password": PASSWORD}],
]
HIDDEN: list[tuple[str, dict[str, Any]]] = [
    ("ISCSIConnection.discoverSendTargets", {"host": "h", "port": 1, "password": None}),
    ("GlusterEvent.webhookAdd", {"url": "u", "bearerToken": None}),
]


@pytest.mark.parametrize("wrapped", WRAPPINGS)
@pytest.mark.parametrize(("verb", "params"), HIDDEN)
def test_a_bad_password_is_not_shown(verb: str, params: dict[str, Any], wrapped: Any) -> None:
    name = next(key for key, value in params.items() if value is None)
    error = refuse(verb, {**params, name: wrapped})
    assert error.parameter == name
    assert PASSWORD not in error.message


@pytest.mark.parametrize("wrapped", WRAPPINGS)
@pytest.mark.parametrize("bad", ["id", "password", "port", "tpgt", "ipv6_enabled"])
def test_nor_anything_near_a_password(bad: str, wrapped: Any) -> None:
    sent = {"id": SD, "connection": "c", "password": PASSWORD, "user": "u", bad: wrapped}
    error = refuse(
        "StoragePool.connectStorageServer",
        {"storagepoolID": SD, "domainType": 3, "connectionParams": [sent]},
    )
    assert error.parameter == f"connectionParams[0].{bad}"
    assert PASSWORD not in error.message


def test_passwords_are_wrapped() -> None:
    sent = {"id": SD, "connection": "c", "password": PASSWORD, "passwd": PASSWORD}
    checked = CHECKER.check_params(
        "StoragePool.connectStorageServer",
        {"storagepoolID": SD, "domainType": 3, "connectionParams": [sent]},
    )
    assert PASSWORD not in repr(checked)
    connections: Any = checked.values["connectionParams"]
    assert connections[0]["password"] == Secret(PASSWORD)


@settings(max_examples=150, deadline=None)
@given(JUNK)
def test_no_junk_makes_a_secret_show(junk: Any) -> None:
    """A password in its place, junk everywhere else."""
    secret = {
        "uuid": SD, "usageType": junk, "usageID": "u", "password": PASSWORD, "description": "",
    }  # fmt: skip
    for params in ({"secrets": [secret]}, {"secrets": secret}, {"secrets": [{"a": secret}]}):
        result = outcome("Host.registerSecrets", params)
        shown = result.warnings if isinstance(result, Checked) else result.message
        assert PASSWORD not in json.dumps(shown)


def test_every_default_is_a_value_of_its_type() -> None:
    """Compiling a verb normalises the defaults of its parameters and of their types."""
    for verb in SCHEMA.verbs():
        result = outcome(verb.name, {})
        assert isinstance(result, Checked) or any(not param.optional for param in verb.params)
