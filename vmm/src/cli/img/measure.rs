//! `cowshed img measure`.

use std::io::Write as _;
use std::path::PathBuf;

use clap::Args;
use cowshed_qcow::ops::measure;
use cowshed_qcow::{Format, Image};
use serde::Serialize;

use super::Failure;
use super::common::{self, Output};
use super::open::Access;
use super::options::Wanted;
use crate::cli::value;

/// Say how large the file of a new image would be.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cowshed img measure -O qcow2 --size 20G
  cowshed img measure -O qcow2 disk.raw -f raw")]
pub(super) struct MeasureArgs {
    /// Format of the image that is there
    #[arg(short, value_name = "FORMAT", value_parser = common::format)]
    format: Option<Format>,

    /// Format of the new image
    #[arg(short = 'O', value_name = "FORMAT", value_parser = common::format, default_value = "raw")]
    output_format: Format,

    /// Options of the new image's format; `create -o help` lists them
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,

    /// Size of a new disk without content
    #[arg(long, value_name = "SIZE", value_parser = value::size, conflicts_with = "image")]
    size: Option<u64>,

    /// How to answer
    #[arg(long, value_name = "HOW", default_value = "human")]
    output: Output,

    #[command(flatten)]
    access: Access,

    /// The image whose content the new one is to have
    #[arg(required_unless_present = "size")]
    image: Option<PathBuf>,
}

/// As `qemu-img measure --output=json` has it.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Json {
    required: u64,
    fully_allocated: u64,
    /// What `convert --bitmaps` would add, where both formats have bitmaps.
    #[serde(skip_serializing_if = "Option::is_none")]
    bitmaps: Option<u64>,
}

pub(super) fn run(args: &MeasureArgs) -> Result<u8, Failure> {
    let source = match &args.image {
        None => None,
        Some(path) => {
            let named = args.access.name(path, args.format)?;
            Some(args.access.open(&named, args.access.reading())?)
        }
    };
    let wanted = Wanted::parse(&args.options, None, None)?;
    let size = source.as_ref().map_or(0, Image::size);
    let size = args.size.or(wanted.size).unwrap_or(size);
    let size = size
        .checked_next_multiple_of(512)
        .ok_or_else(|| Failure::Usage("the size is too large".into()))?;
    let found = match args.output_format {
        Format::Raw => Json {
            required: size,
            fully_allocated: size,
            bitmaps: None,
        },
        Format::Qcow2 => {
            let options = wanted.qcow2(size, &args.access.object)?;
            let found = measure(&options, source.as_ref())?;
            Json {
                required: found.required,
                fully_allocated: found.fully_allocated,
                bitmaps: match &source {
                    Some(source) if options.version >= 3 => bitmaps(source, options.cluster_size)?,
                    _ => None,
                },
            }
        }
    };
    if args.output == Output::Json {
        return common::print_json(&found).map(|()| 0);
    }
    let mut out = std::io::stdout().lock();
    writeln!(out, "required size: {}", found.required)?;
    writeln!(out, "fully allocated size: {}", found.fully_allocated)?;
    if let Some(bytes) = found.bitmaps {
        writeln!(out, "bitmaps size: {bytes}")?;
    }
    Ok(0)
}

/// Room that the bitmaps of `source` take in an image of such clusters: their bits, the table of
/// each, the directory of all. `None` if it can have none.
fn bitmaps(source: &Image, cluster: u32) -> Result<Option<u64>, Failure> {
    if source.format(0) != Some(Format::Qcow2) {
        return Ok(None);
    }
    let cluster = u64::from(cluster);
    let (mut size, mut directory) = (0, 0);
    for bitmap in source.bitmaps()? {
        let bytes = source.size().div_ceil(bitmap.granularity).div_ceil(8);
        let clusters = bytes.div_ceil(cluster);
        size += clusters * cluster + (clusters * 8).next_multiple_of(cluster);
        directory += (24 + bitmap.name.len() as u64).next_multiple_of(8);
    }
    Ok(Some(size + directory.next_multiple_of(cluster)))
}
