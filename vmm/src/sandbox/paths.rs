//! Landlock: no path at all, no TCP, no signal and no abstract socket to anyone outside.

use landlock::{
    ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetCreated, RulesetError,
    RulesetStatus, Scope,
};

/// The newest that we know. What an older kernel lacks of it is left out.
const NEWEST: ABI = ABI::V7;

/// `LANDLOCK_CREATE_RULESET_VERSION`.
const VERSION: u32 = 1;

/// Denies this thread, and those that it makes, everything that they have not opened yet. False where
/// the kernel has no Landlock.
pub(super) fn deny() -> Result<bool, RulesetError> {
    let status = nothing()?.restrict_self()?;
    tracing::debug!(?status, "Landlock");
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}

/// A set of rules that handles every right and grants none.
fn nothing() -> Result<RulesetCreated, RulesetError> {
    Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()
}

/// Whether the kernel has Landlock.
pub(super) fn are_deniable() -> bool {
    // SAFETY: with this flag the call reads nothing and returns a number.
    unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0,
            VERSION,
        ) > 0
    }
}
