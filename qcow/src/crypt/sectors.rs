//! AES over sectors of 512 bytes: the modes of operation, and what makes sectors differ.

use aes::cipher::consts::U16;
use aes::cipher::{
    Array, Block, BlockCipherDecrypt, BlockCipherEncrypt, BlockModeDecrypt, BlockModeEncrypt,
    BlockSizeUser, InnerIvInit, KeyInit,
};
use aes::{Aes128, Aes192, Aes256};

use super::hash::Hash;

/// Bytes that are encrypted by themselves.
pub(crate) const SECTOR: usize = 512;

/// How a sector's blocks of 16 bytes depend on each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Not at all, nor on the sector.
    Ecb,
    Cbc,
    /// The key is two keys of the same length: for data and for the tweak.
    Xts,
}

/// The initialisation vector that a sector's number makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Iv {
    /// The low 32 bits of the number, little-endian.
    Plain,
    /// All 64 bits of it.
    Plain64,
    /// All 64 bits, encrypted with the SHA-256 of the key.
    EssivSha256,
}

/// Encrypts and decrypts sectors by their numbers.
pub(crate) struct Sectors {
    cipher: Box<dyn SectorCipher>,
    number: Number,
}

/// An [`Iv`] with its key. The schedule is large, and every image but a few has none.
enum Number {
    Plain,
    Plain64,
    Essiv(Box<Aes256>),
}

impl Sectors {
    /// `None` where the mode has no key of that length.
    pub(crate) fn new(mode: Mode, iv: Iv, key: &[u8]) -> Option<Self> {
        let of_one = if mode == Mode::Xts {
            key.len() / 2
        } else {
            key.len()
        };
        let cipher = match of_one {
            16 => cipher::<Aes128>(mode, key)?,
            24 => cipher::<Aes192>(mode, key)?,
            32 => cipher::<Aes256>(mode, key)?,
            _ => return None,
        };
        let number = match iv {
            Iv::Plain => Number::Plain,
            Iv::Plain64 => Number::Plain64,
            Iv::EssivSha256 => {
                let salt = Hash::Sha256.digest(&[key]);
                Number::Essiv(Box::new(Aes256::new_from_slice(&salt).ok()?))
            }
        };
        Some(Sectors { cipher, number })
    }

    /// AES-128 in CBC mode with plain numbers of 64 bits.
    pub(crate) fn aes_128_cbc(key: &[u8; 16]) -> Self {
        let cipher = Box::new(Cbc(Aes128::new(key.into())));
        Sectors {
            cipher,
            number: Number::Plain64,
        }
    }

    /// Encrypts in place. The bytes begin where sector `first` does; the last sector may be a
    /// part of one, of whole blocks.
    pub(crate) fn encrypt(&self, first: u64, bytes: &mut [u8]) {
        for (number, sector) in (first..).zip(bytes.chunks_mut(SECTOR)) {
            self.cipher.encrypt(self.iv(number), blocks(sector));
        }
    }

    /// Undoes [`encrypt`](Self::encrypt).
    pub(crate) fn decrypt(&self, first: u64, bytes: &mut [u8]) {
        for (number, sector) in (first..).zip(bytes.chunks_mut(SECTOR)) {
            self.cipher.decrypt(self.iv(number), blocks(sector));
        }
    }

    fn iv(&self, number: u64) -> AesBlock {
        let plain = |number| Array::from(u128::to_le_bytes(number));
        match &self.number {
            Number::Plain => plain(u128::from(number as u32)),
            Number::Plain64 => plain(u128::from(number)),
            Number::Essiv(cipher) => {
                let mut iv = plain(u128::from(number));
                cipher.encrypt_block(&mut iv);
                iv
            }
        }
    }
}

type AesBlock = Array<u8, U16>;

fn blocks(sector: &mut [u8]) -> &mut [AesBlock] {
    Array::slice_as_chunks_mut(sector).0
}

/// A mode with its key.
trait SectorCipher: Send + Sync {
    fn encrypt(&self, iv: AesBlock, sector: &mut [AesBlock]);
    fn decrypt(&self, iv: AesBlock, sector: &mut [AesBlock]);
}

fn cipher<C>(mode: Mode, key: &[u8]) -> Option<Box<dyn SectorCipher>>
where
    C: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser<BlockSize = U16>,
    C: KeyInit + Send + Sync + 'static,
{
    let new = |key| C::new_from_slice(key).ok();
    Some(match mode {
        Mode::Ecb => Box::new(Ecb(new(key)?)),
        Mode::Cbc => Box::new(Cbc(new(key)?)),
        Mode::Xts => {
            let (data, tweak) = key.split_at(key.len() / 2);
            let (data, tweak) = (new(data)?, new(tweak)?);
            Box::new(Xts { data, tweak })
        }
    })
}

struct Ecb<C>(C);
struct Cbc<C>(C);
struct Xts<C> {
    data: C,
    tweak: C,
}

impl<C> SectorCipher for Ecb<C>
where
    C: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser<BlockSize = U16> + Send + Sync,
{
    fn encrypt(&self, _: AesBlock, sector: &mut [AesBlock]) {
        self.0.encrypt_blocks(sector);
    }

    fn decrypt(&self, _: AesBlock, sector: &mut [AesBlock]) {
        self.0.decrypt_blocks(sector);
    }
}

impl<C> SectorCipher for Cbc<C>
where
    C: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser<BlockSize = U16> + Send + Sync,
{
    fn encrypt(&self, iv: AesBlock, sector: &mut [AesBlock]) {
        cbc::Encryptor::inner_iv_init(&self.0, &iv).encrypt_blocks(sector);
    }

    fn decrypt(&self, iv: AesBlock, sector: &mut [AesBlock]) {
        cbc::Decryptor::inner_iv_init(&self.0, &iv).decrypt_blocks(sector);
    }
}

/// IEEE 1619, without ciphertext stealing. It is here because it asks the cipher for all blocks of
/// a sector at once, which the processor does side by side: ten times as fast as one by one.
impl<C> SectorCipher for Xts<C>
where
    C: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser<BlockSize = U16> + Send + Sync,
{
    fn encrypt(&self, iv: AesBlock, sector: &mut [AesBlock]) {
        let tweaks = self.tweaks(iv);
        whiten(sector, &tweaks);
        self.data.encrypt_blocks(sector);
        whiten(sector, &tweaks);
    }

    fn decrypt(&self, iv: AesBlock, sector: &mut [AesBlock]) {
        let tweaks = self.tweaks(iv);
        whiten(sector, &tweaks);
        self.data.decrypt_blocks(sector);
        whiten(sector, &tweaks);
    }
}

const SECTOR_BLOCKS: usize = SECTOR / 16;

impl<C: BlockCipherEncrypt + BlockSizeUser<BlockSize = U16>> Xts<C> {
    /// Each block's tweak is the one before it times x in GF(2^128), the first the encrypted IV.
    fn tweaks(&self, mut iv: AesBlock) -> [u128; SECTOR_BLOCKS] {
        self.tweak.encrypt_block(&mut iv);
        let mut tweak = u128::from_le_bytes(iv.into());
        std::array::from_fn(|_| {
            let this = tweak;
            tweak = (tweak << 1) ^ (0x87 * (tweak >> 127));
            this
        })
    }
}

fn whiten(sector: &mut [AesBlock], tweaks: &[u128; SECTOR_BLOCKS]) {
    for (block, tweak) in sector.iter_mut().zip(tweaks) {
        *block =
            Block::<Aes128>::from((u128::from_le_bytes((*block).into()) ^ tweak).to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
            .collect()
    }

    /// IEEE 1619-2007, annex B: vector 4 (128-bit keys) begins its 512 bytes, and vector 10
    /// (256-bit keys), like this.
    #[test]
    fn xts_as_the_standard_has_it() {
        let vectors = [
            (
                "2718281828459045235360287471352631415926535897932384626433832795",
                0,
                "27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c",
            ),
            (
                "2718281828459045235360287471352662497757247093699959574966967627\
                 3141592653589793238462643383279502884197169399375105820974944592",
                0xff,
                "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b",
            ),
        ];
        for (key, number, begins) in vectors {
            let sectors =
                Sectors::new(Mode::Xts, Iv::Plain64, &hex(&key.replace(' ', ""))).unwrap();
            let plain: Vec<u8> = (0..=255).chain(0..=255).collect();
            let mut bytes = plain.clone();
            sectors.encrypt(number, &mut bytes);
            assert_eq!(bytes[..32], hex(begins));
            sectors.decrypt(number, &mut bytes);
            assert_eq!(bytes, plain);
        }
    }

    /// NIST SP 800-38A, F.2.1 and F.1.5: AES-128 in CBC mode, AES-256 in ECB mode.
    #[test]
    fn cbc_and_ecb_as_the_standard_has_them() {
        let plain = hex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51");
        let key = hex("2b7e151628aed2a6abf7158809cf4f3c");
        let cbc: Box<dyn SectorCipher> = cipher::<Aes128>(Mode::Cbc, &key).unwrap();
        let iv = Array::try_from(&hex("000102030405060708090a0b0c0d0e0f")[..]).unwrap();
        let mut bytes = plain.clone();
        cbc.encrypt(iv, blocks(&mut bytes));
        assert_eq!(
            bytes,
            hex("7649abac8119b246cee98e9b12e9197d5086cb9b507219ee95db113a917678b2")
        );
        cbc.decrypt(iv, blocks(&mut bytes));
        assert_eq!(bytes, plain);

        let key = hex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4");
        let ecb = Sectors::new(Mode::Ecb, Iv::Plain, &key).unwrap();
        ecb.encrypt(9, &mut bytes);
        assert_eq!(
            bytes,
            hex("f3eed1bdb5d2a03c064b5a7e3db181f8591ccb10d410ed26dc5ba74a31362870")
        );
        ecb.decrypt(9, &mut bytes);
        assert_eq!(bytes, plain);
    }

    #[test]
    fn plain_forgets_the_high_half_of_a_number() {
        let encrypted = |iv, number| {
            let mut bytes = vec![7; SECTOR];
            Sectors::new(Mode::Cbc, iv, &[1; 32])
                .unwrap()
                .encrypt(number, &mut bytes);
            bytes
        };
        let far = 5 + (1 << 32);
        assert_eq!(encrypted(Iv::Plain, 5), encrypted(Iv::Plain, far));
        assert_ne!(encrypted(Iv::Plain64, 5), encrypted(Iv::Plain64, far));
        assert_ne!(
            encrypted(Iv::EssivSha256, 5),
            encrypted(Iv::EssivSha256, far)
        );
    }

    #[test]
    fn keys_of_other_lengths_are_refused() {
        for len in (0..80).filter(|len| ![16, 24, 32].contains(len)) {
            assert!(
                Sectors::new(Mode::Cbc, Iv::Plain64, &vec![0; len]).is_none(),
                "{len}"
            );
        }
        for len in (0..80).filter(|len| ![32, 48, 64].contains(len)) {
            assert!(
                Sectors::new(Mode::Xts, Iv::Plain64, &vec![0; len]).is_none(),
                "{len}"
            );
        }
    }
}
