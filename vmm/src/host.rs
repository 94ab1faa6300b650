//! What kind of host this is.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

/// Who executes the guest's kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Virtualization {
    /// The processor, with VMX or SVM.
    Hardware,
    /// KVM's instruction emulator: the host is itself a virtual machine without VMX and SVM, and
    /// `kvm_pvm` serves `/dev/kvm`. Guest ring 3 runs natively, ring 0 does not.
    Emulated,
}

impl Virtualization {
    /// Asks the host.
    ///
    /// # Errors
    /// `/proc` is not mounted.
    pub fn of_host() -> io::Result<Self> {
        let flags = flags(BufReader::new(File::open("/proc/cpuinfo")?))?;
        Ok(Self::from_facts(
            &flags,
            Path::new("/sys/module/kvm_pvm").exists(),
        ))
    }

    fn from_facts(flags: &str, has_pvm: bool) -> Self {
        let in_hardware = flags
            .split_whitespace()
            .any(|flag| flag == "vmx" || flag == "svm");
        if in_hardware && !has_pvm {
            Self::Hardware
        } else {
            Self::Emulated
        }
    }
}

/// The first processor's flags. Nothing is read of the others: making the page up takes the
/// kernel a while for each.
fn flags(cpuinfo: impl BufRead) -> io::Result<String> {
    for line in cpuinfo.lines() {
        let line = line?;
        if let Some((key, flags)) = line.split_once(':')
            && key.trim() == "flags"
        {
            return Ok(flags.to_owned());
        }
    }
    Ok(String::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_needs_a_flag_and_no_pvm() {
        use Virtualization::*;
        for (flags, has_pvm, kind) in [
            (" fpu vmx ssse3", false, Hardware),
            (" fpu svm", false, Hardware),
            (" fpu ssse3", false, Emulated),
            (" fpu svm_lock vmx_flags", false, Emulated),
            (" fpu vmx", true, Emulated),
            ("", true, Emulated),
        ] {
            assert_eq!(
                Virtualization::from_facts(flags, has_pvm),
                kind,
                "{flags} {has_pvm}"
            );
        }
    }

    #[test]
    fn the_first_processors_flags_are_read() {
        let page = "processor\t: 0\nvmx flags\t: ept\nflags\t\t: fpu vmx\n\nflags\t\t: other\n";
        assert_eq!(flags(page.as_bytes()).unwrap(), " fpu vmx");
        assert_eq!(flags(&b"processor : 0\n"[..]).unwrap(), "");
    }
}
