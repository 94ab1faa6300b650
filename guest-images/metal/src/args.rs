//! A program's arguments on the command line.

use core::str::{FromStr, SplitAsciiWhitespace};

use crate::outcome::Outcome;

/// The words that follow the program's name on the command line, or all if it is not there: the
/// VMM may put words of its own before them.
#[derive(Clone, Debug)]
pub struct Args(SplitAsciiWhitespace<'static>);

impl Args {
    /// The arguments of the program of that name.
    pub fn new(command_line: &'static str, program: &str) -> Self {
        let mut words = command_line.split_ascii_whitespace();
        if words.clone().any(|word| word == program) {
            words.find(|&word| word == program);
        }
        Self(words)
    }

    /// The next word, as a number.
    pub fn number(&mut self) -> Outcome<u64> {
        self.next()
            .and_then(number)
            .ok_or("a number is missing on the command line")
    }

    /// The number of an option `key=123`.
    pub fn option(&self, key: &str) -> Option<u64> {
        self.text(key).and_then(number)
    }

    /// The text of an option `key=text`.
    pub fn text(&self, key: &str) -> Option<&'static str> {
        self.0
            .clone()
            .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    }
}

impl Iterator for Args {
    type Item = &'static str;

    /// The next word that is no option.
    fn next(&mut self) -> Option<&'static str> {
        self.0.find(|word| !word.contains('='))
    }
}

fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => u64::from_str(text).ok(),
    }
}
