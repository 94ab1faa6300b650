//! How a program says whether the machine behaved.

use crate::{power, println};

/// What a test found: the error says what was not as it must be.
pub type Outcome<T = ()> = Result<T, &'static str>;

/// An error unless the condition holds.
pub fn ensure(condition: bool, why: &'static str) -> Outcome {
    if condition { Ok(()) } else { Err(why) }
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
