//! The `cowshed` command.
fn main() {}
