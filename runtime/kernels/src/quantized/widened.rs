//! Products of `x` as it is: codes are widened to `f32`.

use super::{BLOCK, Piece, Segment, WORD, eighths, halves};
use crate::{
    ints::Ints,
    isa::IntTask,
    lanes::{Lanes, N},
    linear::{self, Tile},
};
use vlmc_artifact::{Scheme, quant::RUN};

/// `x` as it is; codes are widened.
pub(super) struct Widened<'a> {
    pub(super) piece: Piece<'a>,
    /// `[m, k]`.
    pub(super) x: &'a [f32],
}

impl IntTask for Widened<'_> {
    #[inline(always)]
    unsafe fn run<I: Ints>(self) {
        let Self { piece, x } = self;
        let grid = piece.grid;
        let mut widened = [0.0; BLOCK * N];
        let mut tile = [[0.0; N]; linear::ROWS];
        for (p, panel) in piece.panels.chunks_exact(piece.bytes()).enumerate() {
            let column = (piece.first_panel + p) * N;
            for block in grid.blocks() {
                let columns = grid.columns(block.start).start..grid.columns(block.end - 1).end;
                for i in block.clone() {
                    let to = &mut widened[(grid.columns(i).start - columns.start) * N..][..grid.columns(i).len() * N];
                    // SAFETY: the caller's promise.
                    unsafe { widen::<I>(grid.scheme, &grid.segment(panel, i), to) };
                }
                for row in (0..piece.m).step_by(linear::ROWS) {
                    let rows = linear::ROWS.min(piece.m - row);
                    let x = &x[row * grid.k + columns.start..];
                    let panel = &widened[..columns.len() * N];
                    // SAFETY: the caller's promise, and the piece's columns are this thread's.
                    unsafe {
                        Tile { x, x_stride: grid.k, k: columns.len(), rows, panel, out: &mut tile }.compute::<I::Floats>();
                        for (r, values) in tile.iter_mut().enumerate().take(rows) {
                            let start = if block.start == 0 { piece.out.bias(piece.bias, column) } else { piece.out.read(row + r, column) };
                            values.iter_mut().zip(start).for_each(|(v, start)| *v += start);
                            if block.end == grid.segments() {
                                piece.write::<1>(row + r, column, &mut [[*values]]);
                            } else {
                                piece.out.write(row + r, column, values);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Numbers of a segment to `out [columns, 16]`.
///
/// # Safety
/// The CPU has the instruction set of `I`.
#[inline(always)]
unsafe fn widen<I: Ints>(scheme: Scheme, segment: &Segment<'_>, out: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe {
        let scales = segment.scales::<I::Floats>();
        let zeros = segment.zeros.map_or_else(|| I::splat(i32::from(scheme.middle())), |z| Segment::zeros::<I>(z));
        let out = out.as_chunks_mut::<N>().0;
        if scheme.bits == 3 {
            for (run, out) in segment.codes.as_chunks::<3>().0.iter().zip(out.chunks_mut(RUN)) {
                let codes = eighths(run);
                codes.into_iter().zip(out.chunks_mut(WORD)).for_each(|(codes, out)| widen_word(codes, zeros, scales, out));
            }
        } else if scheme.bits == 4 {
            for (block, out) in segment.codes.iter().zip(out.chunks_mut(2 * WORD)) {
                let [low, high] = halves(I::load(block));
                let (first, second) = out.split_at_mut(WORD.min(out.len()));
                widen_word(low, zeros, scales, first);
                widen_word(high, zeros, scales, second);
            }
        } else {
            for (block, out) in segment.codes.iter().zip(out.chunks_mut(WORD)) {
                widen_word(I::load(block), zeros, scales, out);
            }
        }
    }
}

/// Numbers of the first columns, at most 4, of a vector of codes.
///
/// # Safety
/// The CPU has the instruction set of `I`.
#[inline(always)]
unsafe fn widen_word<I: Ints>(codes: I, zeros: I, scales: I::Floats, out: &mut [[f32; N]]) {
    // SAFETY: the caller's promise.
    unsafe {
        let mask = I::splat(0xff);
        let bytes = [codes, codes.shift_right::<8>(), codes.shift_right::<16>(), codes.shift_right::<24>()];
        for (byte, out) in bytes.iter().zip(out) {
            byte.and(mask).sub(zeros).to_f32().mul(scales).store(out);
        }
    }
}
