//! Recipes and the builder for guest kernels, root file systems and guest programs.
//!
//! Everything is made once and kept under `$XDG_CACHE_HOME/cowshed` (or `~/.cache/cowshed`), in a
//! folder named by a hash of what it was made from. Two processes that want the same thing at the
//! same time make it once; an interrupted one leaves nothing that would be taken for whole.
//!
//! ```no_run
//! use cowshed_guest_images::{Builder, Kernel, Progress};
//!
//! let builder = Builder::new(Progress::to_stderr())?;
//! let kernel = builder.kernel(Kernel::Small)?;
//! let disk = builder.root_image()?;
//! let initrd = cowshed_guest_images::initramfs(&std::fs::read(builder.init()?)?);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod builder;
mod cache;
pub mod cpio;
mod error;
mod kernel;
mod modules;
pub mod packages;
mod programs;
mod progress;
mod recipe;
mod root_image;

pub use builder::Builder;
pub use cpio::initramfs;
pub use error::Error;
pub use kernel::{Kernel, KernelFiles};
pub use packages::PACKAGES;
pub use programs::EMBEDDED_INIT;
pub use progress::Progress;
