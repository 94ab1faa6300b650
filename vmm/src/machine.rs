//! A machine: its VM, memory, buses and vCPUs, from creation to stop.

use std::io::{self, Write};
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use cowshed_devices::bus::{self, Bus};
use cowshed_devices::legacy::acpi_sleep::{self, AcpiSleep};
use cowshed_devices::legacy::cmos::{self, AbsentCmos};
use cowshed_devices::legacy::i8042::{self, I8042};
use cowshed_devices::legacy::pvpanic::{self, PvPanic};
use cowshed_devices::legacy::serial::{self, Serial};
use cowshed_devices::legacy::{EventSink, MachineEvent};
use cowshed_devices::threads::Threads;
use cowshed_devices::virtio::device::VirtioDevice;
use cowshed_devices::virtio::pci::VirtioPci;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::GuestMemoryMmap;

use crate::boot::{Source, UnpackedKernels};
use crate::exit::{EndSink, Ending};
use crate::fallback::{self, Fallback};
use crate::host::Virtualization;
use crate::irq::Interrupts;
use crate::pci::{ConfigPorts, Ecam, PciBus};
use crate::sandbox::{Sandbox, Thread};
use crate::vcpu::{self, Running, Vcpu};
use crate::{acpi, boot, cpu, firmware, layout, memory};

/// Why a machine could not be made or started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `/dev/kvm` did not open.
    #[error("cannot open /dev/kvm: `cowshed doctor` tells what is missing")]
    Open(#[source] kvm_ioctls::Error),
    /// More vCPUs than the machine's interrupt controllers can name.
    #[error("{0} vCPUs: give 1 to {max}", max = layout::MAX_CPUS)]
    Cpus(u8),
    /// KVM refused a step of the way.
    #[error("KVM did not {0}")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    /// A file descriptor or a thread could not be had.
    #[error("cannot {0}")]
    Io(&'static str, #[source] io::Error),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// The kernel or the initrd.
    #[error(transparent)]
    Boot(#[from] boot::Error),
    /// The ACPI tables.
    #[error(transparent)]
    Acpi(#[from] acpi::Error),
    /// The host's CPUID.
    #[error(transparent)]
    Cpu(#[from] cpu::Error),
    /// Two devices were given one address.
    #[error("the machine's layout is wrong")]
    Bus(#[from] bus::Error),
}

/// What a machine is made of, before its devices.
pub struct Config {
    /// Guest memory in bytes.
    pub memory: u64,
    /// Have the host back it by huge pages.
    pub huge_pages: bool,
    /// Number of vCPUs.
    pub cpus: u8,
    /// What kind of KVM this is.
    pub virtualization: Virtualization,
}

/// A machine whose guest has not started.
pub struct Machine {
    vm: Arc<VmFd>,
    /// What this host's processors and KVM offer.
    supported: CpuId,
    config: Config,
    memory: GuestMemoryMmap,
    interrupts: Arc<Interrupts>,
    pio: Arc<Bus>,
    mmio: Arc<Bus>,
    pci: PciBus,
    entry: Option<boot::Entry>,
    end: EndSink,
    threads: Arc<dyn Threads>,
}

/// A machine whose guest runs.
pub struct RunningMachine {
    vcpus: Vec<Running>,
    pci: Arc<PciBus>,
    vm: Arc<VmFd>,
    /// Must be there for as long as the vCPUs may run.
    memory: GuestMemoryMmap,
    /// When the first vCPU was let go.
    pub started: Instant,
}

impl Machine {
    /// An empty machine with the legacy devices that Linux expects. Endings go to `end`, from the
    /// vCPUs' threads; the first one counts. `threads` makes the devices' threads.
    pub fn new(config: Config, end: EndSink, threads: Arc<dyn Threads>) -> Result<Self, Error> {
        if config.cpus == 0 || config.cpus > layout::MAX_CPUS {
            return Err(Error::Cpus(config.cpus));
        }
        let kvm = Kvm::new().map_err(Error::Open)?;
        // A processor that is virtual itself, as on rented machines, takes long to tell what it can do:
        // as long as all of the following.
        let (vm, memory, supported) = thread::scope(|scope| {
            let ask = || kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
            let asking = thread::Builder::new().spawn_scoped(scope, ask);
            let asking = asking.map_err(|source| Error::Io("start a thread", source))?;
            let (vm, memory) = create_vm(&kvm, &config)?;
            let supported = asking.join().unwrap_or_else(|panic| resume_unwind(panic));
            let supported = supported.map_err(failed("tell its CPUID"))?;
            Ok::<_, Error>((vm, memory, supported))
        })?;

        let vm = Arc::new(vm);
        let (pio, mmio) = (Arc::new(Bus::default()), Arc::new(Bus::default()));
        let pci = PciBus::new(vm.clone(), &mmio);
        let interrupts = Interrupts::new(vm.clone());
        let machine = Self {
            vm,
            supported,
            config,
            memory,
            interrupts,
            pio,
            mmio,
            pci,
            entry: None,
            end,
            threads,
        };
        machine.add_legacy_devices()?;
        Ok(machine)
    }

    fn add_legacy_devices(&self) -> Result<(), Error> {
        let end = self.end.clone();
        let events: EventSink = Arc::new(move |event| {
            end(match event {
                MachineEvent::Reset => Ending::Reset,
                MachineEvent::PowerOff => Ending::PowerOff,
                MachineEvent::Panic => Ending::Panic,
            });
        });
        let i8042 = Arc::new(I8042::new(events.clone()));
        self.pio.insert(layout::I8042.into(), i8042::LEN, i8042)?;
        let sleep = Arc::new(AcpiSleep::new(events.clone()));
        self.pio
            .insert(layout::ACPI_SLEEP.into(), acpi_sleep::LEN, sleep)?;
        self.pio.insert(
            layout::PVPANIC.into(),
            pvpanic::LEN,
            Arc::new(PvPanic::new(events)),
        )?;
        self.pio
            .insert(layout::CMOS.into(), cmos::LEN, Arc::new(AbsentCmos))?;
        Ok(())
    }

    /// Adds COM1, which sends to `output`.
    pub fn add_serial(&mut self, output: Box<dyn Write + Send>) -> Result<Arc<Serial>, Error> {
        let line = self.interrupts.line(layout::COM1_IRQ);
        let line = line.map_err(|source| Error::Io("connect COM1's interrupt", source))?;
        let port = Serial::new(Arc::new(line), output);
        let port = Arc::new(port.map_err(|source| Error::Io("make the serial port", source))?);
        self.pio
            .insert(layout::COM1.into(), serial::LEN, port.clone())?;
        Ok(port)
    }

    /// Plugs a virtio device into the next PCI slot.
    pub fn add_virtio(&mut self, device: Box<dyn VirtioDevice>) -> Result<(), Error> {
        let plug = |source| Error::Io("plug in a virtio device", source);
        let function = VirtioPci::new(
            device,
            self.memory.clone(),
            self.interrupts.router(),
            self.threads.clone(),
        );
        self.pci.plug(function.map_err(plug)?).map_err(plug)
    }

    /// Loads what is to run. `initrd` parts are joined in order; `unpacked` is where unpacked kernels
    /// are kept.
    pub fn load(
        &mut self,
        image: Source<'_>,
        initrd: &[Source<'_>],
        cmdline: &str,
        unpacked: Option<&UnpackedKernels>,
    ) -> Result<(), Error> {
        let rsdp = Some(acpi::build(&self.memory, self.config.cpus)?);
        let kernel = boot::Kernel {
            image,
            initrd,
            cmdline,
            rsdp,
            unpacked,
        };
        self.entry = Some(boot::load(&self.memory, &kernel)?);
        Ok(())
    }

    /// Creates the vCPUs and lets the guest go. Before that this thread, and each vCPU's own, is confined.
    pub fn start(self, sandbox: Sandbox) -> Result<RunningMachine, Error> {
        vcpu::prepare_kicks().map_err(|source| Error::Io("install the vCPU signal", source))?;
        let pci = Arc::new(self.pci);
        let ports = Arc::new(ConfigPorts::new(pci.clone()));
        self.pio
            .insert(layout::PCI_CONFIG.into(), ConfigPorts::SIZE, ports)?;
        self.mmio
            .insert(layout::ECAM, layout::ECAM_SIZE, Arc::new(Ecam(pci.clone())))?;

        let emulated = self.config.virtualization == Virtualization::Emulated;
        let mut processors = cpu::Processors {
            count: self.config.cpus,
            tsc_khz: None,
            fallback: emulated,
        };
        let mut vcpus = Vec::with_capacity(self.config.cpus.into());
        for index in 0..self.config.cpus {
            let mut fd = self
                .vm
                .create_vcpu(index.into())
                .map_err(failed("create a vCPU"))?;
            processors.tsc_khz = processors.tsc_khz.or_else(|| fd.get_tsc_khz().ok());
            let cpuid = processors.cpuid(&self.supported, index)?;
            fd.set_cpuid2(&cpuid)
                .map_err(failed("set a vCPU's CPUID"))?;
            firmware::prepare(&fd).map_err(failed("set up a vCPU"))?;
            if index == 0
                && let Some(entry) = &self.entry
            {
                enter(&fd, entry).map_err(failed("set the boot vCPU's registers"))?;
            }
            let fallback = emulated.then(|| Fallback::new(self.memory.clone(), &mut fd));
            let (pio, mmio) = (self.pio.clone(), self.mmio.clone());
            vcpus.push(Vcpu {
                index,
                fd,
                pio,
                mmio,
                fallback,
            });
        }
        let mut machine = RunningMachine {
            vcpus: Vec::with_capacity(vcpus.len()),
            pci,
            vm: self.vm,
            memory: self.memory,
            started: Instant::now(),
        };
        // The vCPUs' threads are made first, so that they are not bound by this thread's list besides
        // their own. All wait for this thread.
        let gate = Arc::new(Mutex::new(()));
        let shut = gate.lock();
        for vcpu in vcpus {
            let gate = gate.clone();
            let prepare = move || {
                sandbox.confine(Thread::Vcpu);
                drop(gate.lock());
            };
            // If it fails, the machine is dropped, which stops those that run.
            let running = vcpu.start(self.end.clone(), prepare);
            let running = running.map_err(|source| Error::Io("start a vCPU's thread", source))?;
            machine.vcpus.push(running);
        }
        sandbox.confine(Thread::Main);
        machine.started = Instant::now();
        drop(shut);
        Ok(machine)
    }
}

impl RunningMachine {
    /// Stops the vCPUs and waits for them: the guest does nothing more.
    pub fn stop_vcpus(&mut self) {
        self.vcpus.iter().for_each(Running::request_stop);
        self.vcpus.drain(..).for_each(Running::join);
    }

    /// Stops the devices and waits for what is in flight: afterwards nothing touches the disks.
    pub fn stop_devices(&self) {
        self.pci.stop();
    }

    /// A hold of what takes the host's kernel milliseconds to take down: the VM and guest memory.
    pub fn shell(&self) -> impl Sized + use<> {
        (self.vm.clone(), self.memory.clone())
    }
}

impl Drop for RunningMachine {
    /// Guest memory must outlive the vCPUs; each device stops itself.
    fn drop(&mut self) {
        self.stop_vcpus();
    }
}

/// The VM with its memory, and the devices that KVM has.
fn create_vm(kvm: &Kvm, config: &Config) -> Result<(VmFd, GuestMemoryMmap), Error> {
    let vm = kvm.create_vm().map_err(failed("create a VM"))?;
    let memory = memory::allocate(config.memory)?;
    if config.huge_pages {
        memory::use_huge_pages(&memory)?;
    }
    // KVM waits for all readers of the VM here, and once for both if they come together. It takes
    // milliseconds once the VM has a device on a bus.
    thread::scope(|scope| {
        let filter = || fallback::prepare(&vm).map_err(failed("filter the SYSCALL registers"));
        let filtering = (config.virtualization == Virtualization::Emulated)
            .then(|| thread::Builder::new().spawn_scoped(scope, filter))
            .transpose()
            .map_err(|source| Error::Io("start a thread", source))?;
        memory::register(&vm, &memory)?;
        filtering.map_or(Ok(()), |thread| {
            thread.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
    })?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(failed("place its identity map"))?;
    vm.set_tss_address(layout::KVM_TSS as usize)
        .map_err(failed("place its TSS"))?;
    vm.create_irq_chip()
        .map_err(failed("create the interrupt controllers"))?;
    // The speaker port, because Linux calibrates with the timer behind it.
    let pit = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    vm.create_pit2(pit)
        .map_err(failed("create the interval timer"))?;
    Ok((vm, memory))
}

/// Puts the boot vCPU where the kernel expects to be entered. The others wait for its call.
fn enter(fd: &VcpuFd, entry: &boot::Entry) -> Result<(), kvm_ioctls::Error> {
    fd.set_sregs(&entry.sregs(fd.get_sregs()?))?;
    fd.set_regs(&entry.regs())?;
    fd.set_fpu(&entry.fpu())
}

fn failed(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |source| Error::Kvm(what, source)
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
