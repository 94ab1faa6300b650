//! A vCPU: its thread, its run loop, and how to make it stop.

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use cowshed_devices::bus::Bus;
use kvm_bindings::{KVM_EXIT_INTERNAL_ERROR, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::exit::{EndSink, Ending, GaveUp};
use crate::fallback::Fallback;

/// What a vCPU's thread needs.
pub struct Vcpu {
    /// Index, which is the APIC identifier too.
    pub index: u8,
    /// KVM's handle, registers set.
    pub fd: VcpuFd,
    /// Port I/O.
    pub pio: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// What this KVM leaves to us; none on ordinary hosts.
    pub fallback: Option<Fallback>,
}

/// A running vCPU.
pub struct Running {
    thread: JoinHandle<()>,
    stop: Arc<Stop>,
}

/// How another thread gets a vCPU out of `KVM_RUN`.
struct Stop {
    wanted: AtomicBool,
    /// `kvm_run.immediate_exit`, null once the thread has let go of its vCPU.
    immediate_exit: Mutex<AtomicPtr<u8>>,
}

impl Stop {
    fn immediate_exit(&self) -> MutexGuard<'_, AtomicPtr<u8>> {
        self.immediate_exit
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes the pointer null when its thread is about to let go of the vCPU.
struct LetsGo<'a>(&'a Stop);

impl Drop for LetsGo<'_> {
    fn drop(&mut self) {
        let pointer = self.0.immediate_exit();
        pointer.store(std::ptr::null_mut(), Ordering::Relaxed);
    }
}

/// Installs the handler of the signal that interrupts `KVM_RUN`. Once a process.
pub fn prepare_kicks() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), nothing)
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

impl Vcpu {
    /// Runs the vCPU on a thread of its own, after `prepare`. What ends the guest goes to `end`.
    pub fn start(
        mut self,
        end: EndSink,
        prepare: impl FnOnce() + Send + 'static,
    ) -> io::Result<Running> {
        let run: *mut kvm_run = self.fd.get_kvm_run();
        // SAFETY: `run` points into the mapping that `fd` owns.
        let immediate_exit = unsafe { &raw mut (*run).immediate_exit };
        let stop = Arc::new(Stop {
            wanted: AtomicBool::new(false),
            immediate_exit: Mutex::new(AtomicPtr::new(immediate_exit)),
        });
        let shared = stop.clone();
        let thread = thread::Builder::new()
            .name(format!("vcpu{}", self.index))
            .spawn(move || {
                let mut vcpu = self;
                // Dropped before the vCPU, also when the thread panics.
                let _guard = LetsGo(&shared);
                prepare();
                if let Some(ending) = vcpu.run(&shared) {
                    end(ending);
                }
            })?;
        Ok(Running { thread, stop })
    }

    fn run(&mut self, stop: &Stop) -> Option<Ending> {
        while !stop.wanted.load(Ordering::Acquire) {
            if let Some(ending) = self.run_once() {
                return Some(ending);
            }
        }
        None
    }

    /// Enters the guest once and deals with why it left.
    fn run_once(&mut self) -> Option<Ending> {
        let run: *mut kvm_run = self.fd.get_kvm_run();
        match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                for item in data.chunks(port_width(run)) {
                    self.pio.write(port.into(), item);
                }
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                for item in data.chunks_mut(port_width(run)) {
                    if !self.pio.read(port.into(), item) {
                        item.fill(0xff);
                    }
                }
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                if !self.mmio.read(address, data) {
                    data.fill(0xff);
                }
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.mmio.write(address, data);
            }
            Ok(VcpuExit::Debug(exit)) if self.fallback.is_some() => {
                return self.mend(|fallback, fd| fallback.debug(fd, exit.pc, exit.dr6));
            }
            Ok(VcpuExit::X86Wrmsr(exit)) if self.fallback.is_some() => {
                let (msr, value) = (exit.index, exit.data);
                *exit.error = 0;
                return self.mend(|fallback, fd| fallback.write_msr(fd, msr, value));
            }
            Ok(VcpuExit::InternalError) => return self.internal_error(),
            Ok(VcpuExit::Shutdown) => return Some(Ending::TripleFault),
            Ok(VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => {}
            Ok(VcpuExit::FailEntry(reason, _)) => {
                let what = format!("KVM could not enter the guest (hardware reason {reason:#x})");
                return Some(self.gave_up(what, "see the host's kernel log"));
            }
            Ok(other) => {
                let what = format!("unexpected exit {other:?}");
                return Some(self.gave_up(what, "this is a bug in cowshed: please report it"));
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => {
                let what = format!("KVM_RUN failed ({error})");
                return Some(self.gave_up(what, "see the host's kernel log"));
            }
        }
        None
    }

    /// Lets the fallback put the state right; the guest goes on if it could.
    fn mend(
        &mut self,
        act: impl FnOnce(&mut Fallback, &mut VcpuFd) -> Result<(), kvm_ioctls::Error>,
    ) -> Option<Ending> {
        let fallback = self.fallback.as_mut()?;
        let error = act(fallback, &mut self.fd).err()?;
        Some(self.gave_up(
            format!("KVM refused a register change ({error})"),
            "see the host's log",
        ))
    }

    fn internal_error(&mut self) -> Option<Ending> {
        let (suberror, bytes) = emulation_failure(self.fd.get_kvm_run());
        if let Some(fallback) = &mut self.fallback
            && suberror == kvm_bindings::KVM_INTERNAL_ERROR_EMULATION
            && let Ok(true) = fallback.instruction(&mut self.fd, &bytes)
        {
            return None;
        }
        let remedy = if self.fallback.is_some() {
            "this host runs the guest's kernel in an instruction emulator that lacks this \
             instruction: use the default guest, or keep the guest's kernel from using it \
             (clearcpuid= on its command line)"
        } else {
            "see the host's kernel log"
        };
        let what = format!("KVM internal error (suberror {suberror})");
        Some(self.gave_up_at(what, bytes, remedy))
    }

    fn gave_up(&self, what: String, remedy: &str) -> Ending {
        self.gave_up_at(what, Vec::new(), remedy)
    }

    fn gave_up_at(&self, what: String, bytes: Vec<u8>, remedy: &str) -> Ending {
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        Ending::Kvm(GaveUp {
            what,
            cpu: self.index,
            rip,
            bytes,
            remedy: remedy.to_owned(),
        })
    }
}

impl Running {
    /// Asks the vCPU to leave the guest; returns at once.
    pub fn request_stop(&self) {
        self.stop.wanted.store(true, Ordering::Release);
        let pointer = self.stop.immediate_exit();
        let immediate_exit = pointer.load(Ordering::Relaxed);
        if immediate_exit.is_null() {
            return;
        }
        // SAFETY: the byte lives in the mapping of a vCPU that its thread has not let go of, or
        // the pointer would be null; KVM and we are the only ones to touch it, a byte at a time.
        unsafe { AtomicU8::from_ptr(immediate_exit) }.store(1, Ordering::Release);
        // SAFETY: the thread has not ended: before it does, by whatever way, it takes the lock that
        // we hold and makes the pointer null.
        unsafe { libc::pthread_kill(self.thread.as_pthread_t(), SIGRTMIN()) };
    }

    /// Waits for the vCPU's thread, which must have been asked to stop or have ended the guest.
    pub fn join(self) {
        if self.thread.join().is_err() {
            tracing::error!("a vCPU thread panicked");
        }
    }
}

/// The width of each item of a port access: a string instruction moves many in one exit.
fn port_width(run: *mut kvm_run) -> usize {
    // SAFETY: `run` is the vCPU's mapping; what the exit's data borrows lies outside this struct.
    let run = unsafe { &*run };
    // SAFETY: plain integers, and the exit reason said that `io` is the member that is set.
    let width = unsafe { run.__bindgen_anon_1.io }.size;
    usize::from(width).max(1)
}

/// The suberror of an internal error, and the instruction bytes if KVM says that they are valid.
fn emulation_failure(run: &kvm_run) -> (u32, Vec<u8>) {
    debug_assert_eq!(run.exit_reason, KVM_EXIT_INTERNAL_ERROR);
    // SAFETY: plain integers of the union's member that the exit reason names.
    let failure = unsafe { run.__bindgen_anon_1.emulation_failure };
    // SAFETY: as above; this union has one member.
    let instruction = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
    let valid = failure.suberror == kvm_bindings::KVM_INTERNAL_ERROR_EMULATION
        && failure.ndata >= 3
        && failure.flags
            & u64::from(kvm_bindings::KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES)
            != 0;
    let len = usize::from(instruction.insn_size).min(instruction.insn_bytes.len());
    let bytes = if valid {
        instruction.insn_bytes[..len].to_vec()
    } else {
        Vec::new()
    };
    (failure.suberror, bytes)
}
