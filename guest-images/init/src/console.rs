//! Telling who reads the console, through the kernel's log.

use alloc::format;

use rustix::fs::{Mode, OFlags};

/// Says something as an error, which is shown unless even errors are turned off.
pub(crate) fn say(message: &str) {
    if let Ok(log) = rustix::fs::open("/dev/kmsg", OFlags::WRONLY, Mode::empty()) {
        let _ = rustix::io::write(log, format!("<3>cowshed-init: {message}\n").as_bytes());
    }
}
