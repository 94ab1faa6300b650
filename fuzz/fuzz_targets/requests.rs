//! What libFuzzer drives: see [`cowshed_fuzz::requests`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cowshed_fuzz::requests::run(data));
