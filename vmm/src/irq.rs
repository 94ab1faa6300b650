//! Interrupts: KVM's routing table, and event file descriptors (irqfds) that drive it.
//!
//! A global system interrupt (GSI) below 24 is a pin of the PIC and the I/O APIC. Each MSI-X
//! vector that the guest unmasks gets a GSI of its own above them.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use cowshed_devices::pci::msix::{MsiMessage, MsiRouter};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Pins of the I/O APIC.
const PINS: u32 = 24;
/// KVM's `KVM_MAX_IRQ_ROUTES` is 4096; pins take 40 entries of it.
const MAX_GSI: u32 = 4096 - 40;

/// The routing table of a VM.
pub struct Interrupts {
    vm: Arc<VmFd>,
    routes: Mutex<Routes>,
}

struct Routes {
    messages: BTreeMap<u32, MsiMessage>,
    next: u32,
}

impl Interrupts {
    /// The table of a VM whose in-kernel interrupt controllers exist.
    pub fn new(vm: Arc<VmFd>) -> Arc<Self> {
        let routes = Routes {
            messages: BTreeMap::new(),
            next: PINS,
        };
        Arc::new(Self {
            vm,
            routes: Mutex::new(routes),
        })
    }

    /// An event whose signals are edges on pin `gsi` (below 24).
    pub fn line(&self, gsi: u32) -> io::Result<EventFd> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        self.vm.register_irqfd(&event, gsi).map_err(kvm_error)?;
        Ok(event)
    }

    /// The router of one PCI function.
    pub fn router(self: &Arc<Self>) -> Arc<dyn MsiRouter> {
        Arc::new(FunctionRouter {
            interrupts: self.clone(),
            vectors: Mutex::new(BTreeMap::new()),
        })
    }

    fn allocate(&self) -> io::Result<u32> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        if routes.next == MAX_GSI {
            return Err(io::Error::other("no interrupt route left"));
        }
        routes.next += 1;
        Ok(routes.next - 1)
    }

    fn route(&self, gsi: u32, message: MsiMessage) -> io::Result<()> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        routes.messages.insert(gsi, message);
        let entries: Vec<_> = pins()
            .chain(
                routes
                    .messages
                    .iter()
                    .map(|(gsi, message)| msi_entry(*gsi, *message)),
            )
            .collect();
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| io::Error::other("interrupt routing table too long"))?;
        self.vm.set_gsi_routing(&table).map_err(kvm_error)
    }
}

/// The vectors of one function. A vector keeps its GSI for the life of the machine.
struct FunctionRouter {
    interrupts: Arc<Interrupts>,
    vectors: Mutex<BTreeMap<u16, Vector>>,
}

#[derive(Clone, Copy)]
struct Vector {
    gsi: u32,
    attached: bool,
    message: Option<MsiMessage>,
}

impl MsiRouter for FunctionRouter {
    fn attach(&self, vector: u16, event: &EventFd, message: MsiMessage) -> io::Result<()> {
        let mut vectors = self.vectors.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = match vectors.get(&vector) {
            Some(state) => *state,
            None => Vector {
                gsi: self.interrupts.allocate()?,
                attached: false,
                message: None,
            },
        };
        if state.message != Some(message) {
            self.interrupts.route(state.gsi, message)?;
            state.message = Some(message);
        }
        if !state.attached {
            // KVM looks at the event when it takes it: what was signalled while masked arrives.
            self.interrupts
                .vm
                .register_irqfd(event, state.gsi)
                .map_err(kvm_error)?;
            state.attached = true;
        }
        vectors.insert(vector, state);
        Ok(())
    }

    fn detach(&self, vector: u16, event: &EventFd) -> io::Result<()> {
        let mut vectors = self.vectors.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(state) = vectors.get_mut(&vector)
            && state.attached
        {
            self.interrupts
                .vm
                .unregister_irqfd(event, state.gsi)
                .map_err(kvm_error)?;
            state.attached = false;
        }
        Ok(())
    }
}

/// The pins as KVM routes them from the start: setting a table replaces all of it.
fn pins() -> impl Iterator<Item = kvm_irq_routing_entry> {
    let pic = (0..16).map(|gsi| {
        let (chip, pin) = if gsi < 8 {
            (KVM_IRQCHIP_PIC_MASTER, gsi)
        } else {
            (KVM_IRQCHIP_PIC_SLAVE, gsi - 8)
        };
        pin_entry(gsi, chip, pin)
    });
    pic.chain((0..PINS).map(|gsi| pin_entry(gsi, KVM_IRQCHIP_IOAPIC, gsi)))
}

fn pin_entry(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip.irqchip = irqchip;
    entry.u.irqchip.pin = pin;
    entry
}

fn msi_entry(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi.address_lo = message.address as u32;
    entry.u.msi.address_hi = (message.address >> 32) as u32;
    entry.u.msi.data = message.data;
    entry
}

fn kvm_error(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}
