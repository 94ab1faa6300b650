#!/usr/bin/env python3
"""How fast qcow2 images are read, written, mapped and checked, as ratios to qemu-img within one run.

Each measure is a median over rounds that take the two in turn, from exec to exit. Requests are those
of `qemu-img bench`, one at a time; ours are made by the example `bench` of cowshed-qcow, all else by
`cowshed img`. Hostile images are measured in seconds and memory: opened or refused,
they may take a second and 64 MiB. Both programs are built by:

  cargo build --release --workspace && cargo build --release -p cowshed-qcow --example bench

COWSHED and BENCH name the programs, QEMU_IMG another qemu-img. A ratio below 1 is ours being faster.
"""

import argparse
import os
import pathlib
import random
import resource
import statistics
import struct
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
RELEASE = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
COWSHED = os.environ.get("COWSHED", RELEASE / "cowshed")
BENCH = os.environ.get("BENCH", RELEASE / "examples" / "bench")
QEMU_IMG = os.environ.get("QEMU_IMG", "qemu-img")

MIB = 1 << 20
SIZE = 256 * MIB
# Visits every 4 KiB of the disk before one comes again, in no order to speak of.
SCATTERED = 4096 * 40503
SECRET = ["--object", "secret,id=password,data=moo"]
# Bounds for an image that is not to be believed.
SECONDS, BYTES = 1, 64 * MIB


def run(*words, cwd):
    timed(words, cwd)


def timed(words, cwd):
    """Seconds on the wall, and of the processor."""
    def processor():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    while True:
        before, began = processor(), time.perf_counter()
        done = subprocess.run([str(word) for word in words], cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        took = time.perf_counter() - began, processor() - before
        # A key costs QEMU as much as takes it a time, and it fails when that was too short to measure.
        if b"accurate CPU usage" in done.stderr:
            continue
        if done.returncode != 0:
            raise SystemExit(f"{words} failed: {done.stderr.decode(errors='replace')}")
        return took


def compare(name, rounds, ours, theirs, cwd, prepare=None):
    """Prints both medians and their ratio; `prepare` puts an image in its place before each."""
    times = {"ours": [], "theirs": []}
    for _ in range(rounds):
        for who, words in (("ours", ours), ("theirs", theirs)):
            if prepare:
                prepare()
            times[who].append(timed(words, cwd))
    row = f"{name:44}"
    for which in (0, 1):
        ours, theirs = (statistics.median(time[which] for time in times[who]) * 1000 for who in ("ours", "theirs"))
        row += f" {ours:8.1f} {theirs:8.1f}  x {ours / theirs:5.2f}  "
    print(row, flush=True)


def make_source(folder):
    """A disk with no two megabytes alike, and none that does not compress."""
    with open(folder / "source", "wb") as file:
        pattern = bytes((i // 37) & 0xFF for i in range(MIB))
        for i in range(SIZE // MIB):
            file.write(pattern[i % 7:] + pattern[: i % 7])


def images(folder):
    """Disks of QEMU's making: name and whether it can be written."""
    make_source(folder)
    run(QEMU_IMG, "convert", "-f", "raw", "-O", "qcow2", "-o", "preallocation=metadata", "source", "full", cwd=folder)
    run(QEMU_IMG, "create", "-q", "-f", "qcow2", "-b", "full", "-F", "qcow2", "overlay", cwd=folder)
    run(QEMU_IMG, "create", "-q", "-f", "qcow2", "-b", "full", "-F", "qcow2", "middle", cwd=folder)
    for at in range(0, SIZE // MIB, 3):
        run(QEMU_IMG, "bench", "-q", "-f", "qcow2", "-w", "-c", 1, "-s", MIB, "-o", at * MIB, "middle", cwd=folder)
    run(QEMU_IMG, "create", "-q", "-f", "qcow2", "-b", "middle", "-F", "qcow2", "chain", cwd=folder)
    for method in ("zlib", "zstd"):
        options = f"compression_type={method}"
        run(QEMU_IMG, "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, "source", method, cwd=folder)
    return ["full", "overlay", "chain", "zlib", "zstd"]


def requests(folder, rounds):
    scratch = folder / "scratch"
    for name in images(folder):
        for what, count, size, step in (("sequential", SIZE // MIB, MIB, MIB), ("scattered", 4000, 4096, SCATTERED)):
            for write in (False, True):
                def prepare():
                    run("cp", "--sparse=always", name, scratch, cwd=folder)
                words = [count, size, step] + (["write"] if write else [])
                theirs = [QEMU_IMG, "bench", "-q", "-t", "writeback", "-d", 1,
                          "-c", count, "-s", size, "-S", step, *(["-w"] if write else []), "-f", "qcow2", scratch]
                if not write:
                    theirs.insert(3, "-U")
                title = f"{name}: {what} {'writes' if write else 'reads'} of {size >> 10} KiB"
                compare(title, rounds, [BENCH, scratch, *words], theirs, folder, prepare)


def encrypted(folder, rounds):
    """The disk encrypted and decrypted: `qemu-img bench` takes no password."""
    make_source(folder)
    for method in ("luks", "aes"):
        options = f"encrypt.format={method},encrypt.key-secret=password"
        options += ",encrypt.iter-time=200" if method == "luks" else ""
        image = f"driver=qcow2,encrypt.key-secret=password,file.filename={folder / method}"
        write = ["convert", *SECRET, "-f", "raw", "-O", "qcow2", "-o", options, "source"]
        read = ["convert", *SECRET, "-O", "raw", "--image-opts", image, "scratch"]
        run(QEMU_IMG, *write, method, cwd=folder)
        for what, words in (("decrypted", read), ("encrypted", [*write, "scratch"])):
            def prepare():
                (folder / "scratch").unlink(missing_ok=True)
            ours, theirs = [COWSHED, "img", *words], [QEMU_IMG, *words]
            compare(f"{method}: {SIZE // MIB} MiB {what}", rounds, ours, theirs, folder, prepare)


def fragmented(path, gibibytes):
    """All clusters of 64 KiB allocated, in an order without any order; the data is a hole."""
    cluster = 65536
    run(QEMU_IMG, "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", path, f"{gibibytes}G", cwd="/")
    with open(path, "r+b") as file:
        def numbers(at, count):
            file.seek(at)
            return struct.unpack(f">{count}Q", file.read(count * 8))
        (l1,) = numbers(40, 1)
        tables = [entry & 0x00FFFFFFFFFFFE00 for entry in numbers(l1, gibibytes * 2)]
        entries = [entry for table in tables for entry in numbers(table, cluster // 8)]
        random.Random(1).shuffle(entries)
        for i, table in enumerate(tables):
            file.seek(table)
            part = entries[i * cluster // 8:(i + 1) * cluster // 8]
            file.write(struct.pack(f">{len(part)}Q", *part))


def large(folder, rounds):
    path = folder / "fragmented"
    fragmented(path, 50)
    tuned = f"driver=qcow2,refcount-cache-size=2M,file.filename={path}"
    one = [QEMU_IMG, "bench", "-q", "-U", "-f", "qcow2", "-c", 1, "-s", 4096, path]
    compare("50 GiB in no order: open, read 4 KiB", rounds, [BENCH, path, 1, 4096, 0], one, folder)
    compare("50 GiB in no order: map", rounds, [COWSHED, "img", "map", path], [QEMU_IMG, "map", "-f", "qcow2", path], folder)
    check = [COWSHED, "img", "check", path]
    compare("50 GiB in no order: check, theirs tuned", rounds, check, [QEMU_IMG, "check", "-q", "--image-opts", tuned], folder)

    scratch = folder / "scratch"

    def prepare():
        run("cp", "--sparse=always", path, scratch, cwd=folder)
        run("sync", scratch, cwd=folder)
    ours = [COWSHED, "img", "snapshot", "-c", "one", scratch]
    theirs = [QEMU_IMG, "snapshot", "-c", "one", "--image-opts", tuned.replace(str(path), str(scratch))]
    compare("50 GiB in no order: snapshot, theirs tuned", rounds, ours, theirs, folder, prepare)


def hostile_images(folder):
    """Names of images that claim more than they have."""
    def image(name, size, *fields, options="cluster_size=64k"):
        run(QEMU_IMG, "create", "-q", "-f", "qcow2", "-o", options, name, size, cwd=folder)
        with open(folder / name, "r+b") as file:
            for at, form, value in fields:
                file.seek(at)
                file.write(struct.pack(form, value))
            # As long as a file may be here, and almost all of it a hole.
            file.truncate(8 << 40)
        return name
    l1 = (24, ">Q", 1 << 50), (36, ">I", (32 << 20) // 8), (40, ">Q", 1 << 40)
    refcounts = (48, ">Q", 2 << 40), (56, ">I", (8 << 20) >> 16)
    snapshots = (60, ">I", 65536), (64, ">Q", 3 << 40)
    yield image("L1 table of 32 MiB", "1G", *l1)
    yield image("refcount table of 8 MiB", "1G", *refcounts)
    yield image("65536 snapshots", "1G", *snapshots)
    yield image("all of these", "1G", *l1, *refcounts, *snapshots)
    yield image("L1 table far past the end", "1G", (40, ">Q", 1 << 62))
    yield image("clusters of 2 GiB", "1G", (20, ">I", 31))
    yield image("unheard-of features", "1G", (72, ">Q", 1 << 40))
    name = image("2 Mi L2 tables in one hole", "1G", *l1)
    with open(folder / name, "r+b") as file:
        file.seek(1 << 40)
        # Written piece by piece: what a child has at first is its parent's memory.
        for i in range(2 << 20):
            file.write(struct.pack(">Q", 1 << 63 | (5 << 40) + (i << 16)))
    yield name


def hostile(folder):
    """Prints what opening or refusing takes, and what work on it takes."""
    print(f"{'hostile images: seconds and MiB, bounds ' + str(SECONDS) + ' and ' + str(BYTES // MIB):44}", flush=True)
    for name in hostile_images(folder):
        path = str(folder / name)
        row = f"{name:44}"
        for what, words in (("info", [COWSHED, "img", "info", path]), ("read", [BENCH, path, "1", "4096", "0"]),
                            ("write", [BENCH, path, "1", "4096", "0", "write"]), ("check", [COWSHED, "img", "check", path]),
                            ("map", [COWSHED, "img", "map", path]),
                            ("convert", [COWSHED, "img", "convert", "-O", "qcow2", path, str(folder / "new")])):
            began = time.perf_counter()
            child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            _, _, used = os.wait4(child.pid, 0)
            seconds, memory = time.perf_counter() - began, used.ru_maxrss * 1024
            # Work on all of it has the tables of a target too.
            over = " !" if seconds > SECONDS or memory > BYTES and what != "convert" else "  "
            row += f" {what} {seconds:6.3f} {memory / MIB:6.1f}{over}"
        print(row, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["requests", "encrypted", "large", "hostile"])
    arguments = parser.parse_args()
    print(f"{'milliseconds: ours, qemu-img, ratio':44} {'on the wall':>26}   {'of the processor':>26}")
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        if arguments.only in (None, "requests"):
            requests(folder, arguments.rounds)
        if arguments.only in (None, "encrypted"):
            encrypted(folder, arguments.rounds)
        if arguments.only in (None, "large"):
            large(folder, arguments.rounds)
        if arguments.only in (None, "hostile"):
            hostile(folder)


if __name__ == "__main__":
    main()
