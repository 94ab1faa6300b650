//! The programs that run inside a guest, built with cargo from this source tree.

use std::path::{Path, PathBuf};

use crate::Error;
use crate::cache::{Cache, Key, files};

/// They run on any x86-64 Linux, or none: not what the host happens to be built for.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What a person or an outer cargo may have set that would change the program.
const OVERRIDES: &[&str] = &[
    "RUSTFLAGS",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_BUILD_RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "RUSTC_WRAPPER",
    "RUSTC_WORKSPACE_WRAPPER",
];

/// The guest's PID 1 in a release, which has it built in (see `./release`); a build without that
/// makes it on first use, by [`Builder::init`](crate::Builder::init).
pub const EMBEDDED_INIT: Option<&[u8]> = cfg_select! {
    feature = "embed-init" => Some(include_bytes!(env!(
        "COWSHED_EMBED_INIT",
        "the feature embed-init takes the program that this variable names: use ./release"
    ))),
    _ => None,
};

pub(crate) fn init(cache: &Cache) -> Result<PathBuf, Error> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    program(
        cache,
        "cowshed-init",
        &here.join("init"),
        &[&here.join("protocol")],
    )
}

pub(crate) fn metal(cache: &Cache, name: &str) -> Result<PathBuf, Error> {
    program(
        cache,
        name,
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("metal"),
        &[],
    )
}

/// Builds the program `name` of the package in `folder`, whose `.cargo/config.toml` says how; it
/// depends on the packages in `others`.
fn program(cache: &Cache, name: &str, folder: &Path, others: &[&Path]) -> Result<PathBuf, Error> {
    let what = format!("building the guest program {name}");
    let mut key = Key::default();
    for package in others.iter().copied().chain([folder]) {
        if !package.is_dir() {
            let folder = package.to_owned();
            return Err(Error::NoSources {
                what: name.to_owned(),
                folder,
            });
        }
        for path in sources(package)? {
            let content = std::fs::read(&path).map_err(Error::io(&path))?;
            let relative = path.strip_prefix(package).unwrap_or(&path);
            key = key
                .with(relative.as_os_str().as_encoded_bytes())
                .with(&content);
        }
    }
    let entry = cache.entry(
        &format!("program-{name}-{}", key.finish()),
        &what,
        |recipe| {
            let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
            // Kept, so that a change compiles what changed; cargo has its own lock on it.
            let target = cache.folder().join("cargo").join(package_name(folder));
            let mut command = recipe.command(&cargo);
            for name in OVERRIDES {
                command.env_remove(name);
            }
            command.current_dir(folder);
            command.args([
                "build",
                "--release",
                "--locked",
                "--target",
                TARGET,
                "--bin",
                name,
            ]);
            command.arg("--target-dir").arg(&target);
            recipe.run(command)?;
            let built = target.join(TARGET).join("release").join(name);
            std::fs::copy(&built, recipe.out.join(name))
                .map(drop)
                .map_err(Error::io(built))
        },
    )?;
    Ok(entry.join(name))
}

/// What a program is built from: sources, manifest, lock file, linker script, settings.
fn sources(package: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut found = files(&package.join("src"))?;
    for extra in ["Cargo.toml", "Cargo.lock", "link.ld", ".cargo/config.toml"] {
        found.push(package.join(extra));
    }
    found.retain(|path| path.is_file());
    found.sort();
    Ok(found)
}

fn package_name(folder: &Path) -> String {
    folder
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}
