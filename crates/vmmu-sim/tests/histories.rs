//! Histories of the library as it is: no violation, the same each time, and about as many hits as faults.

use vmmu_sim::{Accesses, Case, Part, run};

#[test]
fn histories_pass() {
    let mut accesses = Accesses::default();
    for seed in 0..200 {
        let ended = run(&Case::new(seed, 1000));
        assert_eq!(ended.violation, None, "seed {seed}");
        assert_eq!(ended.steps, 1000, "seed {seed}");
        accesses = accesses + ended.accesses;
    }
    // A run that does nothing would pass too.
    assert!(accesses.translated * 2 >= accesses.translated + accesses.faulted, "{accesses:?}");
    assert!(accesses.devices > 1000 && accesses.read_only > 1000 && accesses.software > 1000, "{accesses:?}");
}

#[test]
fn a_case_repeats() {
    for seed in 0..20 {
        let case = Case::new(seed, 500);
        assert_eq!(run(&case), run(&case), "seed {seed}");
    }
}

#[test]
fn a_case_without_everything_passes() {
    for seed in 0..20 {
        let case = Case { without: Part::ALL.to_vec(), vcpus: 1, processors: 1, ..Case::new(seed, 500) };
        let ended = run(&case);
        assert_eq!(ended.violation, None, "{case}");
        assert_eq!((ended.rates.vcpus, ended.rates.moves, ended.rates.zaps), (1, 0, 0));
        assert_eq!(ended.accesses.software, 0);
    }
}
