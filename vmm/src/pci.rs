//! The PCI host bridge: one bus, configuration space by ports and by memory (ECAM), and the
//! BARs that decode, each mapped on the memory bus with its doorbells as ioeventfds.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use cowshed_devices::bus::{Bus, BusDevice};
use cowshed_devices::pci::{BarMapping, Doorbell, PciFunction, SharedFunction};
use cowshed_devices::rarely::Rarely;
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};

use crate::layout;

/// Slots of a bus. Slot 0 is the bridge itself.
const SLOTS: usize = 32;
/// Byte offset of the first BAR in a configuration space.
const BAR0: u16 = 0x10;

/// Bus 0 and what is plugged into it.
pub struct PciBus {
    vm: Arc<VmFd>,
    /// Not held: this bus's own registers are on it, and so it holds us.
    mmio: Weak<Bus>,
    slots: Vec<Slot>,
    next_bar: u64,
}

struct Slot {
    function: SharedFunction,
    doorbells: Vec<Doorbell>,
    mapped: Mutex<Vec<BarMapping>>,
}

impl PciBus {
    /// A bus with the host bridge in slot 0, whose BARs will appear on `mmio`.
    pub fn new(vm: Arc<VmFd>, mmio: &Arc<Bus>) -> Self {
        let bridge = Slot::new(Arc::new(HostBridge));
        Self {
            vm,
            mmio: Arc::downgrade(mmio),
            slots: vec![bridge],
            next_bar: layout::PCI_WINDOW,
        }
    }

    /// Plugs a function into the next slot and assigns its BARs, as firmware would.
    pub fn plug(&mut self, function: SharedFunction) -> io::Result<()> {
        if self.slots.len() == SLOTS {
            return Err(io::Error::other("the PCI bus is full: 31 devices at most"));
        }
        for bar in function.bars() {
            let address = self.next_bar.next_multiple_of(bar.size);
            if address + bar.size > layout::PCI_WINDOW + layout::PCI_WINDOW_SIZE {
                return Err(io::Error::other("the PCI memory window is full"));
            }
            self.next_bar = address + bar.size;
            let register = BAR0 + 4 * bar.index as u16;
            function.config_write(register, &(address as u32).to_le_bytes());
        }
        self.slots.push(Slot::new(function));
        Ok(())
    }

    /// Stops every function and waits for what is in flight.
    pub fn stop(&self) {
        self.slots.iter().for_each(|slot| slot.function.stop());
    }

    fn config_read(&self, device: usize, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        let Some(slot) = self.slots.get(device) else {
            return;
        };
        let value = slot.function.config_read(offset / 4).to_le_bytes();
        for (byte, source) in data
            .iter_mut()
            .zip(value.iter().skip(usize::from(offset % 4)))
        {
            *byte = *source;
        }
    }

    fn config_write(&self, device: usize, offset: u16, data: &[u8]) {
        let Some(slot) = self.slots.get(device) else {
            return;
        };
        if usize::from(offset % 4) + data.len() > 4 {
            return;
        }
        let mut mapped = slot.mapped();
        slot.function.config_write(offset, data);
        let wanted = slot.function.mappings();
        if *mapped != wanted {
            self.remap(slot, &mut mapped, &wanted);
        }
    }

    /// Makes the memory bus and KVM follow what the guest has programmed. A BAR that does not
    /// lie in the window or lies over another one is not mapped: it must not shadow RAM.
    fn remap(&self, slot: &Slot, mapped: &mut Vec<BarMapping>, wanted: &[BarMapping]) {
        // The vCPU whose write led here holds it.
        let Some(mmio) = self.mmio.upgrade() else {
            return;
        };
        mapped.retain(|bar| {
            let keep = wanted.contains(bar);
            if !keep {
                mmio.remove(bar.address);
                self.doorbells(slot, bar, |event, address| {
                    self.vm.unregister_ioevent(event, address, NoDatamatch)
                });
            }
            keep
        });
        for bar in wanted {
            if mapped.contains(bar) || !in_window(bar) {
                continue;
            }
            let device = Arc::new(BarDevice {
                function: slot.function.clone(),
                bar: bar.index,
            });
            if mmio.insert(bar.address, bar.size, device).is_err() {
                static OVERLAPS: Rarely = Rarely::new();
                if let Some(count) = OVERLAPS.count() {
                    let address = format_args!("{:#x}", bar.address);
                    tracing::warn!(address, count, "BAR over another");
                }
                continue;
            }
            mapped.push(*bar);
            self.doorbells(slot, bar, |event, address| {
                self.vm.register_ioevent(event, address, NoDatamatch)
            });
        }
    }

    /// A doorbell that KVM does not take still works: the write reaches the function by an exit.
    fn doorbells(
        &self,
        slot: &Slot,
        bar: &BarMapping,
        change: impl Fn(
            &vmm_sys_util::eventfd::EventFd,
            &IoEventAddress,
        ) -> Result<(), kvm_ioctls::Error>,
    ) {
        for doorbell in slot
            .doorbells
            .iter()
            .filter(|doorbell| doorbell.bar == bar.index)
        {
            let address = IoEventAddress::Mmio(bar.address + doorbell.offset);
            if let Err(error) = change(&doorbell.event, &address) {
                static STUCK: Rarely = Rarely::new();
                if let Some(count) = STUCK.count() {
                    tracing::warn!(%error, count, "cannot move a doorbell");
                }
            }
        }
    }
}

fn in_window(bar: &BarMapping) -> bool {
    let end = layout::PCI_WINDOW + layout::PCI_WINDOW_SIZE;
    bar.address >= layout::PCI_WINDOW
        && bar
            .address
            .checked_add(bar.size)
            .is_some_and(|bar_end| bar_end <= end)
}

impl Slot {
    fn new(function: SharedFunction) -> Self {
        Self {
            doorbells: function.doorbells(),
            function,
            mapped: Mutex::default(),
        }
    }

    /// Held over a configuration write and what follows from it.
    fn mapped(&self) -> MutexGuard<'_, Vec<BarMapping>> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A BAR as the memory bus sees it.
struct BarDevice {
    function: SharedFunction,
    bar: usize,
}

impl BusDevice for BarDevice {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.function.bar_read(self.bar, offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.function.bar_write(self.bar, offset, data);
    }
}

/// Configuration mechanism #1: an address port at 0xcf8 and a data port at 0xcfc
/// (PCI 3.0, section 3.2.2.3).
pub struct ConfigPorts {
    bus: Arc<PciBus>,
    address: Mutex<u32>,
}

impl ConfigPorts {
    /// Size of the port range.
    pub const SIZE: u64 = 8;

    /// The ports of a bus.
    pub fn new(bus: Arc<PciBus>) -> Self {
        Self {
            bus,
            address: Mutex::new(0),
        }
    }

    /// The device and the byte offset that an access to the data port at `offset` names.
    fn target(&self, offset: u64) -> Option<(usize, u16)> {
        let address = *self.address.lock().unwrap_or_else(PoisonError::into_inner);
        let enabled = address & 0x8000_0000 != 0;
        let first_bus_and_function = address & 0x00ff_0700 == 0;
        (enabled && first_bus_and_function).then_some((
            (address >> 11 & 0x1f) as usize,
            (address & 0xfc) as u16 + (offset & 3) as u16,
        ))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset < 4 {
            let address = *self.address.lock().unwrap_or_else(PoisonError::into_inner);
            match <&mut [u8; 4]>::try_from(data) {
                Ok(whole) if offset == 0 => *whole = address.to_le_bytes(),
                Ok(whole) => whole.fill(0xff),
                Err(_) => {}
            }
            return;
        }
        match self.target(offset) {
            Some((device, register)) => self.bus.config_read(device, register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset < 4 {
            // Narrower writes are not of this mechanism: chipsets have other registers there.
            if let Ok(whole) = <[u8; 4]>::try_from(data)
                && offset == 0
            {
                *self.address.lock().unwrap_or_else(PoisonError::into_inner) =
                    u32::from_le_bytes(whole);
            }
            return;
        }
        if let Some((device, register)) = self.target(offset) {
            self.bus.config_write(device, register, data);
        }
    }
}

/// Memory-mapped configuration space (PCI Express 5.0, section 7.2.2).
pub struct Ecam(pub Arc<PciBus>);

impl Ecam {
    /// Device and byte offset, if `offset` names function 0 of a device.
    fn target(offset: u64) -> Option<(usize, u16)> {
        let function = offset >> 12 & 7;
        (function == 0).then_some(((offset >> 15 & 0x1f) as usize, (offset & 0xfff) as u16))
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match Self::target(offset) {
            Some((device, register)) => self.0.config_read(device, register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((device, register)) = Self::target(offset) {
            self.0.config_write(device, register, data);
        }
    }
}

/// What sits in slot 0, because kernels look for a host bridge before they trust the ports.
struct HostBridge;

impl PciFunction for HostBridge {
    fn config_read(&self, register: u16) -> u32 {
        match register {
            0 => 0x0d57_8086,
            2 => 0x0600_0000,
            _ => 0,
        }
    }

    fn config_write(&self, _offset: u16, _data: &[u8]) {}

    fn mappings(&self) -> Vec<BarMapping> {
        Vec::new()
    }

    fn bars(&self) -> Vec<BarMapping> {
        Vec::new()
    }

    fn doorbells(&self) -> Vec<Doorbell> {
        Vec::new()
    }

    fn bar_read(&self, _bar: usize, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&self, _bar: usize, _offset: u64, _data: &[u8]) {}

    fn stop(&self) {}
}
