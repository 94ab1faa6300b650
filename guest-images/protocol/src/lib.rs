//! What the VMM and the guest's PID 1 say to each other.
#![forbid(unsafe_code)]
