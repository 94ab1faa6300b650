//! `cowshed img` beside `qemu-img`: the same words give the same images, answers and statuses.

#![allow(clippy::unwrap_used)] // A test fails by panicking.
use std::fs;
use std::process::Command;
use std::sync::Arc;

use cowshed_qcow::{FileStorage, Format, Image, OpenOptions};
use cowshed_tests::cowshed::binary;
use cowshed_tests::img::{Both, content, qemu_version, run, text};
use cowshed_tests::skip;
use tempfile::TempDir;

#[test]
fn a_day_with_images() {
    let both = Both::new();
    both.file("raw", &content());
    both.ok("convert -f raw -O qcow2 raw base");
    both.same("base", "qcow2");
    both.ok("create -q -f qcow2 -b base -F qcow2 -o cluster_size=4k overlay 5M");
    both.io("overlay", "write -P 7 100k 900k");
    both.json("map --output=json overlay");
    both.json("check --output=json overlay");
    both.ok("snapshot -c one overlay");
    both.json("info --output=json overlay");
    both.json("info --output=json --backing-chain overlay");
    both.json("info --output=json -f raw raw");
    both.io("overlay", "write -z 200k 100k");
    both.ok("convert -l one -O raw overlay one.raw");
    both.same("one.raw", "raw");
    both.ok("convert -O qcow2 -c -o compression_type=zstd overlay small");
    both.same("small", "qcow2");
    both.ok("convert -O qcow2 -B base -F qcow2 overlay moved");
    both.same("moved", "qcow2");
    both.ok("snapshot -a one overlay");
    both.same("overlay", "qcow2");
    both.ok("snapshot -d one overlay");
    both.ok("resize -q overlay +1M");
    both.ok("resize -q --shrink overlay 4M");
    both.same("overlay", "qcow2");
    both.ok("commit -q overlay");
    both.same("base", "qcow2");
    both.json("map --output=json overlay");
    for words in [
        "compare base overlay",
        "compare -s base overlay",
        "compare base small",
    ] {
        both.run(words);
    }
}

#[test]
fn rebased_and_amended() {
    let both = Both::new();
    both.file("raw", &content());
    both.file("other", &content()[..2 << 20]);
    both.ok("create -q -f qcow2 -b raw -F raw disk");
    both.io("disk", "write -P 7 100k 900k");
    both.ok("rebase -b other -F raw disk");
    both.same("disk", "qcow2");
    both.ok("amend -o compat=0.10 disk");
    both.json("info --output=json disk");
    both.same("disk", "qcow2");
    both.ok("amend -o compat=1.1,lazy_refcounts=on disk");
    both.ok("amend -o refcount_bits=32 disk");
    both.same("disk", "qcow2");
    both.ok("rebase -b  disk");
    both.same("disk", "qcow2");
    both.ok("rebase -u -b raw -F raw disk");
    both.same("disk", "qcow2");
    for (words, named) in [
        ("rebase -b missing -F raw disk", "missing"),
        ("amend -o compat=0.9 disk", "compat"),
        ("amend -o refcount_bits=3 disk", "refcount"),
    ] {
        let (ours, _) = both.run(words);
        assert!(
            text(&ours.stderr).contains(named),
            "{words}: {}",
            text(&ours.stderr)
        );
    }
    let (ours, _) = both.run("rebase -b raw disk");
    assert!(text(&ours.stderr).contains("-F"));
}

#[test]
fn rebased_and_compressed() {
    let both = Both::new();
    if qemu_version() < (8, 2) {
        skip::say("qemu-img is older than 8.2: it has no rebase -c");
        return;
    }
    let mut noise = 1_u64;
    let mut bytes = content();
    for byte in &mut bytes[2 << 20..][..65536] {
        noise = noise
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        *byte = (noise >> 56) as u8;
    }
    both.file("raw", &bytes);
    both.file("other", &bytes[..600_000]);
    for options in ["cluster_size=64k", "compression_type=zstd"] {
        both.ok(&format!(
            "create -q -f qcow2 -o {options} -b raw -F raw disk"
        ));
        both.io("disk", "write -P 7 100k 100k");
        both.ok("rebase -q -c -b other -F raw disk");
        both.same("disk", "qcow2");
        // The same clusters are compressed.
        both.json("map --output=json disk");
        both.ok("rebase -q -c -b  disk");
        both.same("disk", "qcow2");
        both.json("map --output=json disk");
    }
    // With subclusters qemu-img 10.0 fails an assertion here.
    both.ok("create -q -f qcow2 -o extended_l2=on -b raw -F raw parts");
    both.io("parts", "write -P 7 100k 100k");
    for (program, folder, flag) in [
        (binary(), both.0.path(), "-c "),
        ("qemu-img".as_ref(), both.1.path(), ""),
    ] {
        let output = run(program, folder, &format!("rebase {flag}-b  parts"));
        assert!(output.status.success(), "{}", text(&output.stderr));
    }
    both.same("parts", "qcow2");
    both.ok("create -q -f qcow2 -o data_file=data,backing_file=raw,backing_fmt=raw split");
    let (ours, _) = both.run("rebase -c -b  split");
    assert!(text(&ours.stderr).contains("data file"));
}

/// Compressed clusters are never encrypted: what is to be secret is not written so.
#[test]
fn what_is_encrypted_is_not_rebased_in_clear() {
    let folder = TempDir::new().unwrap();
    let folder = folder.path();
    fs::write(folder.join("raw"), content()).unwrap();
    let secret = "--object secret,id=k,data=moo";
    let luks = "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10";
    let make = format!("create -q {secret} -f qcow2 -o {luks} -b raw -F raw disk");
    assert!(run(binary(), folder, &make).status.success());
    let opts = "--image-opts driver=qcow2,file.filename=disk,encrypt.key-secret=k";
    let output = run(binary(), folder, &format!("rebase -c {secret} -b  {opts}"));
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains("encryption"),
        "{}",
        text(&output.stderr)
    );
}

/// An overlay whose data is in a file of its own goes into its base, and nowhere else.
#[test]
fn a_data_file_is_not_taken_for_the_base() {
    let both = Both::new();
    both.file("raw", &content());
    both.ok("create -q -f qcow2 -b raw -F raw -o data_file=data top");
    both.io("top", "write -P 7 100k 900k");
    both.ok("commit -q top");
    both.same("raw", "raw");
    both.same("top", "qcow2");
    both.ok("create -q -f qcow2 -b top -F qcow2 upper");
    both.io("upper", "write -P 8 1M 200k");
    both.ok("commit -q -b raw upper");
    both.same("raw", "raw");
}

/// An image never takes the place of what it needs, and nor does its data file, under whatever name and
/// however deep in the chain.
#[test]
fn an_image_does_not_replace_what_it_needs() {
    let folder = TempDir::new().unwrap();
    let folder = folder.path();
    let ok = |words: &str| {
        let output = run(binary(), folder, words);
        assert!(output.status.success(), "{words}: {}", text(&output.stderr));
    };
    fs::write(folder.join("base"), content()).unwrap();
    fs::write(folder.join("raw"), content()).unwrap();
    ok("create -q -f qcow2 -b base -F raw middle");
    ok("create -q -f qcow2 -b middle -F qcow2 top");
    ok("create -q -f qcow2 -b base -F raw -o data_file=data split");
    fs::hard_link(folder.join("base"), folder.join("link")).unwrap();
    std::os::unix::fs::symlink("base", folder.join("symlink")).unwrap();
    let all = || -> Vec<_> {
        let mut files: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .collect::<Result<_, _>>()
            .unwrap();
        files.sort_by_key(fs::DirEntry::file_name);
        let content = |file: fs::DirEntry| (file.file_name(), fs::read(file.path()).unwrap());
        files.into_iter().map(content).collect()
    };
    let before = all();
    for words in [
        "create -f qcow2 -b base -F raw base",
        "create -f qcow2 -b ./base -F raw base 4M",
        "create -f qcow2 -u -b ./base -F raw base 4M",
        "create -f qcow2 -b base -F raw link",
        "create -f qcow2 -b middle -F qcow2 base",
        "create -f qcow2 -b top -F qcow2 symlink",
        "create -f qcow2 -b split -F qcow2 data",
        "create -f qcow2 -o data_file=base base 4M",
        "create -f qcow2 -o data_file=new new 4M",
        "create -f qcow2 -u -b new -F raw -o data_file=./new other 4M",
        "create -f qcow2 -b base -F raw -o data_file=base new",
        "create -f qcow2 -b base -F raw -o data_file=link new",
        "create -f qcow2 -u -b base -F raw -o data_file=link new 4M",
        "create -f qcow2 -b top -F qcow2 -o data_file=base new",
        "convert -f raw -O qcow2 -B base -F raw base base",
        "convert -f raw -O qcow2 -B base -F raw raw base",
        "convert -f raw -O qcow2 -B middle -F qcow2 raw base",
        "convert -f raw -O qcow2 -B middle -F qcow2 raw link",
        "convert -O qcow2 -B middle -F qcow2 top base",
        "convert -U -O qcow2 top base",
        "convert -U -f raw -O qcow2 raw raw",
        "convert -f raw -O qcow2 -o data_file=raw raw new",
        "convert -f raw -O qcow2 -o data_file=base -B middle -F qcow2 raw new",
        "amend -o data_file=split split",
        "amend -o data_file=link split",
    ] {
        let output = run(binary(), folder, words);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{words}: {said}");
        let advice = ["choose another name", "cannot have its data"];
        assert!(
            advice.iter().any(|text| said.contains(text)),
            "{words}: {said}"
        );
        assert!(all() == before, "{words}");
    }
    // Its overlay may take the place of an overlay.
    ok("convert -O qcow2 -B base -F raw middle top");
    ok("compare -f raw -F qcow2 base top");
}

/// Of snapshots that have one name the first is meant; an ID goes before a name, and is none to -d.
#[test]
fn snapshots_of_one_name() {
    let both = Both::new();
    both.ok("create -q -f qcow2 disk 1M");
    for (fill, name) in [(1, "twin"), (2, "twin"), (3, "1"), (4, "twin")] {
        both.io("disk", &format!("write -P {fill} 0 64k"));
        both.ok(&format!("snapshot -c {name} disk"));
    }
    let left = || -> Vec<String> {
        let info = both.json("info --output=json disk");
        let snapshots = info["snapshots"].as_array().unwrap();
        let id = |snapshot: &serde_json::Value| snapshot["id"].as_str().unwrap().to_owned();
        snapshots.iter().map(id).collect()
    };
    for name in ["twin", "1"] {
        both.ok(&format!("snapshot -a {name} disk"));
        both.io("disk", "read -P 1 0 64k");
        both.ok(&format!("convert -l {name} -O raw disk was"));
        both.same("was", "raw");
    }
    both.ok("snapshot -d twin disk");
    assert_eq!(left(), ["2", "3", "4"]);
    both.run("snapshot -d 2 disk");
    both.ok("snapshot -d 1 disk");
    assert_eq!(left(), ["2", "4"]);
    both.ok("snapshot -d twin disk");
    assert_eq!(left(), ["4"]);
    both.same("disk", "qcow2");
}

#[test]
fn bitmaps() {
    let both = Both::new();
    both.ok("create -q -f qcow2 disk 10M");
    both.ok("bitmap --add -g 64k disk a");
    both.io("disk", "write 1M 100k");
    both.ok("bitmap --add --disable disk b");
    both.ok("bitmap --merge a --enable disk b");
    both.ok("bitmap --remove disk a");
    both.same("disk", "qcow2");
    both.json("info --output=json disk");
    let (ours, _) = both.run("bitmap --clear disk a");
    assert!(text(&ours.stderr).contains('a'));
}

/// Marks for which the disk has no place are not lost unseen.
#[test]
fn a_bitmap_of_another_size_is_not_merged() {
    let both = Both::new();
    both.ok("create -q -f qcow2 disk 1M");
    both.ok("bitmap --add disk a");
    for other in ["512k", "2M", "1M"] {
        both.ok(&format!("create -q -f qcow2 other {other}"));
        both.ok("bitmap --add other b");
        let (ours, _) = both.run("bitmap --merge b -b other -F qcow2 disk a");
        let said = text(&ours.stderr);
        assert_eq!(ours.status.success(), other == "1M", "{other}: {said}");
        let named = said.contains("other") && said.contains("disk") && said.contains("1048576");
        assert_eq!(named, other != "1M", "{said}");
    }
}

/// What is changed beside the disk's bytes is changed with the password, and not without.
#[test]
fn encrypted_images_have_snapshots_and_bitmaps() {
    let both = Both::new();
    let secret = "--object secret,id=k,data=mooh";
    let luks = "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10";
    both.ok(&format!("create -q {secret} -f qcow2 -o {luks} disk 1M"));
    let opts = "driver=qcow2,file.filename=disk,encrypt.key-secret=k";
    for words in [
        "snapshot -c one",
        "snapshot -a one",
        "snapshot -l",
        "bitmap --add",
        "bitmap --disable",
        "snapshot -d one",
        "rebase -u -b base -F qcow2",
    ] {
        let bitmap = if words.starts_with("bitmap") {
            " b"
        } else {
            ""
        };
        both.ok(&format!("{words} {secret} --image-opts {opts}{bitmap}"));
        if words != "snapshot -l" {
            let (ours, _) = both.run(&format!("{words} disk{bitmap}"));
            assert!(text(&ours.stderr).contains("secret"), "{words}");
        }
    }
    both.json("info --output=json disk");
    both.ok("create -q -f qcow2 base 1M");
    both.ok(&format!("snapshot {secret} -c two --image-opts {opts}"));
    both.ok(&format!("convert {secret} -O raw --image-opts {opts} back"));
    both.same("back", "raw");
}

/// What is in a file of its own keeps nobody from changing the rest.
#[test]
fn an_image_with_a_data_file_has_bitmaps_and_another_base() {
    let both = Both::new();
    both.file("raw", &content());
    both.ok("create -q -f qcow2 -b raw -F raw -o data_file=data disk");
    both.io("disk", "write -P 7 100k 900k");
    both.ok("bitmap --add disk a");
    both.ok("bitmap --add --disable disk b");
    both.ok("bitmap --merge a disk b");
    both.file("moved", &content());
    both.ok("rebase -u -b moved -F raw disk");
    both.json("info --output=json disk");
    both.same("disk", "qcow2");
    let (ours, _) = both.run("snapshot -c one disk");
    assert!(text(&ours.stderr).contains("data file"));
    for folder in [both.0.path(), both.1.path()] {
        fs::rename(folder.join("data"), folder.join("gone")).unwrap();
    }
    for words in ["bitmap --remove disk a", "rebase -u -b raw -F raw disk"] {
        let (ours, _) = both.run(words);
        assert!(text(&ours.stderr).contains("data"), "{words}");
    }
}

/// A base is written where its data is, and is not kept from that by this command's own lock.
#[test]
fn a_base_with_a_data_file_is_committed_to() {
    let both = Both::new();
    both.file("raw", &content());
    both.ok("create -q -f qcow2 -b raw -F raw -o data_file=data base");
    both.ok("create -q -f qcow2 -b base -F qcow2 -o data_file=own top 4M");
    both.io("top", "write -P 7 100k 900k");
    both.io("top", "write -P 8 3M 64k");
    both.ok("commit -q top");
    both.same("base", "qcow2");
    both.same("top", "qcow2");
    both.ok("create -q -f qcow2 -b top -F qcow2 upper");
    both.io("upper", "write -P 9 1M 200k");
    both.ok("commit -q -b base upper");
    both.same("base", "qcow2");
}

#[test]
fn bitmaps_are_copied() {
    let both = Both::new();
    both.ok("create -q -f qcow2 disk 10M");
    both.ok("bitmap --add -g 64k disk a");
    both.io("disk", "write 1M 100k");
    both.ok("bitmap --add --disable disk b");
    both.ok("convert --bitmaps -O qcow2 disk new");
    both.json("info --output=json new");
    both.same("new", "qcow2");
    let marks = |folder: &TempDir| {
        let path = folder.path().join("new");
        let file = Arc::new(FileStorage::new(fs::File::open(&path).unwrap()));
        let options = OpenOptions {
            read_only: true,
            ..OpenOptions::new(Format::Qcow2)
        };
        let image = Image::open_over(&path, file, &options, None).unwrap();
        let of = |name| image.dirty_ranges(name, 0..10 << 20).unwrap();
        (of("a"), of("b"))
    };
    assert_eq!(marks(&both.0), marks(&both.1));
    assert!(!marks(&both.0).0.is_empty());
    both.run("convert --bitmaps -O raw disk new");
}

#[test]
fn what_can_be_read_is_salvaged() {
    let both = Both::new();
    both.file("raw", &content());
    both.ok("convert -f raw -O qcow2 raw disk");
    for folder in [both.0.path(), both.1.path()] {
        let disk = folder.join("disk");
        let mut bytes = fs::read(&disk).unwrap();
        bytes[0x40000..0x40008].copy_from_slice(&0x8000_0000_0005_0200_u64.to_be_bytes());
        fs::write(disk, bytes).unwrap();
    }
    both.run("convert -O raw disk back");
    assert!(!both.0.path().join("back").exists());
    both.ok("convert --salvage -O raw disk back");
    let back = fs::read(both.0.path().join("back")).unwrap();
    assert!(back[..65536].iter().all(|byte| *byte == 0));
    assert!(back[65536..] == content()[65536..]);
}

#[test]
fn flags_of_scripts() {
    let both = Both::new();
    both.file("raw", &content());
    both.ok("convert -f raw -r 1G -t none -T directsync raw -O qcow2 disk");
    both.same("disk", "qcow2");
    both.ok("create -q -f qcow2 there 3M");
    both.ok("convert -n --target-image-opts disk driver=qcow2,file.filename=there");
    both.same("there", "qcow2");
    both.ok("create -q -f qcow2 -b disk -F qcow2 top");
    both.io("top", "write -P 7 100k 900k");
    both.ok("compare -q -T none disk there");
    both.ok("commit -q -r 1G -t writeback top");
    both.same("disk", "qcow2");
    both.ok("rebase -t none -T none -b  top");
    both.same("top", "qcow2");
}

/// A disk that shrinks takes its file along.
#[test]
fn a_shrunken_file_is_short() {
    let both = Both::new();
    both.ok("create -q -f qcow2 disk 1G");
    both.io("disk", "write 0 1M");
    both.io("disk", "write 900M 10M");
    both.ok("resize -q --shrink disk 100M");
    both.same("disk", "qcow2");
    let len = |folder: &TempDir| fs::metadata(folder.path().join("disk")).unwrap().len();
    assert!(len(&both.0) <= len(&both.1));
    both.io("disk", "write 90M 5M");
    both.same("disk", "qcow2");
}

#[test]
fn an_encrypted_base_is_committed_to() {
    let both = Both::new();
    both.file("raw", &content());
    let secret = "--object secret,id=k,data=mooh";
    let luks = "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10";
    both.ok(&format!("create -q {secret} -f qcow2 -o {luks} base 3M"));
    both.ok(&format!(
        "create -q {secret} -u -f qcow2 -b base -F qcow2 top 3M"
    ));
    let top = "driver=qcow2,file.filename=top";
    let unlocked = format!("--image-opts {top},backing.encrypt.key-secret=k");
    both.ok(&format!(
        "convert {secret} -n -f raw raw --target-image-opts {top},backing.encrypt.key-secret=k"
    ));
    both.ok(&format!("commit -q {secret} {unlocked}"));
    let base = "--image-opts driver=qcow2,file.filename=base,encrypt.key-secret=k";
    both.ok(&format!("convert {secret} -O raw {base} back"));
    both.same("back", "raw");
    let (ours, _) = both.run("commit -q top");
    assert!(text(&ours.stderr).contains("secret"));
}

#[test]
fn measurements() {
    let both = Both::new();
    both.file("raw", &content());
    for words in [
        "measure --output=json -O qcow2 --size 20G",
        "measure --output=json -O qcow2 -o cluster_size=4k,refcount_bits=64 --size 1G",
        "measure --output=json -O qcow2 -f raw raw",
        "measure --output=json -O raw -f raw raw",
    ] {
        both.json(words);
    }
}

#[test]
fn errors_have_qemu_imgs_statuses_and_name_the_file() {
    let both = Both::new();
    both.ok("create -q -f qcow2 disk 1M");
    both.ok("create -q -f qcow2 bad 1M");
    for folder in [both.0.path(), both.1.path()] {
        let bad = folder.join("bad");
        let mut bytes = fs::read(&bad).unwrap();
        bytes[0x20000] ^= 1; // The first refcount.
        fs::write(bad, bytes).unwrap();
    }
    for (words, named) in [
        ("check bad", ""),
        ("check -f raw disk", ""),
        ("check missing", "missing"),
        ("compare disk missing", "missing"),
        ("create -f qcow2 -b disk over", "-F"),
        ("create -f qcow2 -o cluster_size=3k odd 1M", "cluster size"),
        ("create -f qcow2 nosize", "size"),
        ("resize disk 512k", "shrink"),
        ("snapshot -a none disk", "none"),
        ("convert -O qcow2 missing out", "missing"),
        ("convert -c -f raw -O raw disk out", "compress"),
    ] {
        let (ours, _) = both.run(words);
        let said = text(&ours.stderr);
        assert!(said.contains(named), "{words}: {said}");
        assert!(!both.0.path().join("out").exists(), "{words}");
    }
}

#[test]
fn an_image_in_use_is_left_alone() {
    let folder = TempDir::new().unwrap();
    let folder = folder.path();
    let make = run(binary(), folder, "create -q -f qcow2 disk 1M");
    assert!(make.status.success());
    // QEMU's own lock: qemu-io holds it while it waits for its input.
    let mut holder = Command::new("qemu-io")
        .args(["-f", "qcow2", "disk"])
        .current_dir(folder)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // Its prompt says that the image is open.
    let mut prompt = [0; 1];
    std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut prompt).unwrap();
    for words in [
        "resize disk 2M",
        "snapshot -c a disk",
        "check disk",
        "create -f qcow2 disk 1M",
    ] {
        let output = run(binary(), folder, words);
        assert_eq!(output.status.code(), Some(1), "{words}");
        let said = text(&output.stderr);
        assert!(said.contains("another process"), "{words}: {said}");
    }
    assert!(run(binary(), folder, "map -U disk").status.success());
    drop(holder.stdin.take());
    holder.wait().unwrap();
    assert!(run(binary(), folder, "resize -q disk 2M").status.success());
}

#[test]
fn a_target_is_whole_or_not_there() {
    let folder = TempDir::new_in("/dev/shm").unwrap();
    let folder = folder.path();
    fs::write(folder.join("old"), "keep me").unwrap();
    fs::write(folder.join("raw"), vec![5; 40 << 20]).unwrap();
    for kill in [true, false] {
        let mut child = Command::new(binary())
            .args([
                "img", "convert", "-f", "raw", "-O", "qcow2", "-c", "raw", "old",
            ])
            .current_dir(folder)
            .spawn()
            .unwrap();
        if kill {
            child.kill().unwrap();
        }
        child.wait().unwrap();
        let old = fs::read(folder.join("old")).unwrap();
        assert_eq!(old == b"keep me", kill);
        assert_eq!(
            fs::read_dir(folder).unwrap().count(),
            2,
            "something was left behind"
        );
    }
}

#[test]
fn encrypted_images() {
    let both = Both::new();
    both.file("raw", &content());
    let secret = "--object secret,id=k,data=mooh";
    let luks = "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10";
    both.ok(&format!(
        "convert {secret} -f raw -O qcow2 -o {luks} raw locked"
    ));
    both.json("info --output=json locked");
    let opts = "--image-opts driver=qcow2,file.filename=locked,encrypt.key-secret=k";
    both.ok(&format!("convert {secret} -O raw {opts} back"));
    both.same("back", "raw");
    let map = both.json(&format!("map --output=json {secret} {opts}"));
    assert!(
        !map.to_string().contains("offset"),
        "the bytes there are not the disk's: {map}"
    );
    let (ours, _) = both.run("convert -O raw locked nothing");
    assert!(
        text(&ours.stderr).contains("secret"),
        "{}",
        text(&ours.stderr)
    );
    let wrong = "--object secret,id=k,data=moo";
    both.run(&format!("convert {wrong} -O raw {opts} nothing"));
    // Each opens the other's.
    let theirs = both.1.path().join("locked");
    fs::copy(theirs, both.0.path().join("locked")).unwrap();
    both.ok(&format!("convert {secret} -O raw {opts} back"));
    both.same("back", "raw");
}

/// Programs are what disks have that is harder to compress than text.
#[test]
fn compressed_images_are_as_small() {
    let both = Both::new();
    both.file("program", &fs::read(binary()).unwrap());
    for method in ["zlib", "zstd"] {
        both.ok(&format!(
            "convert -c -f raw -O qcow2 -o compression_type={method} program {method}"
        ));
        both.same(method, "qcow2");
        let [ours, theirs] = [&both.0, &both.1]
            .map(|folder| fs::metadata(folder.path().join(method)).unwrap().len());
        // Our files end where a cluster does.
        assert!(
            ours <= theirs * 102 / 100 + 65536,
            "{method}: {ours}, {theirs}"
        );
    }
}
