//! MSI-X: the table, the pending bits, and the way to the hypervisor's interrupt routes.
//!
//! Each vector is an event file descriptor that the device signals, whatever the guest has
//! programmed. While the vector may be delivered, the hypervisor consumes the descriptor
//! (an irqfd). While it is masked nobody does, so the count that stays in the descriptor *is*
//! the pending bit, and attaching the irqfd again delivers it.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::poll;
use crate::rarely::Rarely;

/// The message of an unmasked vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiMessage {
    /// Address that the write goes to.
    pub address: u64,
    /// Value written.
    pub data: u32,
}

/// The hypervisor's side: attaches a vector's event to an interrupt message.
pub trait MsiRouter: Send + Sync {
    /// From now on each signal of `event` delivers `message`, a signal that is already
    /// pending included. Replaces the message if `vector` was attached.
    fn attach(&self, vector: u16, event: &EventFd, message: MsiMessage) -> io::Result<()>;
    /// From now on signals of `event` stay in it.
    fn detach(&self, vector: u16, event: &EventFd) -> io::Result<()>;
}

/// The capability's ID.
pub const CAPABILITY_ID: u8 = 0x11;
/// Offset of the message control register in the capability.
pub const CONTROL_OFFSET: usize = 2;
/// Bytes of a table entry.
pub const ENTRY_SIZE: u64 = 16;
/// Most vectors that the capability can express.
pub const MAX_VECTORS: u16 = 2048;

const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK: u16 = 1 << 14;
/// The vector's mask bit, in the entry's last dword.
const ENTRY_MASKED: u32 = 1;

/// One table entry: address low, address high, data, vector control.
#[derive(Clone, Copy, Debug)]
struct Entry([u32; 4]);

impl Entry {
    fn message(&self) -> MsiMessage {
        let [low, high, data, _] = self.0;
        MsiMessage {
            address: u64::from(high) << 32 | u64::from(low & !3),
            data,
        }
    }

    fn masked(&self) -> bool {
        self.0[3] & ENTRY_MASKED != 0
    }
}

/// A function's vectors.
pub struct Msix {
    table: Vec<Entry>,
    enabled: bool,
    masked: bool,
    /// What each vector is attached to now.
    attached: Vec<Option<MsiMessage>>,
    events: Arc<[EventFd]>,
    router: Arc<dyn MsiRouter>,
}

impl Msix {
    /// `vectors` masked vectors (1 to 2048), disabled as a whole.
    ///
    /// # Errors
    /// No vector, too many of them, or no file descriptors left.
    pub fn new(vectors: u16, router: Arc<dyn MsiRouter>) -> io::Result<Self> {
        if !(1..=MAX_VECTORS).contains(&vectors) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let count = usize::from(vectors);
        let event = |_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        Ok(Self {
            table: vec![Entry([0, 0, 0, ENTRY_MASKED]); count],
            enabled: false,
            masked: false,
            attached: vec![None; count],
            events: (0..count).map(event).collect::<io::Result<_>>()?,
            router,
        })
    }

    /// What the device signals, one event a vector.
    pub fn events(&self) -> &Arc<[EventFd]> {
        &self.events
    }

    /// The capability that follows ID and link (PCI Local Bus 3.0, section 6.8.2), and which of
    /// its bits can be written. Table and pending bits lie in BAR `bar` at 8-byte aligned offsets.
    pub fn capability(&self, bar: u8, table: u32, pending: u32) -> ([u8; 10], [u8; 2]) {
        let mut body = [0; 10];
        // The register holds the number of vectors less one; there is at least one.
        let last = (self.table.len() - 1) as u16;
        body[..2].copy_from_slice(&last.to_le_bytes());
        body[2..6].copy_from_slice(&(table | u32::from(bar)).to_le_bytes());
        body[6..].copy_from_slice(&(pending | u32::from(bar)).to_le_bytes());
        (body, (CONTROL_ENABLE | CONTROL_MASK).to_le_bytes())
    }

    /// Takes the message control register as the guest has written it.
    pub fn set_control(&mut self, control: u16) {
        self.enabled = control & CONTROL_ENABLE != 0;
        self.masked = control & CONTROL_MASK != 0;
        for vector in 0..self.table.len() {
            self.update(vector);
        }
    }

    /// Reads the table at byte `offset`.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        for (byte, at) in data.iter_mut().zip(offset..=u64::MAX) {
            let entry = usize::try_from(at / ENTRY_SIZE)
                .ok()
                .and_then(|at| self.table.get(at));
            if let Some(Entry(dwords)) = entry {
                let dword = dwords[(at % ENTRY_SIZE / 4) as usize];
                *byte = dword.to_le_bytes()[(at % 4) as usize];
            }
        }
    }

    /// Writes the table at byte `offset`. Accesses are aligned and of 4 or 8 bytes (section
    /// 6.8.2); others are dropped.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        let aligned = matches!(data.len(), 4 | 8) && offset.is_multiple_of(data.len() as u64);
        let Ok(vector) = usize::try_from(offset / ENTRY_SIZE) else {
            return;
        };
        let Some(Entry(dwords)) = self.table.get_mut(vector).filter(|_| aligned) else {
            return;
        };
        let first = (offset % ENTRY_SIZE / 4) as usize;
        for (dword, bytes) in dwords.iter_mut().skip(first).zip(data.as_chunks().0) {
            *dword = u32::from_le_bytes(*bytes);
        }
        self.update(vector);
    }

    /// Reads the pending bits at byte `offset`.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        for (byte, at) in data.iter_mut().zip(offset..=u64::MAX) {
            let first = usize::try_from(at).ok().and_then(|at| at.checked_mul(8));
            let pending = |bit| first.is_some_and(|first| self.pending(first.saturating_add(bit)));
            *byte = (0..8)
                .filter(|&bit| pending(bit))
                .fold(0, |bits, bit| bits | 1 << bit);
        }
    }

    /// Forgets what is pending: the device was reset.
    pub fn clear_pending(&self) {
        for (event, attached) in self.events.iter().zip(&self.attached) {
            if attached.is_none() {
                // "Would block" says that nothing was pending.
                let _ = event.read();
            }
        }
    }

    fn pending(&self, vector: usize) -> bool {
        match (self.events.get(vector), self.attached.get(vector)) {
            // Of an attached vector the hypervisor takes each signal at once.
            (Some(event), Some(None)) => poll::readable(event),
            _ => false,
        }
    }

    /// Attaches or detaches a vector if what the guest has programmed asks for a change.
    fn update(&mut self, vector: usize) {
        let (Some(entry), Some(event), Some(attached)) = (
            self.table.get(vector),
            self.events.get(vector),
            self.attached.get_mut(vector),
        ) else {
            return;
        };
        let deliverable = self.enabled && !self.masked && !entry.masked();
        let wanted = deliverable.then(|| entry.message());
        if wanted == *attached {
            return;
        }
        // There are at most `MAX_VECTORS`.
        let index = vector as u16;
        let result = match wanted {
            Some(message) => self.router.attach(index, event, message),
            None => self.router.detach(index, event),
        };
        match result {
            Ok(()) => *attached = wanted,
            Err(error) => {
                static FAILURES: Rarely = Rarely::new();
                if let Some(count) = FAILURES.count() {
                    tracing::warn!(vector, %error, count, "cannot change an interrupt route");
                }
            }
        }
    }
}

impl Drop for Msix {
    fn drop(&mut self) {
        self.set_control(0);
    }
}

#[cfg(test)]
mod tests;
