//! Work on whole images: comparing and copying them, moving what one of them has into another.
//!
//! All of it is done in windows of the disk, by a few threads, and can be watched and stopped by
//! way of a [`Task`].

mod commit;
mod compare;
mod copy;
mod measure;
mod rebase;
mod share;
mod task;
mod window;
mod zeros;

pub use commit::{CommitOptions, commit};
pub use compare::{Comparison, Difference, compare};
pub use copy::{CopyOptions, copy};
pub use measure::{Measurement, measure};
pub use rebase::rebase;
pub use task::Task;
