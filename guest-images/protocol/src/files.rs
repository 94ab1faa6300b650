//! Copying file trees in and out: the same code at both ends.
//!
//! What travels: regular files, directories and symbolic links, their permission bits and times
//! (a link's time does not). Devices, sockets and FIFOs are left out. Owners do not travel: what
//! arrives belongs to the receiver. Hard links arrive as files of their own, holes as zeros.
//!
//! # Where a tree goes
//!
//! `SRC:DST` means what it means to `docker cp`:
//!
//! - `SRC` that ends in `/.` (or `/..`, or is `/`) is a directory of which only what is in it is
//!   copied. A `SRC` that is itself a symbolic link is copied as a link; `SRC/` follows it.
//! - `DST` that is a directory receives the tree under `SRC`'s own name, or, when only what is in
//!   `SRC` is copied, that. A link to a directory counts as one.
//! - `DST` that does not exist becomes the tree; its parent must exist. With a `/` at its end it
//!   must become a directory.
//! - `DST` that is anything else is replaced by a file or link, and refused for a directory.
//!
//! Within the tree directories that exist are kept and merged into, other things that are in the
//! way are replaced, except that a directory never gives way to a file, nor anything else to a
//! directory. Nothing is ever written through a symbolic link below `DST`.

mod destination;
mod receive;
mod send;

pub use receive::{ReceiveError, Receiver};
pub use send::{SendError, send_tree};

/// How deep a tree may be. Each level holds a file descriptor open.
pub const MAX_DEPTH: usize = 200;

/// The name under which `source` goes into an existing directory; empty when only what is in
/// `source` is copied.
pub fn root_name(source: &[u8]) -> &[u8] {
    if source.ends_with(b"/.") || source.ends_with(b"/..") {
        return b"";
    }
    let end = source
        .iter()
        .rposition(|byte| *byte != b'/')
        .map_or(0, |last| last + 1);
    let path = source.get(..end).unwrap_or_default();
    match path.rsplit(|byte| *byte == b'/').next() {
        Some(b"." | b"..") | None => b"",
        Some(name) => name,
    }
}
