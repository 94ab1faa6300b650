//! The qcow2 format: backing chains, copy-on-write, and nothing of virtio or KVM.
#![forbid(unsafe_code)]
