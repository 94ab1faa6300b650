//! The conversation with the VMM.

use alloc::ffi::CString;
use alloc::format;
use alloc::string::ToString;
use alloc::vec;
use alloc::vec::Vec;

use cowshed_guest_protocol::{Decoder, Failure, FromGuest, Message, ToGuest};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::io::Errno;

use crate::Stop;
use crate::copy::CopyIn;
use crate::ports::Ports;

const PIECE: usize = 16 << 10;

/// The control port.
pub(crate) struct Control {
    ports: Ports,
    decoder: Decoder,
    piece: Vec<u8>,
    out: Vec<u8>,
}

/// What the VMM wants done.
pub(crate) struct Job {
    pub(crate) argv: Vec<CString>,
    pub(crate) env: Vec<CString>,
    pub(crate) cwd: CString,
    pub(crate) copy_out: Vec<Vec<u8>>,
}

impl Control {
    pub(crate) fn new(ports: Ports) -> Self {
        Self {
            ports,
            decoder: Decoder::default(),
            piece: vec![0; PIECE],
            out: Vec::new(),
        }
    }

    pub(crate) fn ports(&mut self) -> &mut Ports {
        &mut self.ports
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.ports.control.as_fd()
    }

    /// Says something. A VMM that does not take it is gone, and who else would be told?
    pub(crate) fn send(&mut self, message: &FromGuest<'_>) {
        self.out.clear();
        if message.encode(&mut self.out).is_err() {
            return;
        }
        let mut rest = self.out.as_slice();
        while !rest.is_empty() {
            match rustix::io::write(&self.ports.control, rest) {
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }

    /// Reads what has arrived, waiting if nothing has. `false` when the VMM has closed its end.
    pub(crate) fn receive(&mut self) -> Result<bool, Errno> {
        loop {
            match rustix::io::read(&self.ports.control, &mut self.piece[..]) {
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
                Ok(count) => {
                    self.decoder
                        .feed(self.piece.get(..count).unwrap_or_default());
                    return Ok(count > 0);
                }
            }
        }
    }

    /// The numbers of the signals to send, of what has been received.
    pub(crate) fn signal(&mut self) -> Result<Option<u8>, Stop> {
        match self.decoder.next().map_err(misunderstood)? {
            Some(ToGuest::Signal { number }) => Ok(Some(number)),
            Some(_) => Err(out_of_turn()),
            None => Ok(None),
        }
    }

    /// Copies in what the VMM sends, until it says what to run.
    pub(crate) fn job(&mut self) -> Result<Job, Stop> {
        let mut copy_in: Option<CopyIn> = None;
        let mut copy_out = Vec::new();
        loop {
            match self.decoder.next().map_err(misunderstood)? {
                Some(ToGuest::CopyIn { destination, name }) if copy_in.is_none() => {
                    copy_in = Some(CopyIn::begin(destination, name)?);
                }
                Some(ToGuest::Item(item)) => {
                    let Some(tree) = &mut copy_in else {
                        return Err(out_of_turn());
                    };
                    if tree.item(item)? {
                        copy_in = None;
                    }
                }
                Some(ToGuest::CopyOut { source }) if copy_in.is_none() => {
                    copy_out.push(source.to_vec());
                }
                Some(ToGuest::Start(start)) if copy_in.is_none() => {
                    return Ok(Job {
                        argv: strings(&start.argv),
                        env: strings(&start.env),
                        cwd: CString::new(start.cwd).unwrap_or_default(),
                        copy_out,
                    });
                }
                Some(_) => return Err(out_of_turn()),
                None => {
                    if !self
                        .receive()
                        .map_err(Stop::boot("read the control port"))?
                    {
                        return Err(out_of_turn());
                    }
                }
            }
        }
    }
}

fn strings(bytes: &[&[u8]]) -> Vec<CString> {
    bytes
        .iter()
        .filter_map(|bytes| CString::new(*bytes).ok())
        .collect()
}

fn misunderstood(error: cowshed_guest_protocol::WireError) -> Stop {
    Stop {
        failure: Failure::Protocol,
        message: format!("the VMM sent {error}"),
    }
}

fn out_of_turn() -> Stop {
    let message = "the VMM spoke out of turn".to_string();
    Stop {
        failure: Failure::Protocol,
        message,
    }
}
