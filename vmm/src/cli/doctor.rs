//! `cowshed doctor`: what this host offers, and what to do about what it does not.

mod guests;
mod kernel;
mod kvm;
mod sandbox;

use std::fmt::{self, Display};
use std::io::{self, Write};
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

/// Check what this host offers, with a remedy for what is missing.
///
/// Ends with status 0 if cowshed can boot the default guest here, with 1 if something for that
/// is missing.
#[derive(Args, Clone, Debug)]
pub(super) struct DoctorArgs {
    /// Print the checks as JSON
    #[arg(long)]
    json: bool,
}

/// What a check found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// All is well.
    Ok,
    /// It works, though not as well as it might.
    Note,
    /// It does not work.
    Missing,
}

/// One check of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Check {
    name: &'static str,
    state: State,
    finding: String,
    /// What to do about it: a sentence or a command.
    remedy: Option<String>,
}

impl Check {
    fn ok(name: &'static str, finding: impl Into<String>) -> Self {
        Self {
            name,
            state: State::Ok,
            finding: finding.into(),
            remedy: None,
        }
    }

    fn note(name: &'static str, finding: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            state: State::Note,
            remedy: Some(remedy.into()),
            ..Self::ok(name, finding)
        }
    }

    fn missing(name: &'static str, finding: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            state: State::Missing,
            ..Self::note(name, finding, remedy)
        }
    }
}

/// All checks, in the order in which they are shown.
#[derive(Debug, Serialize)]
struct Diagnosis {
    ok: bool,
    checks: Vec<Check>,
}

impl From<Vec<Check>> for Diagnosis {
    fn from(checks: Vec<Check>) -> Self {
        Self {
            ok: checks.iter().all(|check| check.state != State::Missing),
            checks,
        }
    }
}

impl Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self
            .checks
            .iter()
            .map(|check| check.name.len())
            .max()
            .unwrap_or(0);
        for check in &self.checks {
            let state = match check.state {
                State::Ok => "ok",
                State::Note => "note",
                State::Missing => "MISSING",
            };
            writeln!(f, "{state:7}  {:width$}  {}", check.name, check.finding)?;
            if let Some(remedy) = &check.remedy {
                writeln!(f, "{:7}  {:width$}  -> {remedy}", "", "")?;
            }
        }
        match self.ok {
            true => writeln!(f, "cowshed can boot guests here."),
            false => writeln!(f, "cowshed needs what is missing above."),
        }
    }
}

/// Runs the checks: status 0 if nothing needed is missing, else 1.
pub(super) fn run(args: &DoctorArgs) -> ExitCode {
    let diagnosis = Diagnosis::from(
        [
            kvm::checks(),
            sandbox::checks(),
            kernel::checks(),
            guests::checks(),
        ]
        .concat(),
    );
    let page = match args.json {
        // Strings and booleans always serialise.
        true => serde_json::to_string_pretty(&diagnosis).unwrap_or_default() + "\n",
        false => diagnosis.to_string(),
    };
    // A reader that closed the pipe wants no more of it.
    let _ = io::stdout().write_all(page.as_bytes());
    if diagnosis.ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_missing_spoils_it() {
        let (ok, note) = (Check::ok("a", "x"), Check::note("b", "y", "z"));
        assert!(Diagnosis::from(vec![ok.clone(), note.clone()]).ok);
        assert!(!Diagnosis::from(vec![ok, note, Check::missing("c", "x", "y")]).ok);
    }

    #[test]
    fn people_read_a_table() {
        let checks = vec![
            Check::ok("KVM", "fine"),
            Check::missing("packages", "bc", "get it"),
        ];
        assert_eq!(
            Diagnosis::from(checks).to_string(),
            "ok       KVM       fine\n\
             MISSING  packages  bc\n                   \
             -> get it\n\
             cowshed needs what is missing above.\n"
        );
    }

    #[test]
    fn machines_read_json() {
        let diagnosis = Diagnosis::from(vec![Check::note("KVM", "slow", "move")]);
        let json = serde_json::to_value(&diagnosis).unwrap();
        let check = serde_json::json!(
            {"name": "KVM", "state": "note", "finding": "slow", "remedy": "move"}
        );
        assert_eq!(json, serde_json::json!({"ok": true, "checks": [check]}));
    }

    #[test]
    fn this_host_is_checked_and_every_trouble_has_a_remedy() {
        let checks = [
            kvm::checks(),
            sandbox::checks(),
            kernel::checks(),
            guests::checks(),
        ]
        .concat();
        for check in checks {
            assert_eq!(
                check.remedy.is_none(),
                check.state == State::Ok,
                "{check:?}"
            );
            assert!(!check.finding.is_empty(), "{check:?}");
        }
    }
}
