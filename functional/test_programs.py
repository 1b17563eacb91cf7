# SPDX-License-Identifier: GPL-2.0-or-later
"""vdsm-storaged and vdsm-client as people and units run them."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.pool_lab import MIB, RAW, Lab, Volume, endpoint, local_server, make_lab
from functional.processes import BIN, AgentProcess, leftovers
from vdsm_storage.host import pki
from vdsm_storage.rpc.client import Client

DAEMON = str(BIN / "vdsm-storaged")


@pytest.fixture(scope="module")
def lab(workdir: Path, start_agent: Callable[..., AgentProcess]) -> Iterator[Lab]:
    made = make_lab(start_agent(rpc__strict="true"))
    made.add_domain(local_server(workdir / "storage"))
    yield made
    made.client.close()


def client(lab: Lab, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    argv = [str(BIN / "vdsm-client"), "--dev", str(lab.agent.dir), *words]
    return subprocess.run(
        argv, input=stdin, capture_output=True, text=True, timeout=60, check=False
    )


# -- vdsm-storaged --------------------------------------------------------------------------------


def system_like(root: Path) -> Path:
    """A configuration as in /etc/vdsm-storage, whose paths are below `root`."""
    etc = root / "etc"
    (etc / "conf.d").mkdir(parents=True)
    pki.make_authority(str(root / "pki"))
    paths = {name: root / name for name in ("data_center", "run", "state", "pki")}
    rows = [f"{name} = {path}" for name, path in paths.items()]
    rows += [f"log = {root}/log/agent.log", f"imageio = {root}/none"]
    (etc / "agent.conf").write_text("\n".join(["[paths]", *rows, "[rpc]", "max_connections = 7"]))
    (etc / "conf.d" / "10-first.conf").write_text("[rpc]\nmax_connections = 8\nstrict = true\n")
    (etc / "conf.d" / "20-last.conf").write_text(
        "[rpc]\nmax_connections = 9\n[addresses]\nmanagement_ip = 127.0.0.1\n"
        f"management_port = 0\n[storage]\nuser = {os.geteuid()}\ngroup = {os.getegid()}\n"
    )
    return etc


def show(*words: str) -> Any:
    done = subprocess.run(
        [DAEMON, *words, "--show-config"], capture_output=True, text=True, timeout=60, check=True
    )
    return json.loads(done.stdout)


def test_show_config(workdir: Path, tmp_path: Path) -> None:
    etc = system_like(tmp_path)
    shown = show("--config", str(etc))
    assert shown["rpc"]["max_connections"] == 9
    assert shown["rpc"]["strict"] is True
    assert shown["rpc"]["max_outstanding"] == 2000
    assert shown["paths"]["run"] == f"{tmp_path}/run"
    assert not (tmp_path / "run").exists()
    system = show("--config", str(tmp_path / "none"))
    assert system["paths"]["data_center"] == "/rhev/data-center"
    assert system["paths"]["run"] == "/run/vdsm"
    assert system["addresses"]["management_port"] == 54321
    dev = show("--dev", str(workdir / "never-started"), "--port", "7", "--no-tls")
    own = {name: path for name, path in dev["paths"].items() if name != "log"}
    assert all(path.startswith(f"{workdir}/never-started/") for path in own.values())
    assert dev["addresses"]["management_port"] == 7
    assert dev["tls"]["enabled"] is False


def test_as_a_unit_runs_it(workdir: Path) -> None:
    """Without --dev: the configured paths, no sanlock that it starts or stops."""
    root = workdir / "system"
    root.mkdir()
    argv = [DAEMON, "--config", str(system_like(root))]
    environment = {**os.environ, "VDSM_STORAGE_TEST_AGENT": f"{root}/"}
    agent = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert agent.stdout is not None
        word, _port = agent.stdout.readline().split()
        assert word == "ready"
        mine = Client.dev(str(root))
        assert mine.call("Host.ping2") is True
        mine.close()
        assert {path.name for path in root.iterdir()} >= {"run", "state", "log"}
        children = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, check=False)
        assert children.stdout == b""
    finally:
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(60) == 0
        assert agent.stdout is not None
        assert agent.stdout.read() == "", "one line, and no more"
    assert leftovers(root) == []


def test_a_second_one_there_says_so(lab: Lab) -> None:
    done = subprocess.run(
        [DAEMON, "--dev", str(lab.agent.dir)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert "another agent runs here" in done.stderr
    assert lab.call("Host.ping2") is True


# -- vdsm-client ----------------------------------------------------------------------------------


def test_values_are_typed_by_the_schema(lab: Lab) -> None:
    """A number as text, an enumeration, a map as JSON; the same from standard input."""
    size = 8 * MIB
    ids = {
        "storagepoolID": lab.pool, "storagedomainID": next(iter(lab.servers)),
        "imageID": str(uuid.uuid4()), "volumeID": str(uuid.uuid4()),
    }  # fmt: skip
    words = [f"{name}={value}" for name, value in ids.items()]
    rest = {
        "size": size, "volFormat": "RAW", "preallocate": "SPARSE", "diskType": "DATA",
        "desc": "1.0", "srcImgUUID": str(uuid.UUID(int=0)), "srcVolUUID": str(uuid.UUID(int=0)),
        "legal": True,
    }  # fmt: skip
    done = client(lab, "Volume", "create", "-f", "-", *words, stdin=json.dumps(rest))
    assert done.returncode == 0, done.stderr
    assert lab.wait_task(json.loads(done.stdout)) == 0
    done = client(lab, "--flow-id", "who-asked", "Volume", "getInfo", *words)
    info = json.loads(done.stdout)
    assert (info["capacity"], info["description"]) == (str(size), "1.0")
    assert done.stdout == json.dumps(info, indent=4, sort_keys=True) + "\n"
    assert "who-asked" in (lab.agent.dir / "agent.log").read_text()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["VM", "screenshot", f"vmID={uuid.UUID(int=1)}"], 44),
        (["Volume", "getInfo", "volumeID=x"], -32602),
        (["StorageDomain", "getInfo", f"storagedomainID={uuid.UUID(int=1)}"], 358),
    ],
)
def test_errors_have_code_and_message(lab: Lab, words: list[str], code: int) -> None:
    done = client(lab, *words)
    assert (done.returncode, done.stdout) == (1, "")
    error = json.loads(done.stderr)
    assert error["code"] == code
    assert error["message"]


def test_strict(lab: Lab) -> None:
    done = client(lab, "-f", "-", "Host", "echo", stdin='{"message": "x", "more": 1}')
    assert done.returncode == 1
    assert "more" in json.loads(done.stderr)["message"]


def terminal(argv: list[str]) -> tuple[subprocess.Popen[bytes], int]:
    mine, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    # A shell that runs the tests in the background makes its children deaf to interrupts.
    program = subprocess.Popen(
        ["env", "--default-signal=INT", *argv],
        stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    return program, mine


def seen(events: str, job: str) -> list[str]:
    """The states of a job in the rows that are complete."""
    rows = [row for row in events.splitlines(keepends=True) if row.endswith("\n")]
    return [json.loads(r)["params"]["status"] for r in rows if job and f"|jobs|status|{job}" in r]


def test_tasks_are_told(lab: Lab) -> None:
    """Nobody needs to ask again and again; who is told the end can clear the task at once."""
    where = Volume(next(iter(lab.servers)), str(uuid.uuid4()), str(uuid.uuid4()))
    told: list[dict[str, Any]] = []
    with contextlib.closing(Client.dev(str(lab.agent.dir), timeout=30)) as listener:
        listener.subscribe()
        listener.call("Host.ping2")  # it listens now
        task = lab.start_create(where, MIB, RAW)
        for method, params in listener.events(30):
            if method == f"|tasks|status|{task}":
                assert params.pop("notify_time") > 0
                told.append(params)
                if params["taskState"] == "finished":
                    break
        assert told[-1:] == [lab.call("Task.getStatus", taskID=task)]
        lab.call("Task.clear", taskID=task)
    assert [one["taskState"] for one in told] == ["running", "finished"]
    assert (told[-1]["taskResult"], told[-1]["code"]) == ("success", 0)
    assert lab.code("Task.getStatus", taskID=task) == 401
    assert not (lab.agent.dir / "state" / "journal" / f"{task}.json").exists()


def test_watch_and_follow_show_a_copy(lab: Lab) -> None:
    """An event a line; bars that come to 100 %; both end by an interrupt."""
    domain = next(iter(lab.servers))
    ends = [endpoint(lab.create(domain, 64 * MIB, RAW)) for _ in range(2)]
    base = [str(BIN / "vdsm-client"), "--dev", str(lab.agent.dir)]
    watch, events = terminal([*base, "watch"])
    follow, bars = terminal([*base, "tasks", "--follow"])
    shown = {events: "", bars: ""}
    job, end = "", time.monotonic() + 60
    try:
        while not (seen(shown[events], job)[-1:] == ["done"] and "100 % done" in shown[bars]):
            assert time.monotonic() < end, shown
            if "running" not in seen(shown[events], job):  # until it listens
                job = str(uuid.uuid4())
                lab.call("SDM.copy_data", job_id=job, source=ends[0], destination=ends[1])
                assert lab.wait_job(job) == 0
            for fd in select.select(list(shown), [], [], 2)[0]:
                shown[fd] += os.read(fd, 65536).decode(errors="replace")
    finally:
        for program in (watch, follow):
            program.send_signal(signal.SIGINT)
        codes = [program.wait(20) for program in (watch, follow)]
        for fd in shown:
            os.close(fd)
    assert seen(shown[events], job) == ["running", "done"]
    assert codes == [130, 0]
