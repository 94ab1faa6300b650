//! PID 1 of a guest that runs one command for the VMM and ends.
//!
//! It says hello on the control port, mounts the root file system and moves onto it, copies in
//! what the VMM sends, runs the command with its streams on the VMM's ports, copies out, says how
//! the command ended and powers off. What it says and hears is `cowshed-guest-protocol`.
//!
//! With `cowshed.handover` on the kernel's command line there is no VMM to talk to: it loads the
//! modules, mounts the root and becomes the root's own init.
#![no_std]
#![no_main]

extern crate alloc;

mod block_device;
mod command;
mod console;
mod control;
mod copy;
mod environment;
mod filesystem;
mod kernel_args;
mod modules;
mod mounts;
mod partition_table;
mod ports;
mod raw;
mod relay;
mod root;
mod runtime;
mod start;
mod supervise;
mod volume;

use cowshed_guest_protocol::{Failure, FromGuest, Reason, VERSION};
use rustix::system::RebootCommand;

use crate::control::Control;
use crate::kernel_args::KernelArgs;
use crate::modules::Modules;
use crate::ports::Ports;

/// What stops a guest before its command has run.
struct Stop {
    failure: Failure,
    message: alloc::string::String,
}

impl Stop {
    /// For `map_err`: `doing` failed.
    fn boot(doing: &str) -> impl FnOnce(rustix::io::Errno) -> Self {
        move |errno| Self {
            failure: Failure::Boot,
            message: alloc::format!("cannot {doing}: {}", Reason(errno)),
        }
    }
}

fn main() {
    let early = mounts::early().and_then(|()| KernelArgs::read());
    let args = early.unwrap_or_else(|stop| die(&stop));
    let modules = Modules::of_this_kernel();
    if args.handover {
        let Err(stop) = hand_over(&modules, &args);
        die(&stop);
    }
    let mut control = match connect(&modules) {
        Ok(control) => control,
        Err(stop) => die(&stop),
    };
    if let Err(stop) = run(&mut control, &modules, &args) {
        console::say(&stop.message);
        let Stop { failure, message } = &stop;
        control.send(&FromGuest::Error {
            failure: *failure,
            message,
        });
    }
    power_off();
}

fn connect(modules: &Modules) -> Result<Control, Stop> {
    modules.load(&["virtio_pci", "virtio_mmio", "virtio_console"])?;
    let ports = Ports::find()?;
    let mut control = Control::new(ports);
    control.send(&FromGuest::Hello { version: VERSION });
    Ok(control)
}

fn run(control: &mut Control, modules: &Modules, args: &KernelArgs) -> Result<(), Stop> {
    root::enter(modules, args)?;
    mounts::late()?;
    let job = control.job()?;
    let streams = relay::Streams::open(control.ports())?;
    let (child, streams) = command::spawn(&job, streams)?;
    control.send(&FromGuest::Started);
    let end = supervise::to_the_end(child, control, streams)?;
    for source in &job.copy_out {
        copy::out(control, source);
    }
    mounts::flush();
    control.send(&end);
    Ok(())
}

fn hand_over(modules: &Modules, args: &KernelArgs) -> Result<core::convert::Infallible, Stop> {
    modules.load(&["virtio_pci", "virtio_mmio", "virtio_console"])?;
    root::enter(modules, args)?;
    Err(command::become_init())
}

/// Without a control port nobody can be told but who reads the console.
fn die(stop: &Stop) -> ! {
    console::say(&stop.message);
    power_off()
}

fn power_off() -> ! {
    rustix::fs::sync();
    loop {
        if rustix::system::reboot(RebootCommand::PowerOff).is_err() {
            raw::exit(1);
        }
    }
}
