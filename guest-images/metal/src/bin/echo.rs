//! Sends back what comes in on COM1, to the end of the line, then resets.

#![no_std]
#![no_main]

use metal::{power, program, serial};

program!(echo);

fn echo(_: &str) -> ! {
    loop {
        let byte = serial::read();
        serial::write(byte);
        if byte == b'\n' {
            power::reset()
        }
    }
}
