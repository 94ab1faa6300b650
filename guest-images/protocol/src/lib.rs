//! What the VMM and the guest's PID 1 say to each other.
//!
//! Both talk over the virtio-console port [`CONTROL_PORT`] in frames: a little-endian `u32`
//! length, a tag byte, a payload (see [`Decoder`]). The command's own streams are raw bytes on the
//! ports [`STDIN_PORT`], [`STDOUT_PORT`] and [`STDERR_PORT`].
//!
//! A conversation:
//!
//! 1. guest: [`FromGuest::Hello`], at once when PID 1 is up;
//! 2. host: for each tree to copy in, [`ToGuest::CopyIn`] and its [`Item`]s; for each to copy out
//!    later, [`ToGuest::CopyOut`]; then [`ToGuest::Start`];
//! 3. guest: [`FromGuest::Started`]; from here on the host sends [`ToGuest::Signal`] only;
//! 4. guest, when the command has ended: for each tree to copy out, in the order asked for, its
//!    items as [`FromGuest::Item`]; then [`FromGuest::Exited`] or [`FromGuest::Signaled`]; then it
//!    powers the machine off.
//!
//! At any point the guest may instead say [`FromGuest::Error`] and power off.
//!
//! # What the ports carry besides bytes
//!
//! The virtio-console control message `PORT_OPEN` says whether the VMM's end is open, and the
//! driver tells a closed one from a slow one by it:
//!
//! - The VMM opens its end of all four ports before it names the last of them (`PORT_NAME`): PID 1
//!   begins when it finds all names.
//! - The end of the standard input is closing that port, after its last byte was put in the queue.
//! - Closing the output ports tells the command that nobody reads any more (`SIGPIPE`).
//! - What was written is in the queues when the status is said: drain the output queues then.
//!
//! # The kernel's command line
//!
//! PID 1 mounts the disk that `root=` names (`/dev/vda` if that is there, else it stays in the
//! initramfs), or its largest partition, of the type `rootfstype=` or what it finds, with
//! `rootflags=`, and `ro` if that is said; `cowshed.root=` goes before `root=`. With
//! `cowshed.handover` it talks to nobody, and becomes the init of that root once it is mounted.
//!
//! Each end takes the other for hostile: a length is checked before anything is allocated, and a
//! message that does not parse ends the conversation.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod files;
mod frame;
mod from_guest;
mod item;
mod reason;
mod to_guest;
mod wire;

pub use frame::{Decoder, Message};
pub use from_guest::{Failure, FromGuest};
pub use item::{Item, Stamp};
pub use reason::Reason;
pub use to_guest::{Start, ToGuest};
pub use wire::WireError;

/// The version of this protocol, which [`FromGuest::Hello`] carries. Ends of different versions do
/// not talk.
pub const VERSION: u32 = 1;

/// The name of the virtio-console port for the messages of this crate.
pub const CONTROL_PORT: &str = "cowshed.control";
/// The name of the port that the command reads as its standard input.
pub const STDIN_PORT: &str = "cowshed.stdin";
/// The name of the port that the command writes as its standard output.
pub const STDOUT_PORT: &str = "cowshed.stdout";
/// The name of the port that the command writes as its standard error.
pub const STDERR_PORT: &str = "cowshed.stderr";

/// The most bytes a frame may have after its length field: 1 MiB. It bounds a command's arguments
/// and environment together.
pub const MAX_FRAME: usize = 1 << 20;

/// The most bytes of a file that travel in one [`Item::Data`].
pub const MAX_DATA: usize = 32 << 10;
