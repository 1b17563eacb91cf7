# SPDX-License-Identifier: GPL-2.0-or-later
"""`name=value` as people type it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdsm_storage import errors
from vdsm_storage.schema.loader import Schema
from vdsm_storage.schema.normalise import Checker
from vdsm_storage.schema.text import choices, typed_arguments

SD = "6513270e-269e-4d37-b2a7-4de452e6b438"
SCHEMA = Schema()
LEASE = {"sd_id": SD, "lease_id": SD}

GOOD: list[tuple[str, list[str], dict[str, Any]]] = [
    ("Host.startMonitoringDomain", [f"sdUUID={SD}", "hostID=1"], {"sdUUID": SD, "hostID": 1}),
    ("Host.echo", ["message=a=b"], {"message": "a=b"}),
    ("Host.echo", ["message="], {"message": ""}),
    ("Host.echo", ["message=12"], {"message": "12"}),
    ("Volume.create", ["size=1024", "volFormat=cow", "legal=False"], {
        "size": "1024", "volFormat": "cow", "legal": False,
    }),
    ("Volume.create", ["volFormat=5", "sequence=3"], {"volFormat": "5", "sequence": 3}),
    ("StoragePool.spmStart", ["enableScsiFencing=TRUE", "prevLver=-1"], {
        "enableScsiFencing": "true", "prevLver": "-1",
    }),
    ("Host.getJobs", [f"job_ids={SD},{SD}"], {"job_ids": [SD, SD]}),
    ("Host.getJobs", ["job_ids="], {"job_ids": []}),
    ("Host.getJobs", [f'job_ids=["{SD}"]'], {"job_ids": [SD]}),
    ("Lease.info", [f"lease={json.dumps(LEASE)}"], {"lease": LEASE}),
    ("StorageDomain.create", ["typeArgs=/data"], {"typeArgs": "/data"}),
    ("StorageDomain.create", ['typeArgs={"remotePath": "/d"}'], {"typeArgs": {"remotePath": "/d"}}),
    ("StoragePool.connectStorageServer", ['connectionParams={"connection": "/d"}'], {
        "connectionParams": [{"connection": "/d"}],
    }),
    ("VM.changeCD", ["driveSpec="], {"driveSpec": ""}),
]  # fmt: skip


@pytest.mark.parametrize(("verb", "texts", "expected"), GOOD)
def test_good(verb: str, texts: list[str], expected: dict[str, Any]) -> None:
    assert typed_arguments(SCHEMA, verb, texts) == expected


BAD = [
    ("Host.echo", ["message"], "message", "is not name=value"),
    ("Host.echo", ["mesage=x"], "mesage", "did you mean message"),
    ("Host.startMonitoringDomain", ["hostID=x"], "hostID", "whole number"),
    ("Volume.create", ["legal=yes"], "legal", "true or false"),
    ("Lease.info", ["lease={"], "lease", "breaks at character"),
    ("Lease.info", ["lease=[]"], "lease", "JSON object (Lease)"),
]


@pytest.mark.parametrize(("verb", "texts", "parameter", "hint"), BAD)
def test_bad(verb: str, texts: list[str], parameter: str, hint: str) -> None:
    with pytest.raises(errors.InvalidParams) as caught:
        typed_arguments(SCHEMA, verb, texts)
    assert caught.value.parameter == parameter
    assert hint in caught.value.message


def test_broken_json_does_not_show_what_is_in_it() -> None:
    with pytest.raises(errors.InvalidParams) as caught:
        typed_arguments(SCHEMA, "Host.registerSecrets", ['secrets={"password": "hunter2"'])
    assert "hunter2" not in caught.value.message


@given(st.text())
def test_any_text_is_a_string(text: str) -> None:
    assert typed_arguments(SCHEMA, "Host.echo", [f"message={text}"]) == {"message": text}


def test_what_is_typed_is_what_the_agent_takes() -> None:
    sent = typed_arguments(
        SCHEMA,
        "StorageDomain.create",
        [f"storagedomainID={SD}", "domainType=LOCALFS", "typeArgs=/d", "name=n", "domainClass=data",
         "version=5"],
    )  # fmt: skip
    values = Checker(SCHEMA).check_params("StorageDomain.create", sent).values
    assert values["domainType"] == "LOCALFS"
    assert values["domainClass"] == "Data"
    assert values["version"] == 5


def test_choices() -> None:
    create = SCHEMA.verb("Volume.create")
    params = {param.name: param for param in create.params}
    assert choices(SCHEMA, create, params["volFormat"]) == ("COW", "RAW")
    assert choices(SCHEMA, create, params["legal"]) == ("true", "false")
    assert choices(SCHEMA, create, params["size"]) == ()
