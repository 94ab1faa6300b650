//! A machine with no operating system, as seen from ring 3.
//!
//! Each program in `src/bin` is a guest for a VMM that can boot PVH ELF files. `boot.s` takes
//! the vCPU from the entry point to ring 3, where [`program!`] names the function to run. To
//! see how a driver works, read [`pci`], then [`virtio`], [`queue`] and [`blk`].

#![no_std]

mod start;

pub mod args;
pub mod blk;
pub mod entropy;
pub mod interrupt;
pub mod memory;
pub mod outcome;
pub mod pattern;
pub mod pci;
pub mod port;
pub mod power;
pub mod queue;
pub mod random;
pub mod serial;
pub mod soak;
pub mod time;
pub mod virtio;
