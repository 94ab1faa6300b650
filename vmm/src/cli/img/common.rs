//! What most commands ask for: formats, output.

use std::io::Write as _;

use clap::{Args, ValueEnum};
use cowshed_qcow::Format;

use super::Failure;

/// How a command answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Output {
    /// For people
    Human,
    /// qemu-img's JSON
    Json,
}

/// qemu-img's cache modes. Files are read and written by way of the host's cache with all of them;
/// what differs is whether a new image is waited for until it is on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Cache {
    /// Not waited for
    Unsafe,
    /// On the disk when the command ends, as with the three that follow
    Writeback,
    None,
    Writethrough,
    Directsync,
}

/// Cache modes where they change nothing: what is changed is on the disk when the command ends.
#[derive(Args, Debug)]
pub(super) struct Caches {
    /// Taken for scripts: changes are on the disk when the command ends, whatever is said here
    #[arg(short = 't', value_name = "CACHE")]
    cache: Option<Cache>,

    /// Taken for scripts: files are read by way of the host's cache
    #[arg(short = 'T', value_name = "CACHE")]
    source_cache: Option<Cache>,
}

/// A format by its name on the command line.
pub(super) fn format(name: &str) -> Result<Format, String> {
    Format::from_name(name).ok_or_else(|| match name {
        "luks" => "luks is a way to encrypt qcow2 here: -f qcow2 -o encrypt.format=luks".into(),
        _ => format!(
            "the format {name:?} is not supported: qcow2 and raw are (convert it with qemu-img)"
        ),
    })
}

/// How many threads work at a time.
pub(super) fn threads() -> usize {
    std::thread::available_parallelism().map_or(2, |n| n.get().min(4))
}

/// A size for people: 1.5 GiB.
pub(super) fn human(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

/// Prints a document as JSON, for people to look at too.
pub(super) fn print_json(document: &impl serde::Serialize) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, document).map_err(std::io::Error::from)?;
    writeln!(out)?;
    Ok(())
}
