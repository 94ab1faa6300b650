//! How a program says whether the machine behaved.

use crate::{power, println};

/// What a test found: the error says what was not as it must be.
pub type Outcome<T = ()> = Result<T, &'static str>;

/// An error unless the condition holds.
pub fn ensure(condition: bool, why: &'static str) -> Outcome {
    if condition { Ok(()) } else { Err(why) }
}

/// Several tests, of which each prints a line: `ok name` or `FAIL name: why`.
#[derive(Debug, Default)]
pub struct Report {
    failed: bool,
}

impl Report {
    /// Takes down what a test found.
    pub fn note(&mut self, name: &str, outcome: Outcome) {
        match outcome {
            Ok(()) => println!("ok {name}"),
            Err(why) => {
                println!("FAIL {name}: {why}");
                self.failed = true;
            }
        }
    }

    /// The outcome of all.
    pub fn outcome(&self) -> Outcome {
        ensure(!self.failed, "see above")
    }
}

/// Prints the verdict and ends the guest: `PASS` and power-off, or `FAIL` and a reset.
pub fn finish(outcome: Outcome) -> ! {
    match outcome {
        Ok(()) => {
            println!("PASS");
            power::off()
        }
        Err(why) => {
            println!("FAIL {why}");
            power::reset()
        }
    }
}
