//! Copies a planned guest into its memory, through the library like everything else that touches it.

use crate::memory::MachineHost;
use hypervisor::guest_image::Image;
use vmmu::{Error, Gpa, Vm};

/// Writes every part of `image` to where it belongs.
pub(crate) fn load(vm: &Vm<MachineHost>, image: &Image<'_>) -> Result<(), Error> {
    const ZEROS: [u8; 4096] = [0; 4096];
    let mut memory = vm.reader()?;
    for part in &image.parts {
        memory.write(Gpa::new(part.at), &part.bytes)?;
        let mut at = part.at + part.bytes.len() as u64;
        let mut left = part.zeros;
        while left > 0 {
            let piece = &ZEROS[..usize::try_from(left).unwrap_or(usize::MAX).min(ZEROS.len())];
            memory.write(Gpa::new(at), piece)?;
            at += piece.len() as u64;
            left -= piece.len() as u64;
        }
    }
    Ok(())
}
