//! Passwords for the encrypted files of a chain, in their order.

use super::encrypted::{Encrypted, Numbered};
use super::legacy_aes;
use super::luks::Luks;
use super::secret::Secret;
use crate::data::Form;
use crate::error::{Error, Result};
use crate::header::Encryption;
use crate::host::Host;
use crate::options::OpenOptions;

/// What opens the encrypted files of a chain.
pub(crate) struct Keys {
    /// Those that are left, for the next encrypted files downwards.
    secrets: std::vec::IntoIter<Secret>,
    /// Iterations of PBKDF2 that may still be spent.
    iterations: u64,
    stay_locked: bool,
}

impl Keys {
    pub(crate) fn new(options: &OpenOptions) -> Self {
        Keys {
            secrets: options.secrets.clone().into_iter(),
            iterations: options.max_key_iterations,
            stay_locked: options.stay_locked,
        }
    }

    /// Opens a file with the next secret, if it is encrypted.
    pub(crate) fn unlock(&mut self, host: &Host, encryption: Encryption) -> Result<Form> {
        if encryption == Encryption::None {
            return Ok(Form::Plain);
        }
        if self.stay_locked {
            return Ok(Form::Locked);
        }
        let secret = self.secrets.next().ok_or_else(|| locked(host))?;
        let (sectors, numbered) = match encryption {
            Encryption::None => return Ok(Form::Plain),
            Encryption::LegacyAes => (legacy_aes::sectors(&secret), Numbered::ByGuest),
            Encryption::Luks { offset, len } => {
                let luks = Luks::open(host, offset, len)?;
                let key = luks.unlock(host, &secret, &mut self.iterations)?;
                (luks.sectors(host, &key)?, Numbered::ByHost)
            }
        };
        Ok(Form::Encrypted(Encrypted::new(sectors, numbered)))
    }

    /// Refuses secrets that no file of the chain took: somebody takes it for encrypted.
    pub(crate) fn finish(self, host: &Host) -> Result<()> {
        match self.secrets.len() {
            0 => Ok(()),
            left => Err(Error::Locked {
                file: host.path.clone(),
                reason: format!(
                    "{left} more passwords were given than it and its backing files have encrypted \
                     ones"
                ),
            }),
        }
    }
}

/// The error for an encrypted file that has got no password.
pub(crate) fn locked(host: &Host) -> Error {
    Error::Locked {
        file: host.path.clone(),
        reason: "it is encrypted, and no password was given for it".into(),
    }
}
