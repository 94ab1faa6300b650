//! The virtual machine monitor: KVM, guest memory, boot protocols, ACPI, PCI, the command line.
