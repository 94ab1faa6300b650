use std::sync::Arc;

use super::*;
use crate::storage::MemoryStorage;

const AREA: u64 = 0x20000;
const CHEAP: KeyCost = KeyCost::Iterations(1);

fn secret(text: &str) -> Secret {
    Secret::new(text.into())
}

fn new_file() -> (Host, Luks) {
    let storage = Arc::new(MemoryStorage::default());
    let host = Host {
        path: "image".into(),
        storage,
    };
    host.set_len(AREA + new_len()).unwrap();
    create(&host, AREA, &secret("moo"), CHEAP).unwrap();
    let luks = open(&host);
    (host, luks)
}

fn open(host: &Host) -> Luks {
    Luks::open(host, AREA, host.len().unwrap() - AREA).unwrap()
}

fn slot_of(luks: &Luks, host: &Host, password: &str) -> Option<usize> {
    let found = luks.unlock(host, &secret(password), &mut 1_000_000);
    found.map(|unlocked| unlocked.slot).ok()
}

#[test]
fn each_password_opens_its_slot_until_it_is_erased() {
    let (host, mut luks) = new_file();
    let key = luks.unlock(&host, &secret("moo"), &mut 1_000_000).unwrap();
    for slot in 1..SLOTS {
        let password = secret(&format!("cow {slot}"));
        assert_eq!(luks.add(&host, &key, &password, CHEAP).unwrap(), slot);
    }
    let full = luks.add(&host, &key, &secret("more"), CHEAP).unwrap_err();
    assert!(full.to_string().contains("all 8 key slots"), "{full}");
    let mut luks = open(&host);
    assert_eq!(slot_of(&luks, &host, "moo"), Some(0));
    assert_eq!(slot_of(&luks, &host, "cow 7"), Some(7));
    assert_eq!(slot_of(&luks, &host, "cow 8"), None);

    // All of them encrypt alike.
    let other = luks
        .unlock(&host, &secret("cow 5"), &mut 1_000_000)
        .unwrap();
    assert_eq!(*other.master, *key.master);

    let material = |host: &Host| {
        let mut bytes = vec![0; 256_000];
        let at = AREA + luks.header.slots[3].material_at();
        host.read(at, &mut bytes).unwrap();
        bytes
    };
    let before = material(&host);
    luks.erase(&host, 3, false).unwrap();
    let mut luks = open(&host);
    assert_eq!(slot_of(&luks, &host, "cow 3"), None);
    let after = {
        let mut bytes = vec![0; 256_000];
        let at = AREA + luks.header.slots[3].material_at();
        host.read(at, &mut bytes).unwrap();
        bytes
    };
    let same = before.iter().zip(&after).filter(|(a, b)| a == b).count();
    assert!(
        same < 256_000 / 100,
        "{same} bytes of key material are left"
    );
    assert_eq!(luks.add(&host, &key, &secret("new"), CHEAP).unwrap(), 3);
}

#[test]
fn the_last_key_is_not_erased_by_mistake() {
    let (host, mut luks) = new_file();
    assert!(luks.erase(&host, 8, true).is_err(), "there is no such slot");
    let kept = luks.erase(&host, 0, false).unwrap_err();
    assert!(kept.to_string().contains("last key"), "{kept}");
    assert_eq!(slot_of(&open(&host), &host, "moo"), Some(0));
    luks.erase(&host, 5, false).unwrap();
    luks.erase(&host, 0, true).unwrap();
    assert_eq!(slot_of(&open(&host), &host, "moo"), None);
}

/// Unlocking asks for no more than it may spend, whatever the header says.
#[test]
fn iterations_are_bounded() {
    let (host, luks) = new_file();
    let cost = u64::from(luks.slots()[0].unwrap()) + u64::from(luks.header.digest_iterations);
    let unlock = |luks: &Luks, mut allowed: u64| {
        let unlocked = luks.unlock(&host, &secret("moo"), &mut allowed);
        unlocked.map(|_| allowed)
    };
    assert_eq!(unlock(&luks, cost + 5).unwrap(), 5);
    assert!(
        unlock(&luks, cost - 1)
            .unwrap_err()
            .to_string()
            .contains("2000 iterations")
    );

    let slot = AREA + Header::slot_at(0);
    host.write(slot + 4, &[0xff; 4]).unwrap();
    let error = unlock(&open(&host), 1 << 26).unwrap_err().to_string();
    assert!(
        error.contains("the key slot 0 takes 4294968295 iterations"),
        "{error}"
    );
}

#[test]
fn a_wrong_password_is_called_so() {
    let (host, luks) = new_file();
    let error = luks
        .unlock(&host, &secret("mooo"), &mut 1_000_000)
        .err()
        .unwrap();
    assert!(
        error.to_string().ends_with("the password is wrong"),
        "{error}"
    );
}

#[test]
fn a_cost_in_time_is_what_that_takes() {
    use crate::crypt::hash::Hash;
    let cost =
        |ms| KeyCost::Time(std::time::Duration::from_millis(ms)).iterations(Hash::Sha256, 64);
    assert_eq!(cost(0), 1000);
    assert!(cost(10_000) > 10_000);
}

#[test]
fn uuids_are_random_ones() {
    let (a, b) = (uuid().unwrap(), uuid().unwrap());
    assert_ne!(a, b);
    assert_eq!(a.len(), 36);
    assert_eq!(a.as_bytes()[14], b'4');
    assert!(b"89ab".contains(&a.as_bytes()[19]), "{a}");
}
