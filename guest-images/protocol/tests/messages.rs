//! Messages survive the wire, and what is no message is refused.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

use cowshed_guest_protocol::{
    Decoder, Failure, FromGuest, Item, MAX_DATA, MAX_FRAME, Message, Stamp, Start, ToGuest,
    WireError,
};
use proptest::prelude::*;

/// Feeds `bytes` in pieces of `piece`, and gives each message to `look`.
fn decode<M>(bytes: &[u8], piece: usize, mut look: M) -> Result<(), WireError>
where
    M: FnMut(&mut Decoder) -> Result<bool, WireError>,
{
    let mut decoder = Decoder::default();
    for piece in bytes.chunks(piece) {
        decoder.feed(piece);
        while look(&mut decoder)? {}
    }
    Ok(())
}

fn to_guest(bytes: &[u8], piece: usize) -> Result<usize, WireError> {
    let mut count = 0;
    decode(bytes, piece, |decoder| {
        let found = decoder.next::<ToGuest<'_>>()?.is_some();
        count += usize::from(found);
        Ok(found)
    })?;
    Ok(count)
}

fn from_guest(bytes: &[u8], piece: usize) -> Result<usize, WireError> {
    let mut count = 0;
    decode(bytes, piece, |decoder| {
        let found = decoder.next::<FromGuest<'_>>()?.is_some();
        count += usize::from(found);
        Ok(found)
    })?;
    Ok(count)
}

fn frame(tag: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len() + 1).unwrap();
    [&length.to_le_bytes(), &[tag][..], payload].concat()
}

fn string() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(1..=u8::MAX, 1..40)
}

fn stamp() -> impl Strategy<Value = Stamp> {
    (0u32..=0o777, any::<i64>(), 0u32..1_000_000_000).prop_map(|(mode, seconds, nanoseconds)| {
        Stamp {
            mode,
            seconds,
            nanoseconds,
        }
    })
}

proptest! {
    #[test]
    fn a_start_survives_any_cut(
        argv in prop::collection::vec(string(), 1..5),
        env in prop::collection::vec(string(), 0..5),
        cwd in string(),
        piece in 1usize..64,
    ) {
        let sent = ToGuest::Start(Start {
            argv: argv.iter().map(Vec::as_slice).collect(),
            env: env.iter().map(Vec::as_slice).collect(),
            cwd: &cwd,
        });
        let mut bytes = Vec::new();
        sent.encode(&mut bytes).unwrap();
        let mut received = 0;
        decode(&bytes, piece, |decoder| {
            let Some(message) = decoder.next::<ToGuest<'_>>()? else { return Ok(false) };
            assert_eq!(message, sent);
            received += 1;
            Ok(true)
        }).unwrap();
        prop_assert_eq!(received, 1);
    }

    #[test]
    fn items_survive(name in string(), target in string(), stamp in stamp(), data: Vec<u8>) {
        let message = String::from_utf8_lossy(&target).into_owned();
        for item in [
            Item::Enter { name: &name, stamp },
            Item::Leave,
            Item::File { name: &name, stamp },
            Item::Data(&data),
            Item::Symlink { name: &name, target: &target },
            Item::Skipped { name: &name },
            Item::End,
            Item::Failed { message: &message },
        ] {
            let mut bytes = Vec::new();
            FromGuest::Item(item).encode(&mut bytes).unwrap();
            ToGuest::Item(item).encode(&mut bytes).unwrap();
            let mut decoder = Decoder::default();
            decoder.feed(&bytes);
            prop_assert_eq!(decoder.next().unwrap(), Some(FromGuest::Item(item)));
            prop_assert_eq!(decoder.next().unwrap(), Some(ToGuest::Item(item)));
            prop_assert_eq!(decoder.next::<ToGuest<'_>>().unwrap(), None);
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes: Vec<u8>, piece in 1usize..64) {
        let _ = to_guest(&bytes, piece);
        let _ = from_guest(&bytes, piece);
    }

    #[test]
    fn arbitrary_payloads_never_panic(tag in 0u8..9, payload: Vec<u8>) {
        let bytes = frame(tag, &payload);
        let _ = to_guest(&bytes, bytes.len());
        let _ = from_guest(&bytes, bytes.len());
    }
}

#[test]
fn every_message_of_the_guest_survives() {
    let mut bytes = Vec::new();
    let mut sent = vec![
        FromGuest::Hello { version: 7 },
        FromGuest::Started,
        FromGuest::Exited { code: 255 },
        FromGuest::Signaled { number: 64 },
    ];
    for failure in [
        Failure::NotFound,
        Failure::NotExecutable,
        Failure::Boot,
        Failure::CopyIn,
        Failure::Protocol,
    ] {
        sent.push(FromGuest::Error {
            failure,
            message: "why",
        });
    }
    sent.iter()
        .for_each(|message| message.encode(&mut bytes).unwrap());
    let mut decoder = Decoder::default();
    decoder.feed(&bytes);
    for message in sent {
        assert_eq!(decoder.next().unwrap(), Some(message));
    }
}

#[test]
fn a_length_is_refused_before_its_bytes_arrive() {
    let too_long = MAX_FRAME + 1;
    let bytes = u32::try_from(too_long).unwrap().to_le_bytes();
    assert_eq!(to_guest(&bytes, 4), Err(WireError::TooLong(too_long)));
    assert_eq!(from_guest(&[0; 4], 4), Err(WireError::Empty));
}

#[test]
fn a_message_that_is_too_long_leaves_no_trace() {
    let argument = vec![b'x'; MAX_FRAME];
    let start = ToGuest::Start(Start {
        argv: vec![&argument],
        ..Start::default()
    });
    let mut bytes = b"before".to_vec();
    assert!(matches!(
        start.encode(&mut bytes),
        Err(WireError::TooLong(_))
    ));
    assert_eq!(bytes, b"before");
}

#[test]
fn impossible_messages_are_refused() {
    let number = |value: u32| value.to_le_bytes();
    let start = |argv: &[u8]| [&number(1)[..], argv, &number(0), &number(0)].concat();
    for (tag, payload, refused) in [
        (9, vec![], WireError::UnknownTag(9)),
        (5, vec![], WireError::Truncated(5)),
        (5, vec![1, 1], WireError::TrailingBytes(5, 1)),
        (5, vec![0], WireError::BadValue(5, "signal number")),
        (5, vec![65], WireError::BadValue(5, "signal number")),
        // A list that claims more elements than there are bytes.
        (4, number(u32::MAX).to_vec(), WireError::Truncated(4)),
        (4, vec![0; 12], WireError::BadValue(4, "command")),
        (4, start(&number(0)), WireError::BadValue(4, "command")),
        (
            4,
            start(&[&number(1)[..], &[0]].concat()),
            WireError::BadValue(4, "argument"),
        ),
        (
            3,
            [&number(1)[..], &[0]].concat(),
            WireError::BadValue(3, "path"),
        ),
        (2, vec![99], WireError::BadValue(2, "part of a file tree")),
        (
            2,
            [&[4][..], &vec![0; MAX_DATA + 1]].concat(),
            WireError::BadValue(2, "amount of data"),
        ),
        (
            2,
            [&[1][..], &number(0o1000), &[0; 16]].concat(),
            WireError::BadValue(2, "file mode"),
        ),
        (
            2,
            [&[1][..], &[0; 12], &number(1_000_000_000), &[0; 4]].concat(),
            WireError::BadValue(2, "time"),
        ),
    ] {
        assert_eq!(
            to_guest(&frame(tag, &payload), usize::MAX),
            Err(refused),
            "{payload:?}"
        );
    }
    let error = [&[1][..], &number(1), &[0xff]].concat();
    assert_eq!(
        from_guest(&frame(6, &error), usize::MAX),
        Err(WireError::BadValue(6, "text"))
    );
    let unknown = [&[9][..], &number(0)].concat();
    assert_eq!(
        from_guest(&frame(6, &unknown), 99),
        Err(WireError::BadValue(6, "failure"))
    );
}
