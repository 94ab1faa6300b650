//! What `--report` wrote.

use std::path::Path;

/// Reads the report at `path`.
///
/// # Panics
/// When it is not there or not JSON.
pub fn read(path: &Path) -> serde_json::Value {
    let text = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&text).expect("a report in JSON")
}
