# SPDX-License-Identifier: GPL-2.0-or-later
"""vdsm-client: as a program against a server, and its pages."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.rpc.conftest import Start, Wire, authorities, dev_directory, start, wait_for
from vdsm_storage.cli import helptext, live
from vdsm_storage.cli.values import read_value
from vdsm_storage.schema.loader import Schema

__all__ = ["authorities", "start"]  # fixtures

JOB = "00000000-0000-0000-0000-00000000000a"
PROGRAM = str(Path(sys.executable).parent / "vdsm-client")


@pytest.fixture
def wire(start: Start, tmp_path: Path, authorities: tuple[str, str]) -> Wire:
    """Over TLS, and found by --dev."""
    wire = start(secure=True)
    wire.probe.gate.set()
    dev_directory(wire, tmp_path, authorities[0])
    return wire


def run(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PROGRAM, *words], input=stdin, capture_output=True, text=True, timeout=60, check=False
    )


def dev(tmp_path: Path, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return run("--dev", str(tmp_path), *words, stdin=stdin)


def test_a_result_as_json(wire: Wire, tmp_path: Path) -> None:
    done = dev(tmp_path, "Host", "ping2")
    assert (done.returncode, done.stdout, done.stderr) == (0, "true\n", "")
    done = dev(tmp_path, "Host", "echo", "message=a=b ä")
    assert done.stdout == '"a=b ä"\n'


def test_objects_are_indented_and_sorted(wire: Wire, tmp_path: Path) -> None:
    zero = "00000000-0000-0000-0000-000000000000"
    connection = json.dumps([{"id": zero, "connection": path} for path in ("/x", "/y")])
    done = dev(
        tmp_path,
        *("StoragePool", "connectStorageServer", "domainType=4", f"storagepoolID={zero}"),
        f"connectionParams={connection}",
    )
    assert done.returncode == 0, done.stderr
    expected = [{"id": zero, "status": 0}] * 2
    assert done.stdout == json.dumps(expected, indent=4, sort_keys=True) + "\n"


def test_errors(wire: Wire, tmp_path: Path) -> None:
    done = dev(tmp_path, "Host", "getCapabilities")
    assert (done.returncode, done.stdout) == (1, "")
    error = json.loads(done.stderr)
    assert error["code"] == 44
    assert "Host.getCapabilities" in error["message"]


def test_flow_id_reaches_the_agent(wire: Wire, tmp_path: Path) -> None:
    done = dev(tmp_path, "--flow-id", "flow-3", "Host", "getHardwareInfo")
    assert "flow-3" in json.loads(done.stderr)["message"]


def test_time_out(wire: Wire, tmp_path: Path) -> None:
    wire.probe.gate.clear()
    done = dev(tmp_path, "--timeout", "0.3", "Host", "getAllTasksInfo")
    assert done.returncode == 1
    assert json.loads(done.stderr)["code"] == -32605


def test_parameters_from_a_file_and_from_standard_input(wire: Wire, tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text('{"message": "from a file"}')
    done = dev(tmp_path, "-f", str(tmp_path / "params.json"), "Host", "echo")
    assert done.stdout == '"from a file"\n'
    done = dev(tmp_path, "-f", "-", "Host", "echo", stdin='{"message": "from stdin"}')
    assert done.stdout == '"from stdin"\n'
    done = dev(tmp_path, "-f", "-", "Host", "echo", "message=word", stdin='{"message": "x"}')
    assert done.stdout == '"word"\n'
    done = dev(tmp_path, "-f", "-", "Host", "echo", stdin="[1]")
    assert done.returncode == 2


def test_plain_text_by_host_and_port(start: Start) -> None:
    wire = start()
    done = run("-a", "127.0.0.1", "-p", str(wire.port), "--insecure", "Host", "ping2")
    assert (done.returncode, done.stdout) == (0, "true\n")


def test_nobody_there() -> None:
    done = run("-a", "127.0.0.1", "-p", "1", "--insecure", "Host", "ping2")
    assert done.returncode == 1
    assert "127.0.0.1:1" in json.loads(done.stderr)["message"]


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["Host", "echo", "massage=x"], -32602, "message"),
        (["Host", "extend_image_ticket", "timeout=soon"], -32602, "timeout"),
        (["Host", "noSuchVerb", "a=b"], -32601, "noSuchVerb"),
    ],
)
def test_wrong_parameters_are_found_before_anything_is_sent(
    tmp_path: Path, words: list[str], code: int, text: str
) -> None:
    done = dev(tmp_path, *words)
    assert done.returncode == 1
    error = json.loads(done.stderr)
    assert error["code"] == code
    assert text in error["message"]


@pytest.mark.parametrize("words", [["Host"], ["Host", "echo", "message"], ["--no-such-option"], []])
def test_wrong_command_lines(words: list[str]) -> None:
    assert run(*words).returncode == 2


# -- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("uint", "12", 12),
        ("long", "-5", -5),
        ("float", "1.5", 1.5),
        ("boolean", "true", True),
        ("boolean", "False", False),
        ("string", "12", "12"),
        ("string", "null", "null"),
        ("string", "", ""),
        ("UUID", "ab", "ab"),
        ("VolumeFormat", "COW", "COW"),
        ("IntString", "1073741824", "1073741824"),
        ("[UUID]", '["a","b"]', ["a", "b"]),
        ("[UUID]", "a,b", ["a", "b"]),
        ("[UUID]", "", []),
        ("[uint]", "1,2", [1, 2]),
        ("any", '{"a": 1}', {"a": 1}),
        ("any", "text", "text"),
    ],
)
def test_values_are_read_by_their_type(kind: str, text: str, value: object) -> None:
    found = read_value(Schema(), "Volume", kind, text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("kind", "text"),
    [("uint", "x"), ("uint", "1.5"), ("boolean", "yes"), ("float", "x"), ("[ImageTicket]", "a,b")],
)
def test_values_that_do_not_fit(kind: str, text: str) -> None:
    with pytest.raises(ValueError, match="wanted"):
        read_value(Schema(), "Host", kind, text)


def test_objects_are_json() -> None:
    assert read_value(Schema(), "Host", "ImageTicket", '{"uuid": "a"}') == {"uuid": "a"}
    for text in ("text", "[1]"):
        with pytest.raises(ValueError, match="JSON"):
            read_value(Schema(), "Host", "ImageTicket", text)


# -- pages ---------------------------------------------------------------------------------------


def test_help() -> None:
    done = run("--help")
    assert done.returncode == 0
    for word in ("NAMESPACE VERB", "--flow-id", "StorageDomain", "watch", "--follow", "thin top"):
        assert word in done.stdout
    done = run("--help", "thin")
    for word in ("thin top [--once]", "thin plot VM DRIVE -o FILE", "--interval S", "--since"):
        assert word in done.stdout
    assert run("thin", "plot", "--help").stdout == done.stdout
    done = run("--help", "Volume")
    assert "extendSize" in done.stdout
    done = run("--help", "Volume", "create")
    for word in ("volumeID", "UUID", "VolumeFormat: COW | RAW", "errors", "-32602", "initialSize"):
        assert word in done.stdout
    assert run("Volume", "create", "--help").stdout == done.stdout
    assert run("--help", "Nothing").returncode == 2
    assert run("--help", "Volume", "nothing").returncode == 1


def test_every_verb_has_a_page() -> None:
    schema = Schema()
    for verb in schema.verbs():
        page = helptext.verb(schema, verb.name)
        assert verb.short_name in page
        assert all(param.name in page for param in verb.params)


# -- live views -----------------------------------------------------------------------------------


def test_watch_prints_a_line_an_event(wire: Wire, tmp_path: Path) -> None:
    program = subprocess.Popen(
        [PROGRAM, "--dev", str(tmp_path), "watch"], stdout=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    try:
        wait_for(lambda: wire.broker.subscribers("jms.queue.events") == 1)
        wire.broker.publish_event("|jobs|status|1", {"status": "done"})
        event = json.loads(program.stdout.readline())
        assert event["event"] == "|jobs|status|1"
        assert event["params"]["status"] == "done"
    finally:
        program.terminate()
        program.wait(10)
        program.stdout.close()


def test_rows_of_jobs_and_tasks() -> None:
    jobs = {
        "11111111-x": {"description": "copy", "status": "running", "progress": 42.0},
        "22222222-x": {"job_type": "storage", "status": "pending"},
    }
    tasks = {
        "33333333-x": {"taskState": "running", "message": "createVolume", "taskResult": ""},
        "44444444-x": {"taskState": "finished", "message": "bad", "taskResult": "cleanSuccess"},
        "55555555-x": {"taskState": "finished", "message": "done", "taskResult": "success"},
    }
    verbs = {key: {"id": key, "verb": "createVolume"} for key in list(tasks)[:2]}
    assert live.rows_of(jobs, tasks, verbs) == {
        "11111111-x": ("11111111 copy", "running", 42.0),
        "22222222-x": ("22222222 storage", "pending", None),
        "33333333-x": ("33333333 createVolume", "running", None),
        "44444444-x": ("44444444 createVolume: bad", "failed", None),
        "55555555-x": ("55555555 task", "finished", None),
    }


def test_follow_shows_bars_until_interrupted(wire: Wire, tmp_path: Path) -> None:
    """On a terminal; a job's event shows at once."""
    job = {
        "id": JOB,
        "status": "running",
        "description": "copying a volume",
        "job_type": "storage",
        "progress": 42.0,
    }
    wire.probe.jobs[JOB] = job
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    command = [PROGRAM, "--dev", str(tmp_path), "tasks", "--follow"]
    program = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs,
        # Whoever runs the tests in the background ignores the signal for all of them.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(theirs)
    try:
        shown = read_until(mine, b"42 %")
        assert b"copying a volume" in shown
        wire.probe.jobs[JOB] = {**job, "status": "done", "progress": 100.0}
        wire.broker.publish_event(f"|jobs|status|{JOB}", {"id": JOB})
        assert b"done" in read_until(mine, b"100 %")
        program.send_signal(signal.SIGINT)
        assert program.wait(20) == 0
    finally:
        program.kill()
        program.wait(10)
        os.close(mine)


def read_until(terminal: int, text: bytes) -> bytes:
    out, end = b"", time.monotonic() + 20
    while text not in out:
        assert time.monotonic() < end, out
        if select.select([terminal], [], [], 0.5)[0]:
            out += os.read(terminal, 4096)
    return out


def test_a_plain_call_does_not_load_what_it_does_not_need() -> None:
    """rich, cryptography and asyncio stay out: a call starts in little more than Python does."""
    code = "import sys, vdsm_storage.cli.command; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    loaded = set(done.stdout.split())
    assert not loaded & {"rich", "cryptography", "asyncio", "jsonrpcserver", "orjson"}


