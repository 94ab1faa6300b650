//! The virtual machine monitor: KVM, guest memory, boot protocols, ACPI, PCI, the command line.

pub mod acpi;
pub mod boot;
pub mod cli;
pub mod config;
pub mod cpu;
pub mod disk;
pub mod exit;
pub mod fallback;
pub mod firmware;
mod guest;
pub mod host;
pub mod irq;
pub mod layout;
pub mod machine;
pub mod memory;
mod monitor;
pub mod pci;
pub mod report;
pub mod sandbox;
pub mod session;
mod stderr;
pub mod terminal;
pub mod vcpu;
