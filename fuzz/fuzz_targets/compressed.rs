//! What libFuzzer drives: see [`cowshed_fuzz::compressed`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cowshed_fuzz::compressed::run(data));
