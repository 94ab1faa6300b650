//! The entropy device (virtio 1.2, section 5.4).

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::Memory;
use super::device::{Activation, VirtioDevice};
use super::queue::{self, VirtQueue};
use super::worker::{Stop, Worker};
use crate::poll;
use crate::threads::Kind;

const QUEUE_SIZE: u16 = 64;
/// Most bytes that one request gets. A driver asks again for more.
const MAX_REQUEST: u64 = 64 << 10;
/// An "other" system peripheral: what Linux's driver binds to is the device ID.
const CLASS: u32 = 0x08_80_00;

/// Random bytes from the host's kernel.
#[derive(Default)]
pub struct Rng {
    worker: Option<Worker>,
}

impl Rng {
    /// A source of entropy.
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for Rng {
    fn id(&self) -> u16 {
        VIRTIO_ID_RNG as u16
    }

    fn class(&self) -> u32 {
        CLASS
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn activate(&mut self, mut activation: Activation) -> io::Result<()> {
        let Some(mut queue) = activation.take_queue(0) else {
            return Ok(());
        };
        let Activation {
            memory,
            link,
            threads,
            ..
        } = activation;
        let work = move |stop| {
            if let Err(error) = serve(&mut queue, &memory, &stop) {
                link.fail(&error);
            }
        };
        self.worker = Some(Worker::spawn(&*threads, Kind::Entropy, "rng".into(), work)?);
        Ok(())
    }

    fn stop(&mut self) {
        self.worker = None;
    }
}

/// Why the device gave up.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Queue(#[from] queue::Error),
    #[error("entropy buffer is not in guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
    #[error("no entropy: {0}")]
    Host(#[from] io::Error),
}

fn serve(queue: &mut VirtQueue, memory: &Memory, stop: &Stop) -> Result<(), Error> {
    let mut bytes = Vec::new();
    while !stop.is_set() {
        if let Some(chain) = queue.pop()? {
            let len = chain.writable.len().min(MAX_REQUEST);
            bytes.resize(len as usize, 0);
            fill(&mut bytes)?;
            let written = chain.writable.write(memory, 0, &bytes)?;
            queue.complete(&chain, written as u32)?;
            queue.notify()?;
        } else if !queue.enable_doorbell()? {
            poll::wait(&[queue.doorbell(), stop.event()], -1)?;
            // "Would block": it was the stop event.
            let _ = queue.doorbell().read();
        }
    }
    Ok(())
}

fn fill(mut bytes: &mut [u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match getrandom(&mut *bytes, GetRandomFlags::empty()) {
            Ok(len) => bytes = bytes.get_mut(len..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
