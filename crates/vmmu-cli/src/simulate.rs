//! `vmmu sim`: histories over many seeds, or one replayed.
//!
//! Threads take seeds in turn; each history is its own world. The first violation ends the work: it is made smaller,
//! told, and given with the line that replays it. Invariant: what a seed comes to does not depend on the threads.

use crate::summary::{self, Totals};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::num::NonZero;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use vmmu_sim::{Case, Mutant, Part, Scenario, activate, run};

/// Simulates seeded histories of vCPUs, moving memory, slots and zaps, and judges every translation
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// The first seed
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// A scene that brings a few rules together often (`vmmu scenarios` names them)
    #[arg(long, value_parser = scenario)]
    scenario: Option<Scenario>,
    /// How many seeds; one, unless --for says how long
    #[arg(long)]
    seeds: Option<u64>,
    /// Steps of each history: guest accesses, and operations begun
    #[arg(long, default_value_t = 1000)]
    steps: u64,
    /// Goes on for so many seconds
    #[arg(long = "for", value_name = "SECONDS")]
    duration: Option<u64>,
    /// Only seeds whose number leaves I when divided by N
    #[arg(long, value_name = "I/N", value_parser = shard)]
    shard: Option<(u64, u64)>,
    /// Leaves something out of every history (repeatable)
    #[arg(long, value_parser = part)]
    without: Vec<Part>,
    /// At most so many vCPUs
    #[arg(long, default_value_t = usize::MAX, hide_default_value = true)]
    vcpus: usize,
    /// At most so many physical processors
    #[arg(long, default_value_t = usize::MAX, hide_default_value = true)]
    processors: usize,
    /// Breaks one rule of the library (`vmmu mutants` names them), to see it noticed
    #[arg(long, value_parser = mutant)]
    mutant: Option<Mutant>,
    /// Threads; as many as there are processors
    #[arg(long)]
    threads: Option<NonZero<usize>>,
    /// Tells a violation as it was found, without making its history smaller
    #[arg(long)]
    as_found: bool,
    /// Fails where anything that the library can be made to do happened less often than N times, tables were freed and
    /// used again less often than 10 N times, or less than half of the guest accesses reached memory
    #[arg(long, value_name = "N")]
    floor: Option<u64>,
    /// Tells how often each thing happened
    #[arg(long)]
    coverage: bool,
    /// Prints one JSON object
    #[arg(long)]
    json: bool,
}

fn shard(text: &str) -> Result<(u64, u64), String> {
    let parts = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    parts.filter(|(i, n)| i < n).ok_or_else(|| format!("{text}: not I/N with I below N"))
}

fn part(name: &str) -> Result<Part, String> {
    let names = || Part::ALL.map(Part::name).join(", ");
    Part::ALL.into_iter().find(|part| part.name() == name).ok_or_else(|| format!("not one of {}", names()))
}

fn mutant(name: &str) -> Result<Mutant, String> {
    let found = Mutant::ALL.iter().find(|mutant| mutant.name() == name);
    found.copied().ok_or_else(|| "no such mutant; `vmmu mutants` names them".to_owned())
}

fn scenario(name: &str) -> Result<Scenario, String> {
    let found = Scenario::ALL.iter().find(|scenario| scenario.name() == name);
    found.copied().ok_or_else(|| "no such scenario; `vmmu scenarios` names them".to_owned())
}

impl Options {
    /// What happens without a word: a minute of seeds.
    pub(crate) const fn a_minute() -> Self {
        Self {
            seed: 0,
            scenario: None,
            seeds: None,
            steps: 1000,
            duration: Some(60),
            shard: None,
            without: Vec::new(),
            vcpus: usize::MAX,
            processors: usize::MAX,
            mutant: None,
            threads: None,
            as_found: false,
            floor: None,
            coverage: false,
            json: false,
        }
    }

    fn case(&self, seed: u64) -> Case {
        Case {
            seed,
            scenario: self.scenario,
            steps: self.steps,
            without: self.without.clone(),
            vcpus: self.vcpus,
            processors: self.processors,
        }
    }

    /// The seed of turn `n`, if there is one.
    fn seed_of(&self, n: u64) -> Option<u64> {
        let endless = if self.duration.is_some() { u64::MAX } else { 1 };
        let (i, of) = self.shard.unwrap_or((0, 1));
        let within = n.checked_mul(of)?.checked_add(i)?;
        (within < self.seeds.unwrap_or(endless)).then(|| self.seed.checked_add(within)).flatten()
    }
}

/// What all threads share.
struct Work<'a> {
    options: &'a Options,
    turn: AtomicU64,
    started: Instant,
    totals: Mutex<Totals>,
    failed: Mutex<Option<Case>>,
    bar: ProgressBar,
}

impl Work<'_> {
    fn over(&self) -> bool {
        let time = self.options.duration.is_some_and(|s| self.started.elapsed() >= Duration::from_secs(s));
        time || self.failed.lock().is_ok_and(|failed| failed.is_some())
    }

    fn seeds(&self) {
        while !self.over() {
            let Some(seed) = self.options.seed_of(self.turn.fetch_add(1, Relaxed)) else { return };
            let case = self.options.case(seed);
            let ended = run(&case);
            let failed = ended.violation.is_some();
            if let Ok(mut totals) = self.totals.lock() {
                totals.add(&ended);
                self.bar.set_message(totals.line(self.started.elapsed()));
                match self.options.duration {
                    Some(_) => self.bar.set_position(self.started.elapsed().as_secs()),
                    None => self.bar.set_position(totals.seeds),
                }
            }
            // The smallest failing seed of those under way is told, whichever thread is first.
            if failed
                && let Ok(mut first) = self.failed.lock()
                && first.as_ref().is_none_or(|first| seed < first.seed)
            {
                *first = Some(case);
            }
        }
    }
}

fn bar(options: &Options) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(options.duration.or(options.seeds).unwrap_or(1));
    if let Ok(style) = ProgressStyle::with_template("{spinner:.cyan} {wide_bar:.cyan/blue} {msg}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

/// Simulates; the status says whether all was well.
pub(crate) fn command(options: &Options) -> ExitCode {
    activate(options.mutant);
    let threads = options.threads.or_else(|| std::thread::available_parallelism().ok());
    let work = Work {
        options,
        turn: AtomicU64::new(0),
        started: Instant::now(),
        totals: Mutex::default(),
        failed: Mutex::default(),
        bar: bar(options),
    };
    if work.bar.is_hidden() && !options.json {
        eprintln!("· simulating");
    }
    std::thread::scope(|scope| {
        for _ in 0..threads.map_or(1, NonZero::get) {
            scope.spawn(|| work.seeds());
        }
    });
    work.bar.finish_and_clear();
    let elapsed = work.started.elapsed();
    let Ok(totals) = work.totals.into_inner() else { return ExitCode::FAILURE };
    let failure = work.failed.into_inner().ok().flatten().map(|case| {
        if options.as_found {
            let ended = run(&case);
            (case, ended)
        } else {
            case.shrunk()
        }
    });
    let replay = failure.as_ref().map(|(case, _)| {
        let mutant = options.mutant.map(|m| format!(" --mutant {}", m.name())).unwrap_or_default();
        format!("cargo run --release -- sim {case}{mutant}")
    });
    let below = totals.below(options.floor.unwrap_or(0));
    let story = failure.as_ref().and_then(|(_, ended)| ended.violation.as_deref());
    if options.json {
        println!("{}", summary::object(&totals, elapsed, options.floor, story.zip(replay.as_deref())));
    } else {
        print!("{}", summary::table(&totals, elapsed));
        if options.coverage {
            print!("{}", summary::coverage(&totals, options.floor));
        }
        for summary::Below { what, count, least } in &below {
            println!("{} {what}: {count}, not {least}", console::style("below the floor:").red());
        }
        if let Some((story, replay)) = story.zip(replay.as_deref()) {
            println!("\n{}\n{story}\nreplay: {replay}", console::style("a violation").red().bold());
        }
    }
    if failure.is_some() || !below.is_empty() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
