# SPDX-License-Identifier: GPL-2.0-or-later
"""Configuration: commented classes, filled from INI files and their drop-ins.

/etc/vdsm-storage/*.conf are read in name order, then /etc/vdsm-storage/conf.d/*.conf; a later
value wins.  `vdsm-storaged --show-config` prints the result.
"""

from __future__ import annotations

import configparser
import dataclasses
import glob
import os
from dataclasses import dataclass, field
from typing import Any

from vdsm_storage.errors import InvalidConfiguration


@dataclass
class Addresses:
    """Where the agent listens."""

    # Address to bind; :: serves IPv4 too.
    management_ip: str = "::"
    # TCP port of STOMP and HTTP; 0 takes a free one.
    management_port: int = 54321
    # STOMP destinations that carry requests.
    request_queues: str = "jms.topic.vdsm_requests,jms.topic.vdsm_irs_requests"


@dataclass
class Tls:
    """Mutual TLS; the files are those of an engine-managed host."""

    # False serves plain text: for a lab only.
    enabled: bool = True
    # Refuse a client whose certificate does not name its address.
    verify_client_cert: bool = False
    # Seconds from accept until the handshake is done and the protocol is known.
    handshake_timeout: float = 10.0


@dataclass
class Rpc:
    """Limits of the wire."""

    # Requests that may wait in one connection's queue; beyond it error 1100.
    max_outstanding: int = 2000
    # Bytes of one STOMP frame or HTTP body.
    max_frame: int = 4 * 1024 * 1024
    # Bytes that may wait for a peer that reads slowly before it is disconnected.
    max_output: int = 16 * 1024 * 1024
    # Open connections.
    max_connections: int = 500
    # Seconds until a verb whose storage hangs is answered with an error; engines wait for 180.
    verb_timeout: float = 170.0
    # Answer unknown parameters with an error instead of a warning.
    strict: bool = False
    # Check every reply against the schema (always on in the tests).
    check_replies: bool = False


@dataclass
class Storage:
    """Storage domains and the work on them."""

    # Threads and queued calls of one domain's lane.
    lane_workers: int = 8
    lane_queue: int = 1000
    # Seconds between two checks of a domain.
    monitor_interval: float = 10.0
    # Seconds to wait for a lock or lease that another operation holds.
    lock_timeout: float = 30.0
    # Seconds that an ended job stays visible.
    job_keep: float = 3600.0
    # Seconds between looks for half-made volumes that dead hosts left behind (block domains).
    collect_interval: float = 60.0
    # Seconds that a mount or an unmount may take.
    mount_timeout: float = 60.0
    # Address space in bytes, and CPU seconds, of qemu-img reading an untrusted image.
    untrusted_memory: int = 1024 * 1024 * 1024
    untrusted_cpu: int = 30
    # Owner of volumes; numbers or names.
    user: str = "vdsm"
    group: str = "kvm"


@dataclass
class Sanlock:
    """Leases between hosts."""

    # Seconds of sanlock's I/O time-out; with 10, a dead host's leases are free after 140 s.
    io_timeout: int = 10
    # Seconds to wait for a host id to be acquired.
    host_id_timeout: float = 180.0


@dataclass
class Lvm:
    """Block domains: volume groups on LUNs."""

    # Multipath maps are used by themselves; this adds other block devices: paths, with wildcards,
    # separated by commas.  For laboratories and for disks without multipath.
    devices: str = ""
    # Seconds that one lvm command may take (moving data is not counted).
    timeout: float = 120.0
    # lvm commands that run at once.
    commands: int = 10
    # Seconds that a device may take to answer when volume groups are looked for.
    scan_timeout: float = 10.0
    # Log in to iSCSI portals, that many at once.
    logins: int = 10
    # Seconds that one login may take.
    login_timeout: float = 30.0


@dataclass
class Libvirt:
    """Running VMs, through libvirt."""

    # Where libvirt is; empty on a host that runs no VMs: then there are none.
    uri: str = "qemu:///system"
    # Seconds that libvirt may take to answer one call.
    timeout: float = 30.0
    # Seconds between two signs of life, and how many may be missed before the connection is given
    # up and made anew.
    keepalive_interval: int = 5
    keepalive_count: int = 3
    # Seconds between two attempts to connect.
    retry: float = 2.0
    # Where the libvirt of another host is, that a VM moves to, and where its QEMU receives the VM;
    # {host} stands for the host that VM.migrate names.
    migration_uri: str = "qemu+tls://{host}/system"
    migration_data: str = "tcp://{host}"


@dataclass
class Secrets:
    """What Host.registerSecrets is given."""

    # Keep the values in a file, encrypted, so that an agent that crashed has them again.  False
    # keeps them in memory only.
    keep: bool = True
    # Seconds between two looks at whether libvirt has lost any.
    check_interval: float = 60.0
    # Milliseconds that trying one key of an encrypted volume shall take: what makes guessing a
    # password hard, and each opening of the volume slow.  Secrets that are random need little.
    luks_iteration_time: int = 2000


@dataclass
class Vms:
    """Operations on running VMs."""

    # Seconds that a guest's agent may take to freeze or thaw its file systems.
    freeze_timeout: float = 8.0
    # Seconds after which a guest that its caller leaves frozen is thawed by the agent.
    freeze_limit: float = 300.0
    # Seconds that libvirt may take to switch the disks of a VM to new volumes.
    snapshot_timeout: float = 300.0
    # Seconds that a guest may take to give back a disk that is taken away from it.
    unplug_timeout: float = 30.0
    # Seconds in which a VM that another host announced must begin to arrive, or what was made for
    # it is let go.
    arrival_timeout: float = 120.0


@dataclass
class Bandwidth:
    """MiB a second that one operation may move; 0 is no limit.  Host.setJobBandwidth and
    VM.setReplicationBandwidth change it while it runs."""

    # Copying volumes without a guest.
    copy: int = 0
    # Merging volumes, with and without a guest; a request with a limit of its own has that.
    merge: int = 0
    # Moving a disk of a running VM to another volume.
    replicate: int = 0


@dataclass
class Thin:
    """Growing the volumes of running guests on shared block storage.  Bytes, seconds, and bytes a
    second; monitor/watermark.py says what they do."""

    # False: nothing is watched; guests pause when a volume is full.
    enabled: bool = True
    # Free space at which a volume is extended: of an idle disk, and of the busiest.
    headroom_min: int = 256 * 1024 * 1024
    headroom_max: int = 4 * 1024 * 1024 * 1024
    # What an extension adds to that: of an idle disk, and of the busiest.
    chunk_min: int = 256 * 1024 * 1024
    chunk_max: int = 4 * 1024 * 1024 * 1024
    # Seconds that an extension shall last at the rate at which the guest writes.
    chunk_seconds: float = 4.0
    # Headroom is what the guest writes while extensions take their worst time, times this.
    safety: float = 2.0
    # Seconds after which half of a rate is forgotten.
    half_life: float = 120.0
    # Seconds that an extension is expected to take until enough of them were measured.
    first_latency: float = 0.5
    # Slow a guest that would be out of space before its volume has grown, instead of letting it
    # pause; never below so many bytes a second.
    throttle: bool = True
    throttle_floor: int = 1024 * 1024
    # Seconds between two looks for what no event told.
    scan_interval: float = 300.0
    # Agents of hosts that may be the pool's manager, "HOST ID=ADDRESS, ...": they are asked for
    # space directly; all others by the mailbox of the pool.
    managers: str = ""
    # Seconds until a domain is full, at the present rate, from which on it is told.
    warn_seconds: float = 300.0


@dataclass
class Log:
    """The log file."""

    level: str = "INFO"
    # Bytes after which the file is rotated, and how many old ones are kept.
    size: int = 10 * 1024 * 1024
    keep: int = 5


@dataclass
class Paths:
    """Where things are.  `--dev DIR` puts all of them below DIR."""

    # The tree of links to domains and images that engines write into domain XML.
    data_center: str = "/rhev/data-center"
    # Run-time links of prepared volumes, sockets.
    run: str = "/run/vdsm"
    # Journal, remembered connections.
    state: str = "/var/lib/vdsm-storage"
    # certs/ and keys/.
    pki: str = "/etc/pki/vdsm"
    # - logs to stderr.
    log: str = "/var/log/vdsm-storage/agent.log"
    # sanlock's run directory when it is not the system's.
    sanlock_run: str = ""
    # Control socket of ovirt-imageio.
    imageio: str = "/run/ovirt-imageio/sock"
    # Where lvm2's private configuration and locks are; made at the start.
    lvm: str = "/run/vdsm-storage/lvm"
    # Key of the secrets at rest, made when it is first needed, unless systemd passes the credential
    # vdsm-storage.secrets-key.  It is gone after a reboot, and so are the secrets.
    secrets_key: str = "/run/vdsm-storage/secrets.key"


@dataclass
class Config:
    addresses: Addresses = field(default_factory=Addresses)
    tls: Tls = field(default_factory=Tls)
    rpc: Rpc = field(default_factory=Rpc)
    storage: Storage = field(default_factory=Storage)
    sanlock: Sanlock = field(default_factory=Sanlock)
    lvm: Lvm = field(default_factory=Lvm)
    libvirt: Libvirt = field(default_factory=Libvirt)
    secrets: Secrets = field(default_factory=Secrets)
    vms: Vms = field(default_factory=Vms)
    bandwidth: Bandwidth = field(default_factory=Bandwidth)
    thin: Thin = field(default_factory=Thin)
    log: Log = field(default_factory=Log)
    paths: Paths = field(default_factory=Paths)

    def log_path(self) -> str | None:
        """None logs to stderr."""
        return None if self.paths.log == "-" else self.paths.log

    def as_dict(self) -> dict[str, dict[str, Any]]:
        return dataclasses.asdict(self)


def load(directory: str = "/etc/vdsm-storage") -> Config:
    """Defaults, overridden by the files below `directory`.  Raises InvalidConfiguration."""
    config = Config()
    names = sorted(glob.glob(os.path.join(directory, "*.conf")))
    names += sorted(glob.glob(os.path.join(directory, "conf.d", "*.conf")))
    for name in names:
        _merge(config, name)
    return config


def override(config: Config, assignment: str) -> None:
    """Apply one `section.option=value`.  Raises InvalidConfiguration."""
    name, equals, text = assignment.partition("=")
    section, _, option = name.partition(".")
    target = getattr(config, section, None)
    if not equals or not dataclasses.is_dataclass(target):
        raise InvalidConfiguration(
            source="--set", section=section, option=option, reason="use SECTION.OPTION=VALUE"
        )
    _set(target, option, text, "--set", section)


def dev(config: Config, directory: str) -> Config:
    """The same configuration with all state below `directory` and the port on loopback."""
    config.paths = Paths(
        data_center=os.path.join(directory, "data-center"),
        run=os.path.join(directory, "run"),
        state=os.path.join(directory, "state"),
        pki=os.path.join(directory, "pki"),
        log=os.path.join(directory, "agent.log"),
        sanlock_run=os.path.join(directory, "sanlock"),
        imageio=os.path.join(directory, "imageio.sock"),
        lvm=os.path.join(directory, "run", "lvm"),
        secrets_key=os.path.join(directory, "run", "secrets.key"),
    )
    config.libvirt.uri = ""  # the system's libvirt is not this instance's to change
    config.addresses.management_ip = "127.0.0.1"
    config.addresses.management_port = 0
    config.libvirt.uri = ""  # a machine's own VMs are not for an agent that somebody tries out
    config.storage.user = str(os.geteuid())
    config.storage.group = str(os.getegid())
    return config


def _merge(config: Config, path: str) -> None:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        with open(path, encoding="utf-8") as file:
            parser.read_file(file)
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        raise InvalidConfiguration(source=path, section="", option="", reason=error) from error
    for section in parser.sections():
        target = getattr(config, section, None)
        if not dataclasses.is_dataclass(target):
            raise InvalidConfiguration(
                source=path, section=section, option="", reason="there is no such section"
            )
        for option, text in parser.items(section):
            _set(target, option, text, path, section)


def _set(target: Any, option: str, text: str, path: str, section: str) -> None:
    def wrong(reason: str) -> InvalidConfiguration:
        return InvalidConfiguration(source=path, section=section, option=option, reason=reason)

    if option not in {f.name for f in dataclasses.fields(target)}:
        raise wrong("there is no such option")
    old = getattr(target, option)
    value: object
    try:
        if isinstance(old, bool):
            if text.lower() not in ("true", "false"):
                raise wrong(f"{text!r} is neither true nor false")
            value = text.lower() == "true"
        else:
            value = type(old)(text)
    except ValueError as error:
        raise wrong(f"{text!r} is not of the type {type(old).__name__}") from error
    setattr(target, option, value)
