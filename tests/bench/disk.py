#!/usr/bin/env python3
"""How fast disks are, as ratios within one run: a guest without an operating system polls one.

Each measure is a median over rounds that take the VMMs in turn. Of each there are two numbers:
  IOPS    requests a second, by the guest's clock
  CPU     microseconds of the VMM's own threads a request, without its vCPU; on a machine that is
          busy with other things this one holds still
All VMMs use the same file system and page cache mode (--cache): with none QEMU runs
aio=io_uring,cache=none and an iothread. What a doorbell costs is printed once: where an exit is
expensive (KVM without VMX or SVM), it bounds one request at a time.

A VMM is found in PATH, or by a variable: COWSHED (what ./release builds), QEMU, ALIOTH (raw
only). BEFORE names another cowshed to be measured beside it.
"""

import argparse
import os
import pathlib
import pty
import re
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
METAL = HERE.parent.parent / "guest-images" / "metal"
RAM_MIB = 256


class NoResult(Exception):
    """The guest or the VMM did not do what it should have done."""


def cowshed(binary, disk, cache, kernel, words):
    keys = f"format={disk.form},cache={cache}" + ("" if disk.throwaway else ",overlay=none")
    # QEMU asks for huge pages by itself.
    return [binary, "run", "--memory", f"{RAM_MIB}M", "--huge-pages", "--kernel", kernel, "--cmdline", words,
            "--overlay-dir", disk.path.parent, "--disk", f"{disk.path},{keys}"]


def qemu(binary, disk, cache, kernel, words):
    aio = "io_uring" if cache == "none" else "threads"
    drive = f"id=disk,if=none,format={disk.form},file={disk.path},cache={cache},aio={aio}"
    # Threads have names by that option only, and the vCPU is not to be counted.
    return [binary, "-name", "bench,debug-threads=on", "-M", "q35,accel=kvm", "-nodefaults", "-display", "none",
            "-no-reboot", "-serial", "stdio",
            "-m", f"{RAM_MIB}M", "-object", "iothread,id=io", "-drive", drive + (",snapshot=on" if disk.throwaway else ""),
            "-device", "virtio-blk-pci,disable-legacy=on,drive=disk,iothread=io", "-kernel", kernel, "-append", words]


def alioth(binary, disk, cache, kernel, words):
    if disk.form != "raw" or cache == "none":
        raise NoResult("it has raw disks and the page cache only")
    return [binary, "boot", "-m", f"size={RAM_MIB}M", "--blk", f"file,path={disk.path},api=iouring", "--pvh", kernel,
            "-c", words]


VMMS = [
    ("cowshed", "COWSHED", "cowshed", cowshed),
    ("cowshed before", "BEFORE", None, cowshed),
    ("qemu", "QEMU", "qemu-system-x86_64", qemu),
    ("alioth", "ALIOTH", "alioth", alioth),
]


class Disk:
    """What is measured on: a file, its format, and whether the guest writes to something thrown away."""

    def __init__(self, path, form, throwaway=False):
        self.path, self.form, self.throwaway = path, form, throwaway


def disks(work, size):
    """One of each kind, all with the same content."""
    def img(*words):
        subprocess.run(["qemu-img", *words], check=True, stdout=subprocess.DEVNULL)

    def fill(path, form):
        subprocess.run(["qemu-io", "-f", form, "-c", f"write -q -P 7 0 {size}M", path], check=True)

    raw, qcow2, overlay, base = (work / name for name in ["raw", "qcow2", "overlay", "base"])
    img("create", "-qf", "raw", raw, f"{size}M")
    img("create", "-qf", "qcow2", qcow2, f"{size}M")
    img("create", "-qf", "qcow2", base, f"{size}M")
    for path, form in [(raw, "raw"), (qcow2, "qcow2"), (base, "qcow2")]:
        fill(path, form)
    img("create", "-qf", "qcow2", "-b", base, "-F", "qcow2", overlay)
    fill(overlay, "qcow2")
    return {
        "raw": Disk(raw, "raw"),
        "qcow2": Disk(qcow2, "qcow2"),
        "overlay": Disk(overlay, "qcow2"),
        "throwaway": Disk(base, "qcow2", throwaway=True),
    }


# Name, disk, the guest's words, requests at least.
CASES = [
    *[(f"{form} {what} 4k depth {depth}", form, f"rw={what} depth={depth}", 20000 if depth == 1 else 100000)
      for form in ["raw", "qcow2", "overlay"] for what in ["randread", "randwrite"] for depth in [1, 32]],
    # Enough of them that the guest's first touch of its buffers does not count.
    *[(f"qcow2 {what} 256k", "qcow2", f"rw={what} depth=8 bs=262144", 10000) for what in ["read", "write"]],
    ("qcow2 write+flush 4k", "qcow2", "rw=randwrite depth=1 flush=1", 500),
    ("throwaway randread 4k depth 32", "throwaway", "rw=randread depth=32", 100000),
    ("throwaway randwrite 4k depth 1", "throwaway", "rw=randwrite depth=1", 20000),
    ("throwaway randwrite 4k depth 32", "throwaway", "rw=randwrite depth=32", 40000),
]


def own_cpu(pid):
    """CPU seconds of each thread but the vCPUs, of a process and its children."""
    total = 0.0
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        try:
            name = (task / "comm").read_text()
            if not name.startswith(("vcpu", "CPU ")):
                total += int((task / "schedstat").read_text().split()[0]) / 1e9
            children = (task / "children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            # A thread that ends when it has nothing to do.
            continue
        total += sum(own_cpu(child) for child in children)
    return total


def clock():
    """Cycles of the timestamp counter a second."""
    found = re.search(r"^cpu MHz\s*: ([\d.]+)", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return float(found[1]) * 1e6


def measure(command):
    """Runs a guest: cycles, CPU seconds, requests, and what a doorbell costs in cycles."""
    master, slave = pty.openpty()
    reader, writer = os.pipe()
    errors = tempfile.TemporaryFile()
    pid = os.posix_spawn(command[0], [str(word) for word in command], os.environ, file_actions=[
        (os.POSIX_SPAWN_DUP2, slave, 0),
        (os.POSIX_SPAWN_DUP2, writer, 1),
        (os.POSIX_SPAWN_DUP2, errors.fileno(), 2),
    ])
    os.close(slave)
    os.close(writer)
    said, begun = b"", None
    try:
        while not (done := re.search(rb"^bench .*requests=(\d+) cycles=(\d+)\s", said, re.MULTILINE)):
            part = os.read(reader, 65536) if select.select([reader], [], [], 120)[0] else b""
            said += part
            if begun is None and (exits := re.search(rb"doorbell=(\d+) ", said)):
                begun = own_cpu(pid)
            if not part or b"FAIL" in said:
                errors.seek(0)
                text = (said + errors.read()).decode(errors="replace")
                raise NoResult(text[-300:].strip() or "silence")
        spent = own_cpu(pid) - begun
    finally:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        os.close(reader)
        os.close(master)
    return int(done[2]), spent, int(done[1]), int(exits[1])


def guest():
    """The guest's program, built if need be."""
    environment = {key: value for key, value in os.environ.items() if key != "RUSTFLAGS"}
    target = "x86_64-unknown-linux-gnu"
    built = subprocess.run(["cargo", "metadata", "--format-version=1", "--no-deps"], cwd=METAL, check=True,
                           capture_output=True, env=environment)
    folder = re.search(r'"target_directory":"([^"]*)"', built.stdout.decode())[1]
    subprocess.run(["cargo", "build", "-q", "--release", "--target", target, "--bin", "bench"], cwd=METAL, check=True,
                   env=environment)
    return pathlib.Path(folder) / target / "release" / "bench"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="rounds [5]")
    parser.add_argument("--cache", choices=["none", "writeback"], default="none", help="the page cache [none]")
    parser.add_argument("--folder", type=pathlib.Path, default="/var/tmp", help="where the disks are [/var/tmp]")
    parser.add_argument("--size", type=int, default=256, help="MiB of each disk [256]")
    parser.add_argument("--only", default="", help="only cases with this in their name")
    options = parser.parse_args()

    found = {}
    for name, variable, program, start in VMMS:
        binary = os.environ.get(variable, program and shutil.which(program))
        if binary:
            found[name] = (binary, start)
        elif program:
            print(f"skipped: no {program} in PATH, no {variable} set", file=sys.stderr)
    kernel, hertz = guest(), clock()
    print(f"cache={options.cache} on {options.folder}, {options.size} MiB, medians of {options.runs}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        made = disks(pathlib.Path(folder), options.size)
        told = False
        for case, form, words, requests in CASES:
            if options.only not in case:
                continue
            results = {name: [] for name in found}
            for turn in range(options.runs):
                # What a cloud's disk allows depends on what was asked of it just before.
                for name in list(results)[::-1 if turn % 2 else 1]:
                    binary, start = found[name]
                    # What one left in the page cache is not to be written out during another's turn.
                    os.sync()
                    try:
                        command = start(binary, made[form], options.cache, kernel, f"bench {words} requests={requests} stay=1")
                        cycles, cpu, count, doorbell = measure(command)
                    except NoResult as error:
                        print(f"skipped: {case} of {name}: {error}", file=sys.stderr)
                        del results[name]
                        continue
                    if not told:
                        told = True
                        print(f"a doorbell costs the guest {doorbell / hertz * 1e6:.1f} us")
                    results[name].append((count / (cycles / hertz), cpu / count * 1e6))
            print(f"\n{case}")
            reference = None
            for name, values in results.items():
                iops, cpu = (statistics.median(value[index] for value in values) for index in (0, 1))
                reference = reference or (iops, cpu)
                print(f"  {name:<16}{iops:10.0f} IOPS{iops / reference[0]:7.2f}   {cpu:8.2f} us CPU"
                      f"{cpu / reference[1]:7.2f}", flush=True)


if __name__ == "__main__":
    main()
