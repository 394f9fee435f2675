//! Persistent threads. A region of work starts and ends many times per token, so workers spin for a short while before they
//! sleep; the spin is bounded, because an unbounded one collapses when another process takes a core.

use std::{
    cell::Cell,
    sync::{
        Arc, Condvar, Mutex, PoisonError, TryLockError,
        atomic::{AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

/// Rounds of spinning (some tens of microseconds) before a worker sleeps.
const SPINS: usize = 4000;

thread_local! {
    /// Set while this thread works for a region: a region within a region runs inline.
    static BUSY: Cell<bool> = const { Cell::new(false) };
}

/// A pool of threads; the caller of [`Self::run`] is one of them.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One region at a time.
    turn: Mutex<()>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    done: Condvar,
    /// Counts regions; a change is the sign to start, or to end.
    epoch: AtomicUsize,
}

#[derive(Default)]
struct State {
    region: Option<Arc<Region>>,
    quit: bool,
}

struct Region {
    /// Lives as long as `Pool::run`, which returns only after all workers have left the region.
    job: &'static (dyn Fn(usize) + Sync),
    tasks: usize,
    next: AtomicUsize,
    /// Workers that have not left yet.
    inside: AtomicUsize,
    panicked: AtomicUsize,
}

impl Region {
    fn work(&self) {
        BUSY.set(true);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            loop {
                let task = self.next.fetch_add(1, Ordering::Relaxed);
                if task >= self.tasks {
                    break;
                }
                (self.job)(task);
            }
        }));
        BUSY.set(false);
        if result.is_err() {
            self.panicked.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Pool {
    /// A pool of `threads` (at least one) threads, the caller among them.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared::default());
        let workers = (1..threads.max(1))
            .filter_map(|i| {
                let shared = shared.clone();
                std::thread::Builder::new().name(format!("vlmc-{i}")).spawn(move || worker(&shared)).ok()
            })
            .collect();
        Self { shared, workers, turn: Mutex::new(()) }
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `job` with each of `0..tasks`, in any order, on all threads, and returns when all are done.
    ///
    /// # Panics
    /// If a task panics.
    pub fn run(&self, tasks: usize, job: impl Fn(usize) + Sync) {
        if tasks <= 1 || self.workers.is_empty() || BUSY.get() {
            (0..tasks).for_each(job);
            return;
        }
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let job: &(dyn Fn(usize) + Sync) = &job;
        // SAFETY: only workers inside the region use `job`, and this function does not return, nor unwind, before all of
        // them have left: `Region::work` catches panics.
        let job: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(job) };
        let inside = AtomicUsize::new(self.workers.len());
        let region = Arc::new(Region { job, tasks, next: AtomicUsize::new(0), inside, panicked: AtomicUsize::new(0) });
        self.shared.set(|s| s.region = Some(region.clone()));
        region.work();
        let left = || region.inside.load(Ordering::Acquire) == 0;
        if !spin(left) {
            let mut state = self.shared.lock();
            while !left() {
                state = self.shared.done.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
        drop(turn);
        assert!(region.panicked.load(Ordering::Relaxed) == 0, "a task of the thread pool panicked");
    }

    /// [`Self::run`] whose tasks have an equal part of `scratch` each while they run: a thread's share.
    pub(crate) fn run_with<T: Send>(&self, tasks: usize, scratch: &mut [T], job: impl Fn(usize, &mut [T]) + Sync) {
        let share = scratch.len() / self.threads();
        if share == 0 {
            return self.run(tasks, |i| job(i, &mut []));
        }
        let shares: Vec<_> = scratch.chunks_exact_mut(share).map(Mutex::new).collect();
        self.run(tasks, |i| {
            // There are as many as threads, so one is free, or will be in a moment.
            let mut mine = loop {
                let free = shares.iter().find_map(|s| match s.try_lock() {
                    Ok(share) => Some(share),
                    Err(TryLockError::Poisoned(share)) => Some(share.into_inner()),
                    Err(TryLockError::WouldBlock) => None,
                });
                match free {
                    Some(share) => break share,
                    None => std::hint::spin_loop(),
                }
            };
            job(i, &mut mine);
        });
    }

    /// Splits `data` into pieces of `len` elements and calls `job` with the index of each piece and the piece.
    pub fn chunks<T: Send>(&self, data: &mut [T], len: usize, job: impl Fn(usize, &mut [T]) + Sync) {
        self.pieces(data.chunks_mut(len.max(1)), job);
    }

    /// Calls `job` with the index of each piece and the piece.
    pub(crate) fn pieces<P: Send>(&self, pieces: impl Iterator<Item = P>, job: impl Fn(usize, P) + Sync) {
        let pieces: Vec<_> = pieces.map(|p| Mutex::new(Some(p))).collect();
        self.run(pieces.len(), |i| {
            if let Some(piece) = pieces[i].lock().unwrap_or_else(PoisonError::into_inner).take() {
                job(i, piece);
            }
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.set(|s| s.quit = true);
        for w in self.workers.drain(..) {
            // A worker catches the panics of its tasks, so there is nothing to report here.
            let _ = w.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        change(&mut state);
        self.epoch.fetch_add(1, Ordering::Release);
        drop(state);
        self.wake.notify_all();
    }
}

fn spin(ready: impl Fn() -> bool) -> bool {
    (0..SPINS).any(|_| {
        std::hint::spin_loop();
        ready()
    })
}

fn worker(shared: &Shared) {
    let mut seen = 0;
    loop {
        let changed = || shared.epoch.load(Ordering::Acquire) != seen;
        spin(changed);
        let mut state = shared.lock();
        while !changed() {
            state = shared.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        seen = shared.epoch.load(Ordering::Acquire);
        if state.quit {
            return;
        }
        let Some(region) = state.region.clone() else { continue };
        drop(state);
        region.work();
        // A worker may wake late, when its region is over: then there was no task left to take, and it only leaves.
        if region.inside.fetch_sub(1, Ordering::AcqRel) == 1 {
            let _state = shared.lock();
            shared.done.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in 1..4 {
            let pool = Pool::new(threads);
            for tasks in [0, 1, 2, 7, 1000] {
                let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, |i| _ = counts[i].fetch_add(1, Ordering::Relaxed));
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{threads} threads, {tasks} tasks");
            }
        }
    }

    #[test]
    fn regions_within_regions_and_panics_do_not_hang() {
        let pool = Pool::new(2);
        let sum = AtomicUsize::new(0);
        pool.run(4, |i| pool.run(3, |j| _ = sum.fetch_add(i * 3 + j, Ordering::Relaxed)));
        assert_eq!(sum.load(Ordering::Relaxed), (0..12).sum());
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| pool.run(8, |i| assert!(i != 5, "five"))));
        assert!(result.is_err());
        pool.run(2, |_| _ = sum.fetch_add(1, Ordering::Relaxed));
        assert_eq!(sum.load(Ordering::Relaxed), 68);
    }

    #[test]
    fn tasks_never_share_scratch() {
        for threads in 1..4 {
            let mut scratch = vec![0usize; threads * 8];
            Pool::new(threads).run_with(500, &mut scratch, |i, mine| {
                mine.fill(i);
                std::thread::yield_now();
                assert!(mine.len() == 8 && mine.iter().all(|v| *v == i));
            });
        }
        let ran = AtomicUsize::new(0);
        Pool::new(2).run_with(5, &mut [0u8; 1], |_, mine| _ = ran.fetch_add(1 + mine.len(), Ordering::Relaxed));
        assert_eq!(ran.load(Ordering::Relaxed), 5, "less than one element each is none");
    }

    #[test]
    fn chunks_cover_the_slice() {
        let mut data = vec![0usize; 103];
        Pool::new(3).chunks(&mut data, 10, |i, c| c.fill(i));
        assert!(data.iter().enumerate().all(|(i, v)| *v == i / 10));
    }
}
