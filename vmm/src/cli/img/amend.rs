//! `cowshed img amend`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use cowshed_qcow::{AmendOptions, Format, Image, KeyCost, ResizeOptions, Secret};

use super::common::{self, Caches};
use super::open::{Access, Named};
use super::secrets::find;
use super::target::is_same;
use super::{Failure, options};
use crate::disk::lock::Use;

/// Change what an image is: its version, its refcounts, its passwords.
#[derive(Args, Debug)]
#[command(after_help = "\
Options:
  compat=1.1|0.10            version 3 or 2 of the format
  refcount_bits=BITS         1, 2, 4, 8, 16, 32 or 64
  lazy_refcounts=on|off
  data_file=NAME             the data file's new name, which is not looked at
  size=SIZE                  as with resize
  encrypt.state=active       add the password encrypt.new-secret=NAME
  encrypt.state=inactive     remove the password encrypt.old-secret=NAME, or that in
                             encrypt.keyslot=N
  encrypt.iter-time=MS       how long it takes to try the new password (default 2000)

Examples:
  cowshed img amend -o compat=1.1 old.qcow2
  cowshed img amend --object secret,id=old,file=old --object secret,id=new,file=new \\
    --image-opts driver=qcow2,file.filename=disk.qcow2,encrypt.key-secret=old \\
    -o encrypt.state=active,encrypt.new-secret=new")]
pub(super) struct AmendArgs {
    /// Format of the image
    #[arg(short, value_name = "FORMAT", value_parser = common::format)]
    format: Option<Format>,

    /// What is to change
    #[arg(short, value_name = "OPTIONS", required = true)]
    options: Vec<String>,

    /// Remove the last password too: nobody can read the disk then
    #[arg(long)]
    force: bool,

    /// Accepted for qemu-img's sake: nothing here takes long
    #[arg(short, hide = true)]
    progress: bool,

    /// Say nothing
    #[arg(short)]
    quiet: bool,

    #[command(flatten)]
    caches: Caches,

    #[command(flatten)]
    access: Access,

    /// The image
    image: PathBuf,
}

/// What the options ask for.
#[derive(Default)]
struct Wanted {
    format: AmendOptions,
    size: Option<u64>,
    data_file: Option<String>,
    /// A password is to be added, or else removed.
    add: Option<bool>,
    new: Option<Secret>,
    old: Option<Secret>,
    slot: Option<usize>,
    cost: KeyCost,
}

pub(super) fn run(args: &AmendArgs) -> Result<u8, Failure> {
    let wanted = parse(args)?;
    let named = args.access.name(&args.image, args.format)?;
    let open = || args.access.open(&named, Use::Write);
    let image = open()?;
    if let Some(name) = &wanted.data_file {
        let place = options::beside(&named.path, name);
        if image.paths().iter().any(|path| is_same(path, &place)) {
            let text =
                format!("{name} is the image itself or beneath it, and cannot have its data");
            return Err(Failure::Usage(text));
        }
    }
    if let Some(size) = wanted.size {
        image.resize(size, &ResizeOptions::default())?;
    }
    if let Some(add) = wanted.add {
        change_keys(args, &named, &image, &wanted, add)?;
    }
    image.amend(&wanted.format)?;
    if let Some(name) = &wanted.data_file {
        open()?.set_data_file(name)?;
    }
    Ok(0)
}

fn parse(args: &AmendArgs) -> Result<Wanted, Failure> {
    let mut wanted = Wanted::default();
    let secret = |id: &str| find(&args.access.object, id).map(Some);
    for (key, value) in args.options.iter().flat_map(|list| options::split(list)) {
        match key.as_str() {
            "compat" => wanted.format.version = Some(options::version(&value)?),
            "refcount_bits" => {
                wanted.format.refcount_bits = Some(options::number(&key, &value)?);
            }
            "lazy_refcounts" => {
                wanted.format.lazy_refcounts = Some(options::switch(&key, &value)?);
            }
            "data_file" => wanted.data_file = Some(value),
            "size" => wanted.size = Some(options::size(&key, &value)?),
            "encrypt.state" => {
                let states = [("active", true), ("inactive", false)];
                wanted.add = Some(options::one_of(&key, &value, &states)?);
            }
            "encrypt.new-secret" => wanted.new = secret(&value)?,
            "encrypt.old-secret" => wanted.old = secret(&value)?,
            "encrypt.keyslot" => wanted.slot = Some(options::number(&key, &value)? as usize),
            "encrypt.iter-time" => {
                let time = options::number(&key, &value)?;
                wanted.cost = KeyCost::Time(Duration::from_millis(time.into()));
            }
            _ => {
                let text = format!("{key:?} cannot be amended: see `cowshed img amend --help`");
                return Err(Failure::Usage(text));
            }
        }
    }
    Ok(wanted)
}

fn change_keys(
    args: &AmendArgs,
    named: &Named,
    image: &Image,
    wanted: &Wanted,
    add: bool,
) -> Result<(), Failure> {
    let usage = |text: &str| Err(Failure::Usage(text.into()));
    if add {
        let Some(new) = &wanted.new else {
            return usage("encrypt.state=active needs encrypt.new-secret=NAME");
        };
        if wanted.slot.is_some() {
            return usage("the key slot of a new password is not chosen: it gets the first free");
        }
        let Some((_, opened_by)) = named.secrets.first() else {
            return usage("the image's own password is needed too: see the example in --help");
        };
        image.add_key(opened_by, new, wanted.cost)?;
        return Ok(());
    }
    let slot = match (wanted.slot, &wanted.old) {
        (Some(slot), _) => slot,
        (None, Some(old)) => image.key_slot_of(old)?,
        (None, None) => {
            return usage("say which password goes: encrypt.old-secret=NAME or encrypt.keyslot=N");
        }
    };
    image.erase_key_slot(slot, args.force)?;
    Ok(())
}
