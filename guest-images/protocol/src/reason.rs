//! Error numbers in words, which `rustix` has only with a standard library.

use core::fmt;

use rustix::io::Errno;

const WORDS: &[(Errno, &str)] = &[
    (Errno::ACCESS, "permission denied"),
    (Errno::BUSY, "in use"),
    (Errno::EXIST, "it exists already"),
    (
        Errno::INVAL,
        "invalid argument, or a wrong or damaged file system",
    ),
    (Errno::IO, "input/output error"),
    (Errno::ISDIR, "it is a directory"),
    (Errno::LOOP, "it is a symbolic link, or too many of them"),
    (Errno::NAMETOOLONG, "the name is too long"),
    (Errno::NODEV, "no such device or file system"),
    (Errno::NOENT, "no such file or directory"),
    (Errno::NOEXEC, "not a program that this system can run"),
    (Errno::NOMEM, "out of memory"),
    (Errno::NOSPC, "no space left"),
    (Errno::NOTDIR, "it is not a directory"),
    (Errno::NXIO, "no such device"),
    (Errno::PERM, "operation not permitted"),
    (Errno::ROFS, "read-only file system"),
    (Errno::TOOBIG, "too many arguments"),
    (Errno::TXTBSY, "the program is being written"),
];

/// Shows an error number as words, or as the number where it is a rare one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reason(pub Errno);

impl fmt::Display for Reason {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match WORDS.iter().find(|(errno, _)| *errno == self.0) {
            Some((_, words)) => out.write_str(words),
            None => write!(out, "error {}", self.0.raw_os_error()),
        }
    }
}
