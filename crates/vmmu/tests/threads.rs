//! Several vCPUs and movers at once, on real threads: pages move between frames under invalidation while
//! vCPUs fault, enter, read and write. Whatever the schedule: nobody reads a frame that was given back, no
//! write is lost, and the books agree at the end.

mod common;

use common::{ChangingBacking, FIRST_FRAME, FRAMES, Handle, Page, Random, TestHost};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use vmmu::{
    Config, Fault, Gfn, GfnRange, Gpa, Host, Outcome, PageSize, Pfn, PhysCpu, Region, SlotId, TableFormat,
    TagSet, Vm,
};

const PAGES: u64 = 96;
const VCPUS: u64 = 3;
const POISON: u64 = 0xDEAD_DEAD_DEAD_DEAD;

/// A frame's word, for the test's own direct access.
fn frame_word(host: &Handle, pfn: Pfn, index: usize) -> &'static AtomicU64 {
    let at = host.frame_ptr(pfn).expect("a real frame");
    // SAFETY: inside one page of the host's memory, which outlives the test's threads; aligned.
    unsafe { at.add(index * 8).cast::<AtomicU64>().as_ref() }
}

fn region(backing: &Arc<ChangingBacking>) -> Region {
    Region::new(Gfn::new(0), PAGES, backing.clone())
}

/// Lets the vCPUs end whatever becomes of the others.
struct Stop<'a>(&'a AtomicBool);
impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// PROTOCOLS 2 to 5, M66–M73: the races of moving memory under running vCPUs.
#[test]
fn pages_move_under_running_vcpus() {
    let host = TestHost::new();
    let handle = Handle(host.clone());
    let vm = Vm::new(handle.clone(), Config::new(TableFormat::Npt4, 48)).expect("legal");
    let backing = Arc::new(ChangingBacking::default());
    let free = Mutex::new((PAGES..FRAMES).map(|n| Pfn::new(FIRST_FRAME + n)).collect::<Vec<_>>());
    for n in 0..PAGES {
        let pfn = Pfn::new(FIRST_FRAME + n);
        frame_word(&handle, pfn, 0).store(n, Relaxed);
        let page = Page { pfn, max_size: PageSize::Size4K, writable: true, slow: n % 7 == 0 };
        backing.pages.lock().expect("not poisoned").insert(n, page);
    }
    vm.set_region(SlotId::new(0), region(&backing)).expect("valid");
    let stop = AtomicBool::new(false);
    let (moved, rounds) = (AtomicU64::new(0), AtomicU64::new(0));
    // A scheduler may run one side alone for long: the movers go on until everybody met everybody.
    let enough = || rounds.load(Relaxed) >= 1000 && vm.stats().remote_tlb_flush >= 20;

    std::thread::scope(|s| {
        let stopper = Stop(&stop);
        let vcpus: Vec<_> = (0..VCPUS)
            .map(|_| {
                let mut vcpu = vm.vcpu().expect("alive");
                let (host, stop, rounds) = (&host, &stop, &rounds);
                s.spawn(move || {
                    let mut cpu = PhysCpu::new(TagSet::asids(4, true));
                    let id = u64::from(vcpu.id().number());
                    let mut random = Random::new(id);
                    let mut written = [0u64; PAGES as usize];
                    while !stop.load(Relaxed) {
                        vcpu.prepare().expect("memory");
                        let Ok(entry) = vcpu.enter(&mut cpu) else { continue };
                        // In the guest: until a kick, or a while.
                        for _ in 0..random.below(4000) {
                            if host.kicked.load(Relaxed) & 1 << id != 0 {
                                break;
                            }
                            std::hint::spin_loop();
                        }
                        host.kicked.fetch_and(!(1 << id), Relaxed);
                        entry.ran();
                        let page = random.below(PAGES);
                        let code = 1 << 32 | 4 | u64::from(random.one_in(2)) << 1;
                        let outcome =
                            vcpu.handle_fault(Fault::npf(Gpa::new(page << 12), code)).expect("memory");
                        assert!(matches!(outcome, Outcome::Resume), "{outcome:?}");
                        let page = random.below(PAGES);
                        let mut word = [0; 8];
                        vcpu.read(Gpa::new(page << 12), &mut word).expect("backed");
                        assert_eq!(u64::from_le_bytes(word), page, "a frame that was given back was read");
                        let own = Gpa::new((page << 12) + 8 * (id + 1));
                        vcpu.read(own, &mut word).expect("backed");
                        assert_eq!(u64::from_le_bytes(word), written[page as usize], "a write was lost");
                        rounds.fetch_add(1, Relaxed);
                        written[page as usize] += 1;
                        vcpu.write(own, &written[page as usize].to_le_bytes()).expect("writable");
                    }
                    (id, written)
                })
            })
            .collect();
        let movers: Vec<_> = (0..2u64)
            .map(|mover| {
                let (vm, backing, handle, free, moved) = (&vm, &backing, &handle, &free, &moved);
                let enough = &enough;
                s.spawn(move || {
                    let mut random = Random::new(1000 + mover);
                    for n in 0..300_000u64 {
                        if n >= 1500 && n % 64 == 0 && enough() {
                            return;
                        }
                        // Each mover has its own half of the pages, so that one page is not moved twice at once.
                        let page = random.below(PAGES / 2) * 2 + mover;
                        let range = GfnRange::with_len(Gfn::new(page), 1).expect("in range");
                        let guard = vm.invalidate(range).expect("alive");
                        let old = backing.page(page).expect("there");
                        let new = free.lock().expect("not poisoned").pop().expect("enough frames");
                        for word in 0..512 {
                            let value = frame_word(handle, old.pfn, word).load(Relaxed);
                            frame_word(handle, new, word).store(value, Relaxed);
                        }
                        for word in 0..512 {
                            frame_word(handle, old.pfn, word).store(POISON, Relaxed);
                        }
                        backing.pages.lock().expect("not poisoned").insert(page, Page { pfn: new, ..old });
                        drop(guard);
                        free.lock().expect("not poisoned").insert(0, old.pfn);
                        moved.fetch_add(1, Relaxed);
                        // Where there are fewer processors than threads, the vCPUs get theirs.
                        std::thread::yield_now();
                    }
                    panic!("vCPUs and movers never met: {:?}", vm.stats());
                })
            })
            .collect();
        let changer = {
            let vm = &vm;
            s.spawn(move || {
                let other = Arc::new(ChangingBacking::default());
                for n in 0..200 {
                    let id = SlotId::new(1);
                    let region = Region::new(Gfn::new(1 << 20), 16, other.clone());
                    vm.set_region(id, region).expect("valid");
                    vm.delete_region(id).expect("there");
                    if n % 4 == 0 {
                        vm.zap_all().expect("alive");
                    }
                    if n % 50 == 0 {
                        vm.audit().unwrap_or_else(|broken| panic!("{broken}"));
                    }
                }
            })
        };
        for mover in movers {
            mover.join().expect("a mover failed");
        }
        changer.join().expect("the changer failed");
        drop(stopper);
        for vcpu in vcpus {
            let (id, written) = vcpu.join().expect("a vCPU failed");
            let mut reader = vm.reader().expect("alive");
            for (page, expected) in written.into_iter().enumerate() {
                let mut word = [0; 8];
                reader.read(Gpa::new(((page as u64) << 12) + 8 * (id + 1)), &mut word).expect("backed");
                assert_eq!(u64::from_le_bytes(word), expected, "page {page} of vCPU {id}");
            }
        }
    });
    assert!(moved.load(Relaxed) >= 3000);
    vm.audit().unwrap_or_else(|broken| panic!("{broken}"));
    assert!(enough());
    drop(vm);
    assert_eq!(host.blocks_out(), 0);
}
