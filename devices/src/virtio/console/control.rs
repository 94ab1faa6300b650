//! Messages on the control queues (virtio 1.2, section 5.3.6.2).

const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// Bytes of a message without what some events add.
pub(super) const HEADER: usize = 8;

/// What the driver says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FromDriver {
    /// It wants to know the ports.
    DeviceReady,
    /// It has set up that port.
    PortReady(u32),
    /// A program has opened or closed that port.
    PortOpen(u32, bool),
}

impl FromDriver {
    /// Decodes a message; `None` if it means nothing here.
    pub(super) fn decode(bytes: [u8; HEADER]) -> Option<Self> {
        let [i0, i1, i2, i3, e0, e1, v0, v1] = bytes;
        let port = u32::from_le_bytes([i0, i1, i2, i3]);
        let good = u16::from_le_bytes([v0, v1]) != 0;
        match u16::from_le_bytes([e0, e1]) {
            DEVICE_READY if good => Some(Self::DeviceReady),
            PORT_READY if good => Some(Self::PortReady(port)),
            PORT_OPEN => Some(Self::PortOpen(port, good)),
            _ => None,
        }
    }
}

/// What the device says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ToDriver<'a> {
    Add,
    Console,
    Name(&'a str),
    Open(bool),
}

impl ToDriver<'_> {
    /// Encodes the message about `port`.
    pub(super) fn encode(&self, port: u32) -> Vec<u8> {
        let (event, value) = match *self {
            Self::Add => (PORT_ADD, 0),
            Self::Console => (CONSOLE_PORT, 1),
            Self::Name(_) => (PORT_NAME, 1),
            Self::Open(open) => (PORT_OPEN, u16::from(open)),
        };
        let mut bytes = port.to_le_bytes().to_vec();
        bytes.extend_from_slice(&event.to_le_bytes());
        bytes.extend_from_slice(&value.to_le_bytes());
        if let Self::Name(name) = self {
            bytes.extend_from_slice(name.as_bytes());
        }
        bytes
    }
}
