//! What a campaign must have made the library do, and what it cannot: each by name.
//!
//! The library lists its points and changes of entries; here stands why this simulation cannot reach some of them.
//! Invariant: everything else has a floor.

pub(crate) use vmmu::coverage::Kind;
pub use vmmu::coverage::{Coverage, Group, Point, Transition};

/// One thing that is counted.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Item {
    /// A change of an entry.
    Transition(Transition),
    /// A point of the code.
    Point(Point),
}

impl Item {
    /// Everything that is counted, group by group.
    pub fn all() -> impl Iterator<Item = Self> {
        let points = Point::ALL.iter().map(|point| Self::Point(*point));
        Transition::ALL.iter().map(|change| Self::Transition(*change)).chain(points)
    }

    /// What kind of thing it is.
    pub const fn group(self) -> Group {
        match self {
            Self::Transition(_) => Group::Transition,
            Self::Point(point) => point.group(),
        }
    }

    /// Its name.
    pub fn name(self) -> String {
        match self {
            Self::Transition(change) => change.to_string(),
            Self::Point(point) => point.name().to_owned(),
        }
    }

    /// How often it happened.
    pub const fn count(self, coverage: &Coverage) -> u64 {
        match self {
            Self::Transition(change) => coverage.transition(change),
            Self::Point(point) => coverage.point(point),
        }
    }

    /// The least that a campaign with this floor must have: tables are to come and go ten times as often.
    pub const fn floor(self, floor: u64) -> u64 {
        match self {
            Self::Point(Point::TableFreed | Point::TableReused) => 10 * floor,
            _ => floor,
        }
    }

    /// Why this simulation never reaches it, if so.
    pub const fn out_of_reach(self) -> Option<&'static str> {
        match self {
            Self::Point(Point::ErrorReservedBits) => Some("only a table that somebody else wrote to has any"),
            Self::Point(Point::ErrorDead) => Some("a broken invariant of the library; a violation by itself"),
            Self::Point(Point::SoftwareUnreachable) => Some("the simulated host reaches every frame"),
            _ => None,
        }
    }
}
