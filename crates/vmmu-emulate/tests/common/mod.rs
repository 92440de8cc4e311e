//! A processor's registers and a few bytes of memory, for tests that carry instructions out.

use vmmu_emulate::{Bus, Completion, CpuMode, ExecuteError, Gpr, Registers, Segment, Width, decode, execute};

/// General registers, RIP, RFLAGS; segment bases are zero.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Cpu {
    pub(crate) gprs: [u64; 16],
    pub(crate) rip: u64,
    pub(crate) rflags: u64,
}

impl Registers for Cpu {
    fn gpr(&self, gpr: Gpr) -> u64 {
        self.gprs[usize::from(gpr.number())]
    }
    fn set_gpr(&mut self, gpr: Gpr, value: u64) {
        self.gprs[usize::from(gpr.number())] = value;
    }
    fn rip(&self) -> u64 {
        self.rip
    }
    fn rflags(&self) -> u64 {
        self.rflags
    }
    fn set_rflags(&mut self, value: u64) {
        self.rflags = value;
    }
    fn segment_base(&self, _: Segment) -> u64 {
        0
    }
}

/// What the bus was asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Access {
    Read(u64, Width),
    Write(u64, Width, u64),
}

/// 64 bytes of memory at [`Memory::BASE`], a log of the accesses, and a count after which they fail.
#[derive(Clone, Debug)]
pub(crate) struct Memory {
    pub(crate) bytes: [u8; 64],
    pub(crate) log: Vec<Access>,
    pub(crate) accesses_left: usize,
}

/// The address that could not be accessed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Refused(pub(crate) u64);

impl Memory {
    pub(crate) const BASE: u64 = 0x8000;

    pub(crate) fn new() -> Self {
        let bytes = core::array::from_fn(|at| 0x80 | at as u8);
        Self { bytes, log: Vec::new(), accesses_left: usize::MAX }
    }

    fn range(&mut self, linear: u64, width: Width) -> Result<core::ops::Range<usize>, Refused> {
        self.accesses_left = self.accesses_left.checked_sub(1).ok_or(Refused(linear))?;
        let start = linear.checked_sub(Self::BASE).and_then(|at| usize::try_from(at).ok());
        let end = start.and_then(|start| start.checked_add(width.bytes().into()));
        match (start, end) {
            (Some(start), Some(end)) if end <= self.bytes.len() => Ok(start..end),
            _ => Err(Refused(linear)),
        }
    }

    pub(crate) fn value(&self, offset: usize, width: Width) -> u64 {
        let mut value = [0; 8];
        let len = usize::from(width.bytes());
        value[..len].copy_from_slice(&self.bytes[offset..offset + len]);
        u64::from_le_bytes(value)
    }
}

impl Bus for Memory {
    type Error = Refused;

    fn read(&mut self, linear: u64, width: Width) -> Result<u64, Refused> {
        let range = self.range(linear, width)?;
        self.log.push(Access::Read(linear, width));
        // The bits above the width are rubbish: they must be ignored.
        let rubbish = if width == Width::Qword { 0 } else { u64::MAX << width.bits() };
        Ok(self.value(range.start, width) | rubbish)
    }

    fn write(&mut self, linear: u64, width: Width, value: u64) -> Result<(), Refused> {
        let range = self.range(linear, width)?;
        assert_eq!(value, width.truncate(value), "bits above the width");
        self.log.push(Access::Write(linear, width, value));
        let len = range.len();
        self.bytes[range].copy_from_slice(&value.to_le_bytes()[..len]);
        Ok(())
    }
}

/// Decodes `code`, all of which must be one instruction, and carries it out.
pub(crate) fn run(
    code: &[u8],
    mode: CpuMode,
    cpu: &mut Cpu,
    memory: &mut Memory,
) -> Result<Completion, ExecuteError<Refused>> {
    let instruction = decode(code, mode).unwrap_or_else(|error| panic!("{code:02x?}: {error}"));
    assert_eq!(usize::from(instruction.len()), code.len(), "{code:02x?}");
    execute(&instruction, cpu, memory)
}
