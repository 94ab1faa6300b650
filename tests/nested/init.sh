#!/bin/busybox sh
# PID 1 of the nested host: loads KVM, runs each /steps/* in order, reports on the second serial
# port, powers off. A result is one line there: RESULT name status=N stdout=HEX stderr=HEX.
/bin/busybox mkdir -p /sbin /usr/bin /usr/sbin /tmp /out /dev /proc /sys
/bin/busybox --install -s
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TMPDIR=/tmp
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
mkdir -p /dev/shm /dev/pts /root
mount -t tmpfs shm /dev/shm
mount -t devpts pts /dev/pts
exec </dev/null >/dev/ttyS0 2>&1
stty -F /dev/ttyS1 raw
for module in irqbypass kvm kvm-amd; do
	insmod /modules/$module.ko
done
if [ -c /dev/kvm ]; then
	echo READY >/dev/ttyS1
else
	echo "the nested host has no /dev/kvm"
	dmesg | tail -n 30
	poweroff -f
fi
hex() { xxd -p "$1" | tr -d '\n'; }
for step in /steps/*; do
	name=${step##*/}
	echo "STEP $name at $(cut -d' ' -f1 /proc/uptime) s"
	timeout -s KILL "$(cat "$step/limit")" sh "$step/script" >"/out/$name.out" 2>"/out/$name.err"
	status=$?
	# What the step left running: everything but PID 1, which this is.
	kill -KILL -1
	echo "RESULT $name status=$status stdout=$(hex "/out/$name.out") stderr=$(hex "/out/$name.err")" >/dev/ttyS1
	echo "STEP $name ended with $status at $(cut -d' ' -f1 /proc/uptime) s"
done
poweroff -f
