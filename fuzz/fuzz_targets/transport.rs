//! What libFuzzer drives: see [`cowshed_fuzz::transport`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cowshed_fuzz::transport::run(data));
