//! Memory that is shared with devices: RAM for them to read and write, and their registers.

use core::ptr;
use core::sync::atomic::{AtomicU64, Ordering};

/// A range of guest physical memory that a device may read and write at any time. That is why
/// there are no references to it: every access is a volatile copy of one word.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    address: u64,
    len: u64,
}

/// The integers that a region is read and written by.
pub trait Word: Copy {}
impl Word for u8 {}
impl Word for u16 {}
impl Word for u32 {}
impl Word for u64 {}

/// End of the memory that was allocated so far.
static NEXT: AtomicU64 = AtomicU64::new(0);
/// End of RAM.
static END: AtomicU64 = AtomicU64::new(0);

/// Gives the RAM of a range, which nothing else uses, to [`Region::allocate`].
pub(crate) fn init(first: u64, end: u64) {
    NEXT.store(first, Ordering::Relaxed);
    END.store(end, Ordering::Relaxed);
}

/// End of the RAM that this program lies in.
pub fn ram_end() -> u64 {
    END.load(Ordering::Relaxed)
}

impl Region {
    /// A range at a given address, such as a device's registers.
    ///
    /// # Safety
    ///
    /// It lies below 4 GiB and holds nothing of Rust's: no code, data, stack or heap.
    pub const unsafe fn new(address: u64, len: u64) -> Self {
        Self { address, len }
    }

    /// Takes RAM, zeroed, that is never given back. `align` is a power of two.
    pub fn allocate(len: u64, align: u64) -> Self {
        let address = NEXT.load(Ordering::Relaxed).next_multiple_of(align);
        let end = address.checked_add(len).filter(|&end| end <= ram_end());
        NEXT.store(
            end.expect("out of memory: give the guest more"),
            Ordering::Relaxed,
        );
        let region = Self { address, len };
        // Firmware may have run before.
        (0..len).for_each(|offset| region.write(offset, 0u8));
        region
    }

    /// A part of this range.
    pub fn part(self, offset: u64, len: u64) -> Self {
        assert!(
            offset <= self.len && len <= self.len - offset,
            "{offset}+{len} of {self:x?}"
        );
        Self {
            address: self.address + offset,
            len,
        }
    }

    /// Guest physical address.
    pub fn address(self) -> u64 {
        self.address
    }

    /// Length in bytes; a descriptor has 32 bits for it.
    pub fn size(self) -> u32 {
        self.len
            .try_into()
            .expect("a region for devices is below 4 GiB")
    }

    /// Reads one word, at an aligned address.
    pub fn read<T: Word>(self, offset: u64) -> T {
        let word = self.word::<T>(offset);
        // SAFETY: it lies inside, aligned, and any bits make an integer.
        unsafe { ptr::read_volatile(ptr::with_exposed_provenance(word)) }
    }

    /// Writes one word, at an aligned address.
    pub fn write<T: Word>(self, offset: u64, value: T) {
        let word = self.word::<T>(offset);
        // SAFETY: it lies inside, aligned, and nothing of Rust's is there, as `new` was promised
        // and `allocate` sees to.
        unsafe { ptr::write_volatile(ptr::with_exposed_provenance_mut(word), value) }
    }

    fn word<T: Word>(self, offset: u64) -> usize {
        let address = self.part(offset, size_of::<T>() as u64).address as usize;
        assert!(
            address.is_multiple_of(align_of::<T>()),
            "{address:#x} is not aligned"
        );
        address
    }

    /// Offsets of the 8-byte words inside.
    pub fn words(self) -> impl Iterator<Item = u64> {
        (0..self.len / 8).map(|index| index * 8)
    }

    /// Wrapping sum of its 8-byte words.
    pub fn sum(self) -> u64 {
        self.words()
            .fold(0, |sum, offset| sum.wrapping_add(self.read(offset)))
    }
}
