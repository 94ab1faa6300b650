//! `cowshed img`: disk images, with the names and flags of `qemu-img`.

mod amend;
mod bitmap;
mod check;
mod commit;
mod common;
mod compare;
mod convert;
mod create;
mod info;
mod interrupt;
mod map;
mod measure;
mod open;
mod options;
mod progress;
mod rebase;
mod resize;
mod secrets;
mod snapshot;
mod target;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgMatches, Args, FromArgMatches, Subcommand};

use super::say;
use crate::disk;
use crate::report::chain;

/// The command, of which the words are defined when it is asked for: the start of a guest does not
/// wait for them.
#[derive(Debug)]
pub(super) struct ImgArgs(Words);

impl Args for ImgArgs {
    fn augment_args(command: clap::Command) -> clap::Command {
        command.defer(Words::augment_args)
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for ImgArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        Words::from_arg_matches(matches).map(Self)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.0.update_from_arg_matches(matches)
    }
}

/// Work on disk images, with qemu-img's names and flags.
///
/// Formats are named with -f, -F and -O. An image that is named on the command line is recognised
/// as qcow2; raw is raw only when you say so. Images are locked as QEMU locks them: none is
/// changed while a VM uses it.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cowshed img create -f qcow2 disk.qcow2 20G                         a new disk
  cowshed img create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2   one that starts as another is
  cowshed img info overlay.qcow2                                     what it is, and what is beneath
  cowshed img convert -f raw -O qcow2 disk.raw copy.qcow2            another format
  cowshed img convert -O qcow2 -c overlay.qcow2 small.qcow2          one file to give away
  cowshed img commit overlay.qcow2                                   what was written goes to the base
  cowshed img rebase -b '' overlay.qcow2                             no base any more
  cowshed img resize disk.qcow2 +10G                                 room for more
  cowshed img snapshot -c before disk.qcow2                          a state to go back to,
  cowshed img snapshot -a before disk.qcow2                          and back
  cowshed img check disk.qcow2                                       is it sound?

`alias qemu-img='cowshed img'` keeps scripts working that name formats and parse JSON.")]
struct Words {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Amend(amend::AmendArgs),
    Bitmap(bitmap::BitmapArgs),
    Check(check::CheckArgs),
    Commit(commit::CommitArgs),
    Compare(compare::CompareArgs),
    Convert(convert::ConvertArgs),
    Create(create::CreateArgs),
    Info(info::InfoArgs),
    Map(map::MapArgs),
    Measure(measure::MeasureArgs),
    Rebase(rebase::RebaseArgs),
    Resize(resize::ResizeArgs),
    Snapshot(snapshot::SnapshotArgs),
    #[command(hide = true)]
    Dd(Anything),
    #[command(hide = true)]
    Bench(Anything),
}

/// Whatever follows.
#[derive(Args, Debug)]
struct Anything {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    _words: Vec<std::ffi::OsString>,
}

/// Status of a command that failed, as with `qemu-img`.
pub(super) const FAILED: u8 = 1;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// The command line contradicts itself, or asks for what there is not.
    #[error("{0}")]
    Usage(String),
    /// A file cannot be opened, or is not what was said of it.
    #[error(transparent)]
    Disk(disk::Error),
    /// A file to be read, which another process writes.
    #[error("cannot open the image {}, or only with -U and whatever it has just now", path.display())]
    Busy {
        /// The file.
        path: PathBuf,
        /// Who writes it.
        source: std::io::Error,
    },
    /// A file without qcow2's magic number and of no named format.
    #[error(
        "{} is not a qcow2 image; if it is the disk's bytes as they are, say so: -f raw, and -F raw \
         of the second image of compare", .0.display()
    )]
    Unnamed(PathBuf),
    /// What qemu-img has and this has not.
    #[error("there is no cowshed img {command}: {instead}")]
    Missing {
        /// qemu-img's name for it.
        command: &'static str,
        /// What does the same.
        instead: &'static str,
    },
    /// An encrypted image without its password, or with another.
    #[error(
        "{0} (a password comes with --object secret,id=NAME,file=FILE --image-opts \
         driver=qcow2,file.filename=IMAGE,encrypt.key-secret=NAME)"
    )]
    Locked(cowshed_qcow::Error),
    /// An image cannot be read or written.
    #[error(transparent)]
    Image(cowshed_qcow::Error),
    /// A file of the host cannot be made.
    #[error("cannot create {}", path.display())]
    Create {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Standard output cannot be written.
    #[error("cannot write to standard output")]
    Output(#[from] std::io::Error),
}

impl From<disk::Error> for Failure {
    fn from(error: disk::Error) -> Self {
        match error {
            disk::Error::Unnamed(path) => Self::Unnamed(path),
            error => Self::Disk(error),
        }
    }
}

impl From<cowshed_qcow::Error> for Failure {
    fn from(error: cowshed_qcow::Error) -> Self {
        match error {
            cowshed_qcow::Error::Locked { .. } => Self::Locked(error),
            error => Self::Image(error),
        }
    }
}

fn missing(command: &'static str, instead: &'static str) -> Result<u8, Failure> {
    Err(Failure::Missing { command, instead })
}

/// Runs a command and gives its status.
pub(super) fn run(args: ImgArgs) -> ExitCode {
    let (result, failed) = match args.0.command {
        Command::Amend(args) => (amend::run(&args), FAILED),
        Command::Bitmap(args) => (bitmap::run(&args), FAILED),
        Command::Check(args) => (check::run(&args), FAILED),
        Command::Commit(args) => (commit::run(&args), FAILED),
        Command::Compare(args) => (compare::run(&args), compare::FAILED),
        Command::Convert(args) => (convert::run(&args), FAILED),
        Command::Create(args) => (create::run(&args), FAILED),
        Command::Info(args) => (info::run(&args), FAILED),
        Command::Map(args) => (map::run(&args), FAILED),
        Command::Measure(args) => (measure::run(&args), FAILED),
        Command::Rebase(args) => (rebase::run(&args), FAILED),
        Command::Resize(args) => (resize::run(&args), FAILED),
        Command::Snapshot(args) => (snapshot::run(&args), FAILED),
        Command::Dd(_) => {
            let instead = "convert copies images, and dd copies parts of what convert -O raw makes";
            (missing("dd", instead), FAILED)
        }
        Command::Bench(_) => {
            let instead = "measure within a guest, with fio for example, or with qemu-img";
            (missing("bench", instead), FAILED)
        }
    };
    result.map_or_else(
        |failure| {
            say(&chain(&failure));
            ExitCode::from(failed)
        },
        ExitCode::from,
    )
}
