//! LUKS1 (encryption method 2): a master key, locked in up to eight slots with a password each.
//!
//! Sectors have the numbers of the image's file, so that clusters that move are encrypted anew.

mod afsplit;
mod cost;
mod describe;
mod header;
mod slot;

use super::random;
use super::secret::Secret;
use super::sectors::Sectors;
use crate::error::{Error, Result, Violation};
use crate::host::Host;

pub use cost::KeyCost;
pub use describe::{KeySlot, LuksInfo};
pub(crate) use header::HEADER_BYTES;
use header::{Header, SLOTS, Slot};

/// A LUKS header in an image's file.
pub(crate) struct Luks {
    header: Header,
    /// Where it is, in bytes.
    offset: u64,
}

/// The master key, and the slot that had it.
pub(crate) struct Unlocked {
    pub(crate) slot: usize,
    master: Secret,
}

/// Bytes of a new header and all its key material.
pub(crate) fn new_len() -> u64 {
    Header::new().area_bytes()
}

/// Writes a header with one key to zeros at `offset` of the file.
pub(crate) fn create(host: &Host, offset: u64, password: &Secret, cost: KeyCost) -> Result<()> {
    let (header, material) = new(password, cost).map_err(no_random(host))?;
    let uuid = uuid().map_err(no_random(host))?;
    let [first, ..] = &header.slots;
    host.write(offset + first.material_at(), &material)?;
    host.write(offset, &header.encode(&uuid))
}

fn new(password: &Secret, cost: KeyCost) -> std::io::Result<(Header, Secret)> {
    let mut header = Header::new();
    let mut master = Secret::zeros(header.key_bytes);
    random(master.bytes_mut())?;
    random(&mut header.digest_salt)?;
    let iterations = cost.iterations(header.hash, header.key_bytes);
    header.digest_iterations = cost::of_digest(iterations);
    header.digest = header.digest_of(&master);
    let [first, ..] = &header.slots;
    let (slot, material) = header.lock(first, &master, password, iterations)?;
    header.set_slot(0, slot);
    Ok((header, material))
}

fn no_random(host: &Host) -> impl FnOnce(std::io::Error) -> Error {
    Error::io(&host.path, || "get random bytes for".into())
}

impl Luks {
    /// Reads the header of an area of the file, `len` bytes at `offset`.
    pub(crate) fn open(host: &Host, offset: u64, len: u64) -> Result<Self> {
        let mut bytes = [0; HEADER_BYTES];
        host.read(offset, &mut bytes)?;
        match Header::parse(&bytes, offset, len) {
            Ok(header) => Ok(Luks { header, offset }),
            Err(refusal) => Err(host.refuse(refusal)),
        }
    }

    /// Tries a password on every active slot. `iterations` is how many may be spent on that, and
    /// becomes what is left of them: a header can ask for hours.
    pub(crate) fn unlock(
        &self,
        host: &Host,
        password: &Secret,
        iterations: &mut u64,
    ) -> Result<Unlocked> {
        let mut too_costly = None;
        for (index, slot) in self
            .header
            .slots
            .iter()
            .enumerate()
            .filter(|(_, s)| s.active)
        {
            let cost = u64::from(slot.iterations) + u64::from(self.header.digest_iterations);
            let Some(left) = iterations.checked_sub(cost) else {
                too_costly.get_or_insert((index, cost, *iterations));
                continue;
            };
            *iterations = left;
            let mut material = Secret::zeros(self.header.material_bytes());
            host.read(self.offset + slot.material_at(), material.bytes_mut())?;
            if let Some(master) = self.header.unlock(slot, material, password) {
                return Ok(Unlocked {
                    slot: index,
                    master,
                });
            }
        }
        Err(Error::Locked {
            file: host.path.clone(),
            reason: match too_costly {
                Some((slot, cost, left)) => format!(
                    "to try the key slot {slot} takes {cost} iterations of PBKDF2, and {left} are \
                     left of those that are allowed: allow more if you trust the image"
                ),
                None => "the password is wrong".into(),
            },
        })
    }

    /// What encrypts the disk.
    pub(crate) fn sectors(&self, host: &Host, key: &Unlocked) -> Result<Sectors> {
        self.header.sectors(&key.master).ok_or_else(|| {
            let (len, at) = (key.master.len(), self.offset);
            host.invalid(Violation::new(
                "LUKS key bytes",
                at,
                len,
                "a key of the cipher",
            ))
        })
    }

    /// Iterations of each key slot that is in use.
    pub(crate) fn slots(&self) -> Vec<Option<u32>> {
        let used = |slot: &Slot| slot.active.then_some(slot.iterations);
        self.header.slots.iter().map(used).collect()
    }

    /// Locks the master key with one more password, in the first slot that is free. The slot is
    /// made active when all of it is durable: a crash leaves it free.
    pub(crate) fn add(
        &mut self,
        host: &Host,
        key: &Unlocked,
        password: &Secret,
        cost: KeyCost,
    ) -> Result<usize> {
        let free = self
            .header
            .slots
            .iter()
            .enumerate()
            .find(|(_, slot)| !slot.active);
        let Some((index, free)) = free else {
            return Err(Error::Locked {
                file: host.path.clone(),
                reason: format!("all {SLOTS} key slots are in use: erase one first"),
            });
        };
        let iterations = cost.iterations(self.header.hash, self.header.key_bytes);
        let (slot, material) = self
            .header
            .lock(free, &key.master, password, iterations)
            .map_err(no_random(host))?;
        host.write(self.offset + slot.material_at(), &material)?;
        self.write_slot(
            host,
            index,
            &Slot {
                active: false,
                ..slot
            },
        )?;
        host.sync()?;
        self.write_slot(host, index, &slot)?;
        host.sync()?;
        self.header.set_slot(index, slot);
        Ok(index)
    }

    /// Makes a slot free and overwrites its key material. The last key is only erased by `force`:
    /// without it nobody can read the disk any more.
    pub(crate) fn erase(&mut self, host: &Host, index: usize, force: bool) -> Result<()> {
        let refuse = |reason: String| {
            Err(Error::Locked {
                file: host.path.clone(),
                reason,
            })
        };
        let Some(slot) = self.header.slots.get(index).copied() else {
            return refuse(format!(
                "there is no key slot {index}: they are 0 to {}",
                SLOTS - 1
            ));
        };
        let others = self.slots().iter().flatten().count() - usize::from(slot.active);
        if others == 0 && !force {
            return refuse(format!(
                "the key slot {index} has the last key, which is not erased"
            ));
        }
        let erased = Slot {
            material: slot.material,
            ..Slot::default()
        };
        // Whether or not that arrives, it does not count as a key any more.
        self.header.set_slot(index, erased);
        self.write_slot(host, index, &erased)?;
        host.sync()?;
        let mut noise = vec![0; self.header.material_bytes()];
        random(&mut noise).map_err(no_random(host))?;
        host.write(self.offset + slot.material_at(), &noise)?;
        host.sync()
    }

    fn write_slot(&self, host: &Host, index: usize, slot: &Slot) -> Result<()> {
        host.write(self.offset + Header::slot_at(index), &slot.encode())
    }
}

/// A random UUID (RFC 9562, version 4) as text.
fn uuid() -> std::io::Result<String> {
    let mut bytes = [0; 16];
    random(&mut bytes)?;
    let number = u128::from_be_bytes(bytes) & !(0xf << 76 | 0b11 << 62) | 4 << 76 | 0b10 << 62;
    let hex = format!("{number:032x}");
    let (a, rest) = hex.split_at(8);
    let (b, rest) = rest.split_at(4);
    let (c, rest) = rest.split_at(4);
    let (d, e) = rest.split_at(4);
    Ok(format!("{a}-{b}-{c}-{d}-{e}"))
}

#[cfg(test)]
mod tests;
