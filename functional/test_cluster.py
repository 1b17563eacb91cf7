# SPDX-License-Identifier: GPL-2.0-or-later
"""Hosts that share a disk, as guests of the laboratory: each its own kernel, each can be killed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from functional.lab.agent import PORT, GuestAgent
from functional.lab.channel import Command
from functional.lab.cluster import cluster
from functional.lab.errors import CommandTimeoutError
from functional.lab.guest import Guest, why_not

GIB = 1024**3

pytestmark = [
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "-"),
    pytest.mark.timeout(0),  # the laboratory has time limits of its own
]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Sequence[Guest]]:
    with cluster(2, shared=(20 * GIB,), forward=(PORT,)) as guests:
        yield guests


def test_a_disk_is_shared(hosts: Sequence[Guest]) -> None:
    a, b = hosts
    a.run("vgcreate", "--physicalextentsize", "128m", "shared", "/dev/vdb").check()
    a.run("lvcreate", "-an", "-Zn", "-L", "1g", "-n", "one", "shared").check()
    assert b.run("lvs", "--noheadings", "-o", "name", "shared").check().out.split() == ["one"]
    b.run("vgremove", "--force", "shared").check()


def test_the_network_joins_them(hosts: Sequence[Guest]) -> None:
    a, b = hosts
    listening = "import socket; print(socket.create_server(('', 4000)).accept()[1][0], flush=True)"
    server = a.start("/usr/bin/python3", "-c", listening)
    connect = (
        "import socket, time\n"
        "for _ in range(100):\n"
        "    try: socket.create_connection((%r, 4000), 5); break\n"
        "    except ConnectionRefusedError: time.sleep(0.1)\n"
        "else: raise SystemExit('refused')\n"
    )
    b.run("/usr/bin/python3", "-c", connect % a.address).check()
    assert server.wait(30).check().out.strip() == b.address


def test_a_paused_host_goes_on_where_it_was(hosts: Sequence[Guest]) -> None:
    a, _ = hosts
    counter = a.start("sh", "-c", "sleep 2; echo done")
    a.pause()
    with pytest.raises(CommandTimeoutError):
        counter.wait(4)
    a.resume()
    assert counter.wait(30).out == "done\n"


def test_agents_answer_from_outside(hosts: Sequence[Guest]) -> None:
    for guest in hosts:
        agent = GuestAgent(guest)
        agent.start()
        with agent.client() as client:
            assert client.call("Host.echo", {"message": "from outside"}) == "from outside"
        agent.stop()


LEASE = """
import sanlock, sys, time
role, host_id, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
if role == "first":
    sanlock.write_lockspace(b"space", path, iotimeout=1)
    sanlock.write_resource(b"space", b"lease", [(path, 1048576)])
sanlock.add_lockspace(b"space", host_id, path, iotimeout=1)
fd = sanlock.register()
while True:
    try:
        sanlock.acquire(b"space", b"lease", [(path, 1048576)], slkfd=fd)
        break
    except sanlock.SanlockException as error:
        print("busy", error.errno, flush=True)
        time.sleep(1)
print("held", flush=True)
time.sleep(600)
"""


def test_a_killed_hosts_lease_goes_to_the_next(hosts: Sequence[Guest], tmp_path: Path) -> None:
    """Eight I/O time-outs and a minute later, by sanlock's rules; b tries all the time."""
    a, b = hosts
    for guest in hosts:
        start = "sanlock daemon -w 0 -U root -G root && sleep 1"
        guest.run("sh", "-c", start).check()
    first = a.start("/usr/bin/python3", "-c", LEASE, "first", "1", "/dev/vdb")
    _wait_for(first, "held", 60)
    second = b.start("/usr/bin/python3", "-c", LEASE, "second", "2", "/dev/vdb")
    _wait_for(second, "busy", 60)
    a.kill()
    killed = time.monotonic()
    _wait_for(second, "held", 180)
    assert time.monotonic() - killed > 60
    second.kill()
    a.boot()
    a.wait_ready()
    a.run("true").check()


def _wait_for(command: Command, word: str, timeout: float) -> None:
    end = time.monotonic() + timeout
    while word not in command.output():
        assert not command.ended(), command.output()
        assert time.monotonic() < end, f"no {word!r} in {command.output()!r}"
        time.sleep(0.1)
