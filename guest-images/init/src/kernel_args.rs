//! The kernel's command line, as far as it is for us.

use alloc::string::String;
use alloc::vec::Vec;

use crate::Stop;

/// What the command line says about the root.
#[derive(Default)]
pub(crate) struct KernelArgs {
    /// `root=`, or `cowshed.root=` over it.
    pub(crate) root: Option<String>,
    /// `rootfstype=`.
    pub(crate) root_type: Option<String>,
    /// `rootflags=`.
    pub(crate) root_flags: String,
    /// `ro`, unless `rw` follows.
    pub(crate) read_only: bool,
    /// `cowshed.handover`: become the root's own init.
    pub(crate) handover: bool,
}

impl KernelArgs {
    pub(crate) fn read() -> Result<Self, Stop> {
        let line = read_file("/proc/cmdline").map_err(Stop::boot("read the command line"))?;
        let line = String::from_utf8_lossy(&line);
        let mut args = Self::default();
        let mut own_root = None;
        // What follows `--` is for init.
        for word in line
            .split_ascii_whitespace()
            .take_while(|word| *word != "--")
        {
            match word.split_once('=') {
                Some(("root", value)) => args.root = Some(value.into()),
                Some(("cowshed.root", value)) => own_root = Some(value.into()),
                Some(("rootfstype", value)) => args.root_type = Some(value.into()),
                Some(("rootflags", value)) => args.root_flags = value.into(),
                None if word == "ro" => args.read_only = true,
                None if word == "rw" => args.read_only = false,
                None if word == "cowshed.handover" => args.handover = true,
                _ => {}
            }
        }
        args.root = own_root.or(args.root);
        Ok(args)
    }
}

/// Reads a small file whole.
pub(crate) fn read_file(path: &str) -> Result<Vec<u8>, rustix::io::Errno> {
    use rustix::fs::{Mode, OFlags};
    let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut content = Vec::new();
    let mut piece = [0; 4096];
    loop {
        match rustix::io::read(&file, &mut piece) {
            Ok(0) => return Ok(content),
            Ok(count) => content.extend_from_slice(piece.get(..count).unwrap_or_default()),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}
