//! The length of an instruction that the exit already named, in a few instructions for the usual encoding.
//!
//! Invariant: the answer is that of [`decode`], with the operation checked; only the way there is shorter.

use crate::decode::{DecodeError, decode};
use crate::instruction::{CpuMode, Op};

/// An instruction that an exit names.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
#[allow(missing_docs)] // the names are the architecture's
pub enum Known {
    Cpuid,
    Hlt,
    Vmcall,
    Vmmcall,
    Rdmsr,
    Wrmsr,
    Rdtsc,
    Rdtscp,
    Rdpmc,
    Xsetbv,
    Pause,
    /// IN, with the port in the instruction or in DX; not INS.
    In,
    /// OUT, with the port in the instruction or in DX; not OUTS.
    Out,
}

/// The length of the instruction at the start of `bytes`, which the exit named `known`.
///
/// Without prefixes, this is a comparison of one to three bytes, folded at compile time where `known` is a
/// constant; otherwise it is [`decode`]. Errors are those of [`decode`], and [`DecodeError::Unexpected`] where
/// the bytes are another instruction.
///
/// ```
/// use vmmu_emulate::{CpuMode, DecodeError, Known, length_of_known};
///
/// assert_eq!(length_of_known(&[0x0f, 0xa2], CpuMode::Bits64, Known::Cpuid), Ok(2));
/// assert_eq!(length_of_known(&[0x66, 0xef, 0x90], CpuMode::Bits64, Known::Out), Ok(2)); // out dx, ax
/// assert_eq!(length_of_known(&[0x0f, 0xa2], CpuMode::Bits64, Known::Hlt), Err(DecodeError::Unexpected));
/// ```
#[inline(always)]
pub fn length_of_known(bytes: &[u8], mode: CpuMode, known: Known) -> Result<u8, DecodeError> {
    let length = match (known, bytes) {
        (Known::Cpuid, [0x0f, 0xa2, ..])
        | (Known::Rdmsr, [0x0f, 0x32, ..])
        | (Known::Wrmsr, [0x0f, 0x30, ..])
        | (Known::Rdtsc, [0x0f, 0x31, ..])
        | (Known::Rdpmc, [0x0f, 0x33, ..])
        | (Known::Pause, [0xf3, 0x90, ..])
        | (Known::In, [0xe4 | 0xe5, _, ..])
        | (Known::Out, [0xe6 | 0xe7, _, ..]) => 2,
        (Known::Vmcall, [0x0f, 0x01, 0xc1, ..])
        | (Known::Vmmcall, [0x0f, 0x01, 0xd9, ..])
        | (Known::Xsetbv, [0x0f, 0x01, 0xd1, ..])
        | (Known::Rdtscp, [0x0f, 0x01, 0xf9, ..]) => 3,
        (Known::Hlt, [0xf4, ..]) | (Known::In, [0xec | 0xed, ..]) | (Known::Out, [0xee | 0xef, ..]) => 1,
        _ => return by_decoding(bytes, mode, known),
    };
    Ok(length)
}

#[cold]
fn by_decoding(bytes: &[u8], mode: CpuMode, known: Known) -> Result<u8, DecodeError> {
    let instruction = decode(bytes, mode)?;
    let same = match known {
        Known::Cpuid => instruction.op == Op::Cpuid,
        Known::Hlt => instruction.op == Op::Hlt,
        Known::Vmcall => instruction.op == Op::Vmcall,
        Known::Vmmcall => instruction.op == Op::Vmmcall,
        Known::Rdmsr => instruction.op == Op::Rdmsr,
        Known::Wrmsr => instruction.op == Op::Wrmsr,
        Known::Rdtsc => instruction.op == Op::Rdtsc,
        Known::Rdtscp => instruction.op == Op::Rdtscp,
        Known::Rdpmc => instruction.op == Op::Rdpmc,
        Known::Xsetbv => instruction.op == Op::Xsetbv,
        Known::Pause => instruction.op == Op::Pause,
        Known::In => matches!(instruction.op, Op::In { .. }),
        Known::Out => matches!(instruction.op, Op::Out { .. }),
    };
    if same { Ok(instruction.len) } else { Err(DecodeError::Unexpected) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Known; 13] = [
        Known::Cpuid,
        Known::Hlt,
        Known::Vmcall,
        Known::Vmmcall,
        Known::Rdmsr,
        Known::Wrmsr,
        Known::Rdtsc,
        Known::Rdtscp,
        Known::Rdpmc,
        Known::Xsetbv,
        Known::Pause,
        Known::In,
        Known::Out,
    ];

    #[test]
    fn the_short_way_agrees_with_decoding() {
        let mut accepted = [0_u32; ALL.len()];
        for mode in [CpuMode::Bits16, CpuMode::Bits32, CpuMode::Bits64] {
            for (first, second) in (0..=255).flat_map(|first| (0..=255).map(move |second| (first, second))) {
                for third in [0x00, 0x90, 0xa2, 0xc1, 0xd1, 0xd9, 0xef, 0xf9] {
                    let bytes = [first, second, third, 0x33];
                    for (known, accepted) in ALL.into_iter().zip(&mut accepted) {
                        for have in 0..=bytes.len() {
                            let short = length_of_known(&bytes[..have], mode, known);
                            assert_eq!(
                                short,
                                by_decoding(&bytes[..have], mode, known),
                                "{bytes:02x?} {known:?}"
                            );
                            *accepted += u32::from(short.is_ok());
                        }
                    }
                }
            }
        }
        assert!(accepted.iter().all(|&count| count > 0), "{accepted:?}");
    }
}
