//! The devices' threads.

use std::io;
use std::thread::{self, JoinHandle};

use cowshed_devices::threads::{Kind, Threads};

/// Makes a thread wherever it is asked for one.
pub(crate) struct Workers;

impl Threads for Workers {
    fn spawn(
        &self,
        _kind: Kind,
        name: String,
        work: Box<dyn FnOnce() + Send>,
    ) -> io::Result<JoinHandle<()>> {
        thread::Builder::new().name(name).spawn(work)
    }
}
