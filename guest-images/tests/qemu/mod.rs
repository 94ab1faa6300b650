//! A guest in QEMU, without KVM, to try PID 1 with a VMM that is not ours.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use cowshed_guest_images::{Builder, KernelFiles, Progress, initramfs};
use cowshed_guest_protocol::{
    CONTROL_PORT, Decoder, FromGuest, Message, STDERR_PORT, STDIN_PORT, STDOUT_PORT, ToGuest,
};
use tempfile::TempDir;

pub(crate) fn builder() -> Builder {
    Builder::new(Progress::Lines).unwrap()
}

/// A running guest and the VMM's ends of its ports.
pub(crate) struct Guest {
    folder: TempDir,
    qemu: Child,
    control: UnixStream,
    decoder: Decoder,
    pub(crate) stdin: UnixStream,
    pub(crate) stdout: UnixStream,
    pub(crate) stderr: UnixStream,
}

impl Guest {
    /// Boots the kernel with `arguments` added to its command line.
    pub(crate) fn boot(kernel: &KernelFiles, disk: Option<&Path>, arguments: &str) -> Self {
        let folder = TempDir::new().unwrap();
        let mut initrd = kernel
            .initrd
            .as_ref()
            .map_or(Vec::new(), |i| std::fs::read(i).unwrap());
        let init = std::fs::read(builder().init().unwrap()).unwrap();
        initrd.extend(initramfs(&init));
        let initrd_path = folder.path().join("initrd");
        std::fs::write(&initrd_path, initrd).unwrap();

        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args("-nodefaults -no-user-config -display none -no-reboot".split(' '));
        qemu.args("-accel tcg -cpu max -m 512 -device virtio-rng-pci".split(' '));
        qemu.args("-device virtio-serial-pci,disable-legacy=on".split(' '));
        qemu.arg("-kernel")
            .arg(&kernel.kernel)
            .arg("-initrd")
            .arg(initrd_path);
        qemu.args([
            "-append",
            &format!("console=ttyS0 panic=-1 quiet {arguments}"),
        ]);
        qemu.arg("-serial")
            .arg(format!("file:{}", folder.path().join("console").display()));
        let listeners = [STDIN_PORT, STDOUT_PORT, STDERR_PORT, CONTROL_PORT].map(|name| {
            let path = folder.path().join(name);
            let listener = UnixListener::bind(&path).unwrap();
            qemu.args([
                "-chardev",
                &format!("socket,id={name},path={}", path.display()),
            ]);
            qemu.args([
                "-device",
                &format!("virtserialport,chardev={name},name={name}"),
            ]);
            listener
        });
        if let Some(disk) = disk {
            let file = format!("file={},if=none,id=root,snapshot=on", disk.display());
            qemu.args(["-drive", &file]);
            qemu.args(["-device", "virtio-blk-pci,drive=root,disable-legacy=on"]);
        }
        let qemu = qemu.stdin(Stdio::null()).spawn();
        let qemu = qemu.expect("qemu-system-x86_64 (apt-get install qemu-system-x86)");
        let [stdin, stdout, stderr, control] = listeners.map(|l| l.accept().unwrap().0);
        let decoder = Decoder::default();
        Self {
            folder,
            qemu,
            control,
            decoder,
            stdin,
            stdout,
            stderr,
        }
    }

    pub(crate) fn tell(&mut self, message: &ToGuest<'_>) {
        let mut bytes = Vec::new();
        message.encode(&mut bytes).unwrap();
        self.control.write_all(&bytes).unwrap();
    }

    /// What the guest says next, given to `look`.
    pub(crate) fn hear<T>(&mut self, look: impl FnOnce(FromGuest<'_>) -> T) -> T {
        loop {
            if let Some(message) = self.decoder.next().unwrap() {
                return look(message);
            }
            let mut piece = [0; 65536];
            let count = self.control.read(&mut piece).unwrap();
            assert!(
                count > 0,
                "the guest is gone; its console:\n{}",
                self.console()
            );
            self.decoder.feed(&piece[..count]);
        }
    }

    pub(crate) fn console(&self) -> String {
        let console = std::fs::read(self.folder.path().join("console")).unwrap_or_default();
        String::from_utf8_lossy(&console).into_owned()
    }

    /// Waits until the guest has powered off.
    pub(crate) fn end(mut self) {
        assert!(self.qemu.wait().unwrap().success(), "{}", self.console());
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

pub(crate) fn kernel_and_disk() -> (KernelFiles, PathBuf) {
    let kernel = builder()
        .kernel(cowshed_guest_images::Kernel::Small)
        .unwrap();
    (kernel, builder().root_image().unwrap())
}
