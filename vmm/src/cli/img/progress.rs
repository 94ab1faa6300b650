//! Progress of long work, for those who look.

use std::io::{IsTerminal, Write as _};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use clap::Args;
use cowshed_qcow::ops::Task;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How long work may take before progress is shown.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often it is shown.
const TICK: Duration = Duration::from_millis(200);

/// What people want to see of long work.
#[derive(Args, Debug)]
pub(super) struct Progress {
    /// Show progress, also where standard error is no terminal
    #[arg(short)]
    progress: bool,

    /// Say nothing
    #[arg(short)]
    pub(super) quiet: bool,
}

/// Runs `work` and shows how far its task is: on a terminal once it takes a while, and with -p from
/// the beginning, on whatever standard error is. Nothing with -q.
pub(super) fn watch<T>(wanted: &Progress, task: &Task, work: impl FnOnce(&Task) -> T) -> T {
    let always = wanted.progress;
    let terminal = std::io::stderr().is_terminal();
    if wanted.quiet || !(terminal || always) {
        return work(task);
    }
    let (ended, end) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let patience = if always { TICK } else { PATIENCE };
            if end.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
                show(task, terminal, &end);
            }
        });
        let result = work(task);
        drop(ended);
        result
    })
}

fn show(task: &Task, terminal: bool, end: &mpsc::Receiver<()>) {
    if !terminal {
        let mut said = None;
        while end.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
            let percent = task.done() * 100 / task.total().max(1);
            if said.replace(percent) != Some(percent) {
                // Nobody may be reading.
                let _ = writeln!(std::io::stderr(), "{percent}%");
            }
        }
        return;
    }
    let bar = ProgressBar::with_draw_target(Some(task.total()), ProgressDrawTarget::stderr());
    if let Ok(style) =
        ProgressStyle::with_template("{bar:30} {percent:>3}%  {binary_bytes_per_sec}, {eta} left")
    {
        bar.set_style(style);
    }
    while end.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
        bar.set_length(task.total());
        bar.set_position(task.done());
    }
    bar.finish_and_clear();
}
