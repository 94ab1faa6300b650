use std::process::Command;

use rustix::net::{SendFlags, send};

use super::*;
use crate::monitor::link;

/// A session whose machine's process is deaf, and the end of the link that would be its.
fn session(config: &config::Run) -> (Session<'_>, Link<Told, Order>) {
    let (link, monitor) = link::pair().unwrap();
    let deaf = Command::new("sleep").arg("600").spawn().unwrap();
    let begin = Instant::now();
    let session = Session {
        config,
        begin,
        boot_deadline: None,
        boot_timeout: NEVER,
        run_deadline: begin + NEVER,
        events: Events::new(Signals::block().unwrap(), link.clone()).unwrap(),
        process: Some(deaf.into()),
        link,
        keeper: None,
        conversation: None,
        terminal: None,
        measures: Measures::default(),
        command_started: false,
        patience: Patience::default(),
    };
    (session, monitor)
}

#[test]
fn nonsense_ends_a_run_whose_machine_lives_on() {
    let config = config::Run::new();
    let (mut session, monitor) = session(&config);
    send(&monitor, b"{\"Started\":", SendFlags::empty()).unwrap();
    let Outcome::VmmError(why) = session.wait() else {
        panic!("another outcome");
    };
    assert!(why.contains("makes no sense"), "{why}");
    assert!(session.process.is_none());
}

#[test]
fn a_machine_cannot_say_when_its_boot_is_to_end() {
    let config = config::Run::new();
    let (mut session, monitor) = session(&config);
    monitor.tell(&Told::Started(Duration::MAX));
    monitor.tell(&Told::Started(Duration::ZERO));
    monitor.tell(&Told::Escaped);
    assert!(matches!(session.wait(), Outcome::Escaped));
    let started = session.measures.first_instruction.unwrap();
    assert!(started > Duration::ZERO && started <= session.begin.elapsed());
}

#[test]
fn a_machine_that_always_talks_does_not_put_off_a_deadline() {
    let config = config::Run::new();
    let (mut session, monitor) = session(&config);
    for _ in 0..2 {
        monitor.tell(&Told::Drained);
        session.run_deadline = session.begin;
        assert!(matches!(session.wait(), Outcome::Timeout(_)));
        // Somebody else is heard all the same.
        session.events.put_back(Event::Signal(libc::SIGTERM as u8));
        assert!(matches!(session.wait(), Outcome::Signaled(_)));
    }
}

#[test]
fn insistence_ends_the_wait_for_a_machine_that_is_put_away() {
    let config = config::Run::new();
    let (mut session, _monitor) = session(&config);
    for _ in 0..3 {
        let event = Event::Signal(libc::SIGINT as u8);
        session.events.put_back(event);
    }
    let why = session.closed().unwrap_err();
    assert!(why.contains("killed by signals"), "{why}");
    assert!(session.process.is_none());
}
