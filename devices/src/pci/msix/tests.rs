use std::sync::Mutex;

use super::*;

/// Stands where the hypervisor does: remembers each change.
#[derive(Default)]
struct Router(Mutex<Vec<(u16, Option<MsiMessage>)>>);

impl Router {
    fn changes(&self) -> Vec<(u16, Option<MsiMessage>)> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl MsiRouter for Router {
    fn attach(&self, vector: u16, _: &EventFd, message: MsiMessage) -> io::Result<()> {
        self.0.lock().unwrap().push((vector, Some(message)));
        Ok(())
    }
    fn detach(&self, vector: u16, _: &EventFd) -> io::Result<()> {
        self.0.lock().unwrap().push((vector, None));
        Ok(())
    }
}

const MESSAGE: MsiMessage = MsiMessage {
    address: 0xfee0_1000,
    data: 0x4021,
};

fn msix() -> (Msix, Arc<Router>) {
    let router = Arc::<Router>::default();
    (Msix::new(3, router.clone()).unwrap(), router)
}

fn program(msix: &mut Msix, vector: u64, masked: u32) {
    msix.write_table(vector * 16, &MESSAGE.address.to_le_bytes());
    msix.write_table(vector * 16 + 8, &MESSAGE.data.to_le_bytes());
    msix.write_table(vector * 16 + 12, &masked.to_le_bytes());
}

fn pending(msix: &Msix) -> u64 {
    let mut bits = [0; 8];
    msix.read_pending(0, &mut bits);
    u64::from_le_bytes(bits)
}

#[test]
fn a_vector_is_attached_exactly_while_it_can_be_delivered() {
    let (mut msix, router) = msix();
    program(&mut msix, 1, 0);
    assert_eq!(router.changes(), [], "disabled as a whole");
    msix.set_control(CONTROL_ENABLE);
    assert_eq!(router.changes(), [(1, Some(MESSAGE))]);
    msix.set_control(CONTROL_ENABLE);
    assert_eq!(router.changes(), [], "nothing changed");
    msix.set_control(CONTROL_ENABLE | CONTROL_MASK);
    assert_eq!(router.changes(), [(1, None)]);
    msix.set_control(CONTROL_ENABLE);
    assert_eq!(router.changes(), [(1, Some(MESSAGE))]);
    msix.write_table(16 + 12, &1_u32.to_le_bytes());
    assert_eq!(router.changes(), [(1, None)]);
    msix.write_table(16 + 12, &0_u32.to_le_bytes());
    assert_eq!(router.changes(), [(1, Some(MESSAGE))]);
    drop(msix);
    assert_eq!(router.changes(), [(1, None)]);
}

#[test]
fn a_new_message_replaces_the_old_one() {
    let (mut msix, router) = msix();
    msix.set_control(CONTROL_ENABLE);
    program(&mut msix, 0, 0);
    router.changes();
    msix.write_table(8, &7_u32.to_le_bytes());
    assert_eq!(
        router.changes(),
        [(0, Some(MsiMessage { data: 7, ..MESSAGE }))]
    );
}

#[test]
fn a_masked_vector_keeps_its_pending_bit() {
    let (mut msix, _router) = msix();
    msix.set_control(CONTROL_ENABLE);
    program(&mut msix, 2, 1);
    assert_eq!(pending(&msix), 0);
    msix.events()[2].write(1).unwrap();
    assert_eq!(pending(&msix), 1 << 2);
    assert_eq!(pending(&msix), 1 << 2, "looking does not clear it");
    msix.write_table(2 * 16 + 12, &0_u32.to_le_bytes());
    assert_eq!(pending(&msix), 0, "the hypervisor's now");
    assert_eq!(
        msix.events()[2].read().unwrap(),
        1,
        "and still there for it"
    );
}

#[test]
fn reset_forgets_what_is_pending() {
    let (msix, _router) = msix();
    msix.events()[0].write(1).unwrap();
    msix.clear_pending();
    assert_eq!(pending(&msix), 0);
}

#[test]
fn the_table_reads_back_and_ends() {
    let (mut msix, _router) = msix();
    program(&mut msix, 2, 1);
    let mut data = [0xaa; 8];
    msix.read_table(2 * 16 + 8, &mut data);
    assert_eq!(data, [0x21, 0x40, 0, 0, 1, 0, 0, 0]);
    msix.write_table(3 * 16, &[0xff; 8]);
    msix.write_table(u64::MAX - 7, &[0xff; 8]);
    msix.write_table(2, &[0xff; 4]);
    msix.write_table(0, &[0xff; 2]);
    msix.read_table(0, &mut data);
    assert_eq!(data, [0; 8]);
    msix.read_table(3 * 16, &mut data);
    assert_eq!(data, [0; 8]);
    msix.read_pending(u64::MAX - 3, &mut data);
    assert_eq!(data, [0; 8]);
}

#[test]
fn capability_names_table_and_pending_bits() {
    let (msix, _router) = msix();
    let (body, writable) = msix.capability(0, 0x1000, 0x2000);
    assert_eq!(body, [2, 0, 0, 0x10, 0, 0, 0, 0x20, 0, 0]);
    assert_eq!(writable, [0, 0xc0]);
}

#[test]
fn the_number_of_vectors_is_bounded() {
    assert!(Msix::new(0, Arc::<Router>::default()).is_err());
    assert!(Msix::new(MAX_VECTORS + 1, Arc::<Router>::default()).is_err());
}
