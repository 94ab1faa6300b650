//! `-o`: the options of a new image.

use std::path::Path;
use std::time::Duration;

use cowshed_qcow::{
    Compression, CreateOptions, Format, KeyCost, NewEncryption, Preallocation, Secret,
};

use super::Failure;
use super::secrets::{SecretObject, find};
use crate::cli::value;

/// The options of the formats, as `-o help` shows them.
pub(super) const HELP: &str = "\
Options of qcow2:
  size=SIZE               size of the disk, instead of the argument
  backing_file=NAME       as -b
  backing_fmt=FORMAT      as -F
  compat=1.1|0.10         version 3 (the default) or 2 of the format
  cluster_size=SIZE       512 to 2M, a power of two (default 64k)
  refcount_bits=BITS      1, 2, 4, 8, 16, 32 or 64 (default 16)
  compression_type=TYPE   zlib (the default) or zstd
  extended_l2=on|off      parts of clusters are allocated apart; clusters of at least 16k
  lazy_refcounts=on|off   refcounts are written late, and counted anew after a crash
  preallocation=MODE      off (the default), metadata, falloc or full
  encrypt.format=FORMAT   luks, or aes, which is weak and for old programs only
  encrypt.key-secret=NAME password of the image: the --object secret of that name
  encrypt.iter-time=MS    how long it takes to try a password (default 2000)
  data_file=NAME          a file of its own for the guest's data
  data_file_raw=on|off    that file is a raw image at all times
Options of raw:
  size=SIZE
  preallocation=MODE      off (the default), falloc or full
";

/// What `-o` and its shorter forms ask for.
#[derive(Clone, Debug, Default)]
pub(super) struct Wanted {
    pub(super) size: Option<u64>,
    pub(super) backing_file: Option<String>,
    pub(super) backing_format: Option<Format>,
    /// Everything else, of a disk of no size.
    other: Vec<(String, String)>,
}

impl Wanted {
    /// Takes the values of all `-o`, which are joined, and what flags say of a backing file.
    pub(super) fn parse(
        options: &[String],
        backing: Option<&str>,
        backing_format: Option<Format>,
    ) -> Result<Self, Failure> {
        let mut wanted = Self::default();
        for (key, value) in options.iter().flat_map(|list| split(list)) {
            match key.as_str() {
                "size" => wanted.size = Some(size(&key, &value)?),
                "backing_file" => wanted.backing_file = Some(value),
                "backing_fmt" => {
                    let format = super::common::format(&value).map_err(Failure::Usage)?;
                    wanted.backing_format = Some(format);
                }
                _ => wanted.other.push((key, value)),
            }
        }
        wanted.backing_file = backing.map(str::to_owned).or(wanted.backing_file);
        wanted.backing_format = backing_format.or(wanted.backing_format);
        if wanted.backing_file.is_some() && wanted.backing_format.is_none() {
            return Err(Failure::Usage(
                "name the backing file's format, with -F: it is never guessed".into(),
            ));
        }
        Ok(wanted)
    }

    /// The password that a new image gets.
    pub(super) fn secret(&self, objects: &[SecretObject]) -> Result<Option<Secret>, Failure> {
        let id = self
            .other
            .iter()
            .find(|(key, _)| key == "encrypt.key-secret");
        id.map(|(_, id)| find(objects, id)).transpose()
    }

    /// Name of the file that has the data of a new image, and whether that is raw.
    pub(super) fn data_file(&self) -> Result<Option<(String, bool)>, Failure> {
        let value = |wanted: &str| self.other.iter().find(|(key, _)| key == wanted);
        let raw = value("data_file_raw").map_or(Ok(false), |(key, value)| switch(key, value))?;
        match value("data_file") {
            Some((_, name)) => Ok(Some((name.clone(), raw))),
            None if raw => Err(Failure::Usage(
                "data_file_raw=on needs data_file=NAME".into(),
            )),
            None => Ok(None),
        }
    }

    /// The options of a qcow2 image of `size` bytes, but for its data file.
    pub(super) fn qcow2(
        &self,
        size: u64,
        objects: &[SecretObject],
    ) -> Result<CreateOptions, Failure> {
        let mut options = CreateOptions::new(size);
        let mut encryption = None;
        let mut cost = KeyCost::default();
        for (key, value) in &self.other {
            match key.as_str() {
                "compat" => options.version = version(value)?,
                "cluster_size" => options.cluster_size = number(key, value)?,
                "refcount_bits" => options.refcount_bits = number(key, value)?,
                "compression_type" => {
                    options.compression = one_of(
                        key,
                        value,
                        &[("zlib", Compression::Zlib), ("zstd", Compression::Zstd)],
                    )?;
                }
                "extended_l2" => options.extended_l2 = switch(key, value)?,
                "lazy_refcounts" => options.lazy_refcounts = switch(key, value)?,
                "preallocation" => options.preallocation = preallocation(value)?,
                "encrypt.format" => encryption = Some(value.as_str()),
                "encrypt.iter-time" => {
                    cost = KeyCost::Time(Duration::from_millis(number(key, value)?.into()));
                }
                "encrypt.key-secret" | "data_file" | "data_file_raw" => {}
                key => only(key, value)?,
            }
        }
        options.encryption = match (encryption, self.secret(objects)?) {
            (None, None) => None,
            (Some("aes"), Some(_)) => Some(NewEncryption::LegacyAes),
            (Some("luks"), Some(secret)) => Some(NewEncryption::Luks { secret, cost }),
            (Some("aes" | "luks"), None) => {
                let text = "an encrypted image needs a password: add encrypt.key-secret=NAME";
                return Err(Failure::Usage(text.into()));
            }
            (Some(format), _) => return Err(bad("encrypt.format", format, "luks or aes")),
            (None, Some(_)) => {
                let text = "encrypt.key-secret needs encrypt.format=luks";
                return Err(Failure::Usage(text.into()));
            }
        };
        Ok(options)
    }

    /// How the space of a raw image is allocated.
    pub(super) fn raw(&self) -> Result<Preallocation, Failure> {
        if self.backing_file.is_some() || self.backing_format.is_some() {
            return Err(Failure::Usage(
                "a raw image has no backing file: make a qcow2 image, with -f qcow2".into(),
            ));
        }
        let mut mode = Preallocation::Off;
        for (key, value) in &self.other {
            match (key.as_str(), preallocation(value)) {
                ("preallocation", Ok(Preallocation::Metadata)) => {
                    return Err(bad(key, value, "off, falloc or full in a raw image"));
                }
                ("preallocation", found) => mode = found?,
                _ => return Err(unknown(key, "raw")),
            }
        }
        Ok(mode)
    }
}

/// Splits `a=b,c=d`; a comma within a value is written twice.
pub(super) fn split(list: &str) -> Vec<(String, String)> {
    let mut options = Vec::new();
    let mut option = String::new();
    let mut rest = list.chars().peekable();
    loop {
        match rest.next() {
            Some(',') if rest.peek() == Some(&',') => {
                rest.next();
                option.push(',');
            }
            Some(c) if c != ',' => option.push(c),
            end => {
                if !option.is_empty() {
                    let (key, value) = option.split_once('=').unwrap_or((&option, "on"));
                    options.push((key.to_owned(), value.to_owned()));
                    option.clear();
                }
                if end.is_none() {
                    return options;
                }
            }
        }
    }
}

fn bad(key: &str, value: &str, expected: &str) -> Failure {
    Failure::Usage(format!("{key}={value}: it can be {expected}"))
}

/// Takes options that have one value only, whatever asks for them.
fn only(key: &str, value: &str) -> Result<(), Failure> {
    let has = match key {
        "encrypt.cipher-alg" => "aes-256",
        "encrypt.cipher-mode" => "xts",
        "encrypt.ivgen-alg" => "plain64",
        "encrypt.ivgen-hash-alg" | "encrypt.hash-alg" => "sha256",
        _ => return Err(unknown(key, "qcow2")),
    };
    if value == has {
        Ok(())
    } else {
        Err(bad(key, value, &format!("{has} in a new image")))
    }
}

fn unknown(key: &str, format: &str) -> Failure {
    Failure::Usage(format!(
        "{format} has no option {key:?}, or it is not supported: see `-o help`"
    ))
}

pub(super) fn size(key: &str, value: &str) -> Result<u64, Failure> {
    value::size(value).map_err(|error| bad(key, value, &error.to_string()))
}

pub(super) fn number(key: &str, value: &str) -> Result<u32, Failure> {
    u32::try_from(size(key, value)?).map_err(|_| bad(key, value, "a smaller number"))
}

pub(super) fn version(value: &str) -> Result<u32, Failure> {
    one_of(
        "compat",
        value,
        &[("1.1", 3), ("v3", 3), ("0.10", 2), ("v2", 2)],
    )
}

pub(super) fn switch(key: &str, value: &str) -> Result<bool, Failure> {
    let values = [
        ("on", true),
        ("true", true),
        ("yes", true),
        ("off", false),
        ("false", false),
        ("no", false),
    ];
    one_of(key, value, &values)
}

/// A mode of preallocation.
pub(super) fn preallocation(value: &str) -> Result<Preallocation, Failure> {
    one_of(
        "preallocation",
        value,
        &[
            ("off", Preallocation::Off),
            ("metadata", Preallocation::Metadata),
            ("falloc", Preallocation::Falloc),
            ("full", Preallocation::Full),
        ],
    )
}

pub(super) fn one_of<T: Copy>(key: &str, value: &str, values: &[(&str, T)]) -> Result<T, Failure> {
    let found = values.iter().find(|(name, _)| *name == value);
    found.map(|(_, value)| *value).ok_or_else(|| {
        let names: Vec<_> = values.iter().map(|(name, _)| *name).collect();
        bad(key, value, &names.join(", "))
    })
}

/// A backing file's path as seen from where the image that names it is.
pub(super) fn beside(image: &Path, backing: &str) -> std::path::PathBuf {
    image.parent().unwrap_or(Path::new("")).join(backing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comma_is_written_twice() {
        let pairs = split("size=1G,backing_file=a,,b,extended_l2");
        let expected = [
            ("size", "1G"),
            ("backing_file", "a,b"),
            ("extended_l2", "on"),
        ];
        assert_eq!(pairs, expected.map(|(k, v)| (k.to_owned(), v.to_owned())));
    }

    #[test]
    fn what_is_not_known_is_named() {
        let wanted = Wanted::parse(&["cluster_sise=4k".to_owned()], None, None).unwrap();
        let error = wanted.qcow2(0, &[]).unwrap_err().to_string();
        assert!(error.contains("cluster_sise"), "{error}");
        let wanted = Wanted::parse(&["preallocation=metadata".to_owned()], None, None).unwrap();
        assert!(wanted.raw().is_err());
        assert_eq!(
            wanted.qcow2(0, &[]).unwrap().preallocation,
            Preallocation::Metadata
        );
    }
}
