//! `cowshed img check`.

use std::io::Write as _;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use cowshed_qcow::{CheckOptions, CheckReport, Format, Repair, check, repair};
use serde::Serialize;

use super::Failure;
use super::common::{self, Caches, Output};
use super::open::Access;
use crate::disk::lock::Use;

/// Status of an image with corruptions.
const CORRUPT: u8 = 2;
/// Status of an image with leaks, and nothing worse.
const LEAKS: u8 = 3;
/// Status of a format that cannot be checked.
const UNSUPPORTED: u8 = 63;

/// Check an image's tables.
///
/// Ends with 0 if nothing is wrong, 1 if the image cannot be checked, 2 if it is corrupt, 3 if it
/// has leaked clusters (room that is lost, and nothing worse), 63 if its format has nothing to
/// check.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cowshed img check disk.qcow2
  cowshed img check -r leaks disk.qcow2            lost room back, nothing else
  cowshed img check -r all --output json disk.qcow2")]
pub(super) struct CheckArgs {
    /// Format of the image
    #[arg(short, value_name = "FORMAT", value_parser = common::format)]
    format: Option<Format>,

    /// How to answer
    #[arg(long, value_name = "HOW", default_value = "human")]
    output: Output,

    /// Repair what is wrong, without changing a byte of the disk: `leaks` gives lost room back,
    /// `all` corrects everything that can be
    #[arg(short, value_name = "WHAT")]
    repair: Option<What>,

    /// Say nothing of an image without errors
    #[arg(short)]
    quiet: bool,

    #[command(flatten)]
    caches: Caches,

    #[command(flatten)]
    access: Access,

    /// The image
    image: PathBuf,
}

/// What to repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    /// Refcounts that are too high
    Leaks,
    /// Everything
    All,
}

/// A report as `qemu-img check --output=json` has it.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Json<'a> {
    filename: &'a str,
    format: &'static str,
    check_errors: u64,
    #[serde(skip_serializing_if = "is_zero")]
    image_end_offset: u64,
    #[serde(skip_serializing_if = "is_zero")]
    corruptions: u64,
    #[serde(skip_serializing_if = "is_zero")]
    leaks: u64,
    #[serde(skip_serializing_if = "is_zero")]
    corruptions_fixed: u64,
    #[serde(skip_serializing_if = "is_zero")]
    leaks_fixed: u64,
    #[serde(skip_serializing_if = "is_zero")]
    total_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    allocated_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    fragmented_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    compressed_clusters: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde asks for a reference.
fn is_zero(number: &u64) -> bool {
    *number == 0
}

pub(super) fn run(args: &CheckArgs) -> Result<u8, Failure> {
    let access = &args.access;
    let how = match args.repair {
        Some(_) => Use::Write,
        None => access.reading(),
    };
    let named = access.name(&args.image, args.format)?;
    let (storage, format) = access.file(&named, how)?;
    if format == Format::Raw {
        super::say("a raw image has no tables to check");
        return Ok(UNSUPPORTED);
    }
    let options = CheckOptions::default();
    let report = match args.repair {
        None => check(&named.path, storage, &options)?,
        Some(what) => {
            let what = match what {
                What::Leaks => Repair::Leaks,
                What::All => Repair::All,
            };
            repair(&named.path, storage, what, &options)?
        }
    };
    match args.output {
        Output::Json => json(args, format, &report)?,
        Output::Human if args.quiet && report.is_clean() => {}
        Output::Human => human(&report)?,
    }
    Ok(match (report.corruptions, report.leaks) {
        (0, 0) => 0,
        (0, _) => LEAKS,
        _ => CORRUPT,
    })
}

fn json(args: &CheckArgs, format: Format, report: &CheckReport) -> Result<(), Failure> {
    let document = Json {
        filename: &args.image.to_string_lossy(),
        format: format.name(),
        check_errors: 0,
        image_end_offset: report.image_end_offset,
        corruptions: report.corruptions,
        leaks: report.leaks,
        corruptions_fixed: report.corruptions_fixed,
        leaks_fixed: report.leaks_fixed,
        total_clusters: report.total_clusters,
        allocated_clusters: report.allocated_clusters,
        fragmented_clusters: report.fragmented_clusters,
        compressed_clusters: report.compressed_clusters,
    };
    common::print_json(&document)
}

fn human(report: &CheckReport) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    let (corruptions, leaks) = (report.corruptions_fixed, report.leaks_fixed);
    if corruptions > 0 || leaks > 0 {
        writeln!(
            out,
            "Repaired: {corruptions} errors, {leaks} leaked clusters. What is left:"
        )?;
    }
    for finding in &report.findings {
        writeln!(out, "{finding}")?;
    }
    let hidden = (report.corruptions + report.leaks).saturating_sub(report.findings.len() as u64);
    if hidden > 0 {
        writeln!(out, "... and {hidden} more")?;
    }
    match (report.corruptions, report.leaks) {
        (0, 0) => writeln!(out, "No errors were found on the image.")?,
        (0, leaks) => writeln!(
            out,
            "{leaks} leaked clusters were found on the image. This means waste of disk space, but \
             no harm to data."
        )?,
        (corruptions, leaks) => writeln!(
            out,
            "{corruptions} errors and {leaks} leaked clusters were found on the image. Data may \
             be corrupted, or further writes to the image may corrupt it."
        )?,
    }
    let share = |part: u64, of: u64| part as f64 * 100.0 / of.max(1) as f64;
    writeln!(
        out,
        "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
        report.allocated_clusters,
        report.total_clusters,
        share(report.allocated_clusters, report.total_clusters),
        share(report.fragmented_clusters, report.allocated_clusters),
        share(report.compressed_clusters, report.allocated_clusters),
    )?;
    writeln!(out, "Image end offset: {}", report.image_end_offset)?;
    Ok(())
}
