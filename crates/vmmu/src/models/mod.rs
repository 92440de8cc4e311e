//! Models of the protocols over the shipped source, explored by loom.
//!
//! Only with `--cfg loom`, as unit tests: `cargo xtask loom` builds and runs them. Where `models/*.pml` check the
//! text, these check the code, under the orders that the language allows and not only those of x86. Each room is one
//! protocol: what runs beside what, what must hold, how far it was explored, and the mutants of the library that it
//! catches.
//!
//! | room | PROTOCOLS | runs |
//! |---|---|---|
//! | `shared_exclusive` | 1, 2 | Shared and a walk beside Exclusive |
//! | `grace` | 1, 4 | a walk beside the replacement and reuse of its table |
//! | `entry_shootdown` | 3 | entries beside a removal with its shootdown, and beside a request |
//! | `slot_section` | 5 | a reader of slots beside their change; a fault beside the deletion of its slot |
//! | `link` | T154 | a fault that links tables beside a walk into them |
//! | `freeze` | 4, T95 | a fault that needs a table beside the removal of the table above |
//! | `invalidation` | 4 | a fault, and a read by software, beside `invalidate` |
//! | `lazy_protection` | 7 | the push-down over two levels: its steps alone, until the feature is there |
//! | `machine` | | the host, its frames, and what a processor does, for the others |
//!
//! What this does not show. Loom takes `SeqCst` accesses for acquire and release, which is why the library has fences
//! instead. It orders fences more strictly than the language: each hands all that was done before it on to the next.
//! Of a word it remembers the last seven values. It leaves out schedules in which a thread that reads a word and then
//! changes it comes before another's read alone. What a mutex of the library guards is not looked at, its exclusion is.
//! The models have table pages of four entries, and pieces of the slab of four lines ([`crate::sync::places`]); memory
//! of the guest and counters are not looked at ([`crate::sync::Tally`]); nor are the counts of an `Arc`. Invariant: a
//! mutant counts as caught only by what its test says it must come to, never by a search that was cut short.

mod entry_shootdown;
mod freeze;
mod grace;
mod invalidation;
mod lazy_protection;
mod link;
mod machine;
mod shared_exclusive;
mod slot_section;

use crate::mutants::{Mutant, activate};
use std::panic::{self, AssertUnwindSafe};
use std::string::{String, ToString};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Steps of one execution beyond which loom takes it for endless.
const STEPS: usize = 20_000;
/// What loom says of two accesses that nothing orders, and `machine` of those in the wrong order.
const RACE: &str = "Causality violation";

/// A model: what threads do, explored to the end.
struct Model {
    /// How often, at most, a thread is stopped for another where it could go on; `None`: as often as there are ways
    /// to.
    preemptions: Option<usize>,
    /// One execution, which panics where something does not hold.
    run: fn(),
}

impl Model {
    /// Explores the model with a rule broken, or none, and says in how many executions, and what came of it.
    fn explore(&self, mutant: Option<Mutant>) -> (u64, Result<(), String>) {
        // The mutant is the process's.
        static ONE: Mutex<()> = Mutex::new(());
        let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        activate(mutant);
        let mut explorer = loom::model::Builder::new();
        explorer.preemption_bound = self.preemptions;
        explorer.max_branches = STEPS;
        // Whatever the environment says, to the end.
        (explorer.max_permutations, explorer.max_duration, explorer.checkpoint_file) = (None, None, None);
        let run = self.run;
        let executions = Arc::new(AtomicU64::new(0));
        let count = executions.clone();
        let result = panic::catch_unwind(AssertUnwindSafe(|| {
            explorer.check(move || {
                count.fetch_add(1, Ordering::Relaxed);
                crate::sync::modelled::execution(run);
            });
        }));
        activate(None);
        let said = result.map_err(|why| match (why.downcast_ref::<String>(), why.downcast_ref::<&str>()) {
            (Some(said), _) => said.clone(),
            (None, Some(said)) => (*said).to_string(),
            (None, None) => String::from("a panic without a word"),
        });
        (executions.load(Ordering::Relaxed), said)
    }

    /// Demands that every execution holds.
    fn holds(&self) {
        let (executions, said) = self.explore(None);
        std::println!("{executions} executions");
        said.unwrap_or_else(|said| panic!("after {executions} executions: {said}"));
    }

    /// Demands that an execution with `mutant` comes to `what`.
    fn catches(&self, mutant: Mutant, what: &str) {
        self.comes_to(Some(mutant), what);
    }

    /// Demands that an execution comes to `what`: of a model that lacks a rule itself.
    fn fails(&self, what: &str) {
        self.comes_to(None, what);
    }

    fn comes_to(&self, mutant: Option<Mutant>, what: &str) {
        let (executions, said) = self.explore(mutant);
        std::println!("{executions} executions");
        match said {
            Err(said) if said.contains(what) => {}
            Err(said) => panic!("it came to something else after {executions} executions: {said}"),
            Ok(()) => panic!("it was not noticed in {executions} executions"),
        }
    }
}

/// Tests: that a model holds; that a model catches each mutant in the way that is named.
macro_rules! checks {
    ($model:ident: $holds:ident) => {
        #[test]
        fn $holds() {
            $model.holds();
        }
    };
    ($model:ident catches $($name:ident: $mutant:ident => $what:expr),* $(,)?) => {
        $(#[test]
        fn $name() {
            $model.catches(crate::mutants::Mutant::$mutant, $what);
        })*
    };
}
use checks;
