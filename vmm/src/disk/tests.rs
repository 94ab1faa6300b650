//! Disks against images that `qemu-img` made, and locks against QEMU's tools themselves.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Output};

use tempfile::TempDir;

use super::*;
use crate::config::{Format, Overlays};

mod locks;

const MIB: u64 = 1 << 20;

/// Says so when QEMU's tools are not there; CI has them.
fn has_tools() -> bool {
    let found = ["qemu-img", "qemu-io", "qemu-nbd"]
        .into_iter()
        .find(|tool| Command::new(tool).arg("--version").output().is_err());
    if let Some(tool) = found {
        let _ = writeln!(
            io::stderr(),
            "skipped: {tool} is not installed (qemu-utils)"
        );
    }
    found.is_none()
}

fn tool(command: &str, arguments: &[&str]) -> Output {
    Command::new(command).args(arguments).output().unwrap()
}

fn run_tool(command: &str, arguments: &[&str]) -> String {
    let output = tool(command, arguments);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command} {arguments:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// A folder with `base.qcow2`, 8 MiB whose first mebibyte is full of 0x5a.
struct Fixture {
    folder: TempDir,
}

impl Fixture {
    fn new() -> Self {
        let fixture = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        let base = fixture.path("base.qcow2");
        run_tool(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", text(&base), "8M"],
        );
        run_tool(
            "qemu-io",
            &["-f", "qcow2", "-c", "write -q -P 0x5a 0 1M", text(&base)],
        );
        fixture
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn base(&self) -> Disk {
        Disk::new(self.path("base.qcow2"))
    }

    /// A run with this disk, whose throwaway overlay is in the folder.
    fn run(&self, disk: Disk) -> Run {
        Run {
            root: Root::Image(disk),
            overlays: Overlays {
                folder: Some(self.folder.path().to_path_buf()),
                ..Overlays::default()
            },
            ..Run::new()
        }
    }

    fn open(&self, disk: Disk) -> Result<Disks, Error> {
        open(&self.run(disk), None)
    }

    fn refusal(&self, disk: Disk) -> String {
        crate::report::chain(&self.open(disk).unwrap_err())
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn first(disks: &Disks) -> Arc<dyn disk::Disk> {
    disks.devices().next().unwrap().disk
}

fn read(disk: &dyn disk::Disk, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    disk.read(offset, &mut bytes).unwrap();
    bytes
}

#[test]
fn a_base_is_never_written_and_its_overlay_has_no_name() {
    if !has_tools() {
        return;
    }
    let fixture = Fixture::new();
    let before = std::fs::read(fixture.path("base.qcow2")).unwrap();
    let disks = fixture.open(fixture.base()).unwrap();
    let disk = first(&disks);
    assert_eq!(read(&*disk, 0, 512), [0x5a; 512]);
    for offset in (0..8 * MIB).step_by(1 << 19) {
        disk.write(offset, &[0x77; 4096]).unwrap();
    }
    disk.write_zeroes(65536, 65536, true).unwrap();
    disk.discard(2 * 65536, 65536).unwrap();
    disk.flush().unwrap();
    assert_eq!(read(&*disk, 0, 4608)[4095..4097], [0x77, 0x5a]);
    assert_eq!(read(&*disk, 65536, 512), [0; 512]);

    assert_eq!(fixture.names(), ["base.qcow2"]);
    let open: Vec<String> = disk
        .files()
        .iter()
        .map(|file| std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap())
        .map(|path| path.into_os_string().into_string().unwrap())
        .collect();
    assert!(open[0].ends_with(" (deleted)"), "{open:?}");
    assert_eq!(open[1], text(&fixture.path("base.qcow2")));
    let flags = rustix::fs::fcntl_getfl(disk.files()[1]).unwrap();
    assert_eq!(
        flags & rustix::fs::OFlags::RWMODE,
        rustix::fs::OFlags::RDONLY
    );

    assert!(disks.close(true).unwrap().unwrap() > 0);
    drop(disk);
    assert_eq!(fixture.names(), ["base.qcow2"]);
    assert!(
        std::fs::read(fixture.path("base.qcow2")).unwrap() == before,
        "the base changed"
    );
}

#[test]
fn a_throwaway_overlay_is_not_synced_and_an_image_is() {
    if !has_tools() {
        return;
    }
    let fixture = Fixture::new();
    let throwaway = fixture.open(fixture.base()).unwrap();
    assert!(throwaway.devices().all(|disk| disk.options.never_sync));
    drop(throwaway);
    let mut run = fixture.run(fixture.base());
    run.disks.push(fixture.base());
    run.overlays.keep = Some(fixture.path("kept.qcow2"));
    let kept = open(&run, None).unwrap();
    let never: Vec<bool> = kept.devices().map(|disk| disk.options.never_sync).collect();
    assert_eq!(never, [false, true]);
    drop(kept);
    let named = Disk {
        overlay: Overlay::At(fixture.path("o.qcow2")),
        ..fixture.base()
    };
    assert!(
        fixture
            .open(named)
            .unwrap()
            .devices()
            .all(|disk| !disk.options.never_sync)
    );
}

#[test]
fn a_named_overlay_is_made_once_and_continued() {
    if !has_tools() {
        return;
    }
    let fixture = Fixture::new();
    let overlay = fixture.path("work.qcow2");
    let disk = Disk {
        overlay: Overlay::At(overlay.clone()),
        ..fixture.base()
    };
    let disks = fixture.open(disk.clone()).unwrap();
    first(&disks).write(MIB, &[1; 512]).unwrap();
    assert!(disks.close(false).unwrap().is_some());
    assert_eq!(fixture.names(), ["base.qcow2", "work.qcow2"]);

    let info = run_tool("qemu-img", &["info", "--output=json", text(&overlay)]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["backing-filename"], "base.qcow2");
    assert_eq!(info["backing-filename-format"], "qcow2");
    run_tool("qemu-img", &["check", "-q", text(&overlay)]);
    run_tool(
        "qemu-io",
        &[
            "-r",
            "-c",
            "read -P 0x5a 0 1M",
            "-c",
            "read -P 1 1M 512",
            text(&overlay),
        ],
    );

    let again = fixture.open(disk).unwrap();
    assert_eq!(read(&*first(&again), MIB, 512), [1; 512]);
    assert_eq!(read(&*first(&again), 0, 512), [0x5a; 512]);
}

#[test]
fn an_overlay_made_elsewhere_records_its_base_absolutely() {
    if !has_tools() {
        return;
    }
    let fixture = Fixture::new();
    std::fs::create_dir(fixture.path("elsewhere")).unwrap();
    let overlay = fixture.path("elsewhere/work.qcow2");
    let disk = Disk {
        overlay: Overlay::At(overlay.clone()),
        ..fixture.base()
    };
    drop(fixture.open(disk).unwrap());
    let info = run_tool("qemu-img", &["info", "--output=json", text(&overlay)]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let real = fixture.path("base.qcow2").canonicalize().unwrap();
    assert_eq!(info["backing-filename"], text(&real));
}

#[test]
fn overlays_of_something_else_are_refused() {
    if !has_tools() {
        return;
    }
    let fixture = Fixture::new();
    let other = fixture.path("other.qcow2");
    std::fs::copy(fixture.path("base.qcow2"), &other).unwrap();
    let overlay = fixture.path("o.qcow2");
    let of = |base: &str, format: &str| {
        let _ = std::fs::remove_file(&overlay);
        run_tool(
            "qemu-img",
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-b",
                base,
                "-F",
                format,
                text(&overlay),
            ],
        );
        let bytes = std::fs::read(&overlay).unwrap();
        let disk = Disk {
            overlay: Overlay::At(overlay.clone()),
            ..fixture.base()
        };
        let result = fixture.open(disk).map(drop);
        assert!(
            std::fs::read(&overlay).unwrap() == bytes,
            "the overlay changed"
        );
        result
    };
    assert!(matches!(
        of("other.qcow2", "qcow2"),
        Err(Error::OtherBase { .. })
    ));
    assert!(matches!(
        of("base.qcow2", "raw"),
        Err(Error::OtherBase { .. })
    ));
    // The same file by other names.
    of("./base.qcow2", "qcow2").unwrap();
    of(text(&fixture.path("base.qcow2")), "qcow2").unwrap();
    let gone = fixture.path("gone.qcow2");
    std::fs::copy(&other, &gone).unwrap();
    run_tool(
        "qemu-img",
        &[
            "rebase",
            "-q",
            "-u",
            "-b",
            "gone.qcow2",
            "-F",
            "qcow2",
            text(&overlay),
        ],
    );
    std::fs::remove_file(gone).unwrap();
    let disk = Disk {
        overlay: Overlay::At(overlay.clone()),
        ..fixture.base()
    };
    assert!(matches!(fixture.open(disk), Err(Error::OtherBase { .. })));

    let disk = Disk {
        overlay: Overlay::At(other),
        ..fixture.base()
    };
    assert!(matches!(fixture.open(disk), Err(Error::NoBacking(_))));
}

#[test]
fn sizes_grow_and_never_shrink() {
    if !has_tools() {
        return;
    }
    let fixture = Fixture::new();
    let sized = |size| Disk {
        size: Some(size),
        ..fixture.base()
    };
    let disks = fixture.open(sized(64 * MIB)).unwrap();
    let disk = first(&disks);
    assert_eq!(disk.geometry().size, 64 * MIB);
    assert_eq!(read(&*disk, 63 * MIB, 512), [0; 512]);
    assert!(matches!(
        fixture.open(sized(4 * MIB)),
        Err(Error::Smaller { .. })
    ));

    let overlay = Overlay::At(fixture.path("o.qcow2"));
    let named = |size| Disk {
        overlay: overlay.clone(),
        ..sized(size)
    };
    drop(fixture.open(named(16 * MIB)).unwrap());
    drop(fixture.open(named(16 * MIB)).unwrap());
    assert!(matches!(
        fixture.open(named(32 * MIB)),
        Err(Error::OtherSize { .. })
    ));
}

#[test]
fn raw_must_be_named() {
    if !has_tools() {
        return;
    }
    let fixture = Fixture::new();
    let path = fixture.path("disk.img");
    std::fs::write(&path, vec![7; 4096]).unwrap();
    let message = fixture.refusal(Disk::new(&path));
    assert!(message.contains("disk.img,format=raw"), "{message}");
    let raw = Disk {
        format: Some(Format::Raw),
        ..Disk::new(&path)
    };
    let disks = fixture.open(raw.clone()).unwrap();
    let disk = first(&disks);
    assert_eq!(
        (disk.geometry().size, read(&*disk, 512, 512)),
        (4096, vec![7; 512])
    );
    disk.write(0, &[8; 512]).unwrap();
    drop((disk, disks));
    assert_eq!(std::fs::read(&path).unwrap(), [7; 4096]);

    let direct = Disk {
        overlay: Overlay::Direct,
        ..raw
    };
    let disks = fixture.open(direct).unwrap();
    first(&disks).write(0, &[8; 512]).unwrap();
    assert_eq!(disks.close(false).unwrap(), None);
    assert_eq!(
        std::fs::read(&path).unwrap()[..513],
        [[8; 512].as_slice(), &[7]].concat()
    );
}

#[test]
fn read_only_disks_need_no_overlay() {
    if !has_tools() {
        return;
    }
    let fixture = Fixture::new();
    let disk = Disk {
        read_only: true,
        serial: Some("S1".to_owned()),
        ..fixture.base()
    };
    let disks = fixture.open(disk).unwrap();
    let disk = first(&disks);
    assert!(disk.geometry().read_only);
    assert_eq!(disk.geometry().serial, "S1");
    assert_eq!(disk.geometry().block_size, 65536);
    assert_eq!(disk.files().len(), 1);
    assert!(disk.write(0, &[0; 512]).is_err());
    assert_eq!(disks.close(false).unwrap(), None);
}

#[test]
fn references_outside_the_folder_need_a_word() {
    if !has_tools() {
        return;
    }
    let fixture = Fixture::new();
    std::fs::create_dir(fixture.path("images")).unwrap();
    let path = fixture.path("images/top.qcow2");
    let base = fixture.path("base.qcow2");
    let create = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        text(&base),
        "-F",
        "qcow2",
        text(&path),
    ];
    run_tool("qemu-img", &create);
    assert!(fixture.refusal(Disk::new(&path)).contains("outside"));
    let allowed = Disk {
        allow_outside: true,
        ..Disk::new(&path)
    };
    assert_eq!(read(&*first(&fixture.open(allowed).unwrap()), 0, 1), [0x5a]);
}

#[test]
fn what_is_no_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let fixture = Fixture { folder };
    let message = fixture.refusal(Disk::new(fixture.folder.path()));
    assert!(
        message.contains("neither a file nor a block device"),
        "{message}"
    );
    let message = fixture.refusal(Disk::new(fixture.path("absent")));
    assert!(message.contains("absent: No such file"), "{message}");
}

#[test]
fn the_first_throwaway_overlay_is_kept_when_the_run_fails() {
    if !has_tools() {
        return;
    }
    let fixture = Fixture::new();
    let kept = fixture.path("kept.qcow2");
    let mut run = fixture.run(fixture.base());
    run.disks.push(fixture.base());
    run.overlays.keep = Some(kept.clone());
    let write = || {
        let disks = open(&run, None).unwrap();
        first(&disks).write(MIB, &[9; 512]).unwrap();
        disks
    };
    let disks = write();
    let keeper = disks.keeper().unwrap();
    disks.close(false).unwrap();
    drop(keeper);
    assert!(!kept.exists());
    let disks = write();
    let keeper = disks.keeper().unwrap().unwrap();
    disks.close(true).unwrap();
    keeper.keep().unwrap();
    run_tool("qemu-img", &["check", "-q", text(&kept)]);
    run_tool(
        "qemu-io",
        &[
            "-r",
            "-c",
            "read -P 0x5a 0 1M",
            "-c",
            "read -P 9 1M 512",
            text(&kept),
        ],
    );
    assert!(matches!(open(&run, None), Err(Error::KeepExists(_))));
    std::fs::remove_file(&kept).unwrap();

    run.root = Root::None;
    run.disks.clear();
    assert!(matches!(open(&run, None), Err(Error::NothingToKeep)));
}

#[test]
fn an_overlay_does_not_outgrow_its_bound() {
    if !has_tools() {
        return;
    }
    let fixture = Fixture::new();
    let mut run = fixture.run(fixture.base());
    run.overlays.max_size = Some(2 * MIB);
    let disks = open(&run, None).unwrap();
    let disk = first(&disks);
    let results: Vec<_> = (0..8)
        .map(|i| disk.write(i * MIB, &vec![3; MIB as usize]))
        .collect();
    let error = results.into_iter().find_map(Result::err).unwrap();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    assert_eq!(read(&*disk, 0, 512), [3; 512]);
    assert!(disks.close(false).unwrap().unwrap() <= 2 * MIB);
}
