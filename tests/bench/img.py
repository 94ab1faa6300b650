#!/usr/bin/env python3
"""How fast `cowshed img` is, as ratios to qemu-img within one run.

Medians over rounds that take the two in turn, from exec to exit, on the file system of $TMPDIR. What is
converted is a disk of which a third is text, a third noise, a third zeros. See qcow.py for what is to
be built, and for COWSHED and QEMU_IMG. With --reflink and a $TMPDIR on btrfs or XFS only the conversions are
measured where blocks can be shared, with and without -C.
"""

import argparse
import os
import pathlib
import tempfile

from qcow import COWSHED, MIB, QEMU_IMG, compare, run


def source(path, mebibytes):
    """Text, noise and holes in turn, in pieces of a few clusters."""
    text = b"".join(b"%d: the cow jumped over the moon\n" % i for i in range(40000))[:MIB]
    with open(path, "wb") as file:
        for i in range(mebibytes):
            file.seek(i * MIB)
            if i % 3 != 2:
                file.write(text if i % 3 else os.urandom(MIB))
        file.truncate(mebibytes * MIB)


def both(name, rounds, words, folder, prepare=None):
    words = words.split()
    compare(name, rounds, [COWSHED, "img", *words], [QEMU_IMG, *words], folder, prepare)


def reflinks(rounds, folder):
    def away():
        (folder / "new").unlink(missing_ok=True)

    run("sync", "raw", "base", cwd=folder)
    for source, target in (("raw", "qcow2"), ("qcow2", "raw"), ("raw", "raw")):
        for flag in ("", "-C "):
            words = f"convert {flag}-f {source} -O {target} {'raw' if source == 'raw' else 'base'} new"
            both(f"convert {flag}{source} to {target}", rounds, words, folder, away)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=768, help="of the disk, in MiB")
    parser.add_argument("--reflink", action="store_true", help="only conversions, where blocks can be shared")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    print(f"{'milliseconds: ours, qemu-img, ratio':44} {'on the wall':>26}   {'of the processor':>26}")
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        source(folder / "raw", arguments.size)
        run(QEMU_IMG, "convert", "-f", "raw", "-O", "qcow2", "raw", "base", cwd=folder)
        if arguments.reflink:
            reflinks(rounds, folder)
            return
        run(QEMU_IMG, "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "overlay", cwd=folder)
        for at in range(0, arguments.size, 2):
            run(QEMU_IMG, "bench", "-q", "-f", "qcow2", "-w", "--pattern=7", "-c", 1, "-s", MIB // 2, "-o", at * MIB, "overlay", cwd=folder)
        os.truncate(folder / "raw", arguments.size * MIB)
        run("cp", "--sparse=always", "base", "other", cwd=folder)

        def fresh():
            run("cp", "--sparse=always", "overlay", "top", cwd=folder)
            run("cp", "--sparse=always", "base", "beneath", cwd=folder)
            run(QEMU_IMG, "rebase", "-u", "-b", "beneath", "-F", "qcow2", "top", cwd=folder)
            # What the copies left to be written is not theirs.
            os.sync()

        both("create", rounds, "create -q -f qcow2 new 100G", folder)
        both("info", rounds, "info -f qcow2 base", folder)
        both("check", rounds, "check -f qcow2 base", folder)
        def away():
            (folder / "new").unlink(missing_ok=True)

        both("convert raw to qcow2", rounds, "convert -f raw -O qcow2 raw new", folder, away)
        both("convert qcow2 to raw", rounds, "convert -f qcow2 -O raw base new", folder, away)
        both("convert to zlib", rounds, "convert -c -f raw -O qcow2 raw new", folder, away)
        zstd = "convert -c -f raw -O qcow2 -o compression_type=zstd raw new"
        both("convert to zstd", rounds, zstd, folder, away)
        both("convert to zstd, -W -m 8", rounds, zstd.replace("-c", "-c -W -m 8"), folder, away)
        both("compare", rounds, "compare -f qcow2 -F qcow2 base other", folder)
        both("commit", rounds, "commit -q -f qcow2 top", folder, fresh)
        both("rebase", rounds, "rebase -f qcow2 -b other -F qcow2 top", folder, fresh)


if __name__ == "__main__":
    main()
