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
//! | `vcpus`, `slots`, `movers` | who acts |
//! | `places` | where |
//! | `faults` | the library's answers to guests' faults |
//! | `kicks` | who kicks vCPUs |
//! | `software` | reads and writes by software |
//! | `fetch` | instructions by the guest's own tables |
//! | `world` | what should be |
//! | `oracle` | whether it is, for processors |
//! | `audits` | whether it is, for the library's tables |
//! | `coverage` | what a campaign must reach |
//! | `rates` | what differs between histories |
//! | `frames` | what guests' frames hold, and who has them |
//! | `tasks` | coroutines, and the scheduler that the library asks |
//! | `host` | the library's host: memory, kicks, failing allocations |
//! | `story` | the last steps, for a failure |
//!
//! The library knows nothing of the machine, and the machine nothing of the library; this crate alone knows both.

mod audits;
mod case;
mod coverage;
mod faults;
mod fetch;
mod frames;
mod history;
mod host;
mod kicks;
mod movers;
mod oracle;
mod places;
mod random;
mod rates;
mod scenario;
mod slots;
mod software;
mod story;
mod tasks;
mod vcpus;
mod world;

pub use case::{Case, Part};
pub use coverage::{Coverage, Group, Item, Point, Transition};
pub use history::{Accesses, Ended, run};
pub use host::Failures;
pub use rates::{Rates, Spread};
pub use scenario::Scenario;
pub use vmmu::mutants::{Mutant, activate};
