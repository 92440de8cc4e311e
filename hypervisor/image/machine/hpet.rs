//! The high precision event timer (HPET specification 1.0a) as the hypervisor's own alarm: a comparator whose
//! message to the processor is an NMI, which no mask of the guest's keeps away.
//!
//! The timer is the hypervisor's alone: its page is not there for the guest. The legacy routes stay off, so the
//! interval timer's interrupts stay the guest's. The message goes to every processor and so reaches this one
//! whatever number the guest gives its interrupt controller: right for a machine with one processor only, since it
//! would start the others astray. A guest that aims at the interrupt controller's page can do worse than stop an
//! alarm; a wall there is not this room's.

use super::device;
use core::fmt;

/// Registers (section 2.3.3), by their offsets.
const CAPABILITIES: u64 = 0x000;
const CONFIGURATION: u64 = 0x010;
const COUNTER: u64 = 0x0F0;
const TIMERS: u64 = 0x100;
/// From one timer's registers to the next timer's.
const TIMER: u64 = 0x20;
const COMPARATOR: u64 = 0x08;
const MESSAGE: u64 = 0x10;
/// CAPABILITIES: the counter has 64 bits. Above bit 32: femtoseconds of its period.
const WIDE_COUNTER: u64 = 1 << 13;
/// The longest period that the specification allows, in femtoseconds.
const LONGEST_PERIOD: u64 = 100_000_000;
/// CONFIGURATION: everything runs; the first two comparators take the place of the interval timer and the clock.
const ENABLE: u64 = 1 << 0;
const LEGACY_ROUTES: u64 = 1 << 1;
/// A timer's configuration: interrupts are levels and not edges, interrupt, repeat, the next comparator write sets the
/// value and not the period, compare 32 bits, send messages.
const LEVEL: u64 = 1 << 1;
const INTERRUPT: u64 = 1 << 2;
const PERIODIC: u64 = 1 << 3;
const SET_VALUE: u64 = 1 << 6;
const NARROW: u64 = 1 << 8;
const MESSAGES: u64 = 1 << 14;
/// What a timer can: repeat, send messages.
const CAN_REPEAT: u64 = 1 << 4;
const CAN_MESSAGE: u64 = 1 << 15;
/// A message to the interrupt controllers of all processors (AMD64 manual, volume 2, section 16.11) that is an NMI.
const TO_EVERY_PROCESSOR: u64 = 0xFEEF_F000;
const NMI: u64 = 0x400;
/// Femtoseconds in a second.
const SECOND: u64 = 1_000_000_000_000_000;

/// Why there is no alarm.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum NoAlarm {
    /// The machine's tables name no timer, or none answers where they say.
    NoTimer,
    /// Its counter wraps around too soon to be a clock.
    NarrowCounter,
    /// None of its comparators can repeat and send messages.
    NoMessages,
}

impl fmt::Display for NoAlarm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoTimer => "the machine has no high precision event timer",
            Self::NarrowCounter => "the machine's event timer has a counter of 32 bits",
            Self::NoMessages => "no comparator of the machine's event timer repeats and sends messages",
        })
    }
}

impl core::error::Error for NoAlarm {}

/// The running timer: a clock, and an NMI again and again.
pub(crate) struct Hpet {
    base: u64,
    /// Femtoseconds of one tick of the clock.
    period: u64,
}

impl Hpet {
    /// Starts the timer whose registers are at `base`, host-physical, if there is one: an NMI every `micros`
    /// microseconds, up to a second. The clock begins at 0.
    ///
    /// # Safety
    /// The kibibyte at `base` must be the timer's, mapped for the host, and nobody else's. NMIs must be taken by a
    /// handler that comes back, and this processor must be the only one that runs.
    pub(crate) unsafe fn start(base: Option<u64>, micros: u32) -> Result<Self, NoAlarm> {
        let mut timer = Self { base: base.ok_or(NoAlarm::NoTimer)?, period: 0 };
        let capabilities = timer.load(CAPABILITIES);
        timer.period = capabilities >> 32;
        if timer.period == 0 || timer.period > LONGEST_PERIOD {
            return Err(NoAlarm::NoTimer);
        }
        if capabilities & WIDE_COUNTER == 0 {
            return Err(NoAlarm::NarrowCounter);
        }
        let comparators = (capabilities >> 8 & 31) + 1;
        let fit = (0..comparators).map(|number| TIMERS + number * TIMER).find(|&at| {
            let can = CAN_REPEAT | CAN_MESSAGE;
            timer.load(at) & can == can
        });
        let at = fit.ok_or(NoAlarm::NoMessages)?;
        // What firmware may have begun ends; bits that the specification reserves stay as they are.
        timer.change(CONFIGURATION, ENABLE | LEGACY_ROUTES, 0);
        for other in (0..comparators).map(|number| TIMERS + number * TIMER) {
            timer.change(other, INTERRUPT, 0);
        }
        timer.store(COUNTER, 0);
        timer.store(COUNTER + 4, 0);
        timer.store(at + MESSAGE, NMI);
        timer.store(at + MESSAGE + 4, TO_EVERY_PROCESSOR);
        timer.change(at, LEVEL, INTERRUPT | PERIODIC | SET_VALUE | NARROW | MESSAGES);
        let ticks = (u64::from(micros) * (SECOND / 1_000_000) / timer.period).clamp(1, u64::from(u32::MAX));
        // The first value of the comparator, then what is added to it each time.
        timer.store(at + COMPARATOR, ticks);
        timer.store(at + COMPARATOR, ticks);
        timer.change(CONFIGURATION, 0, ENABLE);
        Ok(timer)
    }

    /// The clock, in ticks since the start.
    pub(crate) fn now(&self) -> u64 {
        self.load(COUNTER)
    }

    /// Ticks of the clock in a second.
    pub(crate) fn hertz(&self) -> u64 {
        SECOND / self.period
    }

    fn load(&self, register: u64) -> u64 {
        // SAFETY: `start`'s caller gave the registers; reading one has no effect.
        unsafe { device::load(self.base + register, 8) }
    }

    /// Clears and sets bits of the low half of a register.
    fn change(&self, register: u64, clear: u64, set: u64) {
        self.store(register, self.load(register) & 0xFFFF_FFFF & !clear | set);
    }

    /// Writes the low half of a register.
    fn store(&self, register: u64, value: u64) {
        // SAFETY: `start`'s caller gave the registers and answers for the messages.
        unsafe { device::store(self.base + register, 4, value) }
    }
}
