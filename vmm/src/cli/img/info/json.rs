//! The documents of `qemu-img info --output=json`.

use std::time::UNIX_EPOCH;

use cowshed_qcow::{Bitmap, Compression, EncryptionInfo, Format, Info, LuksInfo, Snapshot};
use serde_json::{Map, Value, json};

use super::super::{Failure, common};
use super::{Content, Described};

/// Prints the document of the top file, or of the whole chain.
pub(super) fn print(chain: &[Described], whole: bool) -> Result<(), Failure> {
    let mut documents: Vec<Value> = chain.iter().map(document).collect();
    if whole {
        return common::print_json(&documents);
    }
    documents
        .pop()
        .map_or(Ok(()), |document| common::print_json(&document))
}

fn document(file: &Described) -> Value {
    let mut fields = Map::new();
    let mut set = |key: &str, value: Value| fields.insert(key.to_owned(), value);
    set("filename", file.path.to_string_lossy().into());
    set("format", file.format().name().into());
    set("actual-size", file.allocated.into());
    set(
        "children",
        json!([{ "name": "file", "info": host_file(file) }]),
    );
    let info = match &file.content {
        Content::Raw => {
            set("virtual-size", file.len.next_multiple_of(512).into());
            set("dirty-flag", false.into());
            return fields.into();
        }
        Content::Qcow2(info) => info,
    };
    set("virtual-size", info.virtual_size.into());
    set("dirty-flag", info.dirty.into());
    set("cluster-size", info.cluster_size.into());
    if info.encryption.is_some() {
        set("encrypted", true.into());
    }
    if let Some(backing) = &info.backing {
        set("backing-filename", backing.name.clone().into());
        if let Some(format) = backing.format {
            set("backing-filename-format", format.name().into());
        }
    }
    if let Some((path, _)) = file.backing() {
        set("full-backing-filename", path.to_string_lossy().into());
    }
    if !info.snapshots.is_empty() {
        set("snapshots", info.snapshots.iter().map(snapshot).collect());
    }
    let specific = json!({ "type": Format::Qcow2.name(), "data": specific(info) });
    set("format-specific", specific);
    fields.into()
}

/// What holds the image, which qemu-img describes since version 8.1.
fn host_file(file: &Described) -> Value {
    json!({
        "filename": file.path.to_string_lossy(),
        "format": "file",
        "virtual-size": file.len.next_multiple_of(512),
        "actual-size": file.allocated,
        "dirty-flag": false,
        "format-specific": { "type": "file", "data": {} },
        "children": [],
    })
}

fn specific(info: &Info) -> Value {
    let mut fields = Map::new();
    let mut set = |key: &str, value: Value| fields.insert(key.to_owned(), value);
    let compression = match info.compression {
        Compression::Zlib => "zlib",
        Compression::Zstd => "zstd",
    };
    set("compression-type", compression.into());
    set("refcount-bits", info.refcount_bits.into());
    set(
        "compat",
        if info.version < 3 { "0.10" } else { "1.1" }.into(),
    );
    if info.version >= 3 {
        set("lazy-refcounts", info.lazy_refcounts.into());
        set("corrupt", info.corrupt.into());
        set("extended-l2", info.extended_l2.into());
    }
    if let Some(name) = &info.data_file {
        set("data-file", name.clone().into());
        set("data-file-raw", info.data_file_raw.into());
    }
    if !info.bitmaps.is_empty() {
        set("bitmaps", info.bitmaps.iter().map(bitmap).collect());
    }
    match &info.encryption {
        None => {}
        Some(EncryptionInfo::LegacyAes) => {
            set("encrypt", json!({ "format": "aes" }));
        }
        Some(EncryptionInfo::Luks(info)) => {
            set("encrypt", luks(info));
        }
    }
    fields.into()
}

fn luks(luks: &LuksInfo) -> Value {
    // The mode is its name, a hyphen, what numbers sectors, and with essiv a colon and a hash.
    let (mode, iv) = luks
        .cipher_mode
        .split_once('-')
        .unwrap_or((&luks.cipher_mode, ""));
    let (iv, iv_hash) = iv
        .split_once(':')
        .map_or((iv, None), |(iv, hash)| (iv, Some(hash)));
    let slots: Vec<Value> = luks
        .slots
        .iter()
        .map(|slot| match slot.iterations {
            None => json!({ "active": false, "key-offset": slot.offset }),
            Some(iterations) => json!({
                "active": true,
                "iters": iterations,
                "key-offset": slot.offset,
                "stripes": slot.stripes,
            }),
        })
        .collect();
    let mut document = json!({
        "format": "luks",
        "detached-header": false,
        "cipher-alg": format!("{}-{}", luks.cipher, luks.key_bits),
        "cipher-mode": mode,
        "ivgen-alg": iv,
        "hash-alg": luks.hash,
        "uuid": luks.uuid,
        "slots": slots,
        "payload-offset": luks.payload_offset,
        "master-key-iters": luks.digest_iterations,
    });
    if let (Some(hash), Some(fields)) = (iv_hash, document.as_object_mut()) {
        fields.insert("ivgen-hash-alg".to_owned(), hash.into());
    }
    document
}

fn bitmap(bitmap: &Bitmap) -> Value {
    let flags = [(bitmap.in_use, "in-use"), (bitmap.enabled, "auto")];
    let flags: Vec<&str> = flags
        .iter()
        .filter(|(set, _)| *set)
        .map(|(_, name)| *name)
        .collect();
    json!({
        "name": bitmap.name,
        "granularity": bitmap.granularity,
        "flags": flags,
    })
}

fn snapshot(snapshot: &Snapshot) -> Value {
    let date = snapshot.date.duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut document = json!({
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": date.as_secs(),
        "date-nsec": date.subsec_nanos(),
        "vm-clock-sec": snapshot.vm_clock.as_secs(),
        "vm-clock-nsec": snapshot.vm_clock.subsec_nanos(),
    });
    if let (Some(icount), Some(fields)) = (snapshot.icount, document.as_object_mut()) {
        fields.insert("icount".to_owned(), icount.into());
    }
    document
}
