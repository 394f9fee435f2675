//! Persistent threads. A region of work starts and ends many times per token, so workers spin for a short while before they
//! sleep; the spin is bounded, because an unbounded one collapses when another process takes a core.

use std::{
    cell::Cell,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

/// Rounds of spinning (some tens of microseconds) before a worker sleeps.
const SPINS: usize = 4000;

thread_local! {
    /// Set while this thread works for a region: a region within a region runs inline.
    static BUSY: Cell<bool> = const { Cell::new(false) };
    /// Number of this thread in its pool, whose callers are 0.
    static NUMBER: Cell<usize> = const { Cell::new(0) };
}

/// What all threads of a region do. It lives as long as the region, whatever its type says.
type Job = &'static (dyn Fn() + Sync);

/// A pool of threads; the caller of [`Self::run`] is one of them.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One region at a time.
    turn: Mutex<()>,
}

#[derive(Default)]
struct Shared {
    /// What is to be done; a new epoch with nothing to do is the end.
    job: Mutex<Option<Job>>,
    wake: Condvar,
    done: Condvar,
    /// Counts regions; a change is the sign to start.
    epoch: AtomicUsize,
    /// Workers that have not left the region yet.
    inside: AtomicUsize,
    panicked: AtomicBool,
}

impl Pool {
    /// A pool of `threads` (at least one) threads, the caller among them.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared::default());
        let workers = (1..threads.max(1))
            .filter_map(|i| {
                let shared = shared.clone();
                std::thread::Builder::new().name(format!("vlmc-{i}")).spawn(move || worker(&shared, i)).ok()
            })
            .collect();
        Self { shared, workers, turn: Mutex::new(()) }
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `job` once on each thread, or on this one only if there are not two `tasks` or it works for a region already, and
    /// returns when all are done. The job takes tasks until there are none.
    ///
    /// # Panics
    /// If a call panics.
    fn region(&self, tasks: usize, job: &(dyn Fn() + Sync)) {
        if tasks <= 1 || self.workers.is_empty() || BUSY.get() {
            return job();
        }
        let turn = lock(&self.turn);
        let shared = &*self.shared;
        // SAFETY: only workers inside the region use `job`, and this function does not return, nor unwind, before all of them have
        // left: `Shared::work` catches panics.
        let job: Job = unsafe { std::mem::transmute(job) };
        shared.inside.store(self.workers.len(), Ordering::Relaxed);
        shared.start(Some(job));
        shared.work(job);
        let left = || shared.inside.load(Ordering::Acquire) == 0;
        if !spin(left) {
            let mut kept = lock(&shared.job);
            while !left() {
                kept = wait(&shared.done, kept);
            }
        }
        let panicked = shared.panicked.swap(false, Ordering::Relaxed);
        drop(turn);
        assert!(!panicked, "a task of the thread pool panicked");
    }

    /// Calls `job` with each of `0..tasks`, in any order, on all threads, and returns when all are done.
    ///
    /// # Panics
    /// If a task panics.
    pub fn run(&self, tasks: usize, job: impl Fn(usize) + Sync) {
        self.pieces(0..tasks, |task, _| job(task));
    }

    /// Splits `data` into pieces of `len` elements and calls `job` with the index of each piece and the piece.
    pub fn chunks<T: Send>(&self, data: &mut [T], len: usize, job: impl Fn(usize, &mut [T]) + Sync) {
        self.pieces(data.chunks_mut(len.max(1)), job);
    }

    /// Calls `job` with the index of each piece and the piece. Half of the threads begin with the first piece, the others with the last:
    /// what a thread made of some rows of a matrix is then mostly in its own caches when the next region goes over the rows, and other
    /// threads' caches can be far.
    pub(crate) fn pieces<P>(&self, pieces: impl ExactSizeIterator<Item = P> + DoubleEndedIterator + Send, job: impl Fn(usize, P) + Sync) {
        self.pieces_with(pieces, &mut [(); 0], |i, piece, _| job(i, piece));
    }

    /// [`Self::pieces`] whose calls have an equal part of `scratch` each while they run: a thread's share.
    pub(crate) fn pieces_with<P, T: Send>(
        &self,
        pieces: impl ExactSizeIterator<Item = P> + DoubleEndedIterator + Send,
        scratch: &mut [T],
        job: impl Fn(usize, P, &mut [T]) + Sync,
    ) {
        let (count, share) = (pieces.len(), scratch.len() / self.threads());
        let pieces = Mutex::new(pieces.enumerate());
        let shares = Mutex::new(scratch[..share * self.threads()].chunks_exact_mut(share.max(1)));
        self.region(count, &|| {
            let mine = lock(&shares).next().unwrap_or_default();
            let from_the_end = NUMBER.get() % 2 == 1;
            loop {
                let next = if from_the_end { lock(&pieces).next_back() } else { lock(&pieces).next() };
                let Some((i, piece)) = next else { break };
                job(i, piece, mine);
            }
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.start(None);
        for w in self.workers.drain(..) {
            // A worker catches the panics of its tasks, so there is nothing to report here.
            let _ = w.join();
        }
    }
}

impl Shared {
    /// Begins an epoch.
    fn start(&self, job: Option<Job>) {
        let mut kept = lock(&self.job);
        *kept = job;
        self.epoch.fetch_add(1, Ordering::Release);
        drop(kept);
        self.wake.notify_all();
    }

    /// A thread's part of a region.
    fn work(&self, job: Job) {
        BUSY.set(true);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
        BUSY.set(false);
        if result.is_err() {
            self.panicked.store(true, Ordering::Relaxed);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait<'a, T>(sign: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    sign.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

fn spin(ready: impl Fn() -> bool) -> bool {
    (0..SPINS).any(|_| {
        std::hint::spin_loop();
        ready()
    })
}

fn worker(shared: &Shared, number: usize) {
    NUMBER.set(number);
    let mut seen = 0;
    loop {
        let changed = || shared.epoch.load(Ordering::Acquire) != seen;
        spin(changed);
        let mut kept = lock(&shared.job);
        while !changed() {
            kept = wait(&shared.wake, kept);
        }
        seen = shared.epoch.load(Ordering::Acquire);
        let Some(job) = *kept else { return };
        drop(kept);
        // A worker may wake late, when all tasks are taken: the region waits for it nonetheless.
        shared.work(job);
        if shared.inside.fetch_sub(1, Ordering::AcqRel) == 1 {
            let _kept = lock(&shared.job);
            shared.done.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_begin_at_both_ends() {
        let pool = Pool::new(2);
        let taken = Mutex::new([vec![], vec![]]);
        pool.run(1000, |task| {
            std::thread::sleep(std::time::Duration::from_micros(10));
            lock(&taken)[NUMBER.get()].push(task);
        });
        let [mine, others] = taken.into_inner().unwrap();
        assert!(mine.iter().copied().eq(0..mine.len()));
        assert!(others.iter().copied().eq((mine.len()..1000).rev()));
        assert!(!mine.is_empty() && !others.is_empty());
    }

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
            Pool::new(threads).pieces_with(0..500, &mut scratch, |i, _, mine| {
                mine.fill(i);
                std::thread::yield_now();
                assert!(mine.len() == 8 && mine.iter().all(|v| *v == i));
            });
        }
        let ran = AtomicUsize::new(0);
        Pool::new(2).pieces_with(0..5, &mut [0u8; 1], |_, _, mine| _ = ran.fetch_add(1 + mine.len(), Ordering::Relaxed));
        assert_eq!(ran.load(Ordering::Relaxed), 5, "less than one element each is none");
    }

    #[test]
    fn chunks_cover_the_slice() {
        let mut data = vec![0usize; 103];
        Pool::new(3).chunks(&mut data, 10, |i, c| c.fill(i));
        assert!(data.iter().enumerate().all(|(i, v)| *v == i / 10));
    }
}
