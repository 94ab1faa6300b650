//! The command line: one file a subcommand.

mod disk_option;
mod doctor;
mod img;
mod run;
mod shell;
mod value;

use std::ffi::OsString;
use std::io::{IsTerminal, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgAction, Parser, Subcommand, ValueEnum};
use tracing::level_filters::LevelFilter;

use crate::report::{Outcome, Report, chain, printable, status};
use crate::session;
use crate::stderr::Stderr;

/// Boots Linux guests on KVM in milliseconds, on copy-on-write disks.
#[derive(Parser, Debug)]
#[command(
    name = "cowshed",
    version,
    max_term_width = 100,
    after_help = "\
Examples:
  cowshed run -- uname -a        boot the default guest, run a command in it
  cowshed run debian.qcow2       boot your own image; it is not changed
  cowshed img create -f qcow2 disk.qcow2 20G
  cowshed doctor                 check what this host offers"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,

    /// Log more to standard error: -v what happens, -vv details, -vvv everything
    #[arg(short, long, global = true, display_order = 900, action = ArgAction::Count)]
    verbose: u8,

    /// How log lines look
    #[arg(
        long,
        global = true,
        display_order = 901,
        value_name = "FORMAT",
        default_value = "text"
    )]
    log_format: LogFormat,
}

#[derive(Subcommand, Debug)]
enum Command {
    Run(Box<run::RunArgs>),
    Doctor(doctor::DoctorArgs),
    /// Work on disk images, with qemu-img's names and flags
    Img(Box<img::ImgArgs>),
    Completions(shell::CompletionsArgs),
    Man(shell::ManArgs),
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    /// Lines for people
    Text,
    /// One JSON object a line
    Json,
}

/// The `cowshed` program.
#[must_use]
pub fn main() -> ExitCode {
    one_heap();
    let args: Vec<OsString> = std::env::args_os().collect();
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => return refuse(&error, &args),
    };
    start_logging(cli.verbose, cli.log_format);
    match cli.command {
        Command::Doctor(args) => doctor::run(&args),
        Command::Img(args) => img::run(*args),
        Command::Completions(args) => shell::completions(&args),
        Command::Man(args) => shell::man(&args),
        Command::Run(run) => {
            let dashes = args.last().is_some_and(|last| last == "--");
            let (report, path) = match run.into_config(dashes) {
                Ok(config) => (session::run(&config), config.report),
                Err(error) => (Outcome::Usage(error.to_string()).into(), report_path(&args)),
            };
            finish(&report, path)
        }
    }
}

/// Says what there is to say of a run's end and gives its status.
fn finish(report: &Report, path: Option<PathBuf>) -> ExitCode {
    // The report first: nobody may be reading standard error.
    let written = path.map_or(Ok(()), |path| report.write(&path));
    if let Some(message) = report.outcome.message() {
        say(&message);
    }
    match written {
        Ok(()) => ExitCode::from(report.outcome.status()),
        Err(error) => {
            say(&chain(&error));
            ExitCode::from(status::VMM_ERROR)
        }
    }
}

/// A command line that clap refuses, or one that asks for help.
fn refuse(error: &clap::Error, args: &[OsString]) -> ExitCode {
    // Nothing is to be done about a closed terminal.
    let _ = error.print();
    if !error.use_stderr() {
        return ExitCode::SUCCESS;
    }
    if args.get(1).is_some_and(|command| command == "img") {
        return ExitCode::from(img::FAILED);
    }
    let message = error.to_string();
    let first = message.lines().next().unwrap_or_default();
    let report = Report::from(Outcome::Usage(first.to_owned()));
    match report_path(args).map_or(Ok(()), |path| report.write(&path)) {
        Ok(()) => {}
        Err(error) => say(&chain(&error)),
    }
    ExitCode::from(status::USAGE)
}

/// `--report`'s value in a command line that was refused.
fn report_path(args: &[OsString]) -> Option<PathBuf> {
    let mut args = args.iter().take_while(|arg| *arg != "--");
    while let Some(arg) = args.next() {
        if arg == "--report" {
            return args.next().map(PathBuf::from);
        }
        if let Some(path) = arg.to_str().and_then(|arg| arg.strip_prefix("--report=")) {
            return Some(PathBuf::from(path));
        }
    }
    None
}

/// Has the C library keep one heap for all threads: less memory, a faster start, and nothing to ask the
/// host's files about when it shrinks, which the sandbox would not allow.
fn one_heap() {
    // SAFETY: there are no other threads yet.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

fn start_logging(verbose: u8, format: LogFormat) {
    let level = match verbose {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let log = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(|| Stderr);
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
}

/// A line on standard error, which may be closed.
fn say(message: &str) {
    let message = printable(message);
    let _ = Stderr.write_all(format!("cowshed: {message}\n").as_bytes());
}

#[cfg(test)]
mod tests;
