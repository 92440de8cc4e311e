//! Software access to a guest's frames: atomic, because the guest's processors access them at the same time.
//!
//! A plain reference to memory that a guest writes would be undefined behaviour; this is the only door. Accesses
//! of different widths to one place meet here, as they do between processors; the language's own model has no
//! rule for that, and x86 has: each is atomic by itself.
//! Invariant: a [`GuestPage`] exists only inside a section that was rechecked against the invalidation
//! sequence after its announcement (PROTOCOLS 4), one page at a time.

use crate::addr::PAGE_BYTES;
use crate::tlb::reader::Walking;
use core::marker::PhantomData;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed};

/// One 4 KiB frame of guest memory, for as long as the section `'s` lasts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GuestPage<'s> {
    at: NonNull<u8>,
    _section: PhantomData<&'s ()>,
}

impl<'s> GuestPage<'s> {
    /// The frame mapped at `at`.
    ///
    /// # Safety
    /// `at` must be what [`crate::Host::frame_ptr`] gave for a frame that the VM owned when `section`, already
    /// announced, was rechecked.
    pub(crate) unsafe fn new(at: NonNull<u8>, _section: &'s Walking<'_>) -> Self {
        // Between the recheck and the access there is time.
        #[cfg(feature = "instrument")]
        crate::instrument::step();
        Self { at, _section: PhantomData }
    }

    /// Reads from `offset` on, in naturally aligned pieces of up to 8 bytes, each read at once: an aligned value of
    /// 2, 4 or 8 bytes never tears.
    pub(crate) fn read(self, offset: usize, into: &mut [u8]) {
        assert!(offset + into.len() <= PAGE_BYTES as usize, "{} bytes at {offset} of a page", into.len());
        let mut done = 0;
        while done < into.len() {
            let (at, left) = (offset + done, &mut into[done..]);
            done += match piece(at, left.len()) {
                8 => copy(left, self.u64(at).load(Relaxed).to_le_bytes()),
                4 => copy(left, self.u32(at).load(Relaxed).to_le_bytes()),
                2 => copy(left, self.u16(at).load(Relaxed).to_le_bytes()),
                _ => copy(left, [self.u8(at).load(Relaxed)]),
            };
        }
    }

    /// The 16 bytes from `offset` on, which must end inside the page: by aligned words of 8 bytes, each read at
    /// once.
    #[inline(always)]
    pub(crate) fn read_16(self, offset: usize) -> [u8; 16] {
        assert!(offset + 16 <= PAGE_BYTES as usize, "16 bytes at {offset} of a page");
        let (word, shift) = (offset & !7, 8 * (offset % 8) as u32);
        let low =
            u128::from(self.u64(word).load(Relaxed)) | u128::from(self.u64(word + 8).load(Relaxed)) << 64;
        let bytes = if shift == 0 {
            low
        } else {
            low >> shift | u128::from(self.u64(word + 16).load(Relaxed)) << (128 - shift)
        };
        bytes.to_le_bytes()
    }

    /// Writes from `offset` on, in naturally aligned pieces of up to 8 bytes, each written at once.
    pub(crate) fn write(self, offset: usize, from: &[u8]) {
        assert!(offset + from.len() <= PAGE_BYTES as usize, "{} bytes at {offset} of a page", from.len());
        let mut done = 0;
        while done < from.len() {
            let (at, left) = (offset + done, &from[done..]);
            let size = piece(at, left.len());
            match size {
                8 => self.u64(at).store(u64::from_le_bytes(first(left)), Relaxed),
                4 => self.u32(at).store(u32::from_le_bytes(first(left)), Relaxed),
                2 => self.u16(at).store(u16::from_le_bytes(first(left)), Relaxed),
                _ => self.u8(at).store(left[0], Relaxed),
            }
            done += size;
        }
    }

    /// One aligned 4-byte entry of a guest's table.
    #[inline(always)]
    pub(crate) fn load_u32(self, offset: usize) -> u32 {
        assert!(
            offset.is_multiple_of(4) && offset < PAGE_BYTES as usize,
            "a 4-byte entry at {offset} of a page"
        );
        self.u32(offset).load(Relaxed)
    }

    /// One aligned 8-byte entry of a guest's table.
    #[inline(always)]
    pub(crate) fn load_u64(self, offset: usize) -> u64 {
        assert!(
            offset.is_multiple_of(8) && offset < PAGE_BYTES as usize,
            "an 8-byte entry at {offset} of a page"
        );
        self.u64(offset).load(Relaxed)
    }

    fn u16(self, offset: usize) -> &'s AtomicU16 {
        // SAFETY: the callers keep `offset` inside the frame and a multiple of 2; frames are page-aligned.
        unsafe { self.at.add(offset).cast::<AtomicU16>().as_ref() }
    }
    #[inline(always)]
    fn u32(self, offset: usize) -> &'s AtomicU32 {
        // SAFETY: the callers keep `offset` inside the frame and a multiple of 4; frames are page-aligned.
        unsafe { self.at.add(offset).cast::<AtomicU32>().as_ref() }
    }
    fn u8(self, offset: usize) -> &'s AtomicU8 {
        // SAFETY: the callers keep `offset` inside the frame, which is mapped while the section lasts.
        unsafe { self.at.add(offset).cast::<AtomicU8>().as_ref() }
    }
    #[inline(always)]
    fn u64(self, offset: usize) -> &'s AtomicU64 {
        // SAFETY: the callers keep `offset` inside the frame and a multiple of 8; frames are page-aligned.
        unsafe { self.at.add(offset).cast::<AtomicU64>().as_ref() }
    }
}

/// The largest naturally aligned piece at `at`, of at most `left` bytes.
#[inline]
fn piece(at: usize, left: usize) -> usize {
    [8, 4, 2].into_iter().find(|size| at.is_multiple_of(*size) && *size <= left).unwrap_or(1)
}

/// Copies `bytes` to the front of `into` and says how many.
#[inline]
fn copy<const N: usize>(into: &mut [u8], bytes: [u8; N]) -> usize {
    into[..N].copy_from_slice(&bytes);
    N
}

/// The first `N` bytes of `from`, which has as many.
#[inline]
fn first<const N: usize>(from: &[u8]) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&from[..N]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tlb::Tlb;
    use proptest::prelude::*;

    #[repr(align(4096))]
    struct Frame([u8; 4096]);

    proptest! {
        /// Any stretch of a page reads back what was written, and nothing beside it changes.
        #[test]
        fn reads_what_was_written(offset in 0usize..4096, bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let bytes = &bytes[..bytes.len().min(4096 - offset)];
            let mut frame = std::boxed::Box::new(Frame([0xA5; 4096]));
            let tlb = Tlb::new();
            let line = tlb.readers.take(None);
            let section = line.walk(&tlb);
            // SAFETY: the test owns the frame.
            let page = unsafe { GuestPage::new(NonNull::from(&mut frame.0).cast(), &section) };
            page.write(offset, bytes);
            let mut back = std::vec![0; bytes.len()];
            page.read(offset, &mut back);
            prop_assert_eq!(&back, bytes);
            if offset + 16 <= 4096 {
                let mut some = [0; 16];
                page.read(offset, &mut some);
                prop_assert_eq!(page.read_16(offset), some);
            }
            let mut all = [0; 4096];
            page.read(0, &mut all);
            prop_assert!(all[..offset].iter().chain(&all[offset + bytes.len()..]).all(|b| *b == 0xA5));
        }
    }
}
