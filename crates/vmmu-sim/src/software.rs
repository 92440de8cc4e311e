//! Reads and writes by software: by vCPUs, and by threads that are none.
//!
//! Invariants: what is read comes from a frame that the VM has, whatever comes and goes meanwhile; while nothing does,
//! it is what stands at that place, and what is written stands there afterwards.

use crate::faults::no_answer;
use crate::history::{Accesses, Stage};
use crate::host::{POISON, SimHost, WORDS};
use crate::places::some_gfn;
use crate::random::Random;
use crate::story::Violation;
use vmmu::{AddressSpace, Error, Gpa, PageSize, Reader, Vcpu};

/// The word of a page from which on software writes: those before it may be guests' tables.
const WRITTEN: u64 = WORDS as u64 / 2;

/// One turn of a reader in so many is an access.
const RESTS: u64 = 8;

/// An address space and a guest frame in it.
type Place = (AddressSpace, u64);

/// Who accesses memory.
pub(crate) enum Software<'a> {
    Vcpu(&'a mut Vcpu<SimHost>),
    Reader(&'a mut Reader<SimHost>),
}

impl Software<'_> {
    fn read(&mut self, gpa: Gpa) -> Result<u64, Error> {
        let mut word = [0; 8];
        match self {
            Self::Vcpu(vcpu) => vcpu.read(gpa, &mut word),
            Self::Reader(reader) => reader.read(gpa, &mut word),
        }?;
        Ok(u64::from_le_bytes(word))
    }
    fn write(&mut self, gpa: Gpa, word: u64) -> Result<(), Error> {
        match self {
            Self::Vcpu(vcpu) => vcpu.write(gpa, &word.to_le_bytes()),
            Self::Reader(reader) => reader.write(gpa, &word.to_le_bytes()),
        }
    }
}

/// A thread that is no vCPU: accesses memory now and then.
pub(crate) fn reader(stage: &Stage, mut random: Random) {
    let space = stage.some_space(&mut random);
    let Ok(mut reader) = stage.vm.reader_in(space) else { return };
    while !stage.over() {
        stage.boundary();
        if random.one_in(RESTS) && stage.begin(&mut random) {
            accesses(stage, &mut Software::Reader(&mut reader), space, "reader", &mut random);
        }
    }
}

/// Reads or writes a word, and judges what comes of it.
pub(crate) fn accesses(
    stage: &Stage,
    software: &mut Software<'_>,
    space: AddressSpace,
    who: &str,
    random: &mut Random,
) {
    let place = (space, some_gfn(stage, space, random));
    let result = if random.one_in(stage.rates.writes) {
        let at = WRITTEN + random.below(WORDS as u64 - WRITTEN);
        stage.tell(who, || format!("writes {:#x} by software", place.1));
        writes(stage, software, place, at, random.bits() | 1 << 32)
    } else {
        let at = random.below(WORDS as u64);
        stage.tell(who, || format!("reads {:#x} by software", place.1));
        reads(stage, software, place, at)
    };
    match result {
        Ok(done) => {
            let counted = stage.accesses.get();
            stage.accesses.set(Accesses { software: counted.software + u64::from(done), ..counted });
        }
        Err(what) => stage.violate(Violation::new(format!("{who}: {what}"))),
    }
}

/// Reads a word; says whether it could.
fn reads(stage: &Stage, software: &mut Software<'_>, (space, gfn): Place, at: u64) -> Result<bool, String> {
    let (moment, writes) = (stage.world.borrow().moment(), stage.writes.quiet());
    let value = match software.read(gpa(gfn, at)) {
        Ok(value) => value,
        Err(error) => return judge(stage, (space, gfn), error, false, moment).map(|()| false),
    };
    let world = stage.world.borrow();
    // Not all of a page of 1 GiB is marked.
    let giant = world.at(space, gfn).any(|slot| slot.pages == PageSize::Size1G.pages());
    if value == POISON || (value >> 32 == 0 && !giant) {
        return Err(format!("software read {value:#x} at {gfn:#x}, a frame that nobody has"));
    }
    if world.moment() != moment {
        return Ok(true);
    }
    if world.is_open(gfn) {
        return Err(format!("software read {gfn:#x} while it was taken away"));
    }
    let words = stage.words(space, gfn, at);
    let known = writes.is_some() && stage.writes.quiet() == writes;
    if words.is_empty() || known && !words.contains(&value) {
        return Err(format!("software read {value:#x} at {gfn:#x}, where {words:#x?} stands"));
    }
    Ok(true)
}

/// Writes a word; says whether it could.
fn writes(
    stage: &Stage,
    software: &mut Software<'_>,
    (space, gfn): Place,
    at: u64,
    value: u64,
) -> Result<bool, String> {
    let (moment, before) = (stage.world.borrow().moment(), stage.writes.quiet());
    let result = {
        let _open = stage.writes.begin();
        software.write(gpa(gfn, at), value)
    };
    if let Err(error) = result {
        return judge(stage, (space, gfn), error, true, moment).map(|()| false);
    }
    let world = stage.world.borrow();
    if world.moment() != moment {
        return Ok(true);
    }
    if world.is_open(gfn) {
        return Err(format!("software wrote to {gfn:#x} while it was taken away"));
    }
    if !world.at(space, gfn).any(|slot| slot.is_writable(gfn)) {
        return Err(format!("software wrote to {gfn:#x}, which is not writable"));
    }
    let alone = before.is_some_and(|before| stage.writes.quiet() == Some(before + 1));
    if alone && !stage.words(space, gfn, at).contains(&value) {
        return Err(format!("software wrote {value:#x} at {gfn:#x}, and it is not there"));
    }
    Ok(true)
}

/// Judges an access that failed.
fn judge(
    stage: &Stage,
    (space, gfn): Place,
    error: Error,
    write: bool,
    moment: (u64, u64),
) -> Result<(), String> {
    let world = stage.world.borrow();
    let changed = world.moment() != moment;
    let right = match error {
        Error::NoSlot { gpa } => {
            gpa.gfn().raw() == gfn && (changed || !world.at(space, gfn).any(|slot| slot.settled))
        }
        Error::ReadOnly { .. } => {
            write && (changed || !world.at(space, gfn).all(|slot| slot.is_writable(gfn)))
        }
        Error::Backing { why, .. } => changed || no_answer(stage, error) || world.may_refuse(space, gfn, why),
        _ => false,
    };
    if right { Ok(()) } else { Err(format!("software that accesses {gfn:#x} is told: {error}")) }
}

fn gpa(gfn: u64, at: u64) -> Gpa {
    Gpa::new((gfn << 12) + 8 * at)
}
