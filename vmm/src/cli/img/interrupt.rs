//! A file with a temporary name goes when a signal ends the command.

use std::path::PathBuf;

use crate::session::signals::Signals;

/// Removes `files`, if they are there, when a signal comes that ends the command, which it then
/// does. Call it before there are other threads.
pub(super) fn remove_when_ended(files: Vec<PathBuf>) -> std::io::Result<()> {
    let signals = Signals::block()?;
    std::thread::Builder::new().spawn(move || {
        let number = signals.wait();
        for file in files {
            // What is not there need not go.
            let _ = std::fs::remove_file(file);
        }
        signals.end_with(number);
    })?;
    Ok(())
}
