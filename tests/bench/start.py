#!/usr/bin/env python3
"""How fast and how small VMMs start, as ratios within one run.

Three measures, each a median over rounds that take the VMMs in turn (fewer rounds for memory):
  start   from exec to the guest's first serial byte: wall clock and CPU of the VMM
  memory  what the VMM itself takes (PSS without guest RAM) when its guest has been idle for a while
  pid 1   from exec to the first word of a Linux guest's PID 1 (--kernel); where KVM cannot boot
          what all take, the benchmark tests/tests/pid1.rs does it in a nested host

A VMM is found in PATH, or by a variable: COWSHED (what ./release builds), QEMU, ALIOTH,
FIRECRACKER, CLOUD_HYPERVISOR. One that is absent is shown by its ratio to alioth in an earlier run.
"""

import argparse
import ctypes
import json
import os
import pathlib
import pty
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
RAM_MIB = 256

# Milliseconds to the first byte and MB of own memory, all taken in one run.
EARLIER = {
    "alioth": (4.3, 5.3),
    "cloud-hypervisor": (6.5, 11.0),
    "firecracker": (9.7, 4.4),
    "qemu microvm": (33.0, 39.0),
}


class Guest:
    """What to boot; `work` is a folder for what a VMM wants beside its command line."""

    def __init__(self, work, kernel, initrd=None, cmdline=""):
        self.work, self.kernel, self.initrd, self.cmdline = work, kernel, initrd, cmdline

    def disk(self, vmm, form):
        """An empty disk of the VMM's own, since some lock theirs; made on the first call."""
        path = self.work / f"{vmm}.{form}"
        if not path.exists():
            subprocess.run(["qemu-img", "create", "-qf", form, path, "64M"], check=True)
        return path


def cowshed(binary, guest):
    command = [binary, "run", "--memory", f"{RAM_MIB}M", "--kernel", guest.kernel]
    if guest.initrd:
        command += ["--initrd", guest.initrd, "--cmdline", guest.cmdline]
    return command + ["--disk", f"{guest.disk('cowshed', 'qcow2')},format=qcow2"]


def qemu(binary, guest):
    command = [binary, "-M", "microvm,accel=kvm", "-nodefaults", "-no-user-config"]
    command += ["-display", "none", "-no-reboot", "-serial", "stdio", "-m", f"{RAM_MIB}M"]
    command += ["-drive", f"id=disk,if=none,format=qcow2,file={guest.disk('qemu', 'qcow2')}"]
    command += ["-device", "virtio-blk-device,drive=disk", "-kernel", guest.kernel]
    return command + (["-initrd", guest.initrd, "-append", guest.cmdline] if guest.initrd else [])


def alioth(binary, guest):
    command = [binary, "boot", "-m", f"size={RAM_MIB}M", "--blk", f"file,path={guest.disk('alioth', 'raw')}"]
    if guest.initrd:
        return command + ["-k", guest.kernel, "-i", guest.initrd, "-c", guest.cmdline]
    return command + ["--pvh", guest.kernel]


def firecracker(binary, guest):
    boot = {"kernel_image_path": str(guest.kernel), "boot_args": guest.cmdline}
    if guest.initrd:
        boot["initrd_path"] = str(guest.initrd)
    drive = {"drive_id": "disk", "path_on_host": str(guest.disk("firecracker", "raw")), "is_root_device": False,
             "is_read_only": False}
    config = guest.work / "firecracker.json"
    config.write_text(json.dumps({
        "boot-source": boot,
        "drives": [drive],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": RAM_MIB},
    }))
    return [binary, "--no-api", "--config-file", config]


def cloud_hypervisor(binary, guest):
    command = [binary, "--memory", f"size={RAM_MIB}M", "--kernel", guest.kernel]
    command += ["--disk", f"path={guest.disk('cloud-hypervisor', 'qcow2')}", "--serial", "tty", "--console", "off"]
    if guest.initrd:
        command += ["--initramfs", guest.initrd, "--cmdline", guest.cmdline]
    return command


VMMS = [
    ("cowshed", "COWSHED", "cowshed", cowshed),
    ("alioth", "ALIOTH", "alioth", alioth),
    ("cloud-hypervisor", "CLOUD_HYPERVISOR", "cloud-hypervisor", cloud_hypervisor),
    ("firecracker", "FIRECRACKER", "firecracker", firecracker),
    ("qemu microvm", "QEMU", "qemu-system-x86_64", qemu),
]


class NoSign(Exception):
    """The guest did not say what it should have said."""


class Vmm:
    """A VMM that was started and whose guest has said `word`."""

    def __init__(self, command, word, limit):
        # Some VMMs insist on a terminal; all get one for input, and a pipe for output.
        self.master, slave = pty.openpty()
        reader, writer = os.pipe()
        errors = tempfile.TemporaryFile()
        started = time.perf_counter()
        self.pid = os.posix_spawn(command[0], [str(word) for word in command], os.environ, file_actions=[
            (os.POSIX_SPAWN_DUP2, slave, 0),
            (os.POSIX_SPAWN_DUP2, writer, 1),
            (os.POSIX_SPAWN_DUP2, errors.fileno(), 2),
        ])
        os.close(slave)
        os.close(writer)
        self.reader = reader
        said = b""
        while word not in said:
            left = started + limit - time.perf_counter()
            ready = left > 0 and select.select([reader], [], [], left)[0]
            part = os.read(reader, 65536) if ready else b""
            if not part:
                self.end()
                errors.seek(0)
                said += errors.read()
                raise NoSign(said.decode(errors="replace")[-300:].strip() or "silence")
            said += part
        self.wall = time.perf_counter() - started

    def end(self):
        """Kills it; gives the CPU seconds that it and its children took."""
        family = tree(self.pid)
        for pid in family:
            os.kill(pid, signal.SIGKILL)
        # Its children are ours once it is gone: see main.
        usages = [os.wait4(pid, 0)[2] for pid in family]
        os.close(self.reader)
        os.close(self.master)
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    def own_memory(self):
        """Bytes of PSS of it and its children, without the mappings that are guest RAM."""
        return sum(own_pss(pid) for pid in tree(self.pid))


def tree(pid):
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid] + [one for child in children for one in tree(int(child))]


def own_pss(pid):
    total, is_ram = 0, False
    for line in pathlib.Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "Size":
            # Guest RAM is one mapping, or two where a VMM keeps the first megabyte apart.
            is_ram = int(value.split()[0]) >= (RAM_MIB - 1) << 10
        elif key == "Pss" and not is_ram:
            total += int(value.split()[0]) << 10
    return total


def build(work, source, name, *flags):
    output = work / name
    subprocess.run(["cc", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", *flags, "-o", output,
                    HERE / source], check=True)
    return output


def cpio(path, name, content):
    """An initramfs of one executable file."""
    with open(path, "wb") as archive:
        for entry, mode, data in [(name, 0o100755, content), ("TRAILER!!!", 0, b"")]:
            fields = [0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(entry) + 1, 0]
            head = b"070701" + b"".join(b"%08x" % field for field in fields) + entry.encode() + b"\0"
            for part in (head, data):
                archive.write(part + b"\0" * (-len(part) % 4))
    return path


def installed():
    """The VMMs that are here: name -> (binary, how to start it)."""
    found = {}
    for name, variable, program, start in VMMS:
        binary = os.environ.get(variable) or shutil.which(program)
        if binary:
            found[name] = (binary, start)
        else:
            print(f"skipped: no {program} in PATH, no {variable} set", file=sys.stderr)
    return found


def rounds(vmms, count, what, measure):
    """Measures each VMM `count` times, in turn; a first round warms the caches and does not count.

    `measure` is a generator that gives its value after a pause, which all VMMs of a round share.
    """
    results = {name: [] for name in vmms}
    for number in range(count + 1):
        begun = {}
        for name in list(results):
            begun[name] = measure(*vmms[name])
            try:
                pause = next(begun[name])
            except NoSign as error:
                print(f"skipped: {what} of {name}: {error}", file=sys.stderr)
                del results[name], begun[name]
        if begun:
            time.sleep(pause)
        for name, measurement in begun.items():
            value = next(measurement)
            if number:
                results[name].append(value)
        if sys.stderr.isatty():
            print(f"\r{what}: round {number} of {count} ", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return results


def table(title, unit, medians, column=None):
    """Prints medians and their ratio to the first row; absent VMMs by their ratio to alioth."""
    rows = [(name, value, "") for name, value in medians.items()]
    if column is not None and "alioth" in medians:
        scale = medians["alioth"] / EARLIER["alioth"][column]
        rows += [(name, both[column] * scale, "  (absent: its ratio to alioth in an earlier run)")
                 for name, both in EARLIER.items() if name not in medians]
    if not rows:
        return
    reference = rows[0][1]
    print(f"\n{title}, ratio to {rows[0][0]}")
    for name, value, note in rows:
        print(f"  {name:<18}{value:9.2f} {unit}{value / reference:8.2f}{note}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=21, help="rounds of start and of pid 1 [21]")
    parser.add_argument("--memory-runs", type=int, default=5,
                        help="rounds of memory, which varies little and takes --idle each [5]")
    parser.add_argument("--idle", type=float, default=10, help="seconds before memory is read [10]")
    parser.add_argument("--kernel", type=pathlib.Path, help="a Linux kernel that all take: vmlinux or bzImage")
    options = parser.parse_args()

    # A VMM of several processes leaves them to us when it is killed.
    PR_SET_CHILD_SUBREAPER = 36
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    vmms = installed()
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        hello = Guest(work, build(work, "guest.S", "hello"))
        idle = Guest(work, build(work, "guest.S", "idle", "-DIDLE"))

        def start(binary, command):
            vmm = Vmm(command(binary, hello), b"hello", 10)
            cpu = vmm.end()
            yield 0
            yield vmm.wall, cpu

        def memory(binary, command):
            vmm = Vmm(command(binary, idle), b"hello", 10)
            yield options.idle
            own = vmm.own_memory()
            vmm.end()
            yield own

        found = rounds(vmms, options.runs, "start", start)
        for title, index, column in [("start, wall clock", 0, 0), ("start, CPU", 1, None)]:
            medians = {name: statistics.median(v[index] for v in values) * 1e3
                       for name, values in found.items()}
            table(title, "ms", medians, column)
        found = rounds(vmms, options.memory_runs, "memory", memory)
        table(f"own memory after {options.idle:g} s", "MB",
              {name: statistics.median(values) / 1e6 for name, values in found.items()}, 1)
        if options.kernel:
            init = build(work, "init.S", "init").read_bytes()
            linux = Guest(work, options.kernel, cpio(work / "initrd", "init", init),
                          "console=ttyS0 reboot=k panic=-1 quiet")

            def pid_1(binary, command):
                vmm = Vmm(command(binary, linux), b"pid 1", 60)
                vmm.end()
                yield 0
                yield vmm.wall

            found = rounds(vmms, options.runs, "pid 1", pid_1)
            table("pid 1, wall clock", "ms",
                  {name: statistics.median(values) * 1e3 for name, values in found.items()})


if __name__ == "__main__":
    main()
