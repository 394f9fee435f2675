//! Matrices in [`Layout::Planes16`](vlmc_artifact::program::Layout::Planes16): products as of any other, and the largest of the
//! products with one row, for which the lower plane is hardly read.
//!
//! With the middle of what its lower half can be in place of each code, a product is off by `e = Σ s x (l - middle)` over the lower halves
//! `l`, which rounding has left to chance. As independent and evenly distributed numbers they give `e` the variance
//! `Σ s² x² (4^b - 1) / 12`, `b` being the bits of a half. A row whose product is more than [`DEVIATIONS`] of these below the largest is
//! not the largest; all others are multiplied as they are.

use super::{Grid, Ints, Lanes, N, Segment, Segments, WORD, halves, prefetch_ahead, prefetch_once};
use crate::{
    Kernels,
    isa::IntTask,
    lanes::{ASK_FAR, into, prefetch},
    linear::{OutColumns, Panels},
};
use smallvec::SmallVec;
use std::{
    cell::RefCell,
    ops::Range,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};
use vlmc_artifact::{
    program::PANEL,
    quant::{block_len, plane_bytes, upper_bits},
};

/// How far a product may be off. That chance gives more is less likely than 1 in 50 million of a row, and than 1 in a million of the largest:
/// that it is the largest makes it more likely that its lower halves are large.
const DEVIATIONS: f32 = 5.5;
/// Panels that are joined at once: few, to stay in the cache, and as many as products take together.
const TOGETHER: usize = 4;

/// The planes of a matrix.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Planes<'a> {
    grid: Grid,
    /// Of all panels.
    pub(crate) upper: &'a [u8],
    lower: &'a [u8],
    /// Bytes of a panel's.
    bytes: [usize; 2],
}

thread_local! {
    /// Panels that a thread has joined.
    static JOINED: RefCell<Vec<u8>> = const { RefCell::new(vec![]) };
}

impl<'a> Planes<'a> {
    /// `None` if `data` is not that of whole panels, or the grid has no planes.
    pub(crate) fn new(grid: Grid, data: &'a [u8]) -> Option<Self> {
        let bytes = plane_bytes(grid.scheme, grid.k)?;
        let panel = bytes[0] + bytes[1];
        let panels = data.len().checked_div(panel).filter(|n| n * panel == data.len())?;
        let (upper, lower) = data.split_at(panels * bytes[0]);
        Some(Self { grid, upper, lower, bytes })
    }

    /// The planes of panel `i`.
    fn panel(self, i: usize) -> [&'a [u8]; 2] {
        let [upper, lower] = self.bytes;
        [&self.upper[i * upper..][..upper], &self.lower[i * lower..][..lower]]
    }

    /// Blocks of the upper plane for some columns.
    #[inline(always)]
    fn upper_blocks(self) -> impl Fn(usize) -> usize {
        move |columns| columns.div_ceil(2 * block_len(self.grid.scheme))
    }

    /// The segments of an upper plane.
    #[inline(always)]
    fn upper_segments(self, upper: &'a [u8]) -> Segments<'a> {
        Segments::new(self.grid, upper, self.upper_blocks())
    }

    /// Row `row` of the matrix.
    pub(crate) fn row(self, row: usize, out: &mut [f32]) {
        let (grid, r) = (self.grid, row % PANEL);
        let [upper, lower] = self.panel(row / PANEL);
        let ((mask, shift), block) = (upper_bits(grid.scheme), block_len(grid.scheme));
        let lowers = lower.as_chunks::<{ 4 * PANEL }>().0.chunks(grid.segment_len() / (2 * block));
        for (i, (segment, lower)) in self.upper_segments(upper).zip(lowers).enumerate() {
            let byte = |c: usize| {
                let at = 4 * r + c % 4;
                let [upper, lower] = [segment.codes, lower].map(|blocks| blocks[c / (2 * block)][at]);
                if (c / block).is_multiple_of(2) {
                    (upper & !mask) << shift | lower & !mask
                } else {
                    upper & mask | (lower & mask) >> shift
                }
            };
            let code = |c: usize| match (grid.scheme.bits, c % block) {
                (4, 0..4) => byte(c) & 15,
                (4, _) => byte(c) >> 4,
                _ => byte(c),
            };
            grid.numbers(&segment, r, code, &mut out[grid.columns(i)]);
        }
    }

    /// Calls `product` with panels `first..first + count` as other matrices have them, a few at a time, and the number of the first.
    pub(crate) fn joined(self, kernels: &Kernels, first: usize, count: usize, product: impl Fn(usize, &[u8])) {
        JOINED.with_borrow_mut(|joined| {
            let bytes = self.bytes[0] + self.bytes[1];
            for start in (first..first + count).step_by(TOGETHER) {
                let panels = start..(first + count).min(start + TOGETHER);
                joined.resize(panels.len() * bytes, 0);
                for (i, out) in panels.zip(joined.chunks_exact_mut(bytes)) {
                    kernels.isa.run_ints(Join { planes: self, panel: self.panel(i), out });
                }
                product(start, joined);
            }
        });
    }
}

/// A panel of its planes.
struct Join<'a> {
    planes: Planes<'a>,
    panel: [&'a [u8]; 2],
    out: &'a mut [u8],
}

impl IntTask for Join<'_> {
    #[inline(always)]
    unsafe fn run<I: Ints>(self) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.planes.grid.scheme.bits {
                4 => self.panel::<I, 2>(),
                _ => self.panel::<I, 4>(),
            }
        }
    }
}

impl Join<'_> {
    #[inline(always)]
    unsafe fn panel<I: Ints, const HALF: u32>(self) {
        let Self { planes: Planes { grid, .. }, panel: [upper, lower], out } = self;
        let (pair, (mask, _)) = (2 * block_len(grid.scheme), upper_bits(grid.scheme));
        let len = grid.scheme.group_len(grid.k);
        let head = PANEL * (grid.scheme.scale_bytes() + usize::from(grid.scheme.zero_points));
        let (upper_len, out_len) = (head + len / pair * 4 * PANEL, head + len / pair * 8 * PANEL);
        let mut lower = lower.as_chunks::<{ 4 * PANEL }>().0.iter();
        // SAFETY: the caller's promise.
        unsafe {
            for (upper, out) in upper.chunks(upper_len).zip(out.chunks_mut(out_len)) {
                out[..head].copy_from_slice(&upper[..head]);
                let pairs = out[head..].as_chunks_mut::<{ 4 * PANEL }>().0.as_chunks_mut::<2>().0;
                for ((upper, lower), [first, second]) in upper[head..].as_chunks().0.iter().zip(&mut lower).zip(pairs) {
                    prefetch_ahead(upper);
                    prefetch_ahead(lower);
                    let [a, b] = join::<I, HALF>(I::load(upper), I::load(lower), mask);
                    a.store(first);
                    b.store(second);
                }
            }
        }
    }
}

/// The first and the second block of a pair, of codes with halves of `HALF` bits; `mask` is that of [`upper_bits`].
///
/// # Safety
/// The CPU has the instruction set of `I`.
#[inline(always)]
unsafe fn join<I: Ints, const HALF: u32>(upper: I, lower: I, mask: u8) -> [I; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let (uppers, lowers) = (I::splat(i32::from_le_bytes([mask; 4])), I::splat(i32::from_le_bytes([!mask; 4])));
        // No two have the same bits, so a sum has those of both.
        [upper.and(lowers).shift_left::<HALF>().add(lower.and(lowers)), upper.and(uppers).add(lower.and(uppers).shift_right::<HALF>())]
    }
}

/// A row of rounded `x` that is multiplied with a matrix in planes.
#[derive(Clone, Copy)]
struct Row<'a> {
    planes: Planes<'a>,
    /// `[n]`, or empty.
    bias: &'a [f32],
    x: &'a [i32],
    /// Its segments, if bounds are wanted.
    parts: &'a [RowPart],
    out: OutColumns,
}

/// A segment of a row of rounded `x`.
#[derive(Clone, Copy, Default)]
struct RowPart {
    /// What an upper half times a code of `x` stands for, without the row's scale.
    step: f32,
    /// The product with middles of lower halves and with what all rows' codes have as zero.
    middle: f32,
    /// What a zero point of 1 adds, if rows have their own.
    zero: f32,
    /// What it adds to the square of how far products may be off, per square of a scale.
    variance: f32,
}

/// Work on some panels.
struct Products<'a> {
    row: Row<'a>,
    panels: Range<usize>,
    wanted: Wanted<'a>,
}

/// What is computed, to `out`.
#[derive(Clone, Copy)]
enum Wanted<'a> {
    /// All products.
    All,
    /// The most that they can be; and the panel of the most of all.
    Bounds(&'a Mutex<(f32, usize)>),
    /// The products of those panels that may have the largest, where their bounds are.
    Largest(&'a Largest),
}

/// The largest number that threads have found, as [`Largest::key`].
struct Largest(AtomicU32);

impl Largest {
    /// Numbers that are in the order of floats; infinities are ends, and there is no place for not-a-number.
    fn key(v: f32) -> u32 {
        let bits = v.to_bits();
        if bits >> 31 == 0 { bits | 1 << 31 } else { !bits }
    }

    fn get(&self) -> f32 {
        let key = self.0.load(Ordering::Relaxed);
        f32::from_bits(if key >> 31 == 1 { key & !(1 << 31) } else { !key })
    }

    /// Whether products that are at most these may have the largest among them; not-a-number may be anything.
    fn may_be_in(&self, bounds: [f32; N]) -> bool {
        let known = self.get();
        !bounds.iter().all(|bound| *bound < known)
    }

    fn raise(&self, v: f32) {
        if !v.is_nan() {
            self.0.fetch_max(Self::key(v), Ordering::Relaxed);
        }
    }
}

impl IntTask for Products<'_> {
    #[inline(always)]
    unsafe fn run<I: Ints>(self) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.row.planes.grid.scheme.bits {
                4 => self.compute::<I, 2>(),
                _ => self.compute::<I, 4>(),
            }
        }
    }
}

impl Products<'_> {
    #[inline(always)]
    unsafe fn compute<I: Ints, const HALF: u32>(self) {
        let Self { row, panels, wanted } = self;
        // SAFETY of all: the caller's promise, and this thread has these columns.
        match wanted {
            Wanted::All => {
                for panel in panels {
                    unsafe { row.exact::<I, HALF>(panel, None) };
                }
            }
            Wanted::Bounds(most_of_all) => {
                let mut most = (f32::NEG_INFINITY, usize::MAX);
                for panel in panels {
                    let bound = unsafe { row.bound::<I, HALF>(panel) };
                    most = if bound > most.0 { (bound, panel) } else { most };
                }
                let mut all = most_of_all.lock().unwrap_or_else(PoisonError::into_inner);
                *all = if most.0 > all.0 { most } else { *all };
            }
            Wanted::Largest(largest) => {
                let mut chosen = panels.filter(|panel| largest.may_be_in(unsafe { row.out.read(0, panel * N) }));
                let mut next = chosen.next();
                while let Some(panel) = next {
                    next = chosen.next();
                    largest.raise(unsafe { row.exact::<I, HALF>(panel, Some(next.unwrap_or(panel))) });
                }
            }
        }
    }
}

impl Row<'_> {
    /// Writes products with a panel, and gives the largest. Asks for panel `next`, or for what follows in both planes.
    ///
    /// # Safety
    /// The CPU has the instruction set of `I`, and this thread the panel's columns.
    #[inline(always)]
    unsafe fn exact<I: Ints, const HALF: u32>(&self, panel: usize, next: Option<usize>) -> f32 {
        let grid = self.planes.grid;
        let [upper, lower] = self.planes.panel(panel);
        let (codes, rest) = self.x.split_at(grid.vectors());
        let (steps, corrections) = rest.split_at(grid.segments());
        let lowers = lower.as_chunks::<{ 4 * PANEL }>().0.chunks(grid.segment_len() / (2 * block_len(grid.scheme)));
        let planes = self.planes.upper_segments(upper).zip(lowers);
        let next = next.map(|next| self.planes.panel(next).map(|plane| plane.as_chunks::<{ 4 * PANEL }>().0));
        let (mut pairs, (mask, _)) = (0.., upper_bits(grid.scheme));
        let (far, mut values) = (*ASK_FAR, self.out.bias(self.bias, panel * N));
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = I::Floats::load(&values);
            for ((((segment, lower), x), correction), step) in
                planes.zip(codes.chunks(grid.segment_len() / WORD)).zip(corrections).zip(steps)
            {
                let mut parts = [segment.correction::<I>(*correction), I::splat(0)];
                for (i, (upper, lower)) in segment.codes.iter().zip(lower).enumerate() {
                    match (next, pairs.next()) {
                        (Some([uppers, lowers]), Some(pair)) => {
                            // There are more upper blocks, since scales are among them.
                            let blocks = [uppers.get(pair), uppers.get(pair + lowers.len()), lowers.get(pair)];
                            blocks.into_iter().flatten().for_each(|block| prefetch::<{ into::SECOND }, _>(block));
                        }
                        _ => {
                            prefetch_once(upper, far);
                            prefetch_once(lower, far);
                        }
                    }
                    let [first, second] = join::<I, HALF>(I::load(upper), I::load(lower), mask);
                    if HALF == 2 {
                        let ([a, b], [c, d], x) = (halves(first), halves(second), &x.as_chunks::<4>().0[i]);
                        parts[0] = parts[0].dot::<4>(a, x[0]).dot::<4>(c, x[2]);
                        parts[1] = parts[1].dot::<4>(b, x[1]).dot::<4>(d, x[3]);
                    } else {
                        let x = &x.as_chunks::<2>().0[i];
                        parts = [parts[0].dot::<8>(first, x[0]), parts[1].dot::<8>(second, x[1])];
                    }
                }
                let scale = segment.scales::<I::Floats>().mul(I::Floats::splat(f32::from_bits(*step as u32)));
                sums = parts[0].add(parts[1]).to_f32().mul_add(scale, sums);
            }
            sums.store(&mut values);
            self.out.write(0, panel * N, &values);
        }
        self.largest_of(panel, values)
    }

    /// The largest of a panel's values, of those that are of the matrix.
    #[inline(always)]
    fn largest_of(&self, panel: usize, values: [f32; N]) -> f32 {
        let count = N.min(self.out.columns() - panel * N);
        values[..count].iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }

    /// Writes the most that products with a panel can be, and gives the most of these.
    ///
    /// # Safety
    /// As [`Self::exact`].
    #[inline(always)]
    unsafe fn bound<I: Ints, const HALF: u32>(&self, panel: usize) -> f32 {
        let [upper, _] = self.planes.panel(panel);
        // SAFETY: the caller's promise.
        unsafe {
            match Segments::plain(self.planes.grid, upper, self.planes.upper_blocks()) {
                Some(groups) => self.bound_of::<I, HALF>(panel, groups),
                None => self.bound_of::<I, HALF>(panel, self.planes.upper_segments(upper)),
            }
        }
    }

    /// [`Self::bound`] from the segments of the upper plane.
    ///
    /// # Safety
    /// As [`Self::exact`].
    #[inline(always)]
    unsafe fn bound_of<'b, I: Ints, const HALF: u32>(&self, panel: usize, segments: impl Iterator<Item = Segment<'b>>) -> f32 {
        let grid = self.planes.grid;
        let xs = self.x[..grid.vectors()].chunks(grid.segment_len() / WORD);
        let (far, mut values, mut squares) = (*ASK_FAR, self.out.bias(self.bias, panel * N), [0.0; N]);
        // SAFETY: the caller's promise.
        unsafe {
            let mask = I::splat(i32::from_le_bytes([(1 << HALF) - 1; 4]));
            let (mut sums, mut spread) = (I::Floats::load(&values), I::Floats::splat(0.0));
            for ((segment, x), part) in segments.zip(xs).zip(self.parts) {
                let mut parts = [I::splat(0); 2];
                for (i, block) in segment.codes.iter().enumerate() {
                    prefetch_once(block, far);
                    let codes = I::load(block);
                    let [first, second] = [codes.and(mask), codes.shift_right::<4>().and(mask)];
                    if HALF == 2 {
                        let x = &x.as_chunks::<4>().0[i];
                        let [third, fourth] = [codes.shift_right::<2>().and(mask), codes.shift_right::<6>().and(mask)];
                        parts[0] = parts[0].dot::<4>(first, x[0]).dot::<4>(third, x[2]);
                        parts[1] = parts[1].dot::<4>(second, x[1]).dot::<4>(fourth, x[3]);
                    } else {
                        let x = &x.as_chunks::<2>().0[i];
                        parts = [parts[0].dot::<4>(first, x[0]), parts[1].dot::<4>(second, x[1])];
                    }
                }
                let mut middle = I::Floats::splat(part.middle);
                if let Some(zeros) = segment.zeros {
                    middle = Segment::zeros::<I>(zeros).to_f32().mul_add(I::Floats::splat(part.zero), middle);
                }
                let scale = segment.scales::<I::Floats>();
                sums = parts[0].add(parts[1]).to_f32().mul_add(I::Floats::splat(part.step), middle).mul_add(scale, sums);
                spread = scale.mul(scale).mul_add(I::Floats::splat(part.variance), spread);
            }
            sums.store(&mut values);
            spread.store(&mut squares);
            values.iter_mut().zip(squares).for_each(|(value, square)| *value += square.sqrt());
            self.out.write(0, panel * N, &values);
        }
        self.largest_of(panel, values)
    }
}

/// The segments of a row of rounded `x`.
fn parts(grid: Grid, x: &[i32]) -> impl Iterator<Item = RowPart> {
    let (codes, rest) = x.split_at(grid.vectors());
    let (steps, corrections) = rest.split_at(grid.segments());
    let halves = (1u32 << upper_bits(grid.scheme).1) as f32;
    let variance = DEVIATIONS * DEVIATIONS * (halves * halves - 1.0) / 12.0;
    codes.chunks(grid.segment_len() / WORD).zip(steps).zip(corrections).map(move |((codes, step), correction)| {
        let codes = || codes.iter().flat_map(|word| word.to_le_bytes()).map(|code| i32::from(code as i8));
        let step = f32::from_bits(*step as u32);
        let (middle, correction) = ((halves - 1.0) / 2.0 * codes().sum::<i32>() as f32, *correction as f32);
        let (middle, zero) = if grid.scheme.zero_points { (middle, correction) } else { (middle + correction, 0.0) };
        RowPart {
            step: halves * step,
            middle: step * middle,
            zero: step * zero,
            variance: variance * step * step * codes().map(|code| code * code).sum::<i32>() as f32,
        }
    })
}

impl Kernels {
    /// [`Kernels::linear`] of one row `x [k]`, rounded to 8 bits, to `out [n]`, of which only the largest and those that come near it are
    /// right; the others are larger than the products, and smaller than the largest of all. Less is read of matrices in planes.
    ///
    /// # Panics
    /// As [`Kernels::linear`].
    pub fn linear_largest(&self, x: &[f32], w: &Panels<'_>, bias: Option<&[f32]>, out: &mut [f32]) {
        match w.planes.filter(|planes| planes.grid.k > 0 && out.len() == w.n) {
            Some(planes) => self.row_product(x, planes, bias.unwrap_or(&[]), true, out),
            None => self.linear(x, w, bias, None, true, out),
        }
    }

    /// One row `x [k]`, rounded to 8 bits, times a matrix, to `out [n]`; `only_largest` as [`Self::linear_largest`].
    pub(crate) fn row_product(&self, x: &[f32], planes: Planes<'_>, bias: &[f32], only_largest: bool, out: &mut [f32]) {
        let (grid, n) = (planes.grid, out.len());
        assert!(x.len() == grid.k && (bias.is_empty() || bias.len() == n), "x must be [k], bias [n] and out [n]");
        let mut words = self.take_scratch();
        self.round_rows(x, 1, grid, &mut words);
        let mut kept = SmallVec::<[RowPart; 256]>::new();
        if only_largest {
            kept.extend(parts(grid, &words));
        }
        let row = Row { planes, bias, x: &words, parts: &kept, out: OutColumns::new(out, n) };
        let pieces = |job: &(dyn Fn(Range<usize>) + Sync)| {
            self.panel_pieces(planes.upper, n * grid.k, n, 1, |first, upper| job(first..first + upper.len() / planes.bytes[0]));
        };
        let (most, largest) = (Mutex::new((f32::NEG_INFINITY, usize::MAX)), Largest(AtomicU32::new(Largest::key(f32::NEG_INFINITY))));
        let run = |panels, wanted| self.isa.run_ints(Products { row, panels, wanted });
        if only_largest {
            pieces(&|panels| run(panels, Wanted::Bounds(&most)));
            // The panel that promises most first: what it has spares most of the others.
            let (_, panel) = *most.lock().unwrap_or_else(PoisonError::into_inner);
            if panel < n.div_ceil(N) {
                run(panel..panel + 1, Wanted::Largest(&largest));
            }
            pieces(&|panels| run(panels, Wanted::Largest(&largest)));
        } else {
            pieces(&|panels| run(panels, Wanted::All));
        }
        self.give_scratch(words);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Floats, Isa, Table};
    use proptest::prelude::*;
    use vlmc_artifact::{
        Scheme,
        program::Layout,
        quant::{Codes, GROUPS, Method, pack_panels, split_planes},
    };

    /// Nearly normal: sums of evenly distributed numbers (splitmix64).
    fn floats(state: &mut u64, n: usize) -> Vec<f32> {
        let mut next = || {
            *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (*state ^ *state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            [0, 16, 32, 48].iter().map(|at| ((z >> at) as u16) as f32 / 32768.0 - 1.0).sum::<f32>()
        };
        (0..n).map(|_| next()).collect()
    }

    fn planes_of(codes: &Codes, k: usize, scheme: Scheme) -> (Vec<u8>, Vec<u8>) {
        let panels = pack_panels(codes, k, scheme);
        let planes = split_planes(&panels, k, scheme).concat();
        (panels, planes)
    }

    fn scheme() -> impl Strategy<Value = Scheme> {
        let group = prop::option::of(prop::sample::select(&GROUPS));
        (prop_oneof![Just(4u8), Just(8)], group, any::<bool>()).prop_map(|(bits, group, zero_points)| Scheme { bits, group, zero_points })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn planes_are_the_matrix(
            scheme in scheme(), m in prop_oneof![0usize..9, 97usize..120], n in 1usize..150, pairs in 1usize..120, threads in 1usize..4,
            with_bias: bool, dynamic: bool, mut seed: u64,
        ) {
            let k = 16 * pairs;
            let codes = Codes::of(&floats(&mut seed, n * k), k, scheme, Method::Round);
            let (panels, planes) = planes_of(&codes, k, scheme);
            prop_assert_eq!(panels.len(), planes.len());
            let (panels, planes) = (Floats::Quant(&panels, scheme), Floats::Quant(&planes, scheme));
            let (x, bias) = (floats(&mut seed, m * k), floats(&mut seed, n));
            let bias = with_bias.then_some(bias.as_slice());
            for isa in Isa::ALL.into_iter().filter(|i| i.is_supported()) {
                let kernels = Kernels::with_isa(threads, isa).unwrap();
                let mut outs = [vec![f32::NAN; m * n], vec![f32::NAN; m * n]];
                for (data, layout, out) in [(panels, Layout::Panel16), (planes, Layout::Planes16)].into_iter().zip(&mut outs).map(|((d, l), o)| (d, l, o)) {
                    kernels.linear(&x, &Panels::in_layout(data, layout, n, k).unwrap(), bias, None, dynamic, out);
                }
                prop_assert_eq!(&outs[0], &outs[1], "{:?}", isa);
            }
            let mut rows = vec![f32::NAN; n * k];
            let ids: Vec<i64> = (0..n as i64).collect();
            Kernels::new(1).embedding(&Table::new(planes, Layout::Planes16, n, k).unwrap(), &ids, &mut rows).unwrap();
            prop_assert_eq!(rows, codes.dequantize(k, scheme));
        }

        #[test]
        fn the_largest_is_exact_and_all_others_are_smaller(
            scheme in scheme(), n in 1usize..1000, pairs in 1usize..12, threads in 1usize..4, with_bias: bool, spike: bool, mut seed: u64,
        ) {
            let k = 16 * pairs;
            let codes = Codes::of(&floats(&mut seed, n * k), k, scheme, Method::Search);
            let (panels, planes) = planes_of(&codes, k, scheme);
            let (panels, planes) = (Floats::Quant(&panels, scheme), Floats::Quant(&planes, scheme));
            let mut x = floats(&mut seed, k);
            if spike {
                x[k / 2] *= 100.0;
            }
            let bias = floats(&mut seed, n);
            let bias = with_bias.then_some(bias.as_slice());
            let mut screened: Vec<Vec<f32>> = vec![];
            for isa in Isa::ALL.into_iter().filter(|i| i.is_supported()) {
                let kernels = Kernels::with_isa(threads, isa).unwrap();
                let (mut exact, mut out) = (vec![f32::NAN; n], vec![f32::NAN; n]);
                kernels.linear(&x, &Panels::new(panels, n, k).unwrap(), bias, None, true, &mut exact);
                kernels.linear_largest(&x, &Panels::in_layout(planes, Layout::Planes16, n, k).unwrap(), bias, &mut out);
                let largest = exact.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                for (out, exact) in out.iter().zip(&exact) {
                    prop_assert!(out == exact || exact < out && *out < largest, "{isa:?}: {out}, not {exact}, of {largest}");
                }
                prop_assert!(out.contains(&largest));
                screened.push(out);
            }
        }
    }

    /// Most panels are known by their upper planes, and what cannot be known is computed.
    #[test]
    fn few_are_multiplied_again() {
        let (n, k, scheme) = (6_000, 128, Scheme::INT8);
        let mut seed = 7;
        let codes = Codes::of(&floats(&mut seed, n * k), k, scheme, Method::Search);
        let (panels, planes) = planes_of(&codes, k, scheme);
        let w = Panels::in_layout(Floats::Quant(&planes, scheme), Layout::Planes16, n, k).unwrap();
        let kernels = Kernels::new(2);
        let x = floats(&mut seed, k);
        let (mut exact, mut out) = (vec![0.0; n], vec![0.0; n]);
        kernels.linear(&x, &Panels::new(Floats::Quant(&panels, scheme), n, k).unwrap(), None, None, true, &mut exact);
        kernels.linear_largest(&x, &w, None, &mut out);
        let again = out.chunks(N).zip(exact.chunks(N)).filter(|(a, b)| a == b).count();
        assert!(again > 0 && again < n / N / 8, "{again} of {}", n / N);
        for x in [0.0, f32::NAN] {
            kernels.linear(&vec![x; k], &w, None, None, true, &mut exact);
            kernels.linear_largest(&vec![x; k], &w, None, &mut out);
            assert!(exact.iter().zip(&out).all(|(a, b)| a.to_bits() == b.to_bits()), "{x}");
        }
    }

    #[test]
    fn lengths_that_do_not_fit_are_refused() {
        let bytes = vec![0; plane_bytes(Scheme::INT4, 64).unwrap().iter().sum::<usize>() * 2];
        let of = |bytes, n, k| Panels::in_layout(Floats::Quant(bytes, Scheme::INT4), Layout::Planes16, n, k);
        assert!(of(&bytes, 17, 64).is_some());
        assert!(of(&bytes, 16, 64).is_none());
        assert!(of(&bytes[1..], 17, 64).is_none());
        assert!(of(&bytes, 17, 72).is_none());
        assert!(Panels::in_layout(Floats::F32(&[0.0; 16]), Layout::Planes16, 1, 1).is_none());
        assert!(Table::new(Floats::Quant(&bytes, Scheme::INT4), Layout::Planes16, 17, 40).is_none());
    }
}
