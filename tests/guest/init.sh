#!/bin/busybox sh
# First process of the test guest.  The kernel command line gives vm.ip=ADDR vm.peer=ADDR vm.peer_mac=MAC
# [vm.queues=N], vm.disk_threads=N for the disk checker or vm.disk=sectors for a disk that is only read, and
# vm.checks=N vm.pause=MS vm.holes=N for the memory checker.
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
export PATH=/bin
/bin/busybox --install -s /bin
exec </dev/ttyS0 >/dev/ttyS0 2>&1
stty -echo -icrnl raw
# A message of the kernel could split a line of ours; it raises the level itself when it oopses.
echo 1 4 1 7 >/proc/sys/kernel/printk
for word in $(cat /proc/cmdline); do
    case $word in
    vm.*=*) eval "${word#vm.}" ;;
    esac
done
while read -r module; do insmod "/modules/$module" || echo "FAILED insmod $module"; done </modules/order
ip link set lo up
if [ -n "$run" ]; then
    sh "$run"
    poweroff -f
fi

# The kernel uses memory above 16 MiB nearly to its end before it turns to that below, does not tidy up its
# free pages (which guest mem scatters, see there) ...
echo 256 >/proc/sys/vm/min_free_kbytes
echo 0 >/proc/sys/vm/watermark_boost_factor
echo 0 >/proc/sys/vm/compaction_proactiveness
echo 1000 >/proc/sys/vm/extfrag_threshold
# ... and takes single pages of them for network buffers, not runs of eight.
echo 1 >/proc/sys/net/core/high_order_alloc_disable

network() {
    # Only when memory is filled: the card's buffers are to come from the pages given back.
    until [ -e /tmp/filled ]; do sleep 0.1; done
    echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6 2>/dev/null
    ip addr add "$ip/24" dev eth0 || echo "FAILED eth0"
    # A guest that gives its place away by ARP only when it moves: no traffic of its own beside the flow.
    echo 1 >/proc/sys/net/ipv4/conf/eth0/arp_notify
    ip link set eth0 up
    /bin/guest keep 9 &
    exec /bin/guest flow "$ip" "$peer" "$peer_mac" $queues
}
[ -n "$ip" ] && network </dev/null &
if [ -e /dev/vda ]; then
    # Before memory is filled: it takes some for itself.
    /bin/guest ${disk:-disk} /dev/vda $disk_threads </dev/null &
    until [ -e /tmp/disk-ready ]; do sleep 0.1; done
fi
exec /bin/guest mem $checks $pause $holes
