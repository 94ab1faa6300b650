//! What libFuzzer drives: see [`cowshed_fuzz::check`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cowshed_fuzz::check::run(data));
