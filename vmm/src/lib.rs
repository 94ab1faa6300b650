//! The virtual machine monitor: KVM, guest memory, boot protocols, ACPI, PCI, the command line.

pub mod acpi;
pub mod boot;
pub mod cli;
pub mod config;
pub mod cpu;
pub mod exit;
pub mod fallback;
pub mod irq;
pub mod layout;
pub mod memory;
pub mod pci;
pub mod report;
pub mod vcpu;
