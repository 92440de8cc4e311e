//! Where slots are made, and where vCPUs go.
//!
//! Few places, so that those who act meet; far apart, so that tables come and go. Invariant: every choice is the
//! seed's.

use crate::history::Stage;
use crate::random::Random;
use crate::rates::Spread;
use vmmu::{AddressSpace, PageSize};

/// Guest frames that histories use, in 2 MiB blocks far apart, so that tables come and go.
const PLACES: [u64; 6] = [0, 512, 1024, 1 << 18, (1 << 18) + 512, 1 << 27];
/// Two of them that share no table but the root.
const NARROW: [u64; 2] = [0, 1 << 18];
/// Where slots of 1 GiB are made, and their pages.
pub(crate) const GIANTS: [u64; 3] = [1 << 18, 1 << 27, (1 << 27) + (1 << 18)];
pub(crate) const GIANT: u64 = PageSize::Size1G.pages();
/// Places far from each other, 512 GiB apart, beyond all slots.
const FAR: u64 = 120;
/// A frame that no processor of the simulation can name.
const BEYOND: u64 = 1 << 34;
/// Pages from a place on that vCPUs use: now and then as many as these, which reach beyond any slot; mostly, where
/// vCPUs are spread, and where they meet.
const EVEN: u64 = 520;
const FEW: u64 = 6;
const MEETING: u64 = 2;
/// Where in its block a slot begins that does not begin with it.
pub(crate) const ASKEW: u64 = 3;

/// Places that slots and accesses have in this history.
pub(crate) fn places(stage: &Stage) -> &'static [u64] {
    match stage.rates.spread {
        Spread::Narrow => &NARROW,
        Spread::Wide | Spread::Far | Spread::Spot => &PLACES[..stage.rates.places],
    }
}

/// Whether vCPUs are spread over many pages.
pub(crate) fn is_wide(stage: &Stage) -> bool {
    matches!(stage.rates.spread, Spread::Wide | Spread::Far)
}

/// A guest frame of `space`: mostly one of few in a slot, as guests know their memory; now and then any.
pub(crate) fn some_gfn(stage: &Stage, space: AddressSpace, random: &mut Random) -> u64 {
    let within = match stage.rates.spread {
        Spread::Wide | Spread::Far if random.one_in(12) => random.below(EVEN),
        Spread::Wide | Spread::Far => random.below(FEW),
        Spread::Narrow => random.below(MEETING),
        Spread::Spot => 0,
    };
    if random.one_in(stage.rates.far) {
        return (2 + random.below(FAR)) << 27;
    }
    let world = stage.world.borrow();
    let elsewhere = random.one_in(stage.rates.devices);
    let Some(slot) = world.some_slot(space, random).filter(|_| !elsewhere) else {
        return if random.one_in(stage.rates.beyond) { BEYOND } else { random.pick(places(stage)) } + within;
    };
    let block = if slot.pages == GIANT { 512 * random.below(3) } else { 0 };
    slot.gfn + (block + within).min(slot.pages - 1)
}
