//! Rows of `x` rounded to 8 bits for products with panels.

use super::{Grid, ROWS, block_rows, with_rows};
use crate::{
    Kernels,
    isa::Task,
    lanes::{Lanes, N},
    round::{round_to, steps},
};

/// Many rows that were rounded as they were made, for a product with a matrix.
pub struct Rounded {
    pub(crate) words: Vec<i32>,
    pub(crate) m: usize,
    /// [`Grid::wide`] of the matrix's.
    pub(crate) grid: Grid,
}

/// Rounds `R` rows of `x` to 8 bits; rows that are not there count as zeros.
struct Round<'a, const R: usize> {
    grid: Grid,
    /// Up to `R` rows.
    x: &'a [f32],
    /// [`Grid::words`]: codes `[R, vectors]`, scales and corrections `[segments, R]`.
    out: &'a mut [i32],
}

impl<const R: usize> Task for Round<'_, R> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { grid, x, out } = self;
        let (codes, rest) = out.split_at_mut(grid.vectors() * R);
        let (scales, corrections) = rest.split_at_mut(grid.segments() * R);
        let ((scales, _), (corrections, _)) = (scales.as_chunks_mut::<R>(), corrections.as_chunks_mut::<R>());
        let group = grid.scheme.group_len(grid.k);
        let middle = if grid.scheme.zero_points { 1 } else { i32::from(grid.scheme.middle()) };
        let mut rows = x.chunks_exact(grid.k);
        for (r, codes) in codes.chunks_exact_mut(grid.vectors()).enumerate() {
            let Some(x) = rows.next() else {
                codes.fill(0);
                scales.iter_mut().chain(&mut *corrections).for_each(|of_rows| of_rows[r] = 0);
                continue;
            };
            let codes: &mut [i8] = bytemuck::cast_slice_mut(codes);
            codes[grid.k..].fill(0);
            let (mut inverse, mut step) = (0.0, 0.0);
            for (segment, (scale, correction)) in scales.iter_mut().zip(&mut *corrections).enumerate() {
                let columns = grid.columns(segment);
                // SAFETY: the caller's promise.
                unsafe {
                    if columns.start % group == 0 {
                        (inverse, step) = steps::<L>(&x[columns.start..grid.k.min(columns.start + group)]);
                    }
                    // Integers below 2^24: sums are exact.
                    let mut sum = L::splat(0.0);
                    let (x, codes) = (&x[columns.clone()], &mut codes[columns]);
                    let ((whole, last), (whole_codes, last_codes)) = (x.as_chunks::<N>(), codes.as_chunks_mut::<N>());
                    for (x, codes) in whole.iter().zip(whole_codes) {
                        sum = round_to(x, L::splat(inverse), codes).add(sum);
                    }
                    if !last.is_empty() {
                        let mut codes = [0; N];
                        sum = round_to(last, L::splat(inverse), &mut codes).add(sum);
                        last_codes.copy_from_slice(&codes[..last.len()]);
                    }
                    scale[r] = f32::to_bits(step) as i32;
                    correction[r] = -middle * sum.sum() as i32;
                }
            }
        }
    }
}

impl Kernels {
    /// `x [m, k]` rounded to 8 bits for products with panels of `grid`, to `words`.
    pub(crate) fn round_rows(&self, x: &[f32], m: usize, grid: Grid, words: &mut Vec<i32>) {
        let (grid, rows) = (grid.wide(m).unwrap_or(grid), block_rows(m));
        words.resize(m.div_ceil(rows) * grid.words(rows), 0);
        self.pool.chunks(words, grid.words(rows), |i, out| {
            let x = &x[i * rows * grid.k..m.min((i + 1) * rows) * grid.k];
            with_rows!(m, R => self.isa.run(Round::<R> { grid, x, out }));
        });
    }

    /// [`Self::round_rows`] of many rows that `make` makes of a block of `sum [m, k]`, in memory of its thread: an equal part of `room`.
    /// `None` if that is too small for a block.
    pub(crate) fn round_made(
        &self,
        sum: &mut [f32],
        room: &mut [f32],
        grid: Grid,
        make: impl Fn(usize, &mut [f32], &mut [f32]) + Sync,
    ) -> Option<Rounded> {
        let block = ROWS * grid.k;
        if room.len() / self.pool.threads() < block {
            return None;
        }
        let m = sum.len() / grid.k;
        let mut words = self.take_scratch();
        words.resize(m.div_ceil(ROWS) * grid.words(ROWS), 0);
        let blocks = sum.chunks_mut(block).zip(words.chunks_mut(grid.words(ROWS)));
        self.pool.pieces_with(blocks, room, |i, (sum, out), room| {
            let x = &mut room[..sum.len()];
            make(i * block, sum, x);
            self.isa.run(Round::<ROWS> { grid, x, out });
        });
        Some(Rounded { words, m, grid })
    }
}
