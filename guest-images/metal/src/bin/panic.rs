//! Tells the host of a guest panic, by the pvpanic device.

#![no_std]
#![no_main]

use metal::{port, power, println, program};

program!(panic);

fn panic(_: &str) -> ! {
    println!("panic");
    port::write8(0x505, 1);
    power::stop()
}
