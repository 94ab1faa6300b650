//! `cowshed img map`.

use std::io::{BufWriter, Write};
use std::path::PathBuf;

use clap::Args;
use cowshed_qcow::{Format, Image, MapEntry};
use serde::Serialize;

use super::Failure;
use super::common::{self, Output};
use super::open::Access;
use crate::cli::value;

/// Show where an image's bytes are.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cowshed img map disk.qcow2
  cowshed img map --output json -s 1G -l 64M disk.qcow2")]
pub(super) struct MapArgs {
    /// Format of the image
    #[arg(short, value_name = "FORMAT", value_parser = common::format)]
    format: Option<Format>,

    /// How to answer
    #[arg(long, value_name = "HOW", default_value = "human")]
    output: Output,

    /// Where on the disk to begin
    #[arg(short, long, value_name = "OFFSET", value_parser = value::size, default_value = "0")]
    start_offset: u64,

    /// How much of the disk to look at
    #[arg(short = 'l', long, value_name = "LENGTH", value_parser = value::size)]
    max_length: Option<u64>,

    #[command(flatten)]
    access: Access,

    /// The image
    image: PathBuf,
}

/// An entry as `qemu-img map --output=json` has it.
#[derive(Serialize)]
struct Entry {
    start: u64,
    length: u64,
    depth: usize,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
}

pub(super) fn run(args: &MapArgs) -> Result<u8, Failure> {
    let named = args.access.name(&args.image, args.format)?;
    let image = args.access.open(&named, args.access.reading())?;
    let start = args.start_offset.min(image.size());
    let len = (image.size() - start).min(args.max_length.unwrap_or(u64::MAX));
    let mut out = BufWriter::new(std::io::stdout().lock());
    match args.output {
        Output::Human => human(&image, start, len, &mut out)?,
        Output::Json => json(&image, start, len, &mut out)?,
    }
    out.flush()?;
    Ok(0)
}

/// Runs `write` for each entry; an error of its own comes back apart from the image's.
fn each(
    image: &Image,
    start: u64,
    len: u64,
    mut write: impl FnMut(&MapEntry) -> std::io::Result<()>,
) -> Result<(), Failure> {
    let mut failed = Ok(());
    image.map(start, len, &mut |entry| {
        if failed.is_ok() {
            failed = write(&entry);
        }
        Ok(())
    })?;
    Ok(failed?)
}

fn human(image: &Image, start: u64, len: u64, out: &mut impl Write) -> Result<(), Failure> {
    let files = image.paths();
    writeln!(
        out,
        "{:<16}{:<16}{:<16}File",
        "Offset", "Length", "Mapped to"
    )?;
    each(image, start, len, |entry| {
        if !entry.data || entry.zero {
            return Ok(());
        }
        let place = match entry.offset {
            Some(offset) => format!("{offset:#x}"),
            None => "compressed".to_owned(),
        };
        let file = files.get(entry.depth).map(|path| path.display());
        let file = file.map_or(String::new(), |path| path.to_string());
        let (at, len) = (format!("{:#x}", entry.start), format!("{:#x}", entry.len));
        writeln!(out, "{at:<16}{len:<16}{place:<16}{file}")
    })
}

fn json(image: &Image, start: u64, len: u64, out: &mut impl Write) -> Result<(), Failure> {
    let mut between = "[";
    each(image, start, len, |entry| {
        let entry = Entry {
            start: entry.start,
            length: entry.len,
            depth: entry.depth,
            present: entry.present,
            zero: entry.zero,
            data: entry.data,
            compressed: entry.compressed,
            offset: entry.offset,
        };
        out.write_all(between.as_bytes())?;
        between = ",\n";
        serde_json::to_writer(&mut *out, &entry).map_err(std::io::Error::from)
    })?;
    writeln!(out, "{}]", if between == "[" { "[" } else { "" })?;
    Ok(())
}
