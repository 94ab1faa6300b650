use std::time::Duration;

use clap::CommandFactory;

use super::*;
use crate::config::{self, Cmdline, Disk, Overlay, Overlays, Root};
use run::UsageError;

/// The run that a command line after `cowshed run` describes.
fn parse(args: &[&str]) -> Result<config::Run, UsageError> {
    let cli = Cli::try_parse_from([&["cowshed", "run"], args].concat()).unwrap();
    match cli.command {
        Command::Run(run) => run.into_config(args.last() == Some(&"--")),
        _ => unreachable!(),
    }
}

fn refused(args: &[&str]) -> String {
    Cli::try_parse_from([&["cowshed", "run"], args].concat())
        .unwrap_err()
        .to_string()
}

#[test]
fn completions_and_manual_pages_know_the_commands() {
    let mut script = Vec::new();
    let shell = clap_complete::Shell::Bash;
    clap_complete::generate(shell, &mut Cli::command(), "cowshed", &mut script);
    let script = String::from_utf8(script).unwrap();
    assert!(script.contains("--force-share") && script.contains("doctor"));
    let folder = tempfile::tempdir().unwrap();
    clap_mangen::generate_to(Cli::command(), folder.path()).unwrap();
    assert!(folder.path().join("cowshed-img-convert.1").exists());
}

#[test]
fn the_definitions_are_sound() {
    Cli::command().debug_assert();
}

#[test]
fn nothing_said_is_the_default_guest() {
    assert_eq!(parse(&[]), Ok(config::Run::new()));
}

#[test]
fn everything_said() {
    let args = "--kernel k --initrd i --cmdline -x --cpus 2 --memory 1G --huge-pages --timeout 60 \
                --boot-timeout 2m --disk d,readonly --disk e --overlay o --overlay-size 1G \
                --overlay-dir f --keep-overlay p --console-log c --env A=1 --env B=2 --cwd /w \
                --copy-in a:/b --copy-out /c:d --report r --sandbox require --user u:g --chroot e -vv --log-format json image -- a -b --";
    let args: Vec<&str> = args.split_whitespace().collect();
    let cli = Cli::try_parse_from([&["cowshed", "run"], args.as_slice()].concat()).unwrap();
    let Command::Run(run) = cli.command else {
        unreachable!()
    };
    let copy = |from: &str, to: &str| {
        vec![config::Copy {
            from: from.into(),
            to: to.into(),
        }]
    };
    let expected = config::Run {
        kernel: Some("k".into()),
        initrd: Some("i".into()),
        cmdline: Cmdline::Append("-x".to_owned()),
        cpus: 2,
        memory: Some(1 << 30),
        huge_pages: true,
        timeout: Some(Duration::from_secs(60)),
        boot_timeout: Some(Duration::from_secs(120)),
        root: Root::Image(Disk {
            overlay: Overlay::At("o".into()),
            ..Disk::new("image")
        }),
        disks: vec![
            Disk {
                read_only: true,
                ..Disk::new("d")
            },
            Disk::new("e"),
        ],
        overlays: Overlays {
            folder: Some("f".into()),
            max_size: Some(1 << 30),
            keep: Some("p".into()),
        },
        command: Some(vec!["a".into(), "-b".into(), "--".into()]),
        env: vec![("A".into(), "1".into()), ("B".into(), "2".into())],
        cwd: Some("/w".into()),
        copy_in: copy("a", "/b"),
        copy_out: copy("/c", "d"),
        console_log: Some("c".into()),
        report: Some("r".into()),
        sandbox: config::Sandbox {
            mode: config::SandboxMode::Require,
            user: Some("u:g".to_owned()),
            chroot: Some("e".into()),
        },
    };
    assert_eq!(run.into_config(false), Ok(expected));
    assert_eq!(cli.verbose, 2);
    assert!(matches!(cli.log_format, LogFormat::Json));
}

#[test]
fn which_disk_is_the_root() {
    let root = |args: &[&str]| parse(args).map(|run| run.root);
    assert_eq!(root(&["--kernel", "k"]), Ok(Root::None));
    assert_eq!(root(&["--kernel", "k", "--disk", "d"]), Ok(Root::None));
    assert_eq!(
        root(&["--kernel", "k", "i"]),
        Ok(Root::Image(Disk::new("i")))
    );
    let at = || Overlay::At("o".into());
    assert_eq!(root(&["--overlay", "o"]), Ok(Root::Default(at())));
    let direct = Disk {
        overlay: Overlay::Direct,
        ..Disk::new("i")
    };
    assert_eq!(root(&["--overlay", "none", "i"]), Ok(Root::Image(direct)));
    let named = Disk {
        overlay: at(),
        ..Disk::new("i")
    };
    assert_eq!(root(&["i,overlay=o"]), Ok(Root::Image(named)));
}

#[test]
fn contradictions_are_usage_errors() {
    use UsageError::*;
    for (args, error) in [
        (&["--"] as &[&str], EmptyCommand),
        (&["image", "--"], EmptyCommand),
        (&["--overlay", "o", "--kernel", "k"], OverlayWithoutRoot),
        (&["--overlay", "none"], OverlayNoneOfDefault),
        (&["--overlay", "o", "i,overlay=p"], OverlayTwice),
        (&["--overlay", "o", "i,readonly"], OverlayReadOnly),
        (&["--overlay", "none", "i,size=1G"], OverlayNoneWithSize),
    ] {
        assert_eq!(parse(args), Err(error), "{args:?}");
    }
}

#[test]
fn clap_refuses_with_the_options_name() {
    for (args, words) in [
        (&["--cpus", "0"] as &[&str], "--cpus"),
        (&["--cpus", "255"], "1..=254"),
        (&["--memory", "64"], "did you mean 64M?"),
        (&["--timeout", "soon"], "--timeout"),
        (&["--env", "A", "--", "a"], "NAME=VALUE"),
        (&["--env", "A=1"], "COMMAND"),
        (&["--cwd", "/"], "COMMAND"),
        (&["--copy-in", "a:/b"], "COMMAND"),
        (&["--copy-out", "/a:b"], "COMMAND"),
        (
            &["--cmdline", "a", "--cmdline-replace", "b"],
            "--cmdline-replace",
        ),
        (
            &["--disk", "d,cach=none"],
            "'cach' is not one of the disk keys",
        ),
        (&["one", "two"], "two"),
        (&["--colour"], "--colour"),
    ] {
        let message = refused(args);
        assert!(message.contains(words), "{args:?}: {message}");
    }
}

#[test]
fn the_help_tells_every_option_and_status() {
    let mut cli = Cli::command();
    cli.build();
    let run = cli.find_subcommand_mut("run").unwrap();
    let flags: Vec<String> = run
        .get_arguments()
        .filter_map(|a| Some(format!("--{}", a.get_long()?)))
        .collect();
    let help = run.render_long_help().to_string();
    assert!(flags.len() >= 20, "{flags:?}");
    for word in flags {
        assert!(help.contains(&word), "{word}");
    }
    for status in 120..=125 {
        assert!(help.contains(&format!("\n  {status}  ")), "{status}");
    }
    for key in disk_option::KEYS.split(", ") {
        assert!(help.contains(key), "{key}");
    }
    assert!(help.contains("Examples:") && help.contains("Ctrl-A x"));
}

#[test]
fn a_refused_command_line_may_name_a_report() {
    let path = |args: &[&str]| {
        let args: Vec<OsString> = args.iter().map(OsString::from).collect();
        report_path(&args).map(|path| path.into_os_string().into_string().unwrap())
    };
    assert_eq!(
        path(&["run", "--report", "r", "--bad"]).as_deref(),
        Some("r")
    );
    assert_eq!(path(&["run", "--report=r"]).as_deref(), Some("r"));
    assert_eq!(path(&["run", "--", "--report", "r"]), None);
    assert_eq!(path(&["run", "--report"]), None);
}
