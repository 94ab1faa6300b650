//! What libFuzzer drives: see [`cowshed_fuzz::open_read`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cowshed_fuzz::open_read::run(data));
