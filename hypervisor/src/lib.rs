//! The half of the reference hypervisor that decides from bytes alone: what the loader handed over, which
//! memory the guest gets and from which frames, whether a file is a kernel and how it is entered, what a
//! register may hold, how a run is reported.
//!
//! It touches no hardware and no memory but its arguments, so all of it is tested on the host. The other
//! half, in `image/`, is linked with it into the bare-metal image. Invariant: everything read here comes from
//! outside (a boot loader, firmware, a file, a guest) and is checked; what is wrong is a typed error that
//! names the value.
#![no_std]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod acpi;
pub mod boot_info;
pub mod bytes;
pub mod cpuid;
pub mod frame_map;
pub mod guest_image;
pub mod guest_map;
pub mod layout;
pub mod linux;
pub mod memory_map;
pub mod moving;
pub mod multiboot;
pub mod options;
pub mod pace;
pub mod random;
pub mod record;
pub mod registers;
