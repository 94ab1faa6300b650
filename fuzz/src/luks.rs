//! A LUKS header with damage, opened with its password.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use arbitrary::{Arbitrary, Unstructured};
use cowshed_qcow::{
    CreateOptions, Format, Image, KeyCost, MemoryStorage, NewEncryption, OpenOptions, Secret,
    create,
};

use crate::storage::Bounded;

const NAME: &str = "fuzz.qcow2";
/// Bytes of the header of LUKS1.
const HEADER: usize = 592;
/// Iterations of PBKDF2 that a header may ask for: twice what it does undamaged.
const ITERATIONS: u64 = 4000;

/// Opens an image whose LUKS header, or pointer to it, has other bytes here and there; changes its
/// keys if it opens.
pub fn run(data: &[u8]) {
    let Ok(damage) = Vec::<(u16, u8)>::arbitrary(&mut Unstructured::new(data)) else {
        return;
    };
    let (mut bytes, places) = image();
    for (at, value) in &damage {
        bytes[places[usize::from(*at) % places.len()]] = *value;
    }
    for read_only in [true, false] {
        let storage = Bounded::new(bytes.clone());
        let options = OpenOptions {
            read_only,
            secrets: vec![secret("moo")],
            max_key_iterations: ITERATIONS,
            ..OpenOptions::new(Format::Qcow2)
        };
        let opened = Image::open_over(Path::new(NAME), storage.clone(), &options, None);
        let Ok(image) = opened else {
            assert!(!damage.is_empty(), "{opened:?}");
            assert!(storage.to_vec() == bytes, "a refused image was written");
            continue;
        };
        let _ = image.read(0, &mut [0; 700]);
        let _ = image.key_slots();
        if read_only {
            assert!(image.erase_key_slot(0, true).is_err());
            assert!(storage.to_vec() == bytes, "a read-only image was written");
            continue;
        }
        let _ = image.write(100, &[1; 700]);
        let cost = KeyCost::Iterations(1);
        if let Ok(slot) = image.add_key(&secret("moo"), &secret("cow"), cost) {
            assert_eq!(image.key_slot_of(&secret("cow")).unwrap(), slot);
            image.erase_key_slot(slot, false).unwrap();
            assert!(image.key_slot_of(&secret("cow")).is_err());
        }
    }
}

fn secret(text: &str) -> Secret {
    Secret::new(text.into())
}

/// A small encrypted image, and where what is to be damaged lies in it.
fn image() -> (Vec<u8>, &'static [usize]) {
    static IMAGE: OnceLock<(Vec<u8>, Vec<usize>)> = OnceLock::new();
    let (bytes, places) = IMAGE.get_or_init(|| {
        let storage = Arc::new(MemoryStorage::default());
        let new = CreateOptions {
            cluster_size: 4096,
            encryption: Some(NewEncryption::Luks {
                secret: secret("moo"),
                cost: KeyCost::Iterations(1),
            }),
            ..CreateOptions::new(64 << 10)
        };
        create(Path::new(NAME), storage.clone(), &new).unwrap();
        let bytes = storage.to_vec();
        let find = |magic: &[u8]| bytes.windows(magic.len()).position(|found| found == magic);
        let header = find(b"LUKS\xba\xbe").unwrap();
        let pointer = find(&[0x05, 0x37, 0xbe, 0x77]).unwrap();
        let places = (header..header + HEADER).chain(pointer..pointer + 24);
        let places = places.collect();
        (bytes, places)
    });
    (bytes.clone(), places)
}
