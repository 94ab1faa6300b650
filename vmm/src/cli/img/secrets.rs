//! `--object secret`: passwords by name.

use cowshed_qcow::Secret;

use super::{Failure, options};

/// A password and its name.
#[derive(Clone, Debug)]
pub(super) struct SecretObject {
    id: String,
    secret: Secret,
}

impl SecretObject {
    /// Parses `secret,id=NAME,file=FILE` or `secret,id=NAME,data=TEXT`.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let rest = text
            .strip_prefix("secret,")
            .ok_or("only objects of the kind secret,id=NAME,file=FILE are supported")?;
        let (mut id, mut secret) = (None, None);
        for (key, value) in options::split(rest) {
            match key.as_str() {
                "id" => id = Some(value),
                "data" => secret = Some(Secret::new(value.into_bytes())),
                "file" => {
                    let bytes = std::fs::read(&value)
                        .map_err(|error| format!("cannot read the file {value:?}: {error}"))?;
                    secret = Some(Secret::new(bytes));
                }
                "format" if value == "raw" => {}
                _ => return Err(format!("{key}={value} is not supported in a secret")),
            }
        }
        match (id, secret) {
            (Some(id), Some(secret)) => Ok(SecretObject { id, secret }),
            _ => Err("a secret needs id=NAME and file=FILE (or data=TEXT)".into()),
        }
    }
}

/// The password of a name.
pub(super) fn find(objects: &[SecretObject], id: &str) -> Result<Secret, Failure> {
    let object = objects.iter().find(|object| object.id == id);
    object.map(|object| object.secret.clone()).ok_or_else(|| {
        Failure::Usage(format!(
            "no secret is named {id:?}: add --object secret,id={id},file=FILE"
        ))
    })
}
