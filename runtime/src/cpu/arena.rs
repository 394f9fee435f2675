//! Working memory: where the results of a function lie, and how a step gets at them.
//!
//! Where they lie is decided when the sizes are known, from what the program itself says of their lives. So no two results that
//! are alive at once can overlap, whatever the sizes and whatever the program; and a step that writes a part of the arena can read
//! the rest only, which the borrow checker sees to.

use std::{
    cmp::Reverse,
    collections::HashMap,
    ops::{Range, RangeInclusive},
};
use vlmc_artifact::program::Function;

/// Every part of the arena starts at a multiple of this many bytes: a cache line.
const ALIGN: usize = 64;
/// Most bytes of an arena.
const MAX: usize = 1 << 38;
/// Bytes per element of the buffer.
const WORD: usize = 8;
/// Runs after which memory is given back that none of them needed.
const PATIENCE: usize = 32;
/// Parts that a step writes: up to two results, and what its kernel works with.
const WRITTEN: usize = 3;

/// When each part of an arena is in use.
pub(crate) struct Lives {
    slots: Vec<Option<RangeInclusive<usize>>>,
    steps: usize,
}

impl Lives {
    /// Of the slots of a function, and of the scratch of each of its steps.
    pub(crate) fn new(f: &Function) -> Self {
        Self { slots: f.lives(), steps: f.steps.len() }
    }

    /// Number of slots, used or not.
    pub(crate) fn slots(&self) -> usize {
        self.slots.len()
    }

    fn of(&self, part: usize) -> Option<RangeInclusive<usize>> {
        let step = || part - self.slots.len();
        self.slots.get(part).cloned().unwrap_or_else(|| Some(step()..=step()))
    }
}

/// A part that wants a place.
struct Part {
    index: usize,
    words: usize,
    life: RangeInclusive<usize>,
}

/// What parts are sorted by before they are placed.
type Order = fn(&Part) -> (Reverse<usize>, usize);

/// Places parts in their order, each as low as it can lie beside those that are in use at the same time. Returns the words of each.
fn place(parts: &[Part]) -> HashMap<usize, Range<usize>> {
    // Those that have a place, by where it is.
    let mut placed: Vec<(usize, &Part)> = vec![];
    for part in parts {
        let mut start = 0;
        for (taken, other) in &placed {
            if other.life.start() > part.life.end() || part.life.start() > other.life.end() {
                continue;
            }
            if *taken >= start + part.words {
                break;
            }
            start = start.max(taken + other.words);
        }
        placed.insert(placed.partition_point(|(taken, _)| *taken < start), (start, part));
    }
    placed.into_iter().map(|(start, part)| (part.index, start..start + part.words)).collect()
}

/// A size with some room, so that one that grows little by little, as masks of a growing cache do, seldom needs another place.
fn roomy(size: usize) -> usize {
    let step = (size.min(MAX).next_power_of_two() / 32).max(1024);
    size.checked_next_multiple_of(step).unwrap_or(size)
}

/// Where the parts of an arena lie, for one set of sizes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Places {
    /// Bytes, with some room.
    sizes: Vec<usize>,
    /// In words: the slots, then the scratch of each step.
    parts: Vec<Range<usize>>,
    slots: usize,
    words: usize,
    largest: usize,
}

impl Places {
    /// Places parts of `sizes` bytes and some more, slots before scratch.
    ///
    /// # Errors
    /// They need too much memory.
    pub(crate) fn new(lives: &Lives, sizes: &[usize]) -> Result<Self, String> {
        // Sums of smaller ones cannot overflow.
        if sizes.iter().any(|s| *s > MAX) {
            return Err("the request needs too much memory".into());
        }
        let sizes: Vec<usize> = sizes.iter().copied().map(roomy).collect();
        let part = |i: usize| Some(Part { index: i, words: sizes[i].div_ceil(ALIGN) * (ALIGN / WORD), life: lives.of(i)? });
        let mut all: Vec<Part> = (0..sizes.len()).filter_map(part).filter(|p| p.words > 0).collect();
        let mut changes = vec![0isize; lives.steps + 2];
        for p in &all {
            changes[*p.life.start()] += p.words as isize;
            changes[*p.life.end() + 1] -= p.words as isize;
        }
        let alive = changes.iter().scan(0, |sum, c| {
            *sum += c;
            Some(*sum)
        });
        let largest = alive.max().unwrap_or(0) as usize;
        // The largest first is nearly always perfect. Where it is not, those first that are large for long, or there for long, often are.
        let orders: [Order; 3] = [
            |p| (Reverse(p.words), *p.life.start()),
            |p| (Reverse(p.words * (p.life.end() - p.life.start() + 1)), *p.life.start()),
            |p| (Reverse(p.life.end() - p.life.start()), *p.life.start()),
        ];
        let (mut words, mut placed) = (usize::MAX, HashMap::new());
        for order in orders {
            all.sort_by_key(order);
            let other = place(&all);
            let end = other.values().map(|p| p.end).max().unwrap_or(0);
            if end < words {
                (words, placed) = (end, other);
            }
            if words == largest {
                break;
            }
        }
        if words > MAX / WORD {
            return Err(format!("the request needs {} bytes of working memory", words * WORD));
        }
        let parts = (0..sizes.len()).map(|i| placed.get(&i).cloned().unwrap_or(0..0)).collect();
        Ok(Self { sizes, parts, slots: lives.slots(), words, largest })
    }

    /// Whether it is for these sizes.
    pub(crate) fn is_for(&self, sizes: &[usize]) -> bool {
        sizes.iter().copied().map(roomy).eq(self.sizes.iter().copied())
    }

    /// Bytes of the arena.
    pub(crate) fn bytes(&self) -> usize {
        self.words * WORD
    }

    /// Bytes of what is in use at once, at the step where it is the most: no places need fewer.
    pub(crate) fn largest_live(&self) -> usize {
        self.largest * WORD
    }

    /// Most bytes of scratch of a step.
    pub(crate) fn scratch(&self) -> usize {
        self.parts[self.slots..].iter().map(|p| p.len() * WORD).max().unwrap_or(0)
    }

    /// Where a slot lies.
    pub(super) fn slot(&self, slot: usize) -> Range<usize> {
        self.parts[slot].clone()
    }

    /// Where the scratch of a step lies.
    pub(super) fn scratch_of(&self, step: usize) -> Range<usize> {
        self.parts[self.slots + step].clone()
    }
}

/// Working memory that the functions of an artifact share: they run one after the other.
#[derive(Default)]
pub(super) struct Arena {
    words: Vec<u64>,
    /// Most words that the last runs needed, and how many these were.
    needed: usize,
    runs: usize,
}

impl Arena {
    /// The words that places need. The memory grows when it must, and shrinks when many runs have needed less.
    ///
    /// # Errors
    /// There is no memory.
    pub(super) fn fit(&mut self, places: &Places) -> Result<&mut [u64], String> {
        // So that the first one can be a multiple of `ALIGN`.
        let spare = ALIGN / WORD - 1;
        self.needed = self.needed.max(places.words);
        self.runs += 1;
        let idle = self.runs >= PATIENCE && self.needed < self.words.len() / 2;
        if self.words.len() < places.words + spare || idle {
            let size = self.needed + spare;
            // First, so that old and new never stand side by side.
            self.words = vec![];
            self.words.try_reserve_exact(size).map_err(|_| format!("there is no memory for {} bytes", size * WORD))?;
            self.words.resize(size, 0);
        }
        if self.runs >= PATIENCE {
            (self.runs, self.needed) = (0, 0);
        }
        let start = self.words.as_ptr().align_offset(ALIGN).min(spare);
        Ok(&mut self.words[start..start + places.words])
    }
}

/// An arena but for what is being written.
#[derive(Clone, Copy)]
pub(super) struct Rest<'a> {
    parts: [(usize, &'a [u64]); WRITTEN + 1],
}

impl<'a> Rest<'a> {
    /// All of it.
    pub(super) fn all(words: &'a [u64]) -> Self {
        let mut parts: [(usize, &[u64]); WRITTEN + 1] = [(0, &[]); WRITTEN + 1];
        parts[0].1 = words;
        Self { parts }
    }

    /// The words of a range, if none of them is being written.
    pub(super) fn get(&self, range: Range<usize>) -> Option<&'a [u64]> {
        if range.is_empty() {
            return Some(&[]);
        }
        self.parts.iter().find_map(|(start, words)| words.get(range.start.checked_sub(*start)?..range.end - start))
    }
}

/// Splits an arena into the ranges that are written and the rest. An empty range may lie anywhere.
///
/// # Errors
/// Ranges overlap or lead out of the arena.
pub(super) fn split(words: &mut [u64], ranges: [Range<usize>; WRITTEN]) -> Result<(Rest<'_>, [&mut [u64]; WRITTEN]), String> {
    let mut order: [usize; WRITTEN] = std::array::from_fn(|i| i);
    order.sort_by_key(|i| ranges[*i].start);
    let mut written: [&mut [u64]; WRITTEN] = std::array::from_fn(|_| &mut [][..]);
    let mut parts: [(usize, &[u64]); WRITTEN + 1] = [(0, &[]); WRITTEN + 1];
    let (mut at, mut after) = (0, words);
    for (n, i) in order.into_iter().enumerate() {
        let range = &ranges[i];
        if range.is_empty() {
            continue;
        }
        let taken = range.start.checked_sub(at).filter(|gap| *gap <= after.len()).and_then(|gap| {
            let (before, rest) = std::mem::take(&mut after).split_at_mut(gap);
            let (taken, rest) = rest.split_at_mut_checked(range.len())?;
            Some((before, taken, rest))
        });
        let (before, taken, rest) = taken.ok_or("parts of the arena overlap")?;
        parts[n] = (at, before);
        written[i] = taken;
        (at, after) = (range.end, rest);
    }
    parts[WRITTEN] = (at, after);
    Ok((Rest { parts }, written))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lives(all: &[(usize, usize)]) -> Lives {
        let steps = all.iter().map(|(_, last)| last + 1).max().unwrap_or(0);
        Lives { slots: all.iter().map(|(first, last)| Some(*first..=*last)).collect(), steps }
    }

    proptest! {
        #[test]
        fn what_is_alive_at_once_lies_apart(parts in proptest::collection::vec((0usize..40, 0usize..10, 0usize..5000), 1..60)) {
            let (spans, mut sizes): (Vec<_>, Vec<_>) = parts.into_iter().map(|(first, len, size)| ((first, first + len), size)).unzip();
            let lives = lives(&spans);
            sizes.extend((0..lives.steps).map(|step| step % 3 * 100));
            let places = Places::new(&lives, &sizes).unwrap();
            for (a, size) in sizes.iter().enumerate() {
                let (range, life) = (places.parts[a].clone(), lives.of(a).unwrap());
                prop_assert!(range.len() * WORD >= *size && (range.start * WORD).is_multiple_of(ALIGN) && range.end <= places.words);
                for b in 0..a {
                    let (other, at) = (&places.parts[b], lives.of(b).unwrap());
                    let together = life.start() <= at.end() && at.start() <= life.end();
                    prop_assert!(!together || range.end <= other.start || other.end <= range.start || range.is_empty() || other.is_empty());
                }
            }
            prop_assert!(places.is_for(&sizes));
            prop_assert!(places.bytes() >= places.largest_live());
            prop_assert!(places.largest_live() >= sizes.iter().copied().max().unwrap_or(0));
        }

        #[test]
        fn written_parts_and_the_rest_are_apart(ends in proptest::array::uniform6(0usize..20)) {
            let mut words: Vec<u64> = (0..16).collect();
            let ranges: [Range<usize>; WRITTEN] = std::array::from_fn(|i| {
                let [a, b] = [ends[2 * i], ends[2 * i + 1]];
                a.min(b)..a.max(b)
            });
            let overlap = |x: &Range<usize>, y: &Range<usize>| x.start.max(y.start) < x.end.min(y.end);
            let good = ranges.iter().all(|r| r.is_empty() || r.end <= 16) && [(0, 1), (0, 2), (1, 2)].iter().all(|(i, j)| !overlap(&ranges[*i], &ranges[*j]));
            match split(&mut words, ranges.clone()) {
                Err(_) => prop_assert!(!good),
                Ok((rest, written)) => {
                    prop_assert!(good);
                    for (range, words) in ranges.iter().zip(&written) {
                        prop_assert!(words.iter().copied().eq(range.clone().map(|i| i as u64)));
                    }
                    for (from, to) in (0..17).flat_map(|from| (from..17).map(move |to| (from, to))) {
                        match rest.get(from..to) {
                            Some(words) => prop_assert!(words.iter().copied().eq((from as u64)..to as u64)),
                            None => {
                                let whole_rest = (from..to).all(|i| ranges.iter().all(|r| !r.contains(&i)));
                                prop_assert!(!whole_rest, "{from}..{to} is not being written");
                            }
                        }
                        if from < to && ranges.iter().any(|r| overlap(r, &(from..to))) {
                            prop_assert!(rest.get(from..to).is_none());
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn memory_grows_at_once_and_is_given_back_in_time() {
        let lives = lives(&[(0, 0)]);
        let (large, small) = (Places::new(&lives, &[1 << 20, 0]).unwrap(), Places::new(&lives, &[1 << 10, 0]).unwrap());
        let mut arena = Arena::default();
        assert_eq!(arena.fit(&large).unwrap().len(), large.words);
        for _ in 0..2 * PATIENCE {
            let words = arena.fit(&small).unwrap();
            assert_eq!((words.len(), words.as_ptr() as usize % ALIGN), (small.words, 0));
        }
        assert!(arena.words.len() < 2 * small.words);
        assert_eq!(arena.fit(&large).unwrap().len(), large.words);
        assert!(Places::new(&lives, &[usize::MAX, 0]).is_err());
        assert!(Places::new(&lives, &[MAX - 10, 100]).is_err());
    }

    #[test]
    fn places_have_a_little_room() {
        let places = Places::new(&lives(&[(0, 0)]), &[8 * 9000, 0]).unwrap();
        assert!((9000..9200).all(|n| places.is_for(&[8 * n, 0])) && !places.is_for(&[8 * 10_000, 0]) && !places.is_for(&[8 * 8000, 0]));
        for size in [0, 1, 1024, 5000, 1 << 20, (1 << 20) + 1, MAX, usize::MAX] {
            assert!(roomy(size) >= size && roomy(size) - size <= 1024.max(size / 16), "{size}");
        }
    }
}
