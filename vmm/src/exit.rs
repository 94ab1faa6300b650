//! Why a machine stopped.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// What ended the guest, as the machine saw it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    /// ACPI soft off.
    PowerOff,
    /// The keyboard controller's or ACPI's reset.
    Reset,
    /// The guest's kernel said through pvpanic that it panicked.
    Panic,
    /// A triple fault.
    TripleFault,
    /// KVM cannot go on.
    Kvm(GaveUp),
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest powered off"),
            Self::Reset => f.write_str("the guest asked for a reset"),
            Self::Panic => f.write_str("the guest's kernel panicked"),
            Self::TripleFault => f.write_str("the guest hit a triple fault"),
            Self::Kvm(gave_up) => gave_up.fmt(f),
        }
    }
}

/// KVM ended a vCPU's run in a way that the VMM cannot mend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GaveUp {
    /// What KVM reported.
    pub what: String,
    /// The vCPU's index.
    pub cpu: u8,
    /// Instruction pointer.
    pub rip: u64,
    /// The bytes there, if KVM gave them.
    pub bytes: Vec<u8>,
    /// What the user can do.
    pub remedy: String,
}

impl fmt::Display for GaveUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} on vCPU {} at rip {:#x}",
            self.what, self.cpu, self.rip
        )?;
        if !self.bytes.is_empty() {
            f.write_str(", bytes")?;
            self.bytes
                .iter()
                .try_for_each(|byte| write!(f, " {byte:02x}"))?;
        }
        write!(f, "; {}", self.remedy)
    }
}

/// Told of each ending, on the vCPU's thread that saw it: it must not block.
pub type EndSink = Arc<dyn Fn(Ending) + Send + Sync>;
