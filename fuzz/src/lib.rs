//! What the fuzz targets do with their input. A module is a target: its `run` takes any bytes, and
//! panics only where the crate under test broke a promise.

#![allow(clippy::unwrap_used)] // A target fails by panicking.

pub mod check;
pub mod compressed;
mod guest;
pub mod header;
mod image;
pub mod luks;
pub mod open_read;
pub mod ops;
pub mod requests;
mod storage;
#[path = "../../qcow/tests/support/mod.rs"]
mod support;
pub mod transport;

pub use image::from_hex;
use support::Random;

/// A target's name, and what it does with its input.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: [Target; 8] = [
    ("header", header::run),
    ("open_read", open_read::run),
    ("ops", ops::run),
    ("compressed", compressed::run),
    ("check", check::run),
    ("luks", luks::run),
    ("transport", transport::run),
    ("requests", requests::run),
];

/// An input, the same for a seed in each run. Half of its bytes are small: they choose more.
pub fn random_input(seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let len = random.below(600);
    (0..len)
        .map(|_| {
            let most = if random.below(2) == 0 { 8 } else { 256 };
            random.below(most) as u8
        })
        .collect()
}
