#!/bin/busybox sh
# First process of the User-Mode Linux guest: no work of its own. It runs what its console brings, line by line.
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
export PATH=/bin
/bin/busybox --install -s /bin
exec </dev/tty0 >/dev/tty0 2>&1
stty -echo -icrnl raw
# A message of the kernel could split a line of ours.
echo 1 4 1 7 >/proc/sys/kernel/printk
while read -r module; do insmod "/modules/$module" || echo "FAILED insmod $module"; done </modules/order
ip link set lo up
cd /tmp
echo "guest is up"
while read -r line; do eval "$line"; done
