//! Telling a person what takes so long.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// Where steps that take a while are announced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// A spinner on standard error.
    Spinner,
    /// A line a step on standard error.
    Lines,
    /// Nowhere.
    Silent,
}

impl Progress {
    /// A spinner if standard error is a terminal, else a line a step.
    pub fn to_stderr() -> Self {
        if std::io::stderr().is_terminal() {
            Self::Spinner
        } else {
            Self::Lines
        }
    }

    /// Announces a step that lasts until the result is dropped.
    pub(crate) fn step(self, what: &str) -> Step {
        match self {
            Self::Silent => Step(None),
            Self::Lines => {
                eprintln!("cowshed: {what}");
                Step(None)
            }
            Self::Spinner => {
                let bar = ProgressBar::new_spinner().with_message(what.to_owned());
                if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
                    bar.set_style(style);
                }
                bar.enable_steady_tick(Duration::from_millis(120));
                Step(Some(bar))
            }
        }
    }
}

/// A step under way.
pub(crate) struct Step(Option<ProgressBar>);

impl Step {
    /// Says how far it is: the last line of a build's output.
    pub(crate) fn detail(&self, what: &str, line: &str) {
        if let Some(bar) = &self.0 {
            let line: String = line
                .trim()
                .chars()
                .filter(|c| !c.is_control())
                .take(50)
                .collect();
            bar.set_message(format!("{what}: {line}"));
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}
