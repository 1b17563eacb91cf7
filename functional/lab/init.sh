#!/bin/busybox sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Process 1 of a guest, twice: in the initial RAM disk it mounts the root file system, and there it
# is started again with the argument `root`.  No service manager: udev alone, which saves a minute
# under emulation.

initial_ram_disk() {
    /bin/busybox --install -s /bin
    export PATH=/bin
    mount -t proc proc /proc
    mount -t sysfs sys /sys
    mount -t devtmpfs dev /dev
    while read -r module; do insmod "/modules/$module"; done </modules/order
    case $(cat /proc/cmdline) in
    *lab.probe*) # all that was asked is whether a kernel comes up: see accelerator.py
        echo "lab: alive" >/dev/console
        echo o >/proc/sysrq-trigger
        sleep 60
        ;;
    esac
    tries=0
    while [ ! -b /dev/vda ] && [ $tries -lt 100 ]; do
        sleep 0.1
        tries=$((tries + 1))
    done
    mount -t ext4 -o noatime,nobarrier /dev/vda /root || exec sh
    mount -t tmpfs -o mode=755 run /root/run
    mkdir /root/run/lab
    cp /init /inside.py /root/run/lab/
    for point in proc sys dev; do mount --move /$point /root/$point; done
    exec switch_root /root /bin/busybox sh /run/lab/init root
}

root_file_system() {
    export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
    export HOME=/root LANG=C.UTF-8
    mkdir -p /dev/pts /dev/shm /run/lock /run/udev
    mount -t devpts devpts /dev/pts
    mount -t tmpfs shm /dev/shm
    mount -t tmpfs -o mode=1777 tmp /tmp
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    ln -sf /proc/self/mounts /etc/mtab
    ulimit -l unlimited
    ulimit -n 65536
    ip link set lo up
    # Before udev: it sees the devices when it starts, and answers for them.
    modprobe -a loop fuse dm_mod overlay 9pnet_virtio 9p virtio_net configfs
    mount -t configfs configfs /sys/kernel/config
    /lib/systemd/systemd-udevd --daemon
    # What storage tests look at; everything would take 25 s under emulation.
    udevadm trigger --action=add --subsystem-match=block --subsystem-match=misc \
        --subsystem-match=net
    setsid /usr/bin/python3 -I /run/lab/inside.py &
    while :; do wait; sleep 1; done
}

case $1 in
root) root_file_system ;;
*) initial_ram_disk ;;
esac
