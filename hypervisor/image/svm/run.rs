//! The loop around the guest: enter (and prepare, where something came up), account, handle.
//!
//! Invariant: between `enter` and `ran` nothing happens but the world switch and two reads of the clock.

use super::exits;
use super::processor::Processor;
use super::ticks::{self, Ticks};
use super::vmcb::exit;
use crate::churn::MISTAKES;
use crate::guest::End;
use crate::guest::devices::Devices;
use crate::guest::ports::Ports;
use crate::guest::services::Services;
use crate::machine::{cpu, serial};
use crate::memory::MachineHost;
use crate::report;
use vmmu::{PhysCpu, Vcpu};

/// Exits that are kept for the report.
pub(crate) const TRAIL: usize = 16;

/// Places for counts of exits. The code of nested faults, 0x400, falls on that of CR0 reads, which nobody asks for.
const PLACES: usize = 512;
const _: () = assert!(exit::NESTED_FAULT.is_multiple_of(PLACES as u64));

/// An exit as it is kept. The order of the fields is known to whoever reads the ring from outside (`@state`).
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Exit {
    /// Its code.
    pub(crate) code: u64,
    /// Its first word of information.
    pub(crate) info_1: u64,
    /// Its second word of information.
    pub(crate) info_2: u64,
    /// Where the guest was.
    pub(crate) rip: u64,
}

/// What the run cost and did so far.
pub(crate) struct Account {
    /// Exits by the low bits of their code: no two that are intercepted share a place.
    exits: [u64; PLACES],
    /// The last exits, in a ring.
    trail: [Exit; TRAIL],
    /// Exits in all.
    pub(crate) count: u64,
    /// The clock when the run began.
    began: u64,
    /// The sum of the clock at entries less its sum at exits and at the beginning.
    outside: u64,
}

impl Account {
    fn new() -> Self {
        let began = cpu::tsc();
        Self {
            exits: [0; PLACES],
            trail: [Exit::default(); TRAIL],
            count: 0,
            began,
            outside: 0u64.wrapping_sub(began),
        }
    }

    /// Ticks of the clock in the guest and outside of it, now that it is outside.
    pub(crate) fn ticks(&self) -> (u64, u64) {
        let now = cpu::tsc();
        let outside = self.outside.wrapping_add(now);
        ((now - self.began).wrapping_sub(outside), outside)
    }

    #[inline(always)]
    fn note(&mut self, exit: Exit) {
        #[allow(clippy::cast_possible_truncation)] // masked
        let (place, slot) = (exit.code as usize & (PLACES - 1), self.count as usize & (TRAIL - 1));
        self.exits[place] += 1;
        self.trail[slot] = exit;
        self.count += 1;
    }

    /// The names of all exits that happened, and how often they did.
    pub(crate) fn by_name(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let counts = (0..).zip(self.exits).filter(|(_, count)| *count != 0);
        counts.map(|(place, count)| {
            let code = if place == 0 { exit::NESTED_FAULT } else { place };
            (exit::name(code).unwrap_or("unknown"), count)
        })
    }

    /// The last exits, oldest first.
    pub(crate) fn last(&self) -> impl Iterator<Item = &Exit> {
        let first = self.count.saturating_sub(TRAIL as u64);
        #[allow(clippy::cast_possible_truncation)] // masked
        (first..self.count).map(|n| &self.trail[n as usize & (TRAIL - 1)])
    }
}

/// A guest that runs.
pub(crate) struct Machine {
    /// Its processor, as SVM keeps it.
    pub(crate) processor: Processor,
    /// Its processor, as the library knows it.
    pub(crate) vcpu: Vcpu<MachineHost>,
    /// The processor it runs on.
    pub(crate) physical: PhysCpu,
    /// Its ports.
    pub(crate) ports: Ports,
    /// Its devices.
    pub(crate) devices: Devices,
    /// The payload's services.
    pub(crate) services: Services,
    /// What it cost so far.
    pub(crate) account: Account,
    /// Repeated faults.
    pub(crate) storm: exits::Storm,
    /// Time of the hypervisor's own, where something wants it.
    pub(crate) ticks: Option<Ticks>,
}

impl Machine {
    /// A guest about to run.
    pub(crate) fn new(
        processor: Processor,
        mut vcpu: Vcpu<MachineHost>,
        physical: PhysCpu,
        ports: Ports,
        devices: Devices,
        services: Services,
    ) -> Self {
        vcpu.set_paging(processor.paging_state());
        let mut machine = Self {
            processor,
            vcpu,
            physical,
            ports,
            devices,
            services,
            account: Account::new(),
            storm: exits::Storm::default(),
            ticks: None,
        };
        for ports in machine.ports.intercepted() {
            machine.processor.ports.intercept(ports);
        }
        machine
    }

    /// Has the guest run under ticks, whose timer runs already.
    pub(crate) fn tick(&mut self, ticks: Ticks) {
        self.ticks = Some(ticks);
        self.processor.watch_halts(true);
    }

    /// Runs the guest to its end.
    pub(crate) fn run(&mut self) -> End {
        self.tell_where();
        loop {
            if let Err(end) = self.step() {
                self.finish();
                return end;
            }
        }
    }

    /// The guest runs no more.
    #[cold]
    fn finish(&mut self) {
        if let Some(ticks) = &mut self.ticks {
            ticks.churn.end();
        }
        self.ports.flush();
    }

    /// Says where the state of both sides lies, so that a debugger, or an emulator's monitor, can read it while the
    /// guest runs. The machine stays where it is until the run ends.
    fn tell_where(&self) {
        let at = |pointer: *const u64| pointer as u64;
        // Where an NMI is a tick, it takes a byte in this port to ask for the record.
        let port = self.ticks.as_ref().map(|_| serial::listen());
        report::state(
            &[
                ("vmcb", core::ptr::from_ref(&*self.processor.vmcb) as u64),
                ("registers", at(self.processor.registers.general.as_ptr())),
                ("host_save", super::host_save()),
                ("trail", self.account.trail.as_ptr() as u64),
                ("count", at(&raw const self.account.count)),
            ],
            port,
        );
    }

    /// From one exit to the next, and through its handler.
    #[inline(always)]
    fn step(&mut self) -> Result<(), End> {
        let Ok(entry) = self.vcpu.enter(&mut self.physical) else {
            return self.vcpu.prepare().map_err(End::error);
        };
        let before = cpu::tsc();
        // SAFETY: the root is the library's, which maps what the slots say and nothing else, and keeps it
        // valid until the entry is over.
        unsafe { self.processor.enter(entry.root().raw(), entry.tag(), entry.flush()) };
        let after = cpu::tsc();
        entry.ran();
        self.account.outside = self.account.outside.wrapping_add(before).wrapping_sub(after);
        let control = &self.processor.vmcb.control;
        let exit = Exit {
            code: control.exit_code,
            info_1: control.exit_info_1,
            info_2: control.exit_info_2,
            rip: self.processor.vmcb.save.rip,
        };
        self.account.note(exit);
        if MISTAKES {
            ticks::note(self)?;
        }
        exits::handle(self, exit)
    }
}
