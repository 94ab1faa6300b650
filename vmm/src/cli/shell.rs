//! Completions and manual pages, from the definitions of the command line.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, say};

/// Print what a shell needs to complete cowshed's commands and flags
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  eval \"$(cowshed completions bash)\"
  cowshed completions zsh > ~/.zfunc/_cowshed")]
pub(super) struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

/// Write the manual pages, one for each command
#[derive(Args, Debug)]
pub(super) struct ManArgs {
    /// The folder for them, such as ~/.local/share/man/man1
    folder: PathBuf,
}

pub(super) fn completions(args: &CompletionsArgs) -> ExitCode {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "cowshed", &mut script);
    ended(io::Write::write_all(&mut io::stdout(), &script))
}

pub(super) fn man(args: &ManArgs) -> ExitCode {
    let folder = &args.folder;
    ended(
        std::fs::create_dir_all(folder)
            .and_then(|()| clap_mangen::generate_to(Cli::command(), folder)),
    )
}

fn ended(result: io::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&error.to_string());
            ExitCode::FAILURE
        }
    }
}
