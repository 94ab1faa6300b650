//! What libFuzzer drives: see [`cowshed_fuzz::ops`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cowshed_fuzz::ops::run(data));
