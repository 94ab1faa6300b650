use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::acpi_sleep::AcpiSleep;
use super::cmos::AbsentCmos;
use super::i8042::I8042;
use super::pvpanic::PvPanic;
use super::serial::Serial;
use super::*;
use crate::bus::BusDevice;

/// A sink and what it was told.
fn sink() -> (EventSink, Arc<Mutex<Vec<MachineEvent>>>) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let events = Arc::clone(&seen);
    (
        Arc::new(move |event| events.lock().unwrap().push(event)),
        seen,
    )
}

fn read(device: &dyn BusDevice, offset: u64) -> u8 {
    let mut data = [0xaa];
    device.read(offset, &mut data);
    data[0]
}

#[test]
fn keyboard_controller_resets() {
    let (events, seen) = sink();
    let device = I8042::new(events);
    assert_eq!(read(&device, 4), 0);
    device.write(0, &[0xfe]);
    device.write(4, &[0xd1]);
    assert!(seen.lock().unwrap().is_empty());
    device.write(4, &[0xfe]);
    assert_eq!(*seen.lock().unwrap(), [MachineEvent::Reset]);
}

#[test]
fn pvpanic_tells_of_panics_only() {
    let (events, seen) = sink();
    let device = PvPanic::new(events);
    assert_eq!(read(&device, 0), 3);
    device.write(0, &[2]);
    device.write(0, &[0]);
    assert!(seen.lock().unwrap().is_empty());
    device.write(0, &[1]);
    assert_eq!(*seen.lock().unwrap(), [MachineEvent::Panic]);
}

#[test]
fn sleep_control_powers_off() {
    let (events, seen) = sink();
    let device = AcpiSleep::new(events);
    assert_eq!((read(&device, 0), read(&device, 1)), (0, 0));
    device.write(0, &[5 << 2]);
    device.write(0, &[1 << 5 | 3 << 2]);
    device.write(1, &[1 << 5 | 5 << 2]);
    assert!(seen.lock().unwrap().is_empty());
    device.write(0, &[1 << 5 | 5 << 2]);
    assert_eq!(*seen.lock().unwrap(), [MachineEvent::PowerOff]);
}

#[test]
fn absent_clock_is_never_updating() {
    AbsentCmos.write(0, &[0x0a]);
    assert_eq!(read(&AbsentCmos, 1), 0);
}

/// An output that can be looked into.
#[derive(Clone, Default)]
struct Output(Arc<Mutex<Vec<u8>>>);

impl Write for Output {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(buf)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn serial() -> (Serial, Output, EventFd) {
    let output = Output::default();
    let irq = EventFd::new(EFD_NONBLOCK).unwrap();
    let line = Arc::new(irq.try_clone().unwrap());
    (
        Serial::new(line, Box::new(output.clone())).unwrap(),
        output,
        irq,
    )
}

#[test]
fn serial_sends_at_once() {
    let (serial, output, _irq) = serial();
    serial.write(0, b"h");
    serial.write(0, b"i");
    assert_eq!(*output.0.lock().unwrap(), b"hi");
    assert_eq!(read(&serial, 5) & 0x60, 0x60);
}

#[test]
fn serial_receives_with_interrupt_and_bound() {
    let (serial, _output, irq) = serial();
    serial.write(1, &[1]);
    let room = serial.capacity();
    let input: Vec<u8> = (0..=255).collect();
    assert_eq!(serial.enqueue(&input).unwrap(), room);
    assert!(irq.read().unwrap() > 0);
    assert_eq!(serial.enqueue(b"more").unwrap(), 0);
    assert!(serial.drained().read().is_err());
    for expected in &input[..room] {
        assert_eq!(read(&serial, 5) & 1, 1);
        assert_eq!(read(&serial, 0), *expected);
    }
    assert_eq!(read(&serial, 5) & 1, 0);
    assert!(serial.drained().read().is_ok());
    assert_eq!(serial.capacity(), room);
}

#[test]
fn serial_tells_when_loopback_ends() {
    let (serial, _output, _irq) = serial();
    serial.write(4, &[0x10]);
    assert_eq!(serial.enqueue(b"x").unwrap(), 0);
    let _ = serial.drained().read();
    serial.write(4, &[0]);
    assert!(serial.drained().read().is_ok());
    assert_eq!(serial.enqueue(b"x").unwrap(), 1);
}

#[test]
fn serial_survives_a_broken_output() {
    struct Broken;
    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let irq = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    let serial = Serial::new(irq.clone(), Box::new(Broken)).unwrap();
    serial.write(1, &[2]);
    assert!(irq.read().is_ok());
    assert_eq!(read(&serial, 2) & 0xf, 2);
    serial.write(0, b"x");
    assert!(irq.read().is_ok(), "the transmitter is ready for more");
}
