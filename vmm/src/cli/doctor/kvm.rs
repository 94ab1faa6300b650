//! KVM: there, permitted, able.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use kvm_ioctls::{Cap, Kvm};

use super::Check;
use crate::host::Virtualization;

const DEVICE: &str = "/dev/kvm";
/// The one version there has been since 2007.
const API_VERSION: i32 = 12;

/// What every guest needs.
const NEEDED: [(Cap, &str); 7] = [
    (Cap::Irqchip, "interrupt controllers"),
    (Cap::Irqfd, "irqfd"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::SignalMsi, "MSI"),
    (Cap::UserMemory, "user memory"),
    (Cap::ImmediateExit, "immediate exit"),
    (Cap::TscDeadlineTimer, "TSC deadline timer"),
];
/// What a guest needs besides where its kernel is emulated.
const NEEDED_EMULATED: [(Cap, &str); 3] = [
    (Cap::X86UserSpaceMsr, "MSR exits"),
    (Cap::X86MsrFilter, "MSR filters"),
    (Cap::SetGuestDebug, "guest debugging"),
];

pub(super) fn checks() -> Vec<Check> {
    let emulated = Virtualization::of_host() == Virtualization::Emulated;
    vec![device(emulated), kind(emulated)]
}

fn device(emulated: bool) -> Check {
    let opened = File::options().read(true).write(true).open(DEVICE);
    match opened.and_then(|_| Ok(Kvm::new()?)) {
        Ok(kvm) => able(&kvm, emulated),
        Err(error) => unopened(&error),
    }
}

fn unopened(error: &io::Error) -> Check {
    let finding = format!("{DEVICE}: {error}");
    let remedy = match error.kind() {
        io::ErrorKind::NotFound => {
            "load kvm_intel or kvm_amd (sudo modprobe); on a bare machine virtualization is \
             switched on in the firmware, a virtual machine needs nested virtualization, and a \
             container --device /dev/kvm"
                .to_owned()
        }
        io::ErrorKind::PermissionDenied => permit(),
        _ => "see dmesg for what KVM says".to_owned(),
    };
    Check::missing("KVM", finding, remedy)
}

/// How to get at a device that is there.
fn permit() -> String {
    let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
    let gid = Path::new(DEVICE).metadata().map_or(0, |meta| meta.gid());
    match group_name(&groups, gid) {
        Some(name) if gid != 0 => {
            format!("sudo usermod -aG {name} $USER, then log out and in again")
        }
        _ => "give it to a group: echo 'KERNEL==\"kvm\", GROUP=\"kvm\", MODE=\"0660\"' | sudo tee \
              /etc/udev/rules.d/99-kvm.rules; sudo udevadm trigger /dev/kvm; \
              sudo usermod -aG kvm $USER, then log out and in again"
            .to_owned(),
    }
}

/// The name of a group in the text of `/etc/group`.
fn group_name(groups: &str, gid: u32) -> Option<&str> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(gid)).then_some(name)
    })
}

fn able(kvm: &Kvm, emulated: bool) -> Check {
    let version = kvm.get_api_version();
    if version != API_VERSION {
        let finding = format!("API version {version}, not {API_VERSION}");
        return Check::missing("KVM", finding, "run a Linux kernel of this century");
    }
    let besides = NEEDED_EMULATED.iter().filter(|_| emulated);
    let lacking: Vec<&str> = NEEDED
        .iter()
        .chain(besides)
        .filter(|(cap, _)| !kvm.check_extension(*cap))
        .map(|(_, name)| *name)
        .collect();
    match lacking.is_empty() {
        true => Check::ok("KVM", format!("{DEVICE}, API version {version}")),
        false => Check::missing(
            "KVM",
            format!("it lacks {}", lacking.join(", ")),
            "run Linux 5.10 or newer as the host",
        ),
    }
}

fn kind(emulated: bool) -> Check {
    match emulated {
        false => Check::ok("virtualization", "by the processor"),
        true => Check::note(
            "virtualization",
            "no VMX or SVM: KVM emulates the guest's kernel, which boots in seconds to minutes \
             instead of milliseconds",
            "for full speed use a bare machine, or a VM with nested virtualization",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::State;

    #[test]
    fn groups_are_found_by_number() {
        let groups = "root:x:0:\nkvm:x:104:me,you\nbad\nshort:x\n";
        assert_eq!(group_name(groups, 104), Some("kvm"));
        assert_eq!(group_name(groups, 0), Some("root"));
        assert_eq!(group_name(groups, 7), None);
    }

    #[test]
    fn what_keeps_kvm_away_has_its_own_remedy() {
        let remedy = |kind: io::ErrorKind| {
            let check = unopened(&kind.into());
            assert_eq!(check.state, State::Missing);
            check.remedy.unwrap()
        };
        assert!(remedy(io::ErrorKind::NotFound).contains("modprobe"));
        assert!(remedy(io::ErrorKind::PermissionDenied).contains("usermod -aG"));
    }
}
