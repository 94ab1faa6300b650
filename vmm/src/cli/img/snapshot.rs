//! `cowshed img snapshot`.

use std::io::Write as _;
use std::path::PathBuf;

use clap::Args;
use cowshed_qcow::{Format, NewSnapshot, Selector, Snapshot};
use jiff::{Timestamp, tz::TimeZone};

use super::Failure;
use super::common::{self, human};
use super::open::Access;
use crate::disk::lock::Use;

/// Work on the snapshots in an image: earlier states of its disk in the same file.
///
/// Without -a, -c or -d they are listed.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cowshed img snapshot -c before-upgrade disk.qcow2
  cowshed img snapshot disk.qcow2
  cowshed img snapshot -a before-upgrade disk.qcow2")]
pub(super) struct SnapshotArgs {
    /// Format of the image
    #[arg(short, value_name = "FORMAT", value_parser = common::format)]
    format: Option<Format>,

    /// List the snapshots
    #[arg(short, group = "action")]
    list: bool,

    /// Make the disk what it was when this snapshot, an ID or a name, was made; of several of a name
    /// the first is meant. What was written since is lost, unless another snapshot has it
    #[arg(short, value_name = "SNAPSHOT", group = "action")]
    apply: Option<String>,

    /// Make a snapshot of this name
    #[arg(short, value_name = "NAME", group = "action")]
    create: Option<String>,

    /// Delete the snapshot of this name, the first of several
    #[arg(short, value_name = "NAME", group = "action")]
    delete: Option<String>,

    /// Say nothing
    #[arg(short)]
    quiet: bool,

    #[command(flatten)]
    access: Access,

    /// The image
    image: PathBuf,
}

pub(super) fn run(args: &SnapshotArgs) -> Result<u8, Failure> {
    let changes = args.apply.is_some() || args.create.is_some() || args.delete.is_some();
    let access = &args.access;
    let how = if changes {
        Use::Write
    } else {
        access.reading()
    };
    let named = access.name(&args.image, args.format)?;
    let image = access.open_alone(&named, how)?;
    if let Some(which) = &args.apply {
        image.apply_snapshot(&Selector::IdOrName(which.clone()))?;
    } else if let Some(name) = &args.create {
        image.create_snapshot(&NewSnapshot::new(name))?;
    } else if let Some(name) = &args.delete {
        image.delete_snapshot(&Selector::Name(name.clone()))?;
    } else {
        list(&image.snapshots()?)?;
    }
    Ok(0)
}

/// A table, if there is something to show.
pub(super) fn list(snapshots: &[Snapshot]) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    if snapshots.is_empty() {
        return Ok(());
    }
    writeln!(
        out,
        "{:<6}{:<24}{:>12}{:>12}  {:<20}{:>14}",
        "ID", "NAME", "DISK", "VM STATE", "DATE", "VM CLOCK"
    )?;
    for snapshot in snapshots {
        let date = Timestamp::try_from(snapshot.date).map_or_else(
            |_| "?".to_owned(),
            |date| {
                let local = date.to_zoned(TimeZone::system());
                local.strftime("%Y-%m-%d %H:%M:%S").to_string()
            },
        );
        let clock = snapshot.vm_clock;
        let (minutes, seconds) = (clock.as_secs() / 60, clock.as_secs() % 60);
        let clock = format!(
            "{:02}:{:02}:{seconds:02}.{:03}",
            minutes / 60,
            minutes % 60,
            clock.subsec_millis()
        );
        writeln!(
            out,
            "{:<6}{:<24}{:>12}{:>12}  {date:<20}{clock:>14}",
            snapshot.id,
            snapshot.name,
            human(snapshot.disk_size),
            human(snapshot.vm_state_size),
        )?;
    }
    Ok(())
}
