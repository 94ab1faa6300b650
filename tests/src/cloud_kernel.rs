//! Debian's cloud kernel and its modules, unpacked from the package that apt verifies.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The unpacked kernel package.
#[derive(Debug)]
pub struct CloudKernel {
    root: PathBuf,
}

impl CloudKernel {
    /// The kernel, downloaded and unpacked on the first call.
    pub fn prepared() -> &'static Self {
        static KERNEL: OnceLock<CloudKernel> = OnceLock::new();
        KERNEL.get_or_init(|| {
            let root = std::env::temp_dir().join("cowshed-cloud-kernel");
            if !root.join("boot").exists() {
                unpack(&root);
            }
            Self { root }
        })
    }

    /// The bzImage, as the package has it.
    pub fn vmlinuz(&self) -> PathBuf {
        self.find(&self.root.join("boot"), "vmlinuz-")
    }

    /// The module `name`, without its suffix.
    pub fn module(&self, name: &str) -> PathBuf {
        let output = Command::new("find")
            .arg(self.root.join("lib/modules"))
            .args(["-name", &format!("{name}.ko")])
            .output()
            .expect("run find");
        PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())
    }

    fn find(&self, folder: &Path, prefix: &str) -> PathBuf {
        fs::read_dir(folder)
            .expect("the kernel's folder")
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| {
                path.file_name()
                    .is_some_and(|n| n.to_string_lossy().starts_with(prefix))
            })
            .expect("a kernel in its package")
    }
}

fn unpack(root: &Path) {
    let script = "set -eu; mkdir -p \"$1\"; cd \"$1\"; \
        name=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: //p' | head -n 1); \
        apt-get download \"$name\"; dpkg-deb -x \"$name\"_*.deb .";
    let status = Command::new("sh")
        .args(["-c", script, "sh"])
        .arg(root)
        .status()
        .expect("run sh");
    assert!(status.success(), "fetch Debian's cloud kernel: {status}");
}
