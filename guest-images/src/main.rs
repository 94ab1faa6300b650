//! Makes guest images by hand, for tests and CI: prints where they are.

use std::process::ExitCode;

use cowshed_guest_images::{Builder, Error, Kernel, Progress};

const USAGE: &str = "usage: cowshed-guest-images kernel small|debian | root | init | metal NAME";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match make(&words) {
        Ok(Some(made)) => println!("{made}"),
        Ok(None) => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
        Err(error) => {
            let error: &dyn std::error::Error = &error;
            let chain = std::iter::successors(Some(error), |error| error.source());
            let messages: Vec<String> = chain.map(ToString::to_string).collect();
            eprintln!("error: {}", messages.join(": "));
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn make(words: &[&str]) -> Result<Option<String>, Error> {
    let builder = Builder::new(Progress::to_stderr())?;
    let path = match *words {
        ["kernel", "small"] => builder.kernel(Kernel::Small)?.kernel,
        ["kernel", "debian"] => builder.kernel(Kernel::DebianCloud)?.kernel,
        ["root"] => builder.root_image()?,
        ["init"] => builder.init()?,
        ["metal", name] => builder.metal(name)?,
        _ => return Ok(None),
    };
    Ok(Some(path.display().to_string()))
}
