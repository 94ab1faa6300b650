use super::*;

fn disk(text: &str) -> Result<Disk, DiskError> {
    parse(text.into())
}

#[test]
fn a_path_alone_is_a_base_with_a_throwaway_overlay() {
    assert_eq!(disk("a.qcow2"), Ok(Disk::new("a.qcow2")));
}

#[test]
fn every_key() {
    assert_eq!(
        disk("a,format=qcow2,serial=A b,size=2G,overlay=o.qcow2,backing-format=raw,allow-outside"),
        Ok(Disk {
            format: Some(Format::Qcow2),
            serial: Some("A b".to_owned()),
            size: Some(2 << 30),
            overlay: Overlay::At("o.qcow2".into()),
            backing_format: Some(Format::Raw),
            allow_outside: true,
            ..Disk::new("a")
        })
    );
    assert_eq!(
        disk("a,readonly"),
        Ok(Disk {
            read_only: true,
            ..Disk::new("a")
        })
    );
    let direct = Disk {
        overlay: Overlay::Direct,
        ..Disk::new("a")
    };
    assert_eq!(disk("a,overlay=none"), Ok(direct));
}

#[test]
fn how_fast_and_how_safe() {
    let keys = "cache=none,io=threads,queues=2,cache-size=1M,bps=1.5k,iops=10";
    assert_eq!(
        disk(&format!("a,{keys}")),
        Ok(Disk {
            cache: Cache::None,
            io: Io::Threads,
            queues: Some(2),
            cache_size: Some(1 << 20),
            bytes_per_second: Some(1536),
            requests_per_second: Some(10),
            ..Disk::new("a")
        })
    );
    assert_eq!(disk("a,cache=unsafe").unwrap().cache, Cache::Unsafe);
    assert_eq!(
        disk("a,cache=writeback,io=io_uring"),
        Ok(Disk::new("a")),
        "the defaults"
    );
}

#[test]
fn a_comma_in_a_path_is_doubled() {
    assert_eq!(
        disk("a,,b,readonly"),
        Ok(Disk {
            read_only: true,
            ..Disk::new("a,b")
        })
    );
    let overlay = Overlay::At("x,y=z".into());
    assert_eq!(
        disk("a,overlay=x,,y=z"),
        Ok(Disk {
            overlay,
            ..Disk::new("a")
        })
    );
}

#[test]
fn only_a_named_format_or_the_key_allows_outside_references() {
    assert!(!disk("a").unwrap().allow_outside);
    assert!(disk("a,allow-outside").unwrap().allow_outside);
    assert!(disk("a,format=qcow2").unwrap().allow_outside);
    assert!(!disk("a,backing-format=raw").unwrap().allow_outside);
}

#[test]
fn refusals() {
    use DiskError::*;
    for (text, error) in [
        ("", NoPath),
        (",readonly", NoPath),
        ("a,", UnknownKey(String::new())),
        ("a,cach=none", UnknownKey("cach".to_owned())),
        ("a,b.qcow2", UnknownKey("b.qcow2".to_owned())),
        ("a,format=", NoValue("format")),
        ("a,format", NoValue("format")),
        (
            "a,format=vmdk",
            Format {
                key: "format",
                value: "vmdk".to_owned(),
            },
        ),
        ("a,format=raw,format=raw", Twice("format")),
        ("a,readonly=on", Value("readonly")),
        ("a,serial=123456789012345678901", Serial),
        ("a,serial=\u{e9}", Serial),
        ("a,size=100", SizeUnaligned),
        ("a,size=0", NoBytes("size")),
        ("a,bps=0", NoBytes("bps")),
        (
            "a,iops=0",
            Number {
                key: "iops",
                value: "0".to_owned(),
                most: MAX_IOPS,
            },
        ),
        (
            "a,queues=17",
            Number {
                key: "queues",
                value: "17".to_owned(),
                most: 16,
            },
        ),
        (
            "a,cache=fast",
            Choice {
                key: "cache",
                value: "fast".to_owned(),
                known: "writeback, none, unsafe",
            },
        ),
        (
            "a,io=aio",
            Choice {
                key: "io",
                value: "aio".to_owned(),
                known: "io_uring, threads",
            },
        ),
        (
            "a,size=1X",
            Size {
                key: "size",
                value: "1X".to_owned(),
                why: ValueError::Size,
            },
        ),
        ("a,overlay=", NoValue("overlay")),
        (
            "a,readonly,overlay=b",
            Conflict("readonly", "overlay=PATH", ""),
        ),
        ("a,readonly,size=1G", Conflict("readonly", "size=", "")),
        ("a,format=raw,backing-format=raw", RawBacking),
    ] {
        assert_eq!(disk(text), Err(error), "{text}");
    }
    assert!(matches!(disk("a,size=1G,overlay=none"), Err(Conflict(..))));
}

#[test]
fn passwords_and_snapshots() {
    assert_eq!(
        disk("a,secret-file=top,secret-fd=7,snapshot=before"),
        Ok(Disk {
            secrets: vec![
                SecretSource::File("top".into()),
                SecretSource::Descriptor(7)
            ],
            snapshot: Some("before".to_owned()),
            ..Disk::new("a")
        })
    );
    assert_eq!(
        disk("a,secret-fd=-1"),
        Err(DiskError::Descriptor("-1".to_owned()))
    );
    for overlay in ["none", "o.qcow2"] {
        let conflict = disk(&format!("a,snapshot=before,overlay={overlay}"));
        assert!(
            matches!(conflict, Err(DiskError::Conflict(..))),
            "{overlay}"
        );
    }
}

#[test]
fn an_unknown_key_is_answered_with_the_known_ones() {
    let message = disk("a,cach=none").unwrap_err().to_string();
    for key in [
        "format=",
        "readonly",
        "serial=",
        "size=",
        "overlay=",
        "backing-format=",
        "allow-outside",
        "secret-file=",
        "secret-fd=",
        "snapshot=",
        "cache=",
        "io=",
        "queues=",
        "cache-size=",
        "bps=",
        "iops=",
    ] {
        assert!(message.contains(key), "{key} is missing in: {message}");
    }
}
