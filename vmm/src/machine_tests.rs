use std::sync::mpsc;
use std::thread::JoinHandle;

use cowshed_devices::threads::Kind;
use cowshed_devices::virtio::rng::Rng;

use super::*;

/// Makes the threads of devices that no driver starts.
struct NoThreads;

impl Threads for NoThreads {
    fn spawn(&self, _: Kind, _: String, _: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// A machine without a kernel: the first vCPU finds nothing to run at its reset vector, others wait
/// to be called. None, and a word about it, where there is no KVM.
fn machine(cpus: u8, end: EndSink) -> Option<Machine> {
    if let Err(error) = Kvm::new() {
        eprintln!("skipped: /dev/kvm: {error}");
        return None;
    }
    let config = Config {
        huge_pages: false,
        memory: memory::MIN,
        cpus,
        virtualization: Virtualization::of_host(),
    };
    let mut machine = Machine::new(config, end, Arc::new(NoThreads)).unwrap();
    machine.add_virtio(Box::new(Rng::new())).unwrap();
    Some(machine)
}

#[test]
fn nothing_of_a_machine_outlives_it() {
    let Some(machine) = machine(2, Arc::new(|_| {})) else {
        return;
    };
    let vm = Arc::downgrade(&machine.vm);
    let (pio, mmio) = (Arc::downgrade(&machine.pio), Arc::downgrade(&machine.mmio));
    let running = machine.start(Sandbox::off()).unwrap();
    let pci = Arc::downgrade(&running.pci);
    assert!(pio.upgrade().is_some() && mmio.upgrade().is_some());
    drop(running);
    // The vCPUs' threads held these, the buses the devices, and the devices the VM.
    assert!(pio.upgrade().is_none() && mmio.upgrade().is_none());
    assert!(pci.upgrade().is_none());
    assert!(vm.upgrade().is_none());
}

#[test]
fn a_vcpu_whose_thread_panicked_can_be_stopped() {
    let (alive, dead) = mpsc::channel::<()>();
    let end: EndSink = Arc::new(move |ending| {
        let _until_the_thread_is_done = &alive;
        panic!("{ending}");
    });
    let Some(machine) = machine(1, end) else {
        return;
    };
    let mut running = machine.start(Sandbox::off()).unwrap();
    dead.recv().unwrap_err();
    running.stop_vcpus();
}
