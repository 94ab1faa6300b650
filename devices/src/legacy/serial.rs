//! A 16550A serial port.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::Trigger;
use vm_superio::serial::{Error, SerialEvents};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bus::BusDevice;
use crate::irq::IrqLine;

/// Number of ports.
pub const LEN: u64 = 8;
/// Offset of the modem control register, which turns loopback mode on and off.
const MODEM_CONTROL: u64 = 4;

/// A shared interrupt line in the shape that `vm-superio` wants.
struct Line(Arc<dyn IrqLine>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.raise()
    }
}

/// Signals that the guest has read all of its input.
struct Drained(EventFd);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // Fails only when the counter is full: the reader then wakes all the same.
        let _ = self.0.write(1);
    }
}

type Uart = vm_superio::Serial<Line, Drained, Box<dyn Write + Send>>;

/// One UART with a 64 byte receive queue. Each byte that the guest sends is written to the
/// output and flushed at once, so a prompt is never late.
pub struct Serial {
    uart: Mutex<Uart>,
    drained: EventFd,
}

impl Serial {
    /// A port that interrupts over `irq` and sends to `output`. An output that fails loses what
    /// the guest sends; the guest goes on.
    ///
    /// # Errors
    /// There are no file descriptors left.
    pub fn new(irq: Arc<dyn IrqLine>, output: Box<dyn Write + Send>) -> io::Result<Self> {
        let drained = EventFd::new(EFD_NONBLOCK)?;
        let events = Drained(drained.try_clone()?);
        let uart = Uart::with_events(Line(irq), events, output);
        Ok(Self {
            uart: Mutex::new(uart),
            drained,
        })
    }

    /// Gives the guest as much of `input` as there is room for; returns how many bytes that is.
    /// None while the guest has the port in loopback mode.
    ///
    /// # Errors
    /// The interrupt could not be raised.
    pub fn enqueue(&self, input: &[u8]) -> io::Result<usize> {
        self.uart()
            .enqueue_raw_bytes(input)
            .or_else(|error| match error {
                Error::Trigger(error) | Error::IOError(error) => Err(error),
                Error::FullFifo => Ok(0),
            })
    }

    /// How many bytes [`Self::enqueue`] has room for.
    pub fn capacity(&self) -> usize {
        self.uart().fifo_capacity()
    }

    /// Readable (and non-blocking) once the guest has emptied a receive queue that held input,
    /// or may have left loopback mode: what a thread waits for when [`Self::enqueue`] took less
    /// than it was given.
    pub fn drained(&self) -> &EventFd {
        &self.drained
    }

    fn uart(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        // The registers are bytes; of a wider access only the first byte reaches one.
        if let (Some(first), Ok(offset)) = (data.first_mut(), u8::try_from(offset)) {
            *first = self.uart().read(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (Some(&value), Ok(offset)) = (data.first(), u8::try_from(offset)) else {
            return;
        };
        if let Err(error) = self.uart().write(offset, value) {
            tracing::debug!(%error, "serial port");
        }
        if u64::from(offset) == MODEM_CONTROL {
            // Out of loopback mode there is room again. Fails only when the counter is full.
            let _ = self.drained.write(1);
        }
    }
}
