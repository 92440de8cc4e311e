//! One walk for people: registers, access, entries level by level, and what each side said.
//!
//! Pure.

use crate::draw::{Kind, Laid, Walk};
use crate::model::{Answer, NOWHERE};
use crate::report::{DONE, NESTED, Record};
use crate::run::Run;
use std::fmt::Write;

/// The whole story of a walk.
pub(crate) fn tell(run: &Run, walk: &Walk, answer: &Answer, record: &Record) -> String {
    let mut text = String::new();
    // Writing into a string does not fail.
    let _ = write_story(&mut text, run, walk, answer, record);
    text
}

fn write_story(
    text: &mut String,
    run: &Run,
    walk: &Walk,
    answer: &Answer,
    record: &Record,
) -> std::fmt::Result {
    let who = if walk.user { "user" } else { "supervisor" };
    let what = match walk.kind {
        Kind::Read => "read",
        Kind::Write => "write",
        Kind::Fetch => "fetch",
        Kind::Implicit => "descriptor read",
    };
    writeln!(text, "walk {} of seed {}, mode {:#x}", walk.index, run.seed, run.mode.0)?;
    writeln!(text, "  registers  {}", registers(walk))?;
    let ac = if walk.ac { ", AC set" } else { "" };
    writeln!(text, "  access     {who} {what} at {:#x}{ac}; CR3 {:#x}", walk.gva, walk.root)?;
    entries(text, "entry", &walk.first, record, 0)?;
    entries(text, "nested", &walk.second, record, 10)?;
    writeln!(text, "  processor  {}", processor(record))?;
    write!(text, "  model      {}", answer.text)?;
    let list = |bits: u32| (0..31).filter(|bit| bits >> bit & 1 != 0).collect::<Vec<_>>();
    let may = answer.may.iter().fold(0, |all, mark| all | mark.1);
    writeln!(text, "; flags it sets {:?}, may set {:?}", list(answer.must), list(may))?;
    if answer.reached != record.reached && answer.vector == DONE {
        writeln!(text, "             word {:#x}, seen {:#x}", answer.reached, record.reached)?;
    }
    Ok(())
}

fn registers(walk: &Walk) -> String {
    let named = [
        (walk.wp, "WP"),
        (walk.pse, "PSE"),
        (walk.smep, "SMEP"),
        (walk.smap, "SMAP"),
        (walk.pke, "PKE"),
        (walk.nxe, "NXE"),
        (walk.host_nxe && !walk.second.is_empty(), "host-NXE"),
    ];
    let mut on: Vec<String> = named.iter().filter(|flag| flag.0).map(|flag| flag.1.to_owned()).collect();
    if walk.pke {
        on.push(format!("PKRU {:#010x}", walk.pkru));
    }
    on.join(" ")
}

fn entries(text: &mut String, name: &str, laid: &[Laid], record: &Record, shift: usize) -> std::fmt::Result {
    for (n, entry) in laid.iter().enumerate() {
        let before = entry.value >> 5 & 3;
        let after = u64::from(record.marks >> (shift + 2 * n) & 3);
        let flags = ["", ", now A", ", now D", ", now A and D"][((after & !before) & 3) as usize];
        let lost = if before & !after == 0 { "" } else { ", and flags were lost" };
        writeln!(
            text,
            "  {name:<10} level {} at {:#x}: {:#018x}{flags}{lost} (flags {} and {})",
            entry.level,
            entry.at,
            entry.value,
            shift + 2 * n,
            shift + 2 * n + 1
        )?;
    }
    Ok(())
}

fn processor(record: &Record) -> String {
    let at = record.address.map_or_else(String::new, |address| format!(", address {address:#x}"));
    let place = if record.at_load { " at the load of the registers" } else { "" };
    let mut text = match record.vector {
        DONE if record.reached == NOWHERE => "reached no data page".to_owned(),
        DONE => format!("reached word {:#x}", record.reached),
        NESTED => format!(
            "nested page fault, EXITINFO1 {:#x}",
            u64::from(record.code & 0x3fff) | u64::from(record.code >> 14) << 32
        ),
        vector => format!("exception {vector} with code {:#x}{place}", record.code),
    };
    text += &at;
    if let Some(changed) = &record.changed {
        let values: Vec<String> = changed.iter().map(|value| format!("{value:#x}")).collect();
        text += "; entries now ";
        text += &values.join(", ");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::draw::draw;
    use crate::model::Model;
    use crate::run::{Has, Mode};
    use vmmu_machine::{Quirks, Vendor};

    #[test]
    fn a_story_has_both_sides_and_every_level() {
        let run = Run {
            mode: Mode(0x54),
            has: Has(0x3ff),
            phys_bits: 40,
            regions: 20,
            seed: 1,
            first: 0,
            count: 1,
            vendor: Vendor::Amd,
            stubs: [0; 2],
            stub_offsets: [0; 4],
        };
        let walk = draw(&run, 9);
        let model = Model::new();
        model.lay(&run, &walk, false);
        let answer = model.ask(&run, &walk, Quirks::NONE).expect("registers that run");
        let record = Record {
            checksum: 0,
            vector: NESTED,
            at_load: false,
            code: 0x8016,
            reached: 0,
            marks: u32::MAX,
            address: Some(0x1234_5000),
            changed: None,
        };
        let text = tell(&run, &walk, &answer, &record);
        assert!(text.starts_with("walk 9 of seed 1, mode 0x54\n"), "{text}");
        assert!(text.contains("nested page fault, EXITINFO1 0x200000016, address 0x12345000\n"), "{text}");
        assert!(text.contains(&answer.text), "{text}");
        let levels = text.matches(" level ").count();
        assert_eq!(levels, walk.first.len() + walk.second.len(), "{text}");
    }
}
