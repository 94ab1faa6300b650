//! Names in an image's header: whether they are followed, and to where.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::chain::{Opener, ReferencePolicy};
use crate::error::{Error, Reference, Result};
use crate::host::Host;
use crate::storage::Storage;

/// An image and another file that it names.
pub(crate) struct Link {
    referrer: PathBuf,
    kind: Reference,
    name: String,
}

impl Link {
    pub(crate) fn new(referrer: &Path, kind: Reference, name: &str) -> Self {
        Link {
            referrer: referrer.to_owned(),
            kind,
            name: name.to_owned(),
        }
    }

    /// Why the name is not followed, or the file not used.
    pub(crate) fn refuse(&self, reason: &str) -> Error {
        Error::Reference {
            file: self.referrer.clone(),
            kind: self.kind,
            name: self.name.clone(),
            reason: reason.into(),
        }
    }

    /// The folder that relative names begin at: the image's own.
    fn folder(&self) -> &Path {
        match self.referrer.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        }
    }

    /// The file where it is given and the name not followed.
    pub(crate) fn supplied(&self, storage: Arc<dyn Storage>) -> Host {
        let path = self.folder().join(&self.name);
        Host { path, storage }
    }

    /// The path that the name means, if the policy allows it.
    pub(crate) fn locate(&self, policy: ReferencePolicy, opener: &dyn Opener) -> Result<PathBuf> {
        if policy == ReferencePolicy::None {
            return Err(self.refuse("images that name other files are not allowed here"));
        }
        if self
            .name
            .split('/')
            .next()
            .is_some_and(|first| first.contains(':'))
        {
            return Err(self.refuse(
                "only files are followed, no `protocol:...` (a file whose name has a colon is \
                 recorded as `./NAME`)",
            ));
        }
        let (folder, path) = (self.folder(), self.folder().join(&self.name));
        if policy == ReferencePolicy::Any {
            return Ok(path);
        }
        let real = |path: &Path| {
            opener
                .canonicalize(path)
                .map_err(|error| self.refuse(&format!("cannot find {path:?}: {error}")))
        };
        let (real_path, folder) = (real(&path)?, real(folder)?);
        if real_path.starts_with(&folder) {
            return Ok(real_path);
        }
        Err(Error::Outside {
            file: self.referrer.clone(),
            kind: self.kind,
            name: self.name.clone(),
            folder,
        })
    }
}
