//! Giving up what the process may do by who it is.

use std::io;
use std::path::Path;

use rustix::fs::{Gid, Uid};
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, Signal, chdir, chroot, set_dumpable_behavior,
    set_parent_process_death_signal, setrlimit,
};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};

use super::{Error, Identity};

/// Makes `folder` all there is of the file system.
pub(super) fn change_root(folder: &Path) -> Result<(), Error> {
    chroot(folder)
        .and_then(|()| chdir("/"))
        .map_err(|error| Error::Chroot(folder.to_path_buf(), error.into()))
}

/// Becomes another user, of one group only, for good.
pub(super) fn become_user(Identity { uid, gid }: Identity) -> Result<(), Error> {
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(gid));
    set_thread_groups(&[])
        .and_then(|()| set_thread_res_gid(group, group, group))
        .and_then(|()| set_thread_res_uid(user, user, user))
        // Forgotten with the identity.
        .and_then(|()| set_parent_process_death_signal(Some(Signal::KILL)))
        .map_err(|error| Error::User(uid, gid, error.into()))
}

/// Gives up all capabilities, and what others could learn from its memory.
pub(super) fn give_up() -> Result<(), Error> {
    let failed =
        |what| move |errno: rustix::io::Errno| Error::Privileges(what, io::Error::from(errno));
    for capability in (0..64).map(|bit| CapabilitySet::from_bits_retain(1 << bit)) {
        // Fails for those that do not exist, and for all of them where we are nobody special: then
        // there is nothing to give up.
        if remove_capability_from_bounding_set(capability).is_err() {
            break;
        }
    }
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    // An old kernel has no such set.
    let _ = clear_ambient_capability_set();
    set_capabilities(None, none).map_err(failed("drop capabilities"))?;
    set_no_new_privs(true).map_err(failed("give up new privileges"))?;
    let zero = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, zero).map_err(failed("turn core dumps off"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed("hide its memory"))
}
