//! The guest's text console: kept for error messages, logged, shown, and watched for a panic.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::sink::Sink;
use crate::report::printable;

/// How much of the console's end is kept, in bytes.
const KEPT: usize = 16 << 10;
/// How many lines of it an error shows.
const SHOWN: usize = 15;
/// A panic's last words: a message further back than this is one that the guest survived, or
/// somebody read aloud.
const LAST_WORDS: usize = 200;
/// Longest line that is looked at for a panic.
const LINE: usize = 1024;
/// How x86 Linux begins the message.
const PANIC: &str = "Kernel panic - not syncing: ";
/// What it says when nothing more will come: it waits for a reset, or for ever.
const PANIC_ENDS: [&str; 2] = ["---[ end Kernel panic", "Rebooting in "];

/// The console of one run. Clones share it.
#[derive(Clone)]
pub(super) struct Console(Arc<Mutex<State>>);

struct State {
    kept: VecDeque<u8>,
    line: Vec<u8>,
    panic: Option<String>,
    lines_since: usize,
    on_panic: Box<dyn Fn(&str) + Send>,
    copies: Vec<Sink>,
}

impl Console {
    /// A console that writes what it hears to `copies`, and calls `on_panic` with the message once
    /// the guest's kernel has said all of its last words.
    pub(super) fn new(copies: Vec<Sink>, on_panic: impl Fn(&str) + Send + 'static) -> Self {
        Self(Arc::new(Mutex::new(State {
            kept: VecDeque::new(),
            line: Vec::new(),
            panic: None,
            lines_since: 0,
            on_panic: Box::new(on_panic),
            copies,
        })))
    }

    /// The panic's message, if there was one.
    pub(super) fn panic(&self) -> Option<String> {
        self.state().panic.clone()
    }

    /// The last lines, without control characters.
    pub(super) fn last_lines(&self) -> Vec<String> {
        let bytes: Vec<u8> = self.state().kept.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<String> = text
            .lines()
            .map(printable)
            .filter(|line| !line.trim().is_empty())
            .collect();
        lines[lines.len().saturating_sub(SHOWN)..].to_vec()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.state();
        // A copy that fails (a closed terminal, a full disk) is let go: the guest goes on.
        state.copies.retain_mut(|copy| {
            let written = copy.write_all(bytes);
            written
                .inspect_err(|error| tracing::warn!(%error, "console output is lost"))
                .is_ok()
        });
        state.keep(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl State {
    fn keep(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if self.kept.len() == KEPT {
                self.kept.pop_front();
            }
            self.kept.push_back(*byte);
            if *byte == b'\n' {
                self.end_line();
            } else if self.line.len() < LINE {
                self.line.push(*byte);
            }
        }
    }

    fn end_line(&mut self) {
        let line = std::mem::take(&mut self.line);
        let line = String::from_utf8_lossy(&line);
        self.lines_since += 1;
        if let Some((_, message)) = line.split_once(PANIC) {
            self.panic.get_or_insert_with(|| message.trim().to_owned());
            self.lines_since = 0;
        } else if self.lines_since > LAST_WORDS {
            self.panic = None;
        }
        if let Some(message) = &self.panic
            && PANIC_ENDS.iter().any(|end| line.contains(end))
        {
            (self.on_panic)(message);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn a_panic_is_told_when_its_last_line_came() -> io::Result<()> {
        let ends = Arc::new(AtomicU32::new(0));
        let counter = ends.clone();
        let mut console = Console::new(Vec::new(), move |_| {
            counter.fetch_add(1, Ordering::Relaxed);
        });
        console.write_all(b"[1.0] Kernel panic - not syncing: Attempted to kill init!\r\n")?;
        assert_eq!(console.panic().as_deref(), Some("Attempted to kill init!"));
        assert_eq!(ends.load(Ordering::Relaxed), 0);
        console.write_all(b"[1.1] ---[ end Kernel panic - not syncing: Attempted ]---\r\n")?;
        assert_eq!(ends.load(Ordering::Relaxed), 1);
        Ok(())
    }

    #[test]
    fn the_last_lines_are_fit_to_be_shown() -> io::Result<()> {
        let mut console = Console::new(Vec::new(), |_| {});
        for number in 0..20_000 {
            write!(console, "line {number}\r\n")?;
        }
        console.write_all(b"\x1b[31mred\xff\r\n\r\n")?;
        let lines = console.last_lines();
        assert_eq!(lines.len(), SHOWN);
        assert_eq!(lines.last().map(String::as_str), Some("[31mred\u{fffd}"));
        assert_eq!(lines[SHOWN - 2], "line 19999");
        Ok(())
    }
}
