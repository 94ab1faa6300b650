//! What the whole-system tests share: the built `cowshed`, images that `qemu-img` made, waiting with
//! a deadline, and a nested host with ordinary KVM.
//!
//! Everything here panics with the full story when its step fails: its callers are tests.

pub mod base;
pub mod cowshed;
pub mod guest;
pub mod image;
pub mod img;
mod initramfs;
pub mod nested;
pub mod process;
pub mod report;
pub mod skip;

/// What the guests without an operating system use too.
#[path = "../../guest-images/metal/src/random.rs"]
pub mod random;
#[path = "../../guest-images/metal/src/soak.rs"]
pub mod soak;
