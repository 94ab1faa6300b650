//! Trees arrive as they were, where they should, and nowhere else.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use cowshed_guest_protocol::files::{
    MAX_DEPTH, ReceiveError, Receiver, SendError, root_name, send_tree,
};
use cowshed_guest_protocol::{Item, Stamp};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{CWD, Mode, OFlags, Timespec, Timestamps};
use tempfile::TempDir;

const STAMP: Stamp = Stamp {
    mode: 0o640,
    seconds: 1_000_000_000,
    nanoseconds: 5,
};

fn folder(path: &Path) -> OwnedFd {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap()
}

fn receiver(at: &Path, destination: &str, name: &str) -> Receiver {
    Receiver::new(folder(at), destination.as_bytes(), name.as_bytes(), 1 << 20)
}

/// Copies as both ends together would.
fn copy(from: &Path, source: &str, to: &Path, destination: &str) -> Result<(), ReceiveError> {
    let name = String::from_utf8(root_name(source.as_bytes()).to_vec()).unwrap();
    let mut receiver = receiver(to, destination, &name);
    let mut complete = false;
    let sent = send_tree(folder(from).as_fd(), source.as_bytes(), &mut |item| {
        assert!(!complete);
        complete = receiver.item(item)?;
        Ok(())
    });
    match sent {
        Ok(()) => assert!(complete),
        Err(SendError::Sink(error)) => return Err(error),
        Err(error) => panic!("{error}"),
    }
    Ok(())
}

fn give(receiver: &mut Receiver, items: &[Item<'_>]) -> Result<bool, ReceiveError> {
    items.iter().try_fold(false, |_, item| receiver.item(*item))
}

#[test]
fn a_tree_arrives_whole() {
    let (from, to) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let tree = from.path().join("tree");
    fs::create_dir_all(tree.join("deep/er")).unwrap();
    fs::create_dir(tree.join("empty")).unwrap();
    let large: Vec<u8> = (0..300_000u32).map(|number| (number % 251) as u8).collect();
    fs::write(tree.join("deep/er/large"), &large).unwrap();
    fs::write(tree.join("nothing"), b"").unwrap();
    symlink("/somewhere/else", tree.join("link")).unwrap();
    rustix::fs::mkfifoat(CWD, tree.join("fifo"), Mode::RWXU).unwrap();
    fs::set_permissions(tree.join("nothing"), fs::Permissions::from_mode(0o4751)).unwrap();
    fs::set_permissions(tree.join("empty"), fs::Permissions::from_mode(0o500)).unwrap();
    let time = Timespec {
        tv_sec: 123_456_789,
        tv_nsec: 987_654_321,
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    rustix::fs::utimensat(CWD, tree.join("deep"), &times, rustix::fs::AtFlags::empty()).unwrap();

    copy(from.path(), "tree", to.path(), "new").unwrap();

    let new = to.path().join("new");
    assert!(fs::read(new.join("deep/er/large")).unwrap() == large);
    assert_eq!(
        fs::read_link(new.join("link")).unwrap(),
        Path::new("/somewhere/else")
    );
    assert!(!new.join("fifo").exists());
    let mode = |name: &str| fs::metadata(new.join(name)).unwrap().mode() & 0o7777;
    assert_eq!((mode("nothing"), mode("empty")), (0o751, 0o500));
    let deep = fs::metadata(new.join("deep")).unwrap();
    assert_eq!(
        (deep.mtime(), deep.mtime_nsec()),
        (123_456_789, 987_654_321)
    );
}

#[test]
fn source_and_destination_mean_what_docker_means() {
    for (source, destination, expected) in [
        ("file", "absent", Some("absent")),
        ("file", "absent/", None),
        ("file", "absent/absent", None),
        ("file", "dir", Some("dir/file")),
        ("file", "link", Some("dir/file")),
        ("file", "other", Some("other")),
        ("file", ".", Some("file")),
        ("tree", "absent", Some("absent/file")),
        ("tree", "absent/", Some("absent/file")),
        ("tree/", "dir", Some("dir/tree/file")),
        ("tree/.", "dir", Some("dir/file")),
        ("tree/.", "absent", Some("absent/file")),
        ("tree", "other", None),
        ("tree", "link", Some("dir/tree/file")),
    ] {
        let (from, to) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        fs::create_dir(from.path().join("tree")).unwrap();
        fs::write(from.path().join("tree/file"), b"new").unwrap();
        fs::write(from.path().join("file"), b"new").unwrap();
        fs::create_dir(to.path().join("dir")).unwrap();
        fs::write(to.path().join("other"), b"old").unwrap();
        symlink("dir", to.path().join("link")).unwrap();

        let copied = copy(from.path(), source, to.path(), destination);

        let case = format!("{source}:{destination}");
        assert_eq!(copied.is_ok(), expected.is_some(), "{case}: {copied:?}");
        if let Some(expected) = expected {
            assert_eq!(
                fs::read(to.path().join(expected)).unwrap(),
                b"new",
                "{case}"
            );
        }
    }
}

#[test]
fn what_is_in_the_way_is_replaced_but_never_followed() {
    let to = TempDir::new().unwrap();
    let outside = TempDir::new().unwrap();
    fs::write(outside.path().join("file"), b"outside").unwrap();
    fs::create_dir(to.path().join("tree")).unwrap();
    symlink(outside.path().join("file"), to.path().join("tree/file")).unwrap();
    fs::hard_link(outside.path().join("file"), to.path().join("tree/hard")).unwrap();
    let data = Item::Data(b"new");
    let mut tree = receiver(to.path(), ".", "tree");
    let file = |name| Item::File { name, stamp: STAMP };
    let enter = Item::Enter {
        name: b"",
        stamp: STAMP,
    };
    let items = [
        enter,
        file(b"file"),
        data,
        file(b"hard"),
        data,
        Item::Leave,
        Item::End,
    ];
    assert!(give(&mut tree, &items).unwrap());
    assert_eq!(fs::read(to.path().join("tree/file")).unwrap(), b"new");
    assert_eq!(fs::read(to.path().join("tree/hard")).unwrap(), b"new");
    assert_eq!(fs::read(outside.path().join("file")).unwrap(), b"outside");
}

#[test]
fn no_link_leads_out_of_the_destination() {
    let to = TempDir::new().unwrap();
    let outside = TempDir::new().unwrap();
    let target = outside.path().to_str().unwrap().as_bytes();
    let enter = |name| Item::Enter { name, stamp: STAMP };
    // A link that the sender made itself, and one that was there.
    symlink(outside.path(), to.path().join("there")).unwrap();
    for items in [
        vec![
            Item::Symlink {
                name: b"made",
                target,
            },
            enter(b"made"),
        ],
        vec![enter(b"there")],
    ] {
        let mut tree = receiver(to.path(), ".", "");
        give(&mut tree, &[enter(b"")]).unwrap();
        let refused = give(&mut tree, &items);
        assert!(
            matches!(refused, Err(ReceiveError::Write { .. })),
            "{refused:?}"
        );
    }
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
}

#[test]
fn names_are_single_components() {
    let to = TempDir::new().unwrap();
    for name in ["", ".", "..", "/", "a/b", "../a", "/etc", "a\0b"] {
        let name = name.as_bytes();
        for item in [
            Item::File { name, stamp: STAMP },
            Item::Enter { name, stamp: STAMP },
            Item::Symlink { name, target: b"x" },
        ] {
            let mut tree = receiver(to.path(), ".", "");
            let refused = give(
                &mut tree,
                &[
                    Item::Enter {
                        name: b"",
                        stamp: STAMP,
                    },
                    item,
                ],
            );
            assert!(matches!(refused, Err(ReceiveError::BadName(_))), "{item:?}");
        }
    }
    assert_eq!(fs::read_dir(to.path()).unwrap().count(), 0);
}

#[test]
fn parts_out_of_order_are_refused() {
    let to = TempDir::new().unwrap();
    let enter = Item::Enter {
        name: b"x",
        stamp: STAMP,
    };
    let file = Item::File {
        name: b"x",
        stamp: STAMP,
    };
    let data = Item::Data(b"x");
    for items in [
        vec![data],
        vec![Item::Leave],
        vec![Item::End],
        vec![enter, data],
        vec![enter, Item::End],
        vec![enter, Item::Leave, Item::Leave],
        vec![enter, Item::Leave, file],
        vec![file, file],
        vec![file, Item::Leave],
        vec![file, Item::End, Item::End],
    ] {
        let mut tree = receiver(to.path(), "root", "");
        let refused = give(&mut tree, &items);
        assert!(
            matches!(refused, Err(ReceiveError::OutOfOrder)),
            "{items:?}: {refused:?}"
        );
        let _ = fs::remove_dir_all(to.path().join("root"));
        let _ = fs::remove_file(to.path().join("root"));
    }
}

#[test]
fn size_and_depth_are_bounded() {
    let to = TempDir::new().unwrap();
    let mut tree = Receiver::new(folder(to.path()), b"file", b"", 5);
    let file = Item::File {
        name: b"",
        stamp: STAMP,
    };
    give(&mut tree, &[file, Item::Data(b"12345")]).unwrap();
    assert!(matches!(
        tree.item(Item::Data(b"6")),
        Err(ReceiveError::TooLarge(5))
    ));

    let mut tree = receiver(to.path(), "deep", "");
    let enter = Item::Enter {
        name: b"d",
        stamp: STAMP,
    };
    give(&mut tree, &vec![enter; MAX_DEPTH]).unwrap();
    assert!(matches!(tree.item(enter), Err(ReceiveError::TooDeep(_))));
}

#[test]
fn what_cannot_be_read_is_named() {
    let from = TempDir::new().unwrap();
    rustix::fs::mkfifoat(CWD, from.path().join("fifo"), Mode::RWXU).unwrap();
    let send = |source: &[u8]| {
        let sent = send_tree(
            folder(from.path()).as_fd(),
            source,
            &mut |_| Ok::<_, ()>(()),
        );
        sent.unwrap_err().to_string()
    };
    assert!(
        send(b"absent").contains("cannot read absent: no such file"),
        "{}",
        send(b"absent")
    );
    assert_eq!(
        send(b"fifo"),
        "fifo is neither a file, a directory nor a link"
    );
}

#[test]
fn the_name_of_a_root() {
    for (source, name) in [
        ("/etc/passwd", "passwd"),
        ("etc//", "etc"),
        ("etc/.", ""),
        ("etc/./", ""),
        ("etc/..", ""),
        (".", ""),
        ("..", ""),
        ("/", ""),
        ("a/..b", "..b"),
    ] {
        assert_eq!(root_name(source.as_bytes()), name.as_bytes(), "{source}");
    }
}
