//! How many things are due by the clock, where so many are wanted in a second.
//!
//! Pure arithmetic on the readings of a clock that never goes backwards. What a second ago was due and has not
//! been done is not made up for: whoever was kept from working for long does not work without a pause afterwards,
//! and the rate it reached tells.

use core::num::NonZeroU32;

/// A rate that is to be kept.
#[derive(Clone, Debug)]
pub struct Pace {
    /// Things in a second.
    rate: u64,
    /// Ticks of the clock in a second.
    hertz: u64,
    /// The clock's reading when the count began.
    began: u64,
    /// What was done.
    done: u64,
    /// What was due and will not be made up for.
    forgiven: u64,
}

impl Pace {
    /// Nothing done at `now`, a reading of a clock with `hertz` ticks a second.
    pub fn new(rate: NonZeroU32, hertz: u64, now: u64) -> Self {
        Self { rate: rate.get().into(), hertz: hertz.max(1), began: now, done: 0, forgiven: 0 }
    }

    /// `count` for every second of `ticks`, whole ones.
    fn scaled(ticks: u64, count: u64, per: u64) -> u64 {
        u64::try_from(u128::from(ticks) * u128::from(count) / u128::from(per.max(1))).unwrap_or(u64::MAX)
    }

    /// What is still to be done at `now`: at most what is due in a second.
    pub fn owed(&mut self, now: u64) -> u64 {
        let due = Self::scaled(now.saturating_sub(self.began), self.rate, self.hertz);
        let owed = due.saturating_sub(self.done.saturating_add(self.forgiven));
        self.forgiven += owed.saturating_sub(self.rate);
        owed.min(self.rate)
    }

    /// One is done.
    pub fn did_one(&mut self) {
        self.done += 1;
    }

    /// What was done.
    pub fn done(&self) -> u64 {
        self.done
    }

    /// Things in a second that were wanted.
    pub fn wanted(&self) -> u64 {
        self.rate
    }

    /// Things in a second that were done until `now`.
    pub fn reached(&self, now: u64) -> u64 {
        Self::scaled(self.hertz, self.done, now.saturating_sub(self.began))
    }

    /// Microseconds until `now`.
    pub fn micros(&self, now: u64) -> u64 {
        Self::scaled(now.saturating_sub(self.began), 1_000_000, self.hertz)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERTZ: u64 = 100_000_000;

    fn pace(rate: u32, now: u64) -> Pace {
        Pace::new(NonZeroU32::new(rate).unwrap(), HERTZ, now)
    }

    fn work(pace: &mut Pace, now: u64) -> u64 {
        let owed = pace.owed(now);
        (0..owed).for_each(|_| pace.did_one());
        owed
    }

    #[test]
    fn what_is_due_is_what_the_clock_says() {
        let mut pace = pace(2000, 7);
        assert_eq!(pace.owed(7), 0);
        // A tick of a millisecond: two each, none lost to rounding at 1500 a second either.
        for tick in 1..=1000 {
            assert_eq!(work(&mut pace, 7 + tick * HERTZ / 1000), 2);
        }
        assert_eq!((pace.done(), pace.reached(7 + HERTZ)), (2000, 2000));
        let mut pace = self::pace(1500, 0);
        let done: u64 = (1..=1000).map(|tick| work(&mut pace, tick * HERTZ / 1000)).sum();
        assert_eq!(done, 1500);
    }

    #[test]
    fn a_late_tick_is_made_up_for_and_a_long_pause_is_not() {
        let mut pace = pace(2000, 0);
        assert_eq!(work(&mut pace, HERTZ / 10), 200);
        assert_eq!(work(&mut pace, 10 * HERTZ + HERTZ / 10), 2000);
        assert_eq!(work(&mut pace, 10 * HERTZ + HERTZ / 10), 0);
        assert_eq!(work(&mut pace, 10 * HERTZ + HERTZ / 5), 200);
        assert_eq!(pace.reached(10 * HERTZ + HERTZ / 5), 2400 * 10 / 102);
        assert_eq!(pace.micros(10 * HERTZ + HERTZ / 5), 10_200_000);
    }

    #[test]
    fn no_time_and_all_time_are_no_error() {
        let mut pace = pace(u32::MAX, 0);
        assert_eq!((pace.owed(0), pace.reached(0)), (0, 0));
        assert_eq!(pace.owed(u64::MAX), u64::from(u32::MAX));
    }
}
