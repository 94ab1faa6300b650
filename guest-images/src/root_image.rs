//! The default root file system.

use std::path::{Path, PathBuf};

use crate::Error;
use crate::cache::{Cache, Key};
use crate::packages::{self, Needed};
use crate::recipe::Recipe;

const RECIPE: &str = include_str!("../root/build.sh");
const FILES: [(&str, &str); 8] = [
    ("console", include_str!("../root/console")),
    ("fstab", include_str!("../root/fstab")),
    ("group", include_str!("../root/group")),
    ("hostname", include_str!("../root/hostname")),
    ("inittab", include_str!("../root/inittab")),
    ("passwd", include_str!("../root/passwd")),
    ("profile", include_str!("../root/profile")),
    ("rc", include_str!("../root/rc")),
];

pub(crate) fn root_image(cache: &Cache) -> Result<PathBuf, Error> {
    let key = Key::default().with(RECIPE.as_bytes());
    let key = FILES
        .iter()
        .fold(key, |key, (_, text)| key.with(text.as_bytes()))
        .finish();
    let entry = cache.entry(
        &format!("root-{key}"),
        "making the default root image",
        make,
    )?;
    Ok(entry.join("root.qcow2"))
}

fn make(recipe: &Recipe) -> Result<(), Error> {
    packages::require(Needed::RootImage, "the default root image")?;
    for (name, text) in FILES {
        let path = recipe.work.join(name);
        std::fs::write(&path, text).map_err(Error::io(path))?;
    }
    recipe.run(recipe.shell(RECIPE))?;
    let image: &Path = &recipe.out.join("root.qcow2");
    if image.is_file() {
        return Ok(());
    }
    Err(Error::Incomplete {
        what: recipe.what.clone(),
        missing: image.display().to_string(),
    })
}
