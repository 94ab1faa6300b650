//! A command's environment.

use alloc::ffi::CString;
use alloc::vec::Vec;

const DEFAULTS: &[&core::ffi::CStr] = &[
    c"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    c"HOME=/root",
    c"TERM=linux",
];

/// The defaults, and `given` over them; of two that are given the later wins.
pub(crate) fn environment(given: &[CString]) -> Vec<CString> {
    let mut all: Vec<CString> = Vec::new();
    let defaults = DEFAULTS.iter().map(|default| CString::from(*default));
    for variable in defaults.chain(given.iter().cloned()) {
        all.retain(|other| name(other) != name(&variable));
        all.push(variable);
    }
    all
}

/// What `name` is set to.
pub(crate) fn value<'e>(environment: &'e [CString], wanted: &[u8]) -> Option<&'e [u8]> {
    let variable = environment
        .iter()
        .find(|variable| name(variable) == wanted)?;
    variable.to_bytes().get(wanted.len() + 1..)
}

fn name(variable: &CString) -> &[u8] {
    variable
        .to_bytes()
        .split(|byte| *byte == b'=')
        .next()
        .unwrap_or_default()
}
