//! What a driver sees of the console.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::Port;
use super::hub::{ConsoleHandle, Hub};
use super::service::Service;
use crate::threads::Kind;
use crate::virtio::device::{Activation, VirtioDevice, feature};
use crate::virtio::worker::Worker;

const F_MULTIPORT: u32 = 1;
/// A driver fills each receive queue with a page per entry when it starts.
const QUEUE_SIZE: u16 = 32;
/// Most ports whose queues and vectors the transport has room for.
const MAX_PORTS: usize = 64;
/// A communication device of no further kind.
const CLASS: u32 = 0x07_80_00;

/// Ports on the guest's bus. Dropping it closes the ports once their output is written.
pub struct Console {
    hub: Arc<Hub>,
    worker: Option<Worker>,
}

impl Console {
    /// A console with those ports. The first is the one that a driver without multiport
    /// support uses.
    ///
    /// # Errors
    /// Over 64 ports or none, a name with a zero byte, or no file descriptors left.
    pub fn new(ports: Vec<Port>) -> io::Result<(Self, ConsoleHandle)> {
        let named = ports.iter().all(|port| !port.name.contains('\0'));
        if ports.is_empty() || ports.len() > MAX_PORTS || !named {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let hub = Arc::new(Hub::new(ports)?);
        let handle = ConsoleHandle(Arc::clone(&hub));
        Ok((Self { hub, worker: None }, handle))
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.stop();
        self.hub.close();
    }
}

impl VirtioDevice for Console {
    fn id(&self) -> u16 {
        VIRTIO_ID_CONSOLE as u16
    }

    fn class(&self) -> u32 {
        CLASS
    }

    fn features(&self) -> u64 {
        feature(F_MULTIPORT)
    }

    /// A pair for each port, and one for control.
    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2 * (self.hub.ports.len() + 1)]
    }

    /// `struct virtio_console_config` (section 5.3.4).
    fn config(&self) -> Vec<u8> {
        // Columns and rows, not offered.
        let mut config = vec![0; 4];
        config.extend_from_slice(&(self.hub.ports.len() as u32).to_le_bytes());
        // Emergency write, not offered.
        config.extend_from_slice(&[0; 4]);
        config
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let multiport = activation.has(F_MULTIPORT);
        let link = Arc::clone(&activation.link);
        let threads = Arc::clone(&activation.threads);
        let mut service = Service::new(Arc::clone(&self.hub), activation, multiport);
        let hub = Arc::clone(&self.hub);
        hub.set_running(true);
        let work = move |stop| {
            if let Err(error) = service.run(&stop) {
                link.fail(&error);
            }
            hub.set_running(false);
        };
        let worker = Worker::spawn(&*threads, Kind::Console, "console".into(), work);
        if worker.is_err() {
            self.hub.set_running(false);
        }
        self.worker = Some(worker?);
        Ok(())
    }

    fn stop(&mut self) {
        self.worker = None;
    }
}
