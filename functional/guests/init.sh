#!/bin/busybox sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Process 1 of a tiny guest: mounts its disks, starts the guest agent, and obeys lines that come
# through the port test.shell, so that tests can look inside when the agent hangs.
/bin/busybox --install -s /bin
export PATH=/bin:/sbin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
ln -s /run /var/run
ln -s /proc/self/mounts /etc/mtab
while read -r module; do insmod "/modules/$module"; done </modules/order

tries=0
until [ -b /dev/vda ] || [ $tries -ge 100 ]; do
    sleep 0.1
    tries=$((tries + 1))
done
for disk in a b c d e f g h; do
    [ -b /dev/vd$disk ] || continue
    mkdir -p /mnt/vd$disk
    mount -t ext4 /dev/vd$disk /mnt/vd$disk && echo "tiny: mounted vd$disk"
done

mkdir -p /dev/virtio-ports
for port in /sys/class/virtio-ports/*; do
    [ -s "$port/name" ] && ln -sf "../${port##*/}" "/dev/virtio-ports/$(cat "$port/name")"
done
agent=/dev/virtio-ports/org.qemu.guest_agent.0
[ -e $agent ] && qemu-ga -d -m virtio-serial -p $agent -t /run -f /run/qemu-ga.pid
echo "tiny: ready $(cut -d' ' -f1 /proc/uptime)"

# A line is a command; its output is followed by a line `=STATUS`.  End of file: nobody listens.
shell=/dev/virtio-ports/test.shell
[ -e $shell ] && while :; do
    while read -r line; do
        eval "$line" 2>&1
        echo "=$?"
    done <>$shell >&0
    sleep 0.2
done
while :; do sleep 3600; done
