//! Each flag of `cowshed img` means what it means to `qemu-img`; progress; memory.

#![allow(clippy::unwrap_used)] // A test fails by panicking.
use std::fs;
use std::io::Read as _;
use std::process::{Command, Stdio};

use cowshed_tests::cowshed::binary;
use cowshed_tests::img::{Both, content, run, text};
use cowshed_tests::{process, skip};
use tempfile::TempDir;

#[test]
fn flags_of_create() {
    let both = Both::new();
    both.file("raw", &content());
    for (name, words) in [
        ("k", "-f qcow2 k 100k"),
        ("m", "-f qcow2 m 3M"),
        ("g", "-f qcow2 -o size=1G g"),
        ("t", "-f qcow2 -o cluster_size=2M t 2T"),
        ("p", "-f qcow2 -o cluster_size=2M p 1P"),
        ("odd", "-f qcow2 odd 1000"),
        ("plain", "-f raw plain 1.5M"),
        ("bare", "bare 1M"),
        ("base", "-f qcow2 -b raw -F raw base"),
        ("longer", "-f qcow2 -b raw -F raw longer 9M"),
        ("blind", "-u -f qcow2 -b nowhere -F qcow2 blind 1M"),
        ("o", "-f qcow2 -o backing_file=raw,backing_fmt=raw o"),
        ("v2", "-f qcow2 -o compat=0.10 v2 1M"),
        ("rb", "-f qcow2 -o refcount_bits=1,lazy_refcounts=on rb 1M"),
        (
            "l2",
            "-f qcow2 -o extended_l2=on,compression_type=zstd l2 1M",
        ),
        ("meta", "-f qcow2 -o preallocation=metadata meta 4M"),
        ("full", "-f qcow2 -o preallocation=full full 4M"),
        ("falloc", "-f raw -o preallocation=falloc falloc 4M"),
        ("split", "-f qcow2 -o data_file=d,data_file_raw=on split 4M"),
    ] {
        both.ok(&format!("create -q {words}"));
        let raw = ["plain", "bare", "falloc"].contains(&name);
        let format = if raw { "raw" } else { "qcow2" };
        both.json(&format!("info --output=json -f {format} {name}"));
        if !["blind", "p", "t"].contains(&name) {
            both.same(name, format);
        }
    }
    for words in [
        "create -f qcow2 e 9E",
        "create -f qcow2 -b nowhere -F raw new",
        "create -f qcow2 -o preallocation=some new 1M",
        "create -f qcow2 -o nothing=1 new 1M",
        "create -f qcow2 new 1X",
        "create -f qcow2 new -1",
        "create -f vmdk5 new 1M",
    ] {
        both.run(words);
        assert!(!both.0.path().join("new").exists(), "{words}");
    }
}

#[test]
fn flags_of_convert() {
    let both = Both::new();
    both.file("raw", &content());
    both.file("password", b"mooh");
    both.ok("convert -f raw -O qcow2 raw disk");
    both.ok("snapshot -c one disk");
    both.io("disk", "write -P 9 0 100k");
    for (words, format) in [
        ("-f qcow2 -O raw -S 0 disk new", "raw"),
        ("-O raw -S 64k disk new", "raw"),
        ("-O qcow2 -m 16 -W disk new", "qcow2"),
        ("-q -O qcow2 -c disk new", "qcow2"),
        ("-O qcow2 -c -m 1 -o cluster_size=4k disk new", "qcow2"),
        ("-O qcow2 -l one disk new", "qcow2"),
        ("-O qcow2 -l snapshot.id=1 disk new", "qcow2"),
        ("-O qcow2 -l snapshot.name=one disk new", "qcow2"),
        ("-O qcow2 -U disk new", "qcow2"),
        ("-O qcow2 -C disk new", "qcow2"),
        ("-f raw -O qcow2 raw raw raw new", "qcow2"),
        ("-O qcow2 -o preallocation=metadata disk new", "qcow2"),
        ("-t none -T none -O qcow2 disk new", "qcow2"),
        (
            "-O qcow2 --image-opts driver=qcow2,file.filename=disk new",
            "qcow2",
        ),
    ] {
        both.ok(&format!("convert {words}"));
        both.same("new", format);
    }
    both.ok("create -q -f qcow2 new2 3M");
    both.ok("convert -n --target-is-zero -O qcow2 disk new2");
    both.same("new2", "qcow2");
    let secret = "--object secret,id=k,file=password";
    let luks = "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10";
    both.ok(&format!("convert {secret} -O qcow2 -o {luks} disk locked"));
    let opts = "--image-opts driver=qcow2,file.filename=locked,encrypt.key-secret=k";
    both.ok(&format!("convert {secret} -O raw {opts} back"));
    both.same("back", "raw");
    for words in [
        "convert -l none disk out",
        "convert -m 17 disk out",
        "convert -S 1000 disk out",
        "convert -C -c -O qcow2 disk out",
        "convert -C -S 4k -O qcow2 disk out",
        "convert -n -O qcow2 disk nowhere",
        "convert --target-is-zero -O qcow2 disk out",
        "convert -O qcow2 -B raw disk out",
        "convert disk",
    ] {
        both.run(words);
        assert!(!both.0.path().join("out").exists(), "{words}");
    }
    both.same("disk", "qcow2");
}

#[test]
fn flags_of_the_others() {
    let both = Both::new();
    both.file("raw", &content());
    both.ok("convert -f raw -O qcow2 raw disk");
    both.ok("create -q -f qcow2 -b disk -F qcow2 top");
    both.ok("create -q -f qcow2 -b top -F qcow2 upper");
    both.io("top", "write -P 3 1M 200k");
    both.io("upper", "write -P 4 2M 200k");
    for words in [
        "map --output=json -s 1M -l 64k upper",
        "map --output=json --start-offset=2M --max-length=1M upper",
        "map --output=json -U -f qcow2 upper",
        "map --output=json --image-opts driver=qcow2,file.filename=upper",
        "measure --output=json -O qcow2 --size 1T",
        "measure --output=json -O qcow2 -o cluster_size=4k disk",
        "check --output=json -f qcow2 disk",
        "check --output=json -r all disk",
        "info --output=json -U top",
    ] {
        both.json(words);
    }
    for words in [
        "resize -q disk +1M",
        "resize -q disk 8M",
        "resize -q --shrink disk -4M",
    ] {
        both.ok(words);
        both.same("disk", "qcow2");
    }
    both.ok("resize -q --preallocation=metadata disk +4M");
    both.same("disk", "qcow2");
    both.ok("resize -q -f raw --preallocation=falloc raw +1M");
    both.same("raw", "raw");
    both.ok("commit -q -d upper");
    both.same("top", "qcow2");
    both.same("upper", "qcow2");
    both.ok("commit -q -b disk upper");
    both.same("disk", "qcow2");
    both.ok("snapshot -q -c one disk");
    both.ok("snapshot -q -c two disk");
    both.io("disk", "write -P 5 0 64k");
    both.ok("snapshot -q -a 1 disk");
    both.same("disk", "qcow2");
    both.ok("snapshot -q -d two disk");
    both.json("info --output=json disk");
    both.ok("amend -q -o size=20M top");
    both.ok("amend -q -o compat=0.10 upper");
    both.ok("rebase -q -f qcow2 -t none -T none -p -b disk -F qcow2 upper");
    both.same("upper", "qcow2");
}

#[test]
fn bitmaps_are_measured() {
    let both = Both::new();
    both.ok("create -q -f qcow2 disk 3M");
    both.json("measure --output=json -O qcow2 disk");
    both.ok("bitmap --add -g 4k disk a");
    both.ok("bitmap --add disk another");
    for options in ["cluster_size=64k", "cluster_size=512", "compat=0.10"] {
        both.json(&format!("measure --output=json -O qcow2 -o {options} disk"));
    }
}

/// The statuses that qemu-img documents, one by one.
#[test]
fn statuses() {
    let both = Both::new();
    both.file("raw", &content());
    both.ok("convert -f raw -O qcow2 raw sound");
    for name in ["leaky", "corrupt"] {
        both.ok(&format!("convert -f raw -O qcow2 raw {name}"));
    }
    both.ok("convert -f raw -O qcow2 raw other");
    both.io("other", "write -P 9 0 64k");
    let damage = |name: &str, damage: &dyn Fn(&mut Vec<u8>)| {
        for folder in [both.0.path(), both.1.path()] {
            let path = folder.join(name);
            let mut image = fs::read(&path).unwrap();
            damage(&mut image);
            fs::write(path, image).unwrap();
        }
    };
    // The first table that the first entry of a header's table names.
    let first = |image: &[u8], field: usize| {
        let offset = |at: usize| {
            let bytes = image[at..at + 8].try_into().unwrap();
            (u64::from_be_bytes(bytes) & 0x00ff_ffff_ffff_fe00) as usize
        };
        offset(offset(field))
    };
    damage("leaky", &|image| {
        let cluster = image.len().div_ceil(65536);
        image.resize((cluster + 1) * 65536, 0);
        let refcount = first(image, 48) + 2 * cluster;
        image[refcount + 1] = 1;
    });
    damage("corrupt", &|image| {
        let entry = first(image, 40);
        image[entry..entry + 8].copy_from_slice(&0x8000_0000_0005_0200_u64.to_be_bytes());
    });
    for (words, status) in [
        ("check sound", 0),
        ("check missing", 1),
        ("check leaky", 3),
        ("check -q leaky", 3),
        ("check -f raw raw", 63),
        ("compare sound sound", 0),
        ("compare sound other", 1),
        ("compare -f raw -F qcow2 raw sound", 0),
        ("compare -s -f raw -F qcow2 raw other", 1),
        ("compare sound missing", 2),
        ("info missing", 1),
        ("resize sound 1M", 1),
        ("nonsense", 1),
        ("create", 1),
        ("convert", 1),
    ] {
        let (ours, _) = both.run(words);
        let said = text(&ours.stderr);
        assert_eq!(ours.status.code(), Some(status), "{words}: {said}");
    }
    let (ours, _) = both.run("check corrupt");
    assert_eq!(ours.status.code(), Some(2), "{}", text(&ours.stdout));
    both.run("check -r leaks leaky");
    both.run("check leaky");
}

/// A raw file gets the length that is asked for, and no other image one that is no whole sectors.
#[test]
fn sizes_that_are_no_sectors() {
    let both = Both::new();
    both.file("raw", &content());
    both.ok("create -q -f qcow2 disk 0x100000");
    both.json("info --output=json disk");
    let lengths = || {
        let len = |folder: &TempDir| fs::metadata(folder.path().join("raw")).unwrap().len();
        assert_eq!(len(&both.0), len(&both.1));
        len(&both.0)
    };
    for (words, len) in [
        ("resize -q -f raw --shrink raw 1000000", 1_000_000),
        ("resize -q -f raw --shrink raw 1000", 1000),
        ("resize -q -f raw raw +1", 1025),
        ("resize -q -f raw raw 0x1001", 4097),
    ] {
        both.ok(words);
        assert_eq!(lengths(), len, "{words}");
        both.same("raw", "raw");
    }
    for words in [
        "resize disk 1000001",
        "resize disk +1",
        "resize --shrink disk 1000",
        "amend -o size=1048577 disk",
        "create -f qcow2 new 0x",
        "create -f qcow2 new 0x1.8",
        "create -f qcow2 new 1e3",
    ] {
        let (ours, _) = both.run(words);
        assert_eq!(ours.status.code(), Some(1), "{words}");
    }
    both.same("disk", "qcow2");
}

/// `info` opens nothing but the file that was named; with --backing-chain the chain, by its formats.
#[test]
fn info_opens_one_file() {
    let folder = TempDir::new().unwrap();
    let folder = folder.path();
    fs::write(folder.join("raw"), content()).unwrap();
    let ours = |words: &str| run(binary(), folder, words);
    assert!(
        ours("create -q -f qcow2 -o data_file=data,backing_file=raw,backing_fmt=raw disk")
            .status
            .success()
    );
    fs::remove_file(folder.join("raw")).unwrap();
    fs::remove_file(folder.join("data")).unwrap();
    let output = ours("info disk");
    let said = text(&output.stdout);
    assert!(
        output.status.success() && said.contains("raw") && said.contains("data"),
        "{said}"
    );
    let output = ours("info --backing-chain disk");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("raw"));
    // Whoever left the format out is not answered with a guess.
    let output = ours("info --references none disk");
    assert!(output.status.success());
}

/// Where standard error is no terminal there is no progress but with -p; on one there is rate and time
/// left, and only for what takes a while.
#[test]
fn progress_is_for_those_who_look() {
    let folder = TempDir::new().unwrap();
    let folder = folder.path();
    fs::write(folder.join("raw"), content()).unwrap();
    let slow = "convert -f raw -O qcow2 -r 2M raw new";
    let quick = "convert -f raw -O qcow2 raw new";
    let on_pipe = |words: &str| text(&run(binary(), folder, words).stderr);
    assert_eq!(on_pipe(slow), "");
    let said = on_pipe(&slow.replace("-r", "-p -r"));
    assert!(said.contains('%'), "{said:?}");
    if skip::program("script").is_none() {
        skip::say("no script(1) to make a terminal with (bsdutils)");
        return;
    }
    let on_terminal = |words: &str| {
        let command = format!("{} img {words}", binary().display());
        let output = Command::new("script")
            .args(["-qefc", &command, "/dev/null"])
            .env("TERM", "xterm")
            .current_dir(folder)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(output.status.success(), "{words}");
        text(&output.stdout)
    };
    let said = on_terminal(slow);
    for part in ["%", "/s", "left"] {
        assert!(said.contains(part), "no {part:?}: {said:?}");
    }
    assert_eq!(on_terminal(quick), "");
    assert_eq!(on_terminal(&slow.replace("-r", "-q -r")), "");
}

/// `-m 16` with the largest clusters, compressed.
#[test]
fn memory_is_bounded() {
    let folder = TempDir::new().unwrap();
    let folder = folder.path();
    let mut noise = 1_u64;
    let bytes: Vec<u8> = std::iter::repeat_with(|| {
        noise = noise
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (noise >> 60) as u8
    })
    .take(96 << 20)
    .collect();
    fs::write(folder.join("raw"), bytes).unwrap();
    let words = "img convert -p -r 32M -c -W -m 16 -o cluster_size=2M -f raw -O qcow2 raw new";
    let mut child = Command::new(binary())
        .args(words.split(' '))
        .current_dir(folder)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // All threads are at work when half of it is done.
    let mut said = String::new();
    let mut stderr = child.stderr.take().unwrap();
    let mut byte = [0; 1];
    while !said.lines().any(|line| {
        line.trim_end_matches('%')
            .parse::<u32>()
            .is_ok_and(|done| done >= 50)
    }) {
        stderr.read_exact(&mut byte).unwrap();
        said.push(byte[0].into());
    }
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    process::kill(&mut child);
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak < 200 << 10, "{peak} kB");
}
