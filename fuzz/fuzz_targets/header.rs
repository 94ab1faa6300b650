//! What libFuzzer drives: see [`cowshed_fuzz::header`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cowshed_fuzz::header::run(data));
