//! Gives libFuzzer something to begin with, in `corpus/TARGET`: the valid images, and what crashed
//! once.

use std::fs;
use std::io;
use std::path::Path;

use cowshed_fuzz::{TARGETS, from_hex};

fn main() -> io::Result<()> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    convert(&here.join("images"), &here.join("corpus/header"))?;
    for (target, _) in TARGETS {
        let from = here.join("regressions").join(target);
        convert(&from, &here.join("corpus").join(target))?;
    }
    Ok(())
}

/// Writes the bytes of each text file of a folder, if it is there, to another.
fn convert(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    if !from.exists() {
        return Ok(());
    }
    for file in fs::read_dir(from)? {
        let path = file?.path();
        if let (Some("hex"), Some(name)) = (
            path.extension().and_then(|extension| extension.to_str()),
            path.file_stem(),
        ) {
            fs::write(to.join(name), from_hex(&fs::read_to_string(&path)?))?;
        }
    }
    Ok(())
}
