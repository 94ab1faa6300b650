//! The sandbox of `run`: which of its parts this kernel has.

use super::Check;
use crate::sandbox;

pub(super) fn checks() -> Vec<Check> {
    let [landlock, seccomp] = sandbox::available();
    vec![check(landlock, seccomp)]
}

fn check(landlock: bool, seccomp: bool) -> Check {
    let remedy = match (landlock, seccomp) {
        (true, true) => return Check::ok("sandbox", "Landlock and seccomp"),
        (false, true) => {
            "a guest that breaks out of cowshed would find the system calls for opening files gone all \
             the same; for Landlock run Linux 5.13 or newer with landlock in its lsm= list"
        }
        (_, false) => {
            "run a kernel built with CONFIG_SECCOMP_FILTER, or run no guest you do not trust"
        }
    };
    let lacking = if seccomp { "Landlock" } else { "seccomp" };
    Check::note("sandbox", format!("this kernel has no {lacking}"), remedy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::State;

    #[test]
    fn what_lacks_is_named_with_a_remedy() {
        assert_eq!(check(true, true).state, State::Ok);
        for (landlock, seccomp, name) in [(false, true, "Landlock"), (true, false, "seccomp")] {
            let check = check(landlock, seccomp);
            assert_eq!(check.state, State::Note);
            assert!(check.finding.contains(name), "{check:?}");
        }
    }
}
