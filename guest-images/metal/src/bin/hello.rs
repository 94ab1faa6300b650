//! The smallest guest: a line on COM1, then a reset.

#![no_std]
#![no_main]

use metal::{power, println, program};

program!(hello);

fn hello(_: &str) -> ! {
    println!("hello from ring 3");
    power::reset()
}
