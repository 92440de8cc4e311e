//! A machine that did not end by itself: what its processor was doing, read through the emulator's monitor.
//!
//! The monitor shows the registers of whichever side the processor is on, guest or hypervisor. Where the hypervisor
//! has said where its state lies (`@state`), the other side is read from memory: the guest from its control block
//! and the hypervisor's copy of the general registers, the hypervisor from the host-save area (AMD64 manual, volume
//! 2, appendix B), and the last exits from the hypervisor's ring.

use super::record::Exit;
use crate::qemu::machine::Running;
use crate::qemu::monitor::Monitor;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

/// General registers in the order of their encoding.
const GENERAL: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];
/// Registers in a control block or host-save area, with their offsets in bytes.
const SAVED: [(&str, usize); 9] = [
    ("rip", 0x578),
    ("rflags", 0x570),
    ("rsp", 0x5D8),
    ("rax", 0x5F8),
    ("cr0", 0x558),
    ("cr2", 0x640),
    ("cr3", 0x550),
    ("cr4", 0x548),
    ("efer", 0x4D0),
];
/// Where a saved page holds CR3.
const CR3: usize = 0x550;
/// Words in the hypervisor's ring for one exit: code, two words of information, RIP.
const EXIT_WORDS: usize = 4;
/// Exits in that ring.
const EXITS: usize = 16;

/// What the hypervisor looks for in the port that it names, where an NMI alone does not mean that it is asked.
const QUESTION: u8 = b'?';

/// What was found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Findings {
    /// Both sides' registers, in words.
    pub(crate) registers: String,
    /// The last exits, oldest first.
    pub(crate) last_exits: Vec<Exit>,
}

/// Stops the machine and looks at it. What cannot be read is said in place of the registers.
pub(crate) fn look(running: &mut Running, state: Option<&Value>) -> Findings {
    try_look(running, state).unwrap_or_else(|error| Findings {
        registers: format!("the registers cannot be read: {error:#}"),
        last_exits: Vec::new(),
    })
}

fn try_look(running: &mut Running, state: Option<&Value>) -> Result<Findings> {
    let monitor = running.monitor()?;
    monitor.execute("stop", &json!({}))?;
    let shown = without_vectors(&monitor.human("info registers")?);
    let Some(state) = state else {
        let registers = format!("processor (the hypervisor has not said where its state lies):\n{shown}");
        return Ok(Findings { registers, last_exits: Vec::new() });
    };
    let host_save = read(monitor, address(state, "host_save")?, 512)?;
    let guest_save = read(monitor, address(state, "vmcb")?, 512)?;
    let general = read(monitor, address(state, "registers")?, 16)?;
    let registers = if control_register_3(&shown) == Some(word(&host_save, CR3)) {
        let guest = saved(&guest_save, Some(&general));
        format!("hypervisor, where the processor is:\n{shown}\nguest, at its last exit:\n{guest}")
    } else {
        let host = saved(&host_save, None);
        format!("guest, where the processor is:\n{shown}\nhypervisor, at its last entry:\n{host}")
    };
    let count = read(monitor, address(state, "count")?, 1)?;
    let trail = read(monitor, address(state, "trail")?, EXITS * EXIT_WORDS)?;
    Ok(Findings { registers, last_exits: last_exits(&trail, word(&count, 0)) })
}

/// Lets the machine go on and interrupts it with an NMI, if the hypervisor has said that it answers one with its
/// record, and to what beside it. An NMI that it does not take would be the guest's.
pub(crate) fn ask_for_record(running: &mut Running, state: Option<&Value>) -> Result<()> {
    ensure!(state.is_some_and(|state| state["nmi"] == true), "the hypervisor takes no NMI");
    let monitor = running.monitor()?;
    if let Some(port) = state.map(|state| &state["ask"]).filter(|port| !port.is_null()) {
        let port = port.as_str().context("the port to ask in is no text")?;
        monitor.human(&format!("o /b {port} {QUESTION:#x}"))?;
    }
    monitor.execute("inject-nmi", &json!({}))?;
    monitor.execute("cont", &json!({}))?;
    Ok(())
}

/// An address from the hypervisor's line.
fn address(state: &Value, name: &str) -> Result<u64> {
    let text = state[name].as_str().and_then(|text| text.strip_prefix("0x"));
    let value = text.and_then(|text| u64::from_str_radix(text, 16).ok());
    value.with_context(|| format!("the hypervisor's @state has no address `{name}`"))
}

/// Reads `words` 8-byte words of physical memory.
fn read(monitor: &mut Monitor, at: u64, words: usize) -> Result<Vec<u64>> {
    let text = monitor.human(&format!("xp /{words}gx {at:#x}"))?;
    let values = memory_words(&text);
    ensure!(values.len() == words, "the monitor cannot read {words} words at {at:#x}: {}", text.trim());
    Ok(values)
}

/// The words in the monitor's lines `address: word word`.
fn memory_words(text: &str) -> Vec<u64> {
    let words =
        text.lines().filter_map(|line| line.split_once(':')).flat_map(|(_, words)| words.split_whitespace());
    words.filter_map(|word| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok()).collect()
}

/// The word at a byte offset; 0 beyond the end.
fn word(page: &[u64], offset: usize) -> u64 {
    page.get(offset / 8).copied().unwrap_or(0)
}

/// CR3 as `info registers` shows it.
fn control_register_3(shown: &str) -> Option<u64> {
    let digits = shown.split_once("CR3=")?.1;
    let end = digits.find(|letter: char| !letter.is_ascii_hexdigit()).unwrap_or(digits.len());
    u64::from_str_radix(&digits[..end], 16).ok()
}

/// The monitor's lines but for the x87 and vector registers.
fn without_vectors(shown: &str) -> String {
    let lines = shown.lines().filter(|line| {
        !["FCW", "FPR", "XMM", "YMM", "Opmask", "CPU#"].iter().any(|name| line.starts_with(name))
    });
    lines.filter(|line| !line.trim().is_empty()).collect::<Vec<_>>().join("\n")
}

/// The registers in a saved page, with the general ones where they are known.
fn saved(page: &[u64], general: Option<&[u64]>) -> String {
    let mut values: Vec<(&str, u64)> =
        SAVED.iter().map(|&(name, offset)| (name, word(page, offset))).collect();
    if let Some(general) = general {
        // RAX and RSP (0 and 4) are in the page.
        let others = GENERAL.into_iter().zip(general.iter().copied()).enumerate();
        values.extend(others.filter(|(number, _)| !matches!(number, 0 | 4)).map(|(_, value)| value));
    }
    let cells: Vec<String> = values.iter().map(|(name, value)| format!("{name:>6}={value:016x}")).collect();
    cells.chunks(4).map(|line| line.join(" ")).collect::<Vec<_>>().join("\n")
}

/// The ring's exits in the order in which they came.
fn last_exits(trail: &[u64], count: u64) -> Vec<Exit> {
    let exits: Vec<&[u64]> = trail.chunks_exact(EXIT_WORDS).collect();
    let first = count.saturating_sub(exits.len() as u64);
    (first..count)
        .filter_map(|number| {
            let slot = usize::try_from(number % exits.len() as u64).ok()?;
            let &[code, info_1, info_2, rip] = exits[slot] else { return None };
            let info = [info_1, info_2].map(|word| format!("{word:#x}"));
            Some(Exit { name: format!("code {code:#x}"), rip: format!("{rip:#x}"), info })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_monitor_s_lines_are_read() {
        let text = "0000000000001000: 0x0000000000000001 0xffffffffffffffff\n0000000000001010: 0x10\n";
        assert_eq!(memory_words(text), [1, u64::MAX, 16]);
        assert!(memory_words("Cannot access memory").is_empty());
        assert_eq!(control_register_3("CR0=80000011 CR2=00 CR3=0000000001a2b000 CR4=20"), Some(0x1A2_B000));
        assert_eq!(control_register_3("CR0=1"), None);
    }

    #[test]
    fn the_ring_is_unrolled() {
        let trail: Vec<u64> = (0..64).collect();
        let exits = last_exits(&trail, 18);
        assert_eq!(exits.len(), 16);
        // Exit 2 is the oldest that is still there, in slot 2; exit 17 the newest, in slot 1.
        assert_eq!((exits[0].name.as_str(), exits[0].rip.as_str()), ("code 0x8", "0xb"));
        assert_eq!((exits[15].name.as_str(), exits[15].info[1].as_str()), ("code 0x4", "0x6"));
        assert_eq!(last_exits(&trail, 3).len(), 3);
        assert!(last_exits(&trail, 0).is_empty());
    }

    #[test]
    fn saved_registers_are_where_the_manual_says() {
        let mut page = vec![0; 512];
        page[0x578 / 8] = 0xABC;
        page[0x5F8 / 8] = 0x123;
        let general: Vec<u64> = (100..116).collect();
        let text = saved(&page, Some(&general));
        assert!(text.contains("rip=0000000000000abc") && text.contains("rax=0000000000000123"), "{text}");
        assert!(text.contains("r15=0000000000000073") && text.contains("rcx=0000000000000065"), "{text}");
        assert_eq!(text.matches("rsp=").count(), 1);
    }

    #[test]
    fn addresses_are_hexadecimal_texts() {
        let state = json!({ "vmcb": "0x1000", "count": 5 });
        assert_eq!(address(&state, "vmcb").unwrap(), 0x1000);
        assert!(address(&state, "count").is_err() && address(&state, "trail").is_err());
    }
}
