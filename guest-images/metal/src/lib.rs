//! A machine with no operating system, as seen from ring 3.
//!
//! Each program in `src/bin` is a guest for a VMM that can boot PVH ELF files. `boot.s` takes
//! the vCPU from the entry point to ring 3, where [`program!`] names the function to run.

#![no_std]

mod start;

pub mod port;
pub mod power;
pub mod serial;
