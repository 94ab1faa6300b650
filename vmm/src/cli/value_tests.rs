use super::*;

#[test]
fn sizes() {
    for (text, bytes) in [
        ("0", 0),
        ("512", 512),
        ("4k", 4096),
        ("4K", 4096),
        ("64M", 64 << 20),
        ("64m", 64 << 20),
        ("3G", 3 << 30),
        ("2T", 2 << 40),
        ("1.5G", 3 << 29),
        ("0.5k", 512),
        ("7E", 7 << 60),
        ("8388607T", 8_388_607 << 40),
        ("0x100000", 1 << 20),
        ("0XFf", 255),
        ("0x7fffffffffffffff", i64::MAX as u64),
    ] {
        assert_eq!(size(text), Ok(bytes), "{text}");
    }
    for text in [
        "", "M", "-1", ".5G", "1.5.5", "1e3", " 1", "1 M", "1MB", "0x", "0x+1", "0x1.8", "0x10k",
        "x10", "４",
    ] {
        assert_eq!(size(text), Err(ValueError::Size), "{text}");
    }
    for text in [
        "8388608T",
        "8E",
        "18446744073709551616",
        "99999999999999999999k",
        "0x8000000000000000",
        "0x10000000000000000",
    ] {
        assert_eq!(size(text), Err(ValueError::TooLarge), "{text}");
    }
}

#[test]
fn memory_is_whole_mebibytes_and_enough() {
    assert_eq!(memory("16M"), Ok(16 << 20));
    assert_eq!(memory("5G"), Ok(5 << 30));
    assert_eq!(memory("268435456"), Ok(256 << 20));
    assert_eq!(memory("512"), Err(ValueError::MemoryUnit(512)));
    assert_eq!(memory("15M"), Err(ValueError::MemoryTooSmall));
    assert_eq!(memory("0"), Err(ValueError::MemoryUnit(0)));
    assert_eq!(memory("16777217"), Err(ValueError::MemoryUnaligned));
    assert!(
        memory("512")
            .unwrap_err()
            .to_string()
            .ends_with("did you mean 512M?")
    );
}

#[test]
fn durations() {
    for (text, milliseconds) in [
        ("60", 60_000),
        ("60s", 60_000),
        ("250ms", 250),
        ("2m", 120_000),
        ("1h", 3_600_000),
    ] {
        assert_eq!(
            duration(text),
            Ok(Duration::from_millis(milliseconds)),
            "{text}"
        );
    }
    for text in ["", "s", "1.5", "-1", "1d", "1 s", "1S"] {
        assert_eq!(duration(text), Err(ValueError::Duration), "{text}");
    }
    assert_eq!(duration("0"), Err(ValueError::NoTime));
    assert_eq!(duration("0ms"), Err(ValueError::NoTime));
    assert_eq!(duration("99999999h"), Err(ValueError::TooLarge));
    assert_eq!(duration("18446744073709551615h"), Err(ValueError::TooLarge));
    assert_eq!(duration("18446744073709551616"), Err(ValueError::TooLarge));
}

#[test]
fn environment() {
    let pair = |k: &str, v: &str| Ok((OsString::from(k), OsString::from(v)));
    assert_eq!(env("A=1".into()), pair("A", "1"));
    assert_eq!(env("A=".into()), pair("A", ""));
    assert_eq!(env("A=b=c".into()), pair("A", "b=c"));
    assert_eq!(env("A".into()), Err(ValueError::Env));
    assert_eq!(env("=1".into()), Err(ValueError::Env));
    let binary = OsString::from_vec(b"A=\xff".to_vec());
    assert_eq!(
        env(binary),
        Ok(("A".into(), OsString::from_vec(vec![0xff])))
    );
}

#[test]
fn copies() {
    let pair = |from: &str, to: &str| {
        Ok(Copy {
            from: from.into(),
            to: to.into(),
        })
    };
    assert_eq!(copy_in(".:/src".into()), pair(".", "/src"));
    assert_eq!(copy_in("a::b:/c::d".into()), pair("a:b", "/c:d"));
    assert_eq!(copy_out("/out:here".into()), pair("/out", "here"));
    for text in ["", ":", "a:", ":/b", "a", "a:b:c"] {
        assert_eq!(copy_in(text.into()), Err(ValueError::Copy), "{text}");
    }
    assert_eq!(
        copy_in("a:b".into()),
        Err(ValueError::GuestPath("b".into()))
    );
    assert_eq!(
        copy_out("a:b".into()),
        Err(ValueError::GuestPath("a".into()))
    );
}

#[test]
fn doubled_separators_stand_for_themselves() {
    let split = |text: &str| split_doubled(OsStr::new(text), b',');
    assert_eq!(split(""), [""]);
    assert_eq!(split("a"), ["a"]);
    assert_eq!(split("a,b"), ["a", "b"]);
    assert_eq!(split("a,,b,c"), ["a,b", "c"]);
    assert_eq!(split("a,,,b"), ["a,", "b"]);
    assert_eq!(split(",a"), ["", "a"]);
    assert_eq!(split("a,"), ["a", ""]);
}
