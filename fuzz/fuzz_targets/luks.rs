//! What libFuzzer drives: see [`cowshed_fuzz::luks`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cowshed_fuzz::luks::run(data));
