//! What the hypervisor says, on its own serial line.
//!
//! Lines that begin with `@` are for programs: `@text` a line of the guest's text, `@record` the one JSON
//! object at the end of a run (see [`finish`]). All others are for people. After the record the run is over:
//! the emulator's exit port is told 0 for a guest that ended with value 0, 1 for everything else, and the
//! processor stops.

use crate::guest::End;
use crate::machine::serial::Serial;
use crate::machine::{cpu, port};
use crate::memory::MachineHost;
use crate::svm::run::{Account, Machine};
use crate::svm::ticks::Ticks;
use crate::svm::vmcb::{Segment, exit};
use core::fmt::{self, Arguments, Write};
use hypervisor::options::{LayoutKind, Options};
use hypervisor::record::Json;
use vmmu::{Gfn, PageSize, Vm};
use vmmu_emulate::Gpr;

/// QEMU's `isa-debug-exit` device: a write of v ends the emulator with status 2v + 1.
const EXIT_PORT: u16 = 0xF4;

/// Writes a line for people.
macro_rules! say {
    ($($argument:tt)*) => {
        $crate::report::line(format_args!($($argument)*))
    };
}
pub(crate) use say;

/// Writes one line. A serial line that does not take it is nobody's fault.
pub(crate) fn line(text: Arguments<'_>) {
    let _ = writeln!(Serial, "{text}");
}

/// Passes on a line of the guest's own text. What is no UTF-8 is shown as such.
pub(crate) fn guest_text(text: &[u8]) {
    let mut out = Serial;
    let _ = out.write_str("@text ");
    for chunk in text.utf8_chunks() {
        let _ = out.write_str(chunk.valid());
        if !chunk.invalid().is_empty() {
            let _ = out.write_char(char::REPLACEMENT_CHARACTER);
        }
    }
    let _ = out.write_char('\n');
}

/// Says where the run's state lies, host-physical, for whoever looks at the machine from outside: `@state`, one
/// JSON object. `nmi` tells that an NMI ends the run with its record; `ask` is the port in which a question mark must
/// be for that, where one must.
pub(crate) fn state(addresses: &[(&str, u64)], ask: Option<u16>) {
    let mut out = Serial;
    let _ = write!(out, "@state ");
    let _ = state_record(&mut out, addresses, ask);
    let _ = writeln!(out);
}

fn state_record(out: &mut Serial, addresses: &[(&str, u64)], ask: Option<u16>) -> fmt::Result {
    let mut state = Json::object(out)?;
    for &(name, address) in addresses {
        state.hex(name, address)?;
    }
    state.truth("nmi", true)?;
    if let Some(port) = ask {
        state.hex("ask", port.into())?;
    }
    state.end()
}

/// Ends everything with an error that needs neither heap nor guest to be told.
pub(crate) fn fatal(text: Arguments<'_>) -> ! {
    line(format_args!("hypervisor: {text}"));
    let mut out = Serial;
    let _ = write!(out, "@record ");
    let _ = fatal_record(&mut out, text);
    let _ = writeln!(out);
    stop(1)
}

fn fatal_record(out: &mut Serial, text: Arguments<'_>) -> fmt::Result {
    let mut record = Json::object(out)?;
    record.text("end", &"error")?;
    record.text("text", &text)?;
    record.number("tsc", cpu::tsc())?;
    record.end()
}

/// Tells the emulator, and stops.
fn stop(status: u32) -> ! {
    // SAFETY: the port ends the emulator, or is nobody's.
    unsafe { port::out32(EXIT_PORT, status) };
    cpu::halt()
}

/// What the record tells beside the run itself.
pub(crate) struct Setting<'a> {
    /// The user's options.
    pub(crate) options: &'a Options,
    /// Levels of the host's own paging, and of the nested tables.
    pub(crate) levels: u32,
    /// What kind of guest it was.
    pub(crate) guest: &'static str,
    /// The slots of RAM, as guest frame numbers.
    pub(crate) ram: &'a [core::ops::Range<u64>],
}

/// Writes the record of a run, and ends everything.
pub(crate) fn finish(end: &End, machine: &Machine, vm: &Vm<MachineHost>, setting: &Setting<'_>) -> ! {
    line(format_args!("hypervisor: {end}"));
    let mut out = Serial;
    let _ = write!(out, "@record ");
    let _ = record(&mut out, end, machine, vm, setting);
    let _ = writeln!(out);
    stop(u32::from(*end != End::Value(0)))
}

fn record(
    out: &mut Serial,
    end: &End,
    machine: &Machine,
    vm: &Vm<MachineHost>,
    setting: &Setting<'_>,
) -> fmt::Result {
    let mut record = Json::object(out)?;
    record.text("end", &end.name())?;
    record.text("text", end)?;
    if let End::Value(value) = end {
        record.number("value", (*value).into())?;
    }
    record.text("mode", &"npt")?;
    record.text("guest", &setting.guest)?;
    let layout = match setting.options.layout {
        LayoutKind::Contiguous => "contiguous",
        LayoutKind::Scattered => "scattered",
    };
    record.text("layout", &layout)?;
    record.number("seed", setting.options.seed)?;
    record.number("memory", setting.options.memory)?;
    record.number("levels", setting.levels.into())?;

    let account = &machine.account;
    record.number("tsc", cpu::tsc())?;
    let (inside, outside) = account.ticks();
    record.number("tsc_guest", inside)?;
    record.number("tsc_hypervisor", outside)?;
    exits(&mut record, account)?;
    if let Some(ticks) = &machine.ticks {
        churn(&mut record, ticks)?;
    }
    memory(&mut record, vm, setting)?;
    if *end != End::Value(0) {
        registers(&mut record, machine)?;
        last(&mut record, account)?;
    }
    record.end()
}

/// Exits by kind.
fn exits(record: &mut Json<'_, Serial>, account: &Account) -> fmt::Result {
    record.number("exits_total", account.count)?;
    let mut exits = record.nested("exits")?;
    for (name, count) in account.by_name() {
        exits.number(name, count)?;
    }
    exits.end()
}

/// How far the guest's memory moved. `wanted` and `reached` are moves a second.
fn churn(record: &mut Json<'_, Serial>, ticks: &Ticks) -> fmt::Result {
    let (pace, now) = ticks.churn.pace();
    let counts = ticks.churn.counts();
    let mut churn = record.nested("churn")?;
    churn.number("wanted", pace.wanted())?;
    churn.number("reached", pace.reached(now))?;
    churn.number("moves", pace.done())?;
    churn.number("micros", pace.micros(now))?;
    churn.number("pages", counts.pages)?;
    churn.number("blocks", counts.blocks)?;
    churn.number("broken_up", counts.broken_up)?;
    churn.number("mistakes", counts.mistakes)?;
    churn.number("ticks", ticks.count)?;
    churn.end()
}

/// What the library counted, what is mapped, and whether all of it is sound.
fn memory(record: &mut Json<'_, Serial>, vm: &Vm<MachineHost>, setting: &Setting<'_>) -> fmt::Result {
    let mut stats = record.nested("stats")?;
    for (name, value) in vm.stats().iter() {
        stats.number(name, value)?;
    }
    stats.end()?;

    let (mut moved, mut in_place, mut mapped) = (0u64, 0u64, [0u64; 3]);
    let shown = vm.for_each_mapping(|mapping| {
        if setting.ram.iter().any(|range| range.contains(&mapping.gfn.raw())) {
            let pages = mapping.size.pages();
            if mapping.gfn == Gfn::new(mapping.pfn.raw()) {
                in_place += pages;
            } else {
                moved += pages;
            }
            mapped[match mapping.size {
                PageSize::Size4K => 0,
                PageSize::Size2M => 1,
                PageSize::Size1G => 2,
            }] += 1;
        }
    });
    let mut frames = record.nested("ram")?;
    if let Err(error) = shown {
        frames.text("error", &error)?;
    }
    frames.number("frames_moved", moved)?;
    frames.number("frames_in_place", in_place)?;
    frames.number("leaves_4k", mapped[0])?;
    frames.number("leaves_2m", mapped[1])?;
    frames.number("leaves_1g", mapped[2])?;
    frames.end()?;

    let mut audit = record.nested("audit")?;
    match vm.audit() {
        Ok(report) => {
            audit.truth("clean", true)?;
            audit.number("roots", report.roots)?;
            audit.number("tables", report.tables)?;
            audit.number("leaves_4k", report.leaves[0])?;
            audit.number("leaves_2m", report.leaves[1])?;
            audit.number("leaves_1g", report.leaves[2])?;
            audit.number("mmio", report.mmio)?;
        }
        Err(error) => {
            audit.truth("clean", false)?;
            audit.text("text", &error)?;
        }
    }
    audit.end()
}

/// The guest's registers.
fn registers(record: &mut Json<'_, Serial>, machine: &Machine) -> fmt::Result {
    const NAMES: [&str; 16] = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
        "r14", "r15",
    ];
    let save = &machine.processor.vmcb.save;
    let mut registers = record.nested("registers")?;
    registers.hex("rip", save.rip)?;
    registers.hex("rflags", save.rflags)?;
    for (name, gpr) in NAMES.into_iter().zip(Gpr::ALL) {
        registers.hex(name, machine.processor.general(gpr))?;
    }
    for (name, value) in
        [("cr0", save.cr0), ("cr2", save.cr2), ("cr3", save.cr3), ("cr4", save.cr4), ("efer", save.efer)]
    {
        registers.hex(name, value)?;
    }
    for (name, segment) in
        [("cs", save.cs), ("ss", save.ss), ("ds", save.ds), ("gdtr", save.gdtr), ("idtr", save.idtr)]
    {
        let Segment { selector, attributes, limit, base } = segment;
        registers.text(name, &format_args!("{selector:#x} {base:#x}+{limit:#x} {attributes:#x}"))?;
    }
    registers.end()
}

/// The last exits, oldest first.
fn last(record: &mut Json<'_, Serial>, account: &Account) -> fmt::Result {
    let mut last = record.array("last_exits")?;
    for kept in account.last() {
        let mut item = last.item()?;
        item.hex("code", kept.code)?;
        item.text("name", &exit::name(kept.code).unwrap_or("unknown"))?;
        item.hex("rip", kept.rip)?;
        item.hex("info_1", kept.info_1)?;
        item.hex("info_2", kept.info_2)?;
        item.end()?;
    }
    last.end()
}
