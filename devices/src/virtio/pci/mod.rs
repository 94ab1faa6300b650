//! The modern PCI transport (virtio 1.2, section 4.1): MSI-X only, one BAR for everything.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Memory;
use super::device::VirtioDevice;
use super::link::DriverLink;
use crate::pci::configuration::{self, Configuration, Identity};
use crate::pci::msix::{self, MsiRouter, Msix};
use crate::pci::{BarMapping, Doorbell, PciFunction};
use crate::threads::Threads;
use common::Common;
use layout::Capabilities;

mod common;
mod layout;

/// Virtio's PCI vendor.
const VENDOR: u16 = 0x1af4;
/// Modern devices have this plus the virtio device ID.
const DEVICE_BASE: u16 = 0x1040;
/// Modern devices have a revision of at least 1.
const REVISION: u8 = 1;
/// Modern devices have a subsystem ID of at least 0x40.
const SUBSYSTEM: u16 = 0x40;

/// Offsets in the capability that gives access to the BAR through configuration space.
const ACCESS_BAR: usize = 4;
const ACCESS_OFFSET: usize = 8;
const ACCESS_LEN: usize = 12;
const ACCESS_DATA: usize = 16;

/// A virtio device as a PCI function.
///
/// Locks: the device's threads take none of these, so a vCPU may wait for a thread's end under
/// `common`. Nobody holds two at once.
pub struct VirtioPci {
    configuration: Mutex<Configuration>,
    capabilities: Capabilities,
    common: Mutex<Common>,
    msix: Mutex<Msix>,
    link: Arc<DriverLink>,
    doorbells: Arc<[EventFd]>,
}

impl VirtioPci {
    /// Makes a function of `device`: one vector for each queue and one for configuration
    /// changes, delivered through `router`. Its threads come from `threads`.
    ///
    /// # Errors
    /// No file descriptors left, or the device has over 255 queues or 512 bytes of
    /// configuration.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        router: Arc<dyn MsiRouter>,
        threads: Arc<dyn Threads>,
    ) -> io::Result<Arc<Self>> {
        let queue_sizes = device.queue_sizes();
        let (queues, config) = (queue_sizes.len(), device.config().len());
        if queues > layout::MAX_QUEUES || config as u64 > layout::DEVICE_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let identity = Identity {
            vendor: VENDOR,
            device: DEVICE_BASE + device.id(),
            revision: REVISION,
            class: device.class(),
            subsystem_vendor: VENDOR,
            subsystem: SUBSYSTEM,
        };
        let msix = Msix::new(queues as u16 + 1, router)?;
        let mut configuration = Configuration::new(&identity);
        let capabilities = layout::describe(&mut configuration, &msix, queues, config)
            .map_err(|error: configuration::Error| io::Error::other(error))?;
        let link = Arc::new(DriverLink::new(
            device.id(),
            queues,
            Arc::clone(msix.events()),
        ));
        let doorbell = |_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let doorbells: Arc<[EventFd]> = (0..queues).map(doorbell).collect::<io::Result<_>>()?;
        let common = Common::new(
            device,
            queue_sizes,
            memory,
            Arc::clone(&link),
            Arc::clone(&doorbells),
            threads,
        );
        Ok(Arc::new(Self {
            configuration: Mutex::new(configuration),
            capabilities,
            common: Mutex::new(common),
            msix: Mutex::new(msix),
            link,
            doorbells,
        }))
    }

    /// The part of the BAR that the window in configuration space shows now, if it is one to
    /// four aligned bytes of it.
    fn window(&self) -> Option<(u64, usize)> {
        let configuration = lock(&self.configuration);
        let at = self.capabilities.access;
        let word = |offset: usize| configuration.read(((at + offset) / 4) as u16);
        let (bar, offset, len) = (word(ACCESS_BAR), word(ACCESS_OFFSET), word(ACCESS_LEN));
        let valid = bar as usize & 0xff == layout::BAR
            && matches!(len, 1 | 2 | 4)
            && offset.is_multiple_of(len)
            && offset < layout::BAR_SIZE;
        valid.then_some((u64::from(offset), len as usize))
    }

    /// Where the window's data register is in configuration space.
    fn window_data(&self) -> usize {
        self.capabilities.access + ACCESS_DATA
    }
}

impl PciFunction for VirtioPci {
    fn config_read(&self, register: u16) -> u32 {
        if usize::from(register) * 4 == self.window_data()
            && let Some((offset, len)) = self.window()
        {
            let mut data = [0; 4];
            self.bar_read(layout::BAR, offset, &mut data[..len]);
            lock(&self.configuration).set(self.window_data(), &data);
        }
        lock(&self.configuration).read(register)
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let control = {
            let mut configuration = lock(&self.configuration);
            configuration.write(offset, data);
            let at = self.capabilities.msix + msix::CONTROL_OFFSET;
            configuration
                .bytes(at, 2)
                .try_into()
                .map_or(0, u16::from_le_bytes)
        };
        let touches = |at: usize, len: usize| {
            usize::from(offset) < at + len && at < usize::from(offset) + data.len()
        };
        if touches(self.capabilities.msix + msix::CONTROL_OFFSET, 2) {
            lock(&self.msix).set_control(control);
        }
        if touches(self.window_data(), 4)
            && let Some((offset, len)) = self.window()
        {
            let data = lock(&self.configuration)
                .bytes(self.window_data(), len)
                .to_vec();
            self.bar_write(layout::BAR, offset, &data);
        }
    }

    fn mappings(&self) -> Vec<BarMapping> {
        lock(&self.configuration).mappings()
    }

    fn bars(&self) -> Vec<BarMapping> {
        lock(&self.configuration).bars()
    }

    fn doorbells(&self) -> Vec<Doorbell> {
        let place =
            |index: usize| layout::NOTIFY + index as u64 * u64::from(layout::NOTIFY_MULTIPLIER);
        let clones = self.doorbells.iter().map(EventFd::try_clone).enumerate();
        // Without a descriptor for it a doorbell still works: the write arrives at the BAR.
        clones
            .filter_map(|(index, event)| Some((index, event.ok()?)))
            .map(|(index, event)| Doorbell {
                bar: layout::BAR,
                offset: place(index),
                event,
            })
            .collect()
    }

    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if bar != layout::BAR {
            return;
        }
        match offset {
            layout::COMMON..layout::ISR => {
                copy(
                    &lock(&self.common).registers(),
                    offset - layout::COMMON,
                    data,
                );
            }
            layout::ISR => {
                if let Some(first) = data.first_mut() {
                    *first = self.link.take_isr();
                }
            }
            layout::DEVICE..layout::NOTIFY => {
                copy(
                    &lock(&self.common).device_config(),
                    offset - layout::DEVICE,
                    data,
                );
            }
            layout::TABLE..layout::PENDING => {
                lock(&self.msix).read_table(offset - layout::TABLE, data);
            }
            layout::PENDING.. => lock(&self.msix).read_pending(offset - layout::PENDING, data),
            _ => {}
        }
    }

    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) {
        if bar != layout::BAR {
            return;
        }
        match offset {
            layout::COMMON..layout::ISR => {
                let reset = lock(&self.common).write(offset - layout::COMMON, data);
                if reset {
                    lock(&self.msix).clear_pending();
                }
            }
            layout::NOTIFY..layout::TABLE => {
                let queue = (offset - layout::NOTIFY) / u64::from(layout::NOTIFY_MULTIPLIER);
                if let Some(event) = self.doorbells.get(queue as usize) {
                    // Fails only when the counter is full, and then the signal is there already.
                    let _ = event.write(1);
                }
            }
            layout::TABLE..layout::PENDING => {
                lock(&self.msix).write_table(offset - layout::TABLE, data);
            }
            _ => {}
        }
    }

    fn stop(&self) {
        lock(&self.common).stop();
    }
}

/// Fills `data` from `source` at `offset`, as far as it reaches.
fn copy(source: &[u8], offset: u64, data: &mut [u8]) {
    let source = usize::try_from(offset)
        .ok()
        .and_then(|offset| source.get(offset..));
    for (byte, source) in data.iter_mut().zip(source.unwrap_or_default()) {
        *byte = *source;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
