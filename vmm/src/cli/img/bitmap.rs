//! `cowshed img bitmap`.

use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, error::ErrorKind};
use cowshed_qcow::Format;

use super::Failure;
use super::common;
use super::open::{Access, Named};
use crate::cli::value;
use crate::disk::lock::Use;

/// Change the bitmaps of an image: they say what was written since they were cleared, for
/// incremental backups.
///
/// What is to be done is done in the order in which it is asked for.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cowshed img bitmap --add disk.qcow2 since-monday
  cowshed img bitmap --disable --merge since-monday disk.qcow2 all
  cowshed img bitmap --remove disk.qcow2 since-monday")]
pub(super) struct BitmapArgs {
    #[command(flatten)]
    steps: Steps,

    /// Bytes that one bit of a new bitmap stands for: a power of two from 512 to 2G
    #[arg(short, long, value_name = "SIZE", value_parser = value::size)]
    granularity: Option<u64>,

    /// The image that has the bitmap to merge; without it, this one
    #[arg(short = 'b', value_name = "IMAGE")]
    source_file: Option<PathBuf>,

    /// Format of that image
    #[arg(short = 'F', value_name = "FORMAT", value_parser = common::format)]
    source_format: Option<Format>,

    /// Format of the image
    #[arg(short, value_name = "FORMAT", value_parser = common::format)]
    format: Option<Format>,

    #[command(flatten)]
    access: Access,

    /// The image
    image: PathBuf,

    /// The bitmap's name
    bitmap: String,
}

/// What is to be done with a bitmap.
#[derive(Clone, Debug)]
enum Step {
    Add,
    Remove,
    Clear,
    Enable,
    Disable,
    Merge(String),
}

/// All of it, in the order of the command line, which a list of flags does not have.
#[derive(Clone, Debug)]
struct Steps(Vec<Step>);

const FLAGS: [(&str, &str, Step); 5] = [
    ("add", "Add the bitmap, enabled, with no bit set", Step::Add),
    ("remove", "Remove it", Step::Remove),
    ("clear", "Clear all of its bits", Step::Clear),
    (
        "enable",
        "Have it set bits for what is written from now on",
        Step::Enable,
    ),
    ("disable", "Have it set no more bits", Step::Disable),
];

impl Args for Steps {
    fn augment_args(command: Command) -> Command {
        let flags = FLAGS.map(|(name, help, _)| {
            Arg::new(name)
                .long(name)
                .help(help)
                .action(ArgAction::SetTrue)
        });
        let merge = Arg::new("merge")
            .long("merge")
            .value_name("BITMAP")
            .help("Set the bits in it that this other bitmap has")
            .action(ArgAction::Append);
        command.args(flags).arg(merge)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Steps {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut steps = Vec::new();
        for (name, _, step) in FLAGS {
            if matches.get_flag(name)
                && let Some(index) = matches.index_of(name)
            {
                steps.push((index, step));
            }
        }
        let sources = matches.get_many::<String>("merge").into_iter().flatten();
        let indices = matches.indices_of("merge").into_iter().flatten();
        steps.extend(indices.zip(sources.map(|source| Step::Merge(source.clone()))));
        if steps.is_empty() {
            let text = "say what to do: --add, --remove, --clear, --enable, --disable or --merge\n";
            return Err(clap::Error::raw(ErrorKind::MissingRequiredArgument, text));
        }
        steps.sort_by_key(|(index, _)| *index);
        Ok(Steps(steps.into_iter().map(|(_, step)| step).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

pub(super) fn run(args: &BitmapArgs) -> Result<u8, Failure> {
    let access = &args.access;
    let granularity = args
        .granularity
        .map(|size| u32::try_from(size).map_err(|_| Failure::Usage("-g can be 512 to 2G".into())));
    let granularity = granularity.transpose()?;
    let source = match &args.source_file {
        None => None,
        Some(path) => {
            let named = Named::path(path, args.source_format);
            Some(access.open_alone(&named, access.reading())?)
        }
    };
    let named = access.name(&args.image, args.format)?;
    let image = access.open_alone(&named, Use::Write)?;
    let merges = args
        .steps
        .0
        .iter()
        .any(|step| matches!(step, Step::Merge(_)));
    if let Some((source, path)) = source.as_ref().zip(args.source_file.as_ref())
        && merges
        && source.size() != image.size()
    {
        return Err(Failure::Usage(format!(
            "the disk of {} has {} bytes and that of {} {}: a bitmap is merged into one of a disk of \
             its own size only",
            path.display(),
            source.size(),
            named.path.display(),
            image.size()
        )));
    }
    let name = &args.bitmap;
    for step in &args.steps.0 {
        match (step, &source) {
            (Step::Add, _) => image.add_bitmap(name, granularity, true)?,
            (Step::Remove, _) => image.remove_bitmap(name)?,
            (Step::Clear, _) => image.clear_bitmap(name)?,
            (Step::Enable, _) => image.enable_bitmap(name)?,
            (Step::Disable, _) => image.disable_bitmap(name)?,
            (Step::Merge(other), None) => image.merge_bitmap(name, other)?,
            (Step::Merge(other), Some(source)) => {
                image.mark_bitmap(name, &source.dirty_ranges(other, 0..source.size())?)?;
            }
        }
    }
    image.close()?;
    Ok(0)
}
