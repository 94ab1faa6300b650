//! What file systems and partitions are called: each may have a UUID and a label.

use alloc::string::{String, ToString};

/// Fills the buffer with a volume's bytes from an offset on, or says that it cannot.
pub(crate) type ReadAt<'a> = &'a dyn Fn(u64, &mut [u8]) -> bool;

/// The `N` bytes at `offset`.
pub(crate) fn bytes<const N: usize>(read: ReadAt<'_>, offset: u64) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    read(offset, &mut bytes).then_some(bytes)
}

/// The names that a file system or a partition has.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Names {
    /// In the form that `blkid` prints.
    pub(crate) uuid: Option<String>,
    /// Not empty.
    pub(crate) label: Option<String>,
}

/// One name, to find a file system or a partition by.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Name {
    /// Upper and lower case are the same.
    Uuid(String),
    Label(String),
}

impl Name {
    pub(crate) fn is_in(&self, names: &Names) -> bool {
        match self {
            Self::Uuid(wanted) => {
                let uuid = names.uuid.as_deref();
                uuid.is_some_and(|uuid| uuid.eq_ignore_ascii_case(wanted))
            }
            Self::Label(wanted) => names.label.as_ref() == Some(wanted),
        }
    }
}

/// The text up to the first NUL, if there is any.
pub(crate) fn label(bytes: &[u8]) -> Option<String> {
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    (!text.is_empty()).then(|| String::from_utf8_lossy(text).to_string())
}

/// A UUID whose bytes are in the order in which it is written.
pub(crate) fn uuid(bytes: [u8; 16]) -> String {
    let mut text = String::new();
    for (index, byte) in bytes.into_iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&alloc::format!("{byte:02x}"));
    }
    text
}
