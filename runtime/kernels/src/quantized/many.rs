//! Products of many rows of rounded `x`: the codes of a block of segments are unpacked once for all of them. Small groups of 3 or 4 bits
//! become longer ones of 8 bits then, whose sums are brought together more seldom.

use super::{BLOCK, Grid, Piece, ROWS, Segment, WIDE, WORD, eighths, halves, prefetch_ahead};
use crate::{
    ints::Ints,
    isa::IntTask,
    lanes::{Lanes, N, into, prefetch},
};
use std::{cell::RefCell, ops::Range};
use vlmc_artifact::{Scheme, program::PANEL, quant::RUN};

/// Panels that rows are multiplied with at once: as many sums as there are registers for, and four products for each word of `x` that
/// is loaded.
pub(super) const PANELS: usize = 4;

/// Rows of rounded `x` in blocks of [`ROWS`].
pub(super) struct Matrix<'a> {
    pub(super) piece: Piece<'a>,
    /// [`Grid::wide`] of the piece's.
    pub(super) wide: Grid,
    pub(super) x: &'a [i32],
}

thread_local! {
    /// [`PANELS`] panels that a thread has unpacked: to make room for them anew for each piece would take a fortieth of the time.
    static UNPACKED: RefCell<Vec<Unpacked>> = const { RefCell::new(vec![]) };
}

/// A block of segments of a panel, a byte for each code. Aligned, since vectors that cross cache lines are slower to load.
#[repr(align(64))]
#[derive(Clone)]
struct Unpacked {
    codes: [[u8; 4 * PANEL]; BLOCK / WORD],
    scales: [[f32; N]; BLOCK / WIDE],
    zeros: [[u8; PANEL]; BLOCK / WIDE],
}

impl Unpacked {
    const EMPTY: Self = Self { codes: [[0; 4 * PANEL]; BLOCK / WORD], scales: [[0.0; N]; BLOCK / WIDE], zeros: [[0; PANEL]; BLOCK / WIDE] };

    /// Segments `block` of `wide`, which is [`Grid::wide`] of the panel's grid. Codes are left out if they `lie` together and can be read where they do.
    ///
    /// # Safety
    /// The CPU has the instruction set of `I`.
    #[inline(always)]
    unsafe fn fill<I: Ints>(&mut self, grid: Grid, wide: Grid, panel: &[u8], block: Range<usize>, lie: bool) {
        let first = wide.columns(block.start).start;
        for (i, (scales, zeros)) in block.zip(self.scales.iter_mut().zip(&mut self.zeros)) {
            let columns = wide.columns(i);
            let codes = &mut self.codes[(columns.start - first) / WORD..];
            // SAFETY: the caller's promise.
            unsafe {
                if grid.scheme != wide.scheme {
                    merge::<I>(grid, panel, columns, codes, scales);
                    continue;
                }
                let segment = grid.segment(panel, i);
                segment.scales::<I::Floats>().store(scales);
                if let Some(from) = segment.zeros {
                    *zeros = *from;
                }
                if lie {
                    continue;
                }
                if grid.scheme.bits == 3 {
                    for (to, from) in codes.as_chunks_mut::<{ RUN / WORD }>().0.iter_mut().zip(segment.codes.as_chunks::<3>().0) {
                        from.iter().for_each(prefetch_ahead);
                        let codes = eighths::<I>(from);
                        to.iter_mut().zip(codes).for_each(|(to, codes)| codes.store(to));
                    }
                } else if grid.scheme.bits == 4 {
                    for (to, from) in codes.as_chunks_mut::<2>().0.iter_mut().zip(segment.codes) {
                        prefetch_ahead(from);
                        let [low, high] = halves(I::load(from));
                        low.store(&mut to[0]);
                        high.store(&mut to[1]);
                    }
                } else {
                    for (to, from) in codes.iter_mut().zip(segment.codes) {
                        prefetch_ahead(from);
                        I::load(from).store(to);
                    }
                }
            }
        }
    }
}

/// Rounds the numbers of small groups of 3 or 4 bits to 8 bits, of middle 128, with one scale for each row of the panel: the least that
/// holds all numbers that codes can stand for.
///
/// # Safety
/// The CPU has the instruction set of `I`.
#[inline(always)]
unsafe fn merge<I: Ints>(grid: Grid, panel: &[u8], columns: Range<usize>, codes: &mut [[u8; 4 * PANEL]], scales: &mut [f32; N]) {
    // Bits behind the point of a group's scale in steps of the common one, which is below 16 (32 with 3 bits), and of a code: 15 together.
    let points = [u32::from(grid.scheme.bits) + 7, 8 - u32::from(grid.scheme.bits)];
    let len = grid.segment_len();
    let groups = || (columns.start / len..columns.end.div_ceil(len)).map(|i| grid.segment(panel, i));
    let middle = [grid.scheme.middle(); PANEL];
    // SAFETY: the caller's promise.
    unsafe {
        let mut common = I::Floats::splat(0.0);
        for group in groups() {
            let zeros = group.zeros.unwrap_or(&middle);
            let largest = zeros.map(|z| f32::from(z.max(grid.scheme.max_code().saturating_sub(z))));
            let scale = group.scales::<I::Floats>().mul(I::Floats::load(&largest));
            common = common.max(scale.max(I::Floats::splat(0.0).sub(scale)));
        }
        common.mul(I::Floats::splat(1.0 / 127.0)).store(scales);
        let inverse = I::Floats::splat(127.0 * (1 << points[0]) as f32).div(common.max(I::Floats::splat(f32::MIN_POSITIVE)));
        let mut to = codes.as_chunks_mut::<2>().0.iter_mut();
        for group in groups() {
            let mut steps = [0.0; N];
            group.scales::<I::Floats>().mul(inverse).round().store(&mut steps);
            let steps = pairs::<I>(steps.map(|step| step as i32));
            let zeros = pairs::<I>(group.zeros.unwrap_or(&middle).map(|zero| i32::from(zero) << points[1]));
            let scale = Rescale { zeros, steps };
            if grid.scheme.bits == 3 {
                for run in group.codes.as_chunks::<3>().0 {
                    run.iter().for_each(prefetch_ahead);
                    let codes = eighths::<I>(run);
                    for (codes, to) in codes.as_chunks::<2>().0.iter().zip(&mut to) {
                        for (codes, to) in codes.iter().zip(to) {
                            scale.bytes(codes.shift_left::<5>(), codes.shift_right::<3>()).store(to);
                        }
                    }
                }
                continue;
            }
            for (from, to) in group.codes.iter().zip(&mut to) {
                prefetch_ahead(from);
                let codes = I::load(from);
                scale.bytes(codes.shift_left::<4>(), codes.shift_right::<4>()).store(&mut to[0]);
                scale.bytes(codes, codes.shift_right::<8>()).store(&mut to[1]);
            }
        }
    }
}

/// Brings codes to another scale; pairs of 16 bits for each row.
struct Rescale<I> {
    /// With as many bits behind the point as the codes.
    zeros: I,
    steps: I,
}

impl<I: Ints> Rescale<I> {
    /// Bytes of 128 + the numbers of codes that end with bit 7 of each 16 of `even` and `odd`.
    ///
    /// # Safety
    /// The CPU has the instruction set of `I`.
    #[inline(always)]
    unsafe fn bytes(&self, even: I, odd: I) -> I {
        // SAFETY: the caller's promise.
        unsafe {
            let (code, middle) = (I::splat(0x00f0_00f0), I::splat(-0x007f_0080));
            let even = even.and(code).sub_16(self.zeros).mul_round_16(self.steps).sub_16(middle);
            let odd = odd.and(code).sub_16(self.zeros).mul_round_16(self.steps).sub_16(middle);
            even.add(odd.shift_left::<8>())
        }
    }
}

/// Each number twice, in 16 bits.
///
/// # Safety
/// The CPU has the instruction set of `I`.
#[inline(always)]
unsafe fn pairs<I: Ints>(numbers: [i32; N]) -> I {
    let mut words = [0; 4 * N];
    for (word, v) in words.as_chunks_mut::<4>().0.iter_mut().zip(numbers) {
        *word = (v & 0xffff | v << 16).to_le_bytes();
    }
    // SAFETY: the caller's promise.
    unsafe { I::load(&words) }
}

impl IntTask for Matrix<'_> {
    #[inline(always)]
    unsafe fn run<I: Ints>(self) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.wide.scheme {
                Scheme { bits: 4, zero_points: false, .. } => self.products::<I, 4, false>(),
                Scheme { bits: 4, .. } => self.products::<I, 4, true>(),
                Scheme { zero_points: false, .. } => self.products::<I, 8, false>(),
                _ => self.products::<I, 8, true>(),
            }
        }
    }
}

impl Matrix<'_> {
    #[inline(always)]
    unsafe fn products<I: Ints, const BITS: u8, const ZEROS: bool>(self) {
        let Self { piece, wide, x } = self;
        // Taken, since what follows may not be in a closure: closures are not compiled for the instruction set.
        let mut unpacked = UNPACKED.take();
        unpacked.resize(PANELS, Unpacked::EMPTY);
        let mut sums = [[[0.0; N]; PANELS]; ROWS];
        for (p, panels) in piece.panels.chunks(PANELS * piece.bytes()).enumerate() {
            let column = (piece.first_panel + PANELS * p) * N;
            let bias: [_; PANELS] = std::array::from_fn(|p| piece.out.bias(piece.bias, column + p * N));
            for block in wide.blocks() {
                let panels = panels.chunks_exact(piece.bytes());
                let lie = piece.grid.lie(&block);
                for (unpacked, panel) in unpacked.iter_mut().zip(panels.clone()) {
                    // SAFETY: the caller's promise.
                    unsafe { unpacked.fill::<I>(piece.grid, wide, panel, block.clone(), lie) };
                }
                let mut codes: [_; PANELS] = std::array::from_fn(|i| &unpacked[i].codes[..]);
                if lie {
                    for (codes, panel) in codes.iter_mut().zip(panels.clone()) {
                        *codes = piece.grid.segment(panel, block.start).codes;
                    }
                }
                for (b, x) in x.chunks_exact(wide.words(ROWS)).enumerate() {
                    let tile = IntTile { piece: &piece, wide, x, block: block.clone(), first_row: b * ROWS, column, bias: &bias };
                    // SAFETY: the caller's promise.
                    unsafe {
                        if let (PANELS, Some(unpacked)) = (panels.len(), unpacked.first_chunk().filter(|_| I::MANY_REGISTERS)) {
                            tile.compute::<I, BITS, ZEROS, PANELS, ROWS>(unpacked, codes, 0, &mut sums);
                            continue;
                        }
                        for (i, unpacked) in unpacked.iter().enumerate().take(panels.len()) {
                            let tile = IntTile { column: column + i * N, block: block.clone(), bias: &bias[i..], ..tile };
                            for row in (0..ROWS).step_by(ROWS / 2) {
                                let mut sums = [[[0.0; N]]; ROWS / 2];
                                tile.compute::<I, BITS, ZEROS, 1, { ROWS / 2 }>(std::array::from_ref(unpacked), [codes[i]], row, &mut sums);
                            }
                        }
                    }
                }
            }
        }
        UNPACKED.set(unpacked);
    }
}

/// A block of rows of `x` and a block of segments.
struct IntTile<'a, 'b> {
    piece: &'a Piece<'b>,
    wide: Grid,
    /// [`Grid::words`] of [`ROWS`] rows.
    x: &'a [i32],
    block: Range<usize>,
    first_row: usize,
    column: usize,
    /// Of each panel.
    bias: &'a [[f32; N]],
}

impl IntTile<'_, '_> {
    /// Adds to the result: rows `row..row + R` of the block with `P` panels. Whatever `sums` holds, they are room for the sums.
    ///
    /// # Safety
    /// The CPU has the instruction set of `I`.
    #[inline(always)]
    unsafe fn compute<I: Ints, const BITS: u8, const ZEROS: bool, const P: usize, const R: usize>(
        &self,
        panels: &[Unpacked; P],
        codes_of: [&[[u8; 4 * PANEL]]; P],
        row: usize,
        sums: &mut [[[f32; N]; P]; R],
    ) {
        let (Piece { out, m, .. }, grid) = (*self.piece, self.wide);
        let rows = m.saturating_sub(self.first_row + row).min(R);
        let (codes, rest) = self.x.split_at(grid.vectors() * ROWS);
        let (scales, corrections) = rest.split_at(grid.segments() * ROWS);
        let ((scales, _), (corrections, _)) = (scales.as_chunks::<ROWS>(), corrections.as_chunks::<ROWS>());
        let first = grid.columns(self.block.start).start / WORD;
        // SAFETY: the caller's promise, and this thread has these columns.
        unsafe {
            for (r, sums) in sums.iter_mut().enumerate() {
                for (p, sum) in sums.iter_mut().enumerate() {
                    let before = self.block.start > 0 && r < rows;
                    *sum = if before { out.read(self.first_row + row + r, self.column + p * N) } else { self.bias[p] };
                }
            }
            // Results are seldom in a cache. A CPU stores in order, so that what follows would wait for them.
            for r in 0..rows {
                let to = out.place(self.first_row + row + r, self.column, 0);
                (0..P).for_each(|p| prefetch::<{ into::SECOND }, _>(to.wrapping_add(p * N)));
            }
            for (s, i) in self.block.clone().enumerate() {
                let columns = grid.columns(i);
                let vectors = columns.start / WORD - first..columns.end.div_ceil(WORD) - first;
                let mut products = [[I::splat(0); P]; R];
                for r in 0..R {
                    let correction = I::splat(corrections[i][row + r]);
                    for p in 0..P {
                        products[r][p] = if ZEROS { Segment::zeros::<I>(&panels[p].zeros[s]).mul(correction) } else { correction };
                    }
                }
                // Opaque, else the compiler computes it anew for each vector, which takes a fiftieth of the time.
                let count = std::hint::black_box(vectors.len());
                let x: [&[i32]; R] = std::array::from_fn(|r| &codes[(row + r) * grid.vectors() + first + vectors.start..][..count]);
                let panel_codes: [_; P] = std::array::from_fn(|p| &codes_of[p][vectors.clone()]);
                for v in 0..count {
                    // SAFETY: as many vectors of codes and of `x` were taken.
                    let codes: [I; P] = std::array::from_fn(|p| I::load(panel_codes[p].get_unchecked(v)));
                    for r in 0..R {
                        for p in 0..P {
                            products[r][p] = products[r][p].dot::<BITS>(codes[p], *x[r].get_unchecked(v));
                        }
                    }
                }
                for p in 0..P {
                    let scale = I::Floats::load(&panels[p].scales[s]);
                    for r in 0..R {
                        let scale = scale.mul(I::Floats::splat(f32::from_bits(scales[i][row + r] as u32)));
                        products[r][p].to_f32().mul_add(scale, I::Floats::load(&sums[r][p])).store(&mut sums[r][p]);
                    }
                }
            }
            if self.block.end == grid.segments() {
                self.piece.write(self.first_row + row, self.column, &mut sums[..rows]);
                return;
            }
            for (r, sums) in sums.iter().enumerate().take(rows) {
                for (p, sum) in sums.iter().enumerate() {
                    out.write(self.first_row + row + r, self.column + p * N, sum);
                }
            }
        }
    }
}
