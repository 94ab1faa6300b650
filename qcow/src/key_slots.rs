//! The passwords of an open LUKS image: who may open it the next time.

use std::sync::PoisonError;

use crate::crypt::luks::{KeyCost, Luks};
use crate::crypt::secret::Secret;
use crate::error::{Error, Result};
use crate::header::Encryption;
use crate::image::Image;
use crate::layer::Layer;
use crate::qcow2::Qcow2;

/// Iterations of PBKDF2 that changing a key may take: the image was opened, so that it is trusted.
const TRUSTED: u64 = u64::MAX;

impl Image {
    /// The key slots of the top image, with the iterations of those that are in use. Empty if it is
    /// not encrypted with LUKS.
    pub fn key_slots(&self) -> Result<Vec<Option<u32>>> {
        match self.top_luks()? {
            Some((_, luks)) => Ok(luks.slots()),
            None => Ok(Vec::new()),
        }
    }

    /// The key slot that a password opens.
    pub fn key_slot_of(&self, secret: &Secret) -> Result<usize> {
        let (qcow2, luks) = self.top_luks()?.ok_or_else(|| self.no_luks())?;
        Ok(luks.unlock(&qcow2.host, secret, &mut { TRUSTED })?.slot)
    }

    /// Lets `new` open the image too, in the first free key slot, whose number is returned. `old`
    /// is a password that opens it now. Durable when it returns; a crash adds it or does not.
    pub fn add_key(&self, old: &Secret, new: &Secret, cost: KeyCost) -> Result<usize> {
        self.change_luks(|qcow2, luks| {
            let key = luks.unlock(&qcow2.host, old, &mut { TRUSTED })?;
            luks.add(&qcow2.host, &key, new, cost)
        })
    }

    /// Wipes a key slot: its password does not open the image any more. The last one is only wiped
    /// by `force`, and then nobody can read the disk any more once it is closed. Durable when it
    /// returns.
    pub fn erase_key_slot(&self, slot: usize, force: bool) -> Result<()> {
        self.change_luks(|qcow2, luks| luks.erase(&qcow2.host, slot, force))
    }

    fn change_luks<T>(&self, change: impl FnOnce(&Qcow2, &mut Luks) -> Result<T>) -> Result<T> {
        let qcow2 = self.writable_top()?.ok_or_else(|| self.no_luks())?;
        // Makes sure that no other metadata lies there.
        qcow2.split(&mut qcow2.state())?;
        let one_at_a_time = qcow2.key_slots.lock();
        let _one_at_a_time = one_at_a_time.unwrap_or_else(PoisonError::into_inner);
        let (qcow2, mut luks) = self.top_luks()?.ok_or_else(|| self.no_luks())?;
        change(qcow2, &mut luks)
    }

    fn top_luks(&self) -> Result<Option<(&Qcow2, Luks)>> {
        let Some(Layer::Qcow2(qcow2)) = self.layers.first() else {
            return Ok(None);
        };
        let encryption = qcow2.state().tables.header.encryption;
        let Encryption::Luks { offset, len } = encryption else {
            return Ok(None);
        };
        Ok(Some((qcow2, Luks::open(&qcow2.host, offset, len)?)))
    }

    fn no_luks(&self) -> Error {
        let file = self.layers.first().map(|top| top.host().path.clone());
        Error::Locked {
            file: file.unwrap_or_default(),
            reason: "it has no key slots: it is not encrypted with LUKS".into(),
        }
    }
}
