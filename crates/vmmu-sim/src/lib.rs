//! Deterministic simulation of `vmmu` on a software machine.
//!
//! One seed is one history: vCPUs that enter, migrate, access memory and fault, movers that take frames away and
//! reuse them at once, slots that come, move and go, zaps, tables that cannot be had. All run as tasks on one
//! thread; the seed decides at every atomic access of the library who goes on, and when a store becomes visible.
//! The machine ([`vmmu_machine`]) forgets no translation by itself; the oracles judge every translation that it
//! could use.
//!
//! | room | holds |
//! |---|---|
//! | `case` | a history as a line names it; shrinking |
//! | `scenario` | scenes that bring few rules together often |
//! | `history` | one seed's run: rates, tasks, rests |
//! | `actors` | who acts |
//! | `fetch` | instructions by the guest's own tables |
//! | `world` | what should be |
//! | `oracle` | whether it is |
//! | `tasks` | coroutines, and the scheduler that the library asks |
//! | `host` | the library's host: memory, kicks, failing allocations |
//! | `story` | the last steps, for a failure |
//!
//! The library knows nothing of the machine, and the machine nothing of the library; this crate alone knows both.

mod actors;
mod case;
mod fetch;
mod history;
mod host;
mod oracle;
mod random;
mod scenario;
mod story;
mod tasks;
mod world;

pub use case::{Case, Part};
pub use history::{Accesses, Ended, Rates, run};
pub use scenario::Scenario;
pub use vmmu::mutants::{Mutant, activate};
