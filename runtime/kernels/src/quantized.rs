//! Products with quantized matrices in panels.
//!
//! Either `x` is rounded to 8 bits and multiplied with the codes in integers, 4 columns at a time, or the codes are widened to
//! `f32`. Both go by segments: runs of columns that share a scale, cut so short that a segment's integers fit 32 bits, however
//! long a row is. For many rows of `x` the codes of a block of segments are unpacked once.

use crate::{
    Kernels, elementwise,
    ints::Ints,
    isa::{IntTask, Task},
    lanes::{Lanes, N},
    linear::{self, OutColumns, Tile},
    round::{round_to, steps},
};
use half::f16;
use std::ops::Range;
use vlmc_artifact::{
    Scheme,
    program::{PANEL, Unary},
    quant::{block_len, panel_bytes},
};

/// Most columns of a segment, and columns of a block of them: sums of 1536 products of 255 * 127 are far from 2^31, two panels'
/// codes stay in the second cache, and sums are seldom put aside. The sizes of groups divide it.
const BLOCK: usize = 1536;
/// Most segments of a block: of groups of 16.
const SEGMENTS: usize = BLOCK / 16;
/// Columns whose codes make a vector: 4 bytes of each of 16 rows.
const WORD: usize = 4;
/// Rows of rounded `x` that a tile serves: with two panels, as many sums as there are registers for.
const ROWS: usize = 6;

/// How the panels of a matrix with `k` columns lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    pub(crate) scheme: Scheme,
    pub(crate) k: usize,
}

/// A segment of a panel.
pub(crate) struct Segment<'a> {
    scales: &'a [u8],
    /// If the scheme has zero points.
    pub(crate) zeros: Option<&'a [u8; PANEL]>,
    /// Blocks of 4 bytes of each row.
    pub(crate) codes: &'a [[u8; 4 * PANEL]],
}

impl Grid {
    pub(crate) fn new(scheme: Scheme, k: usize) -> Self {
        Self { scheme, k }
    }

    /// Bytes of a panel; `None` if that is no number.
    pub(crate) fn panel_bytes(self) -> Option<usize> {
        panel_bytes(self.scheme, self.k)
    }

    /// Columns of a segment that is not the last of its row.
    #[inline(always)]
    pub(crate) fn segment_len(self) -> usize {
        self.scheme.group_len(self.k).min(BLOCK)
    }

    #[inline(always)]
    pub(crate) fn segments(self) -> usize {
        self.k.div_ceil(self.segment_len())
    }

    #[inline(always)]
    pub(crate) fn columns(self, segment: usize) -> Range<usize> {
        let start = segment * self.segment_len();
        start..self.k.min(start + self.segment_len())
    }

    /// Blocks of at most [`BLOCK`] columns, as ranges of segments.
    #[inline(always)]
    fn blocks(self) -> impl Iterator<Item = Range<usize>> {
        let (n, step) = (self.segments(), (BLOCK / self.segment_len()).min(SEGMENTS));
        (0..n).step_by(step).map(move |i| i..n.min(i + step))
    }

    #[inline(always)]
    pub(crate) fn segment<'a>(self, panel: &'a [u8], i: usize) -> Segment<'a> {
        let (len, block) = (self.scheme.group_len(self.k), block_len(self.scheme));
        let scale_bytes = PANEL * self.scheme.scale_bytes();
        let head = scale_bytes + if self.scheme.zero_points { PANEL } else { 0 };
        let columns = self.columns(i);
        let group = columns.start / len;
        // All groups before this one are whole.
        let panel = &panel[group * (head + len.div_ceil(block) * 4 * PANEL)..];
        let (scales, rest) = panel.split_at(scale_bytes);
        let zeros = if self.scheme.zero_points { rest.first_chunk() } else { None };
        let first = (columns.start - group * len) / block;
        let (codes, _) = panel[head..].as_chunks();
        Segment { scales, zeros, codes: &codes[first..first + columns.len().div_ceil(block)] }
    }

    /// Row `r` of a panel.
    pub(crate) fn row(self, panel: &[u8], r: usize, out: &mut [f32]) {
        let block = block_len(self.scheme);
        for i in 0..self.segments() {
            let segment = self.segment(panel, i);
            let scale = segment.scale(r);
            let zero = segment.zeros.map_or(self.scheme.middle(), |z| z[r]);
            for (c, out) in out[self.columns(i)].iter_mut().enumerate() {
                let byte = segment.codes[c / block][4 * r + c % 4];
                let code = match (self.scheme.bits, c % block) {
                    (4, 0..4) => byte & 15,
                    (4, _) => byte >> 4,
                    _ => byte,
                };
                *out = scale * f32::from(i16::from(code) - i16::from(zero));
            }
        }
    }

    /// 32-bit words of a block of `rows` rows of rounded `x`: codes of whole vectors, then of each segment a scale and what its
    /// zero takes from a sum.
    #[inline(always)]
    fn words(self, rows: usize) -> usize {
        rows * (self.vectors() + 2 * self.segments())
    }

    /// Vectors of codes of a row: whole blocks of 8 columns, so that they serve either number of bits.
    #[inline(always)]
    fn vectors(self) -> usize {
        self.k.div_ceil(2 * WORD) * 2
    }
}

impl Segment<'_> {
    /// Scale of a row.
    #[inline(always)]
    fn scale(&self, r: usize) -> f32 {
        if let Some(half) = self.scales.as_chunks::<2>().0.get(r).filter(|_| self.scales.len() == 2 * PANEL) {
            return f16::from_le_bytes(*half).to_f32();
        }
        self.scales.as_chunks().0.get(r).map_or(0.0, |b| f32::from_le_bytes(*b))
    }

    /// Scales of all rows.
    ///
    /// # Safety
    /// The CPU has the instruction set of `L`.
    #[inline(always)]
    pub(crate) unsafe fn scales<L: Lanes>(&self) -> L {
        // SAFETY: the caller's promise.
        unsafe {
            if let Ok(halves) = <&[u8; 2 * PANEL]>::try_from(self.scales) {
                return L::load_f16(&std::array::from_fn(|r| f16::from_le_bytes([halves[2 * r], halves[2 * r + 1]])));
            }
            L::load(&std::array::from_fn(|r| self.scale(r)))
        }
    }

    /// Zero points of all rows.
    ///
    /// # Safety
    /// The CPU has the instruction set of `I`.
    #[inline(always)]
    unsafe fn zeros<I: Ints>(zeros: &[u8; PANEL]) -> I {
        let mut words = [0; 4 * PANEL];
        for (word, zero) in words.as_chunks_mut::<4>().0.iter_mut().zip(zeros) {
            word[0] = *zero;
        }
        // SAFETY: the caller's promise.
        unsafe { I::load(&words) }
    }
}

/// Codes of columns 0 to 3 and 4 to 7 of a block of 4 bits.
///
/// # Safety
/// The CPU has the instruction set of `I`.
#[inline(always)]
unsafe fn halves<I: Ints>(block: &[u8; 4 * PANEL]) -> [I; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let (both, mask) = (I::load(block), I::splat(0x0f0f_0f0f));
        [both.and(mask), both.shift_right::<4>().and(mask)]
    }
}

/// Rounds `R` rows of `x` to 8 bits; rows that are not there count as zeros.
struct Round<'a, const R: usize> {
    grid: Grid,
    /// Up to `R` rows.
    x: &'a [f32],
    /// [`Grid::words`]: codes `[vectors, R]`, scales and corrections `[segments, R]`.
    out: &'a mut [i32],
}

impl<const R: usize> Task for Round<'_, R> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { grid, x, out } = self;
        out.fill(0);
        let (codes, rest) = out.split_at_mut(grid.vectors() * R);
        let (scales, corrections) = rest.split_at_mut(grid.segments() * R);
        let group = grid.scheme.group_len(grid.k);
        let segments_of_group = group.div_ceil(grid.segment_len());
        for (r, x) in x.chunks_exact(grid.k).enumerate() {
            for (g, x) in x.chunks(group).enumerate() {
                // SAFETY of all blocks: the caller's promise.
                let (inverse, scale) = unsafe { steps::<L>(x) };
                for (s, x) in x.chunks(grid.segment_len()).enumerate() {
                    let segment = g * segments_of_group + s;
                    let codes = &mut codes[segment * grid.segment_len() / WORD * R..];
                    let put = |at: usize, bytes: &[i8; N]| {
                        // The last vectors of a row may not be there: their columns are not either.
                        let to = codes[at / WORD * R..].chunks_mut(R);
                        for (to, bytes) in to.zip(bytes.as_chunks::<WORD>().0) {
                            to[r] = i32::from_le_bytes(bytes.map(|b| b as u8));
                        }
                    };
                    let sum = unsafe { round_to::<L>(x, inverse, put) } as i32;
                    scales[segment * R + r] = scale.to_bits() as i32;
                    corrections[segment * R + r] = if grid.scheme.zero_points { -sum } else { -sum * i32::from(grid.scheme.middle()) };
                }
            }
        }
    }
}

/// Panels that one thread multiplies with.
#[derive(Clone, Copy)]
pub(crate) struct Piece<'a> {
    pub(crate) grid: Grid,
    pub(crate) panels: &'a [u8],
    pub(crate) first_panel: usize,
    /// `[n]`, or empty.
    pub(crate) bias: &'a [f32],
    pub(crate) out: OutColumns,
    pub(crate) m: usize,
}

impl Piece<'_> {
    pub(crate) fn bytes(&self) -> usize {
        self.grid.panel_bytes().unwrap_or(0).max(1)
    }

    /// The same, [`PART`] panels at a time.
    fn parts(self) -> impl Iterator<Item = Self> {
        let panels = self.panels.chunks(PART * self.bytes()).enumerate();
        panels.map(move |(i, panels)| Self { panels, first_panel: self.first_panel + i * PART, ..self })
    }
}

/// Panels whose results stay in the second cache until they are done: of 512 rows 128 KiB.
const PART: usize = 4;

/// The results of a piece through an activation.
struct Activate<'a> {
    piece: Piece<'a>,
    act: Unary,
}

impl Task for Activate<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { piece, act } = self;
        let mut values = [[0.0; N]; PART];
        let panels = piece.panels.len() / piece.bytes();
        for row in 0..piece.m {
            for first in (0..panels).step_by(PART) {
                let columns = (first..panels.min(first + PART)).map(|p| (piece.first_panel + p) * N);
                // SAFETY: the caller's promise, and the piece's columns are this thread's.
                unsafe {
                    for (values, column) in values.iter_mut().zip(columns.clone()) {
                        *values = piece.out.read(row, column);
                    }
                    elementwise::map::<L>(act, values.as_flattened_mut());
                    for (values, column) in values.iter().zip(columns) {
                        piece.out.write(row, column, values);
                    }
                }
            }
        }
    }
}

/// One row of rounded `x`: panels are read as they lie.
struct Vector<'a> {
    piece: Piece<'a>,
    x: &'a [i32],
}

impl IntTask for Vector<'_> {
    #[inline(always)]
    unsafe fn run<I: Ints>(self) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.piece.grid.scheme.bits {
                4 => self.products::<I, 4>(),
                _ => self.products::<I, 8>(),
            }
        }
    }
}

impl Vector<'_> {
    #[inline(always)]
    unsafe fn products<I: Ints, const BITS: u8>(self) {
        let Self { piece, x } = self;
        let grid = piece.grid;
        let (x, rest) = x.split_at(grid.vectors());
        let (scales, corrections) = rest.split_at(grid.segments());
        for (p, panel) in piece.panels.chunks_exact(piece.bytes()).enumerate() {
            let column = (piece.first_panel + p) * N;
            // SAFETY: the caller's promise.
            unsafe {
                let mut sum = I::Floats::load(&piece.out.bias(piece.bias, column));
                for i in 0..grid.segments() {
                    let segment = grid.segment(panel, i);
                    let start = match segment.zeros {
                        Some(zeros) => Segment::zeros::<I>(zeros).mul(I::splat(corrections[i])),
                        None => I::splat(corrections[i]),
                    };
                    let x = &x[grid.columns(i).start / WORD..];
                    let products = dot::<I, BITS>(start, segment.codes, x);
                    let scale = segment.scales::<I::Floats>().mul(I::Floats::splat(f32::from_bits(scales[i] as u32)));
                    sum = products.to_f32().mul_add(scale, sum);
                }
                let mut values = [0.0; N];
                sum.store(&mut values);
                piece.out.write(0, column, &values);
            }
        }
    }
}

/// Blocks of codes that are fetched ahead: memory answers after some 100 ns, in which a thread can read 2 to 4 KiB, and the CPU's own
/// prefetching stops at pages of 4 KiB.
const AHEAD: usize = 32;

/// `start` + codes times `x`. Two sums at once hide the latency of the additions.
///
/// # Safety
/// The CPU has the instruction set of `I`.
#[inline(always)]
unsafe fn dot<I: Ints, const BITS: u8>(start: I, codes: &[[u8; 4 * PANEL]], x: &[i32]) -> I {
    // SAFETY: the caller's promise.
    unsafe {
        let (mut a, mut b) = (start, I::splat(0));
        if BITS == 4 {
            for (block, x) in codes.iter().zip(x.as_chunks::<2>().0) {
                prefetch(block, AHEAD);
                let [low, high] = halves::<I>(block);
                a = a.dot::<BITS>(low, x[0]);
                b = b.dot::<BITS>(high, x[1]);
            }
        } else {
            let ((pairs, rest), (xs, x_rest)) = (codes.as_chunks::<2>(), x.as_chunks::<2>());
            for (pair, x) in pairs.iter().zip(xs) {
                prefetch(&pair[0], AHEAD);
                prefetch(&pair[1], AHEAD);
                a = a.dot::<BITS>(I::load(&pair[0]), x[0]);
                b = b.dot::<BITS>(I::load(&pair[1]), x[1]);
            }
            let x_last = xs.get(pairs.len()).map(|x| x[0]).or(x_rest.first().copied());
            if let (Some(codes), Some(x)) = (rest.first(), x_last) {
                a = a.dot::<BITS>(I::load(codes), x);
            }
        }
        a.add(b)
    }
}

/// Asks for the block that lies `ahead` blocks behind `block`. Nothing is read, so there need not be one.
#[inline(always)]
fn prefetch(block: &[u8; 4 * PANEL], ahead: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 CPU has the instruction, and it takes any address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(std::ptr::from_ref(block).wrapping_add(ahead).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (block, ahead);
}

/// Rows of rounded `x` in blocks of [`ROWS`].
struct Matrix<'a> {
    piece: Piece<'a>,
    x: &'a [i32],
}

/// A block of segments of a panel, a byte for each code.
struct Unpacked {
    codes: [[u8; 4 * PANEL]; BLOCK / WORD],
    scales: [[f32; N]; SEGMENTS],
    zeros: [[u8; PANEL]; SEGMENTS],
}

impl Unpacked {
    const EMPTY: Self = Self { codes: [[0; 4 * PANEL]; BLOCK / WORD], scales: [[0.0; N]; SEGMENTS], zeros: [[0; PANEL]; SEGMENTS] };

    /// # Safety
    /// The CPU has the instruction set of `I`.
    #[inline(always)]
    unsafe fn fill<I: Ints>(&mut self, grid: Grid, panel: &[u8], block: Range<usize>) {
        let first = grid.columns(block.start).start;
        for (i, (scales, zeros)) in block.zip(self.scales.iter_mut().zip(&mut self.zeros)) {
            let segment = grid.segment(panel, i);
            let codes = &mut self.codes[(grid.columns(i).start - first) / WORD..];
            // SAFETY: the caller's promise.
            unsafe {
                segment.scales::<I::Floats>().store(scales);
                if grid.scheme.bits == 4 {
                    for (to, from) in codes.as_chunks_mut::<2>().0.iter_mut().zip(segment.codes) {
                        prefetch(from, AHEAD);
                        let [low, high] = halves::<I>(from);
                        low.store(&mut to[0]);
                        high.store(&mut to[1]);
                    }
                } else {
                    for (to, from) in codes.iter_mut().zip(segment.codes) {
                        prefetch(from, AHEAD);
                        I::load(from).store(to);
                    }
                }
            }
            if let Some(from) = segment.zeros {
                *zeros = *from;
            }
        }
    }
}

impl IntTask for Matrix<'_> {
    #[inline(always)]
    unsafe fn run<I: Ints>(self) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.piece.grid.scheme {
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
        let Self { piece, x } = self;
        let grid = piece.grid;
        let mut unpacked = [Unpacked::EMPTY; 2];
        for (p, pair) in piece.panels.chunks(2 * piece.bytes()).enumerate() {
            let column = (piece.first_panel + 2 * p) * N;
            for block in grid.blocks() {
                let panels = pair.chunks_exact(piece.bytes());
                for (unpacked, panel) in unpacked.iter_mut().zip(panels.clone()) {
                    // SAFETY: the caller's promise.
                    unsafe { unpacked.fill::<I>(grid, panel, block.clone()) };
                }
                for (b, x) in x.chunks_exact(grid.words(ROWS)).enumerate() {
                    let tile = IntTile { piece: &piece, x, block: block.clone(), first_row: b * ROWS, column };
                    let [first, second] = &unpacked;
                    // SAFETY: the caller's promise.
                    unsafe {
                        if panels.len() == 2 && I::MANY_REGISTERS {
                            tile.compute::<I, BITS, ZEROS, 2, ROWS>([first, second], 0);
                            continue;
                        }
                        for (i, unpacked) in unpacked.iter().enumerate().take(panels.len()) {
                            let tile = IntTile { column: column + i * N, block: block.clone(), ..tile };
                            for row in (0..ROWS).step_by(ROWS / 2) {
                                tile.compute::<I, BITS, ZEROS, 1, { ROWS / 2 }>([unpacked], row);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// A block of rows of `x` and a block of segments.
struct IntTile<'a, 'b> {
    piece: &'a Piece<'b>,
    /// [`Grid::words`] of [`ROWS`] rows.
    x: &'a [i32],
    block: Range<usize>,
    first_row: usize,
    column: usize,
}

impl IntTile<'_, '_> {
    /// Adds to the result: rows `row..row + R` of the block with `P` panels.
    ///
    /// # Safety
    /// The CPU has the instruction set of `I`.
    #[inline(always)]
    unsafe fn compute<I: Ints, const BITS: u8, const ZEROS: bool, const P: usize, const R: usize>(
        &self,
        panels: [&Unpacked; P],
        row: usize,
    ) {
        let Piece { grid, out, bias, m, .. } = *self.piece;
        let rows = m.saturating_sub(self.first_row + row).min(R);
        let (codes, rest) = self.x.split_at(grid.vectors() * ROWS);
        let (scales, corrections) = rest.split_at(grid.segments() * ROWS);
        let ((codes, _), (scales, _), (corrections, _)) =
            (codes.as_chunks::<ROWS>(), scales.as_chunks::<ROWS>(), corrections.as_chunks::<ROWS>());
        let first = grid.columns(self.block.start).start / WORD;
        let whole = rows == R && self.column + P * N <= out.columns();
        // SAFETY: the caller's promise, and this thread has these columns.
        unsafe {
            // Sums stay in registers if all indices of theirs are constants.
            let mut sums = [[I::Floats::splat(0.0); P]; R];
            let start = |r: usize, p: usize| {
                let column = self.column + p * N;
                if self.block.start == 0 { out.bias(bias, column) } else { out.read(self.first_row + row + r, column) }
            };
            if whole {
                for (r, sums) in sums.iter_mut().enumerate() {
                    for (p, sum) in sums.iter_mut().enumerate() {
                        *sum = I::Floats::load(&start(r, p));
                    }
                }
            } else {
                let mut values = [[[0.0; N]; P]; R];
                values.iter_mut().enumerate().take(rows).for_each(|(r, v)| *v = std::array::from_fn(|p| start(r, p)));
                for (sums, values) in sums.iter_mut().zip(&values) {
                    for (sum, values) in sums.iter_mut().zip(values) {
                        *sum = I::Floats::load(values);
                    }
                }
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
                let x = &codes[first + vectors.start..first + vectors.end];
                let panel_codes = panels.map(|p| &p.codes[vectors.clone()]);
                for (v, x) in x.iter().enumerate() {
                    for p in 0..P {
                        // SAFETY: as many vectors of codes as of `x` were taken.
                        let codes = I::load(panel_codes[p].get_unchecked(v));
                        for r in 0..R {
                            products[r][p] = products[r][p].dot::<BITS>(codes, x[row + r]);
                        }
                    }
                }
                for p in 0..P {
                    let scale = I::Floats::load(&panels[p].scales[s]);
                    for r in 0..R {
                        let scale = scale.mul(I::Floats::splat(f32::from_bits(scales[i][row + r] as u32)));
                        sums[r][p] = products[r][p].to_f32().mul_add(scale, sums[r][p]);
                    }
                }
            }
            let mut values = [[[0.0; N]; P]; R];
            for r in 0..R {
                for p in 0..P {
                    sums[r][p].store(&mut values[r][p]);
                    if whole {
                        out.write(self.first_row + row + r, self.column + p * N, &values[r][p]);
                    }
                }
            }
            if !whole {
                for (r, values) in values.iter().enumerate().take(rows) {
                    for (p, values) in values.iter().enumerate() {
                        out.write(self.first_row + row + r, self.column + p * N, values);
                    }
                }
            }
        }
    }
}

/// `x` as it is; codes are widened.
struct Widened<'a> {
    piece: Piece<'a>,
    /// `[m, k]`.
    x: &'a [f32],
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
                        for (r, values) in tile.iter().enumerate().take(rows) {
                            let start = if block.start == 0 { piece.out.bias(piece.bias, column) } else { piece.out.read(row + r, column) };
                            piece.out.write(row + r, column, &std::array::from_fn(|i| start[i] + values[i]));
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
        if scheme.bits == 4 {
            for (block, out) in segment.codes.iter().zip(out.chunks_mut(2 * WORD)) {
                let [low, high] = halves::<I>(block);
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

impl Kernels {
    /// `x [m, k]` rounded to 8 bits, in blocks of 1 row or [`ROWS`], to `words`.
    pub(crate) fn round_rows(&self, x: &[f32], m: usize, grid: Grid, words: &mut Vec<i32>) {
        let rows = if m == 1 { 1 } else { ROWS };
        words.resize(m.div_ceil(rows) * grid.words(rows), 0);
        self.pool.chunks(words, grid.words(rows), |i, out| {
            let x = &x[i * rows * grid.k..m.min((i + 1) * rows) * grid.k];
            if rows == 1 { self.isa.run(Round::<1> { grid, x, out }) } else { self.isa.run(Round::<ROWS> { grid, x, out }) }
        });
    }

    /// Products of rows that [`Self::round_rows`] has rounded, through `act`.
    pub(crate) fn rounded_product(&self, x: &[i32], piece: Piece<'_>, act: Option<Unary>) {
        if piece.m == 1 {
            self.isa.run_ints(Vector { piece, x });
            self.activate(piece, act);
            return;
        }
        for part in piece.parts() {
            self.isa.run_ints(Matrix { piece: part, x });
            self.activate(part, act);
        }
    }

    /// Products with widened codes, through `act`; `x` is `[m, k]`.
    pub(crate) fn widened_product(&self, x: &[f32], piece: Piece<'_>, act: Option<Unary>) {
        for part in piece.parts() {
            self.isa.run_ints(Widened { piece: part, x });
            self.activate(part, act);
        }
    }

    fn activate(&self, piece: Piece<'_>, act: Option<Unary>) {
        if let Some(act) = act {
            self.isa.run(Activate { piece, act });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BadIndex, Floats, Isa, Panels, Table};
    use proptest::prelude::*;
    use vlmc_artifact::{
        program::{Layout, Unary},
        quant::{Codes, Method, pack_panels},
    };

    fn floats(state: &mut u32, n: usize) -> Vec<f32> {
        let next = |_| {
            *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (*state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(next).collect()
    }

    /// Any codes, scales and zeros, not only those that quantizing gives.
    fn codes(state: &mut u32, n: usize, k: usize, scheme: Scheme) -> Codes {
        let mut below =
            |limit: u8, n: usize| floats(state, n).iter().map(|v| ((v + 1.0) * 0.5 * (f32::from(limit) + 1.0)) as u8).collect::<Vec<_>>();
        let (codes, zeros) = (below(scheme.max_code(), n * k), below(scheme.max_code(), n * scheme.groups(k)));
        let scales = floats(state, n * scheme.groups(k)).iter().map(|v| f16::from_f32(*v).to_f32()).collect();
        Codes { codes, scales, zeros: if scheme.zero_points { zeros } else { vec![scheme.middle(); n * scheme.groups(k)] } }
    }

    /// What `dynamic` makes of rows.
    fn rounded(x: &[f32], k: usize, scheme: Scheme) -> Vec<f32> {
        let group = |x: &[f32]| {
            let largest = x.iter().fold(0f32, |m, v| m.max(v.abs()));
            x.iter().map(|v| (v * (127.0 / largest.max(1e-30))).round_ties_even() * (largest / 127.0)).collect::<Vec<_>>()
        };
        x.chunks(k.max(1)).flat_map(|row| row.chunks(scheme.group_len(k)).flat_map(group).collect::<Vec<_>>()).collect()
    }

    fn scheme() -> impl Strategy<Value = Scheme> {
        let group = prop_oneof![Just(None), prop::sample::select(vec![16u16, 32, 64, 128, 256]).prop_map(Some)];
        (prop_oneof![Just(4u8), Just(8)], group, any::<bool>()).prop_map(|(bits, group, zero_points)| Scheme { bits, group, zero_points })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn products_are_those_of_the_numbers_that_codes_stand_for(
            scheme in scheme(), m in 0usize..20, n in 0usize..70, k in prop_oneof![0usize..100, 500usize..1100],
            threads in 1usize..4, with_bias: bool, dynamic: bool, mut seed: u32,
        ) {
            let x = floats(&mut seed, m * k);
            let bias = floats(&mut seed, n);
            let bias = with_bias.then_some(bias.as_slice());
            let codes = codes(&mut seed, n, k, scheme);
            let bytes = pack_panels(&codes, k, scheme);
            let w = Panels::new(Floats::Quant(&bytes, scheme), n, k).unwrap();
            let (dense, seen) = (codes.dequantize(k, scheme), if dynamic { rounded(&x, k, scheme) } else { x.clone() });
            let product = |i: usize| {
                let terms = (0..k).map(|c| f64::from(seen[i / n * k + c]) * f64::from(dense[i % n * k + c]));
                // The sum, and how large its terms are.
                let start = bias.map_or(0.0, |b| f64::from(b[i % n]));
                terms.fold((start, start.abs()), |(s, a), t| (s + t, a + t.abs()))
            };
            let expected: Vec<(f64, f64)> = (0..m * n).map(product).collect();
            let mut others: Vec<(Isa, Vec<f32>)> = vec![];
            for isa in Isa::ALL.into_iter().filter(|i| i.is_supported()) {
                let kernels = Kernels::with_isa(threads, isa).unwrap();
                let mut out = vec![f32::NAN; m * n];
                kernels.linear(&x, &w, bias, None, dynamic, &mut out);
                for (o, (e, size)) in out.iter().zip(&expected) {
                    prop_assert!((f64::from(*o) - e).abs() <= 1e-5 * (1e-3 + size), "{isa:?}: {o} instead of {e} of {size}");
                }
                let mut alone = vec![f32::NAN; m * n];
                Kernels::with_isa(1, isa).unwrap().linear(&x, &w, bias, None, dynamic, &mut alone);
                prop_assert_eq!(&out, &alone);
                if dynamic && n > 0 && k > 0 {
                    // Rows do not depend on each other.
                    let mut row = vec![f32::NAN; n];
                    for (x, out) in x.chunks_exact(k).zip(out.chunks_exact(n)) {
                        kernels.linear(x, &w, bias, None, dynamic, &mut row);
                        prop_assert_eq!(&row, out);
                    }
                }
                others.push((isa, out));
            }
            // VNNI changes speed only.
            let of = |isa: Isa| others.iter().find(|o| o.0 == isa).map(|o| &o.1);
            for (plain, vnni) in [(Isa::Avx2, Isa::AvxVnni), (Isa::Avx512, Isa::Avx512Vnni)] {
                if let (Some(plain), Some(vnni)) = (of(plain), of(vnni)) {
                    prop_assert_eq!(plain, vnni);
                }
            }
        }

        /// Many rows go through tiles where there are such, which round `x` to bytes or to bf16, and weights to bf16.
        #[test]
        fn products_of_many_rows_are_near_those_of_the_numbers(
            scheme in scheme(), m in 32usize..600, n in 1usize..70, k in prop_oneof![1usize..100, 500usize..1100],
            threads in 1usize..3, act: bool, mut seed: u32,
        ) {
            let (x, bias) = (floats(&mut seed, m * k), floats(&mut seed, n));
            let codes = codes(&mut seed, n, k, scheme);
            let bytes = pack_panels(&codes, k, scheme);
            let w = Panels::new(Floats::Quant(&bytes, scheme), n, k).unwrap();
            let act = act.then_some(Unary::Silu);
            let product = |x: &[f32]| {
                let mut out = vec![f32::NAN; m * n];
                Kernels::with_isa(1, Isa::Scalar).unwrap().linear(x, &w, Some(&bias), act, false, &mut out);
                out
            };
            let (exact, rounded) = (product(&x), product(&rounded(&x, k, scheme)));
            let dense = codes.dequantize(k, scheme);
            for isa in Isa::ALL.into_iter().filter(|i| i.is_supported()) {
                let mut out = vec![f32::NAN; m * n];
                Kernels::with_isa(threads, isa).unwrap().linear(&x, &w, Some(&bias), act, true, &mut out);
                for (i, o) in out.iter().enumerate() {
                    let terms = (0..k).map(|c| (x[i / n * k + c] * dense[i % n * k + c]).powi(2));
                    let size = terms.sum::<f32>().sqrt() + 1e-3;
                    // Either is near enough: errors of 2^-9 of each term add up as their squares do, 6 times that is never seen.
                    let near = |e: f32, bound: f32| (o - e).abs() <= bound * size;
                    prop_assert!(near(exact[i], 6.0 / 256.0) || near(rounded[i], 1e-4), "{isa:?}: {o}, not {} or {}", exact[i], rounded[i]);
                }
            }
        }

        #[test]
        fn rows_of_tables_are_those_that_codes_stand_for(scheme in scheme(), n in 1usize..40, width in 0usize..600, mut seed: u32) {
            let codes = codes(&mut seed, n, width, scheme);
            let bytes = pack_panels(&codes, width, scheme);
            let data = Floats::Quant(&bytes, scheme);
            let table = Table::new(data, Layout::Panel16, n, width).unwrap();
            let mut out = vec![f32::NAN; n * width];
            let ids: Vec<i64> = (0..n as i64).collect();
            Kernels::new(1).embedding(&table, &ids, &mut out).unwrap();
            prop_assert_eq!(out, codes.dequantize(width, scheme));
            let bad = Kernels::new(1).embedding(&table, &[n as i64], &mut vec![0.0; width]);
            prop_assert_eq!(bad, Err(BadIndex { index: n as i64, len: n }));
            prop_assert!(Table::new(data, Layout::Rows, n, width).is_none());
        }
    }

    /// The largest sums that there are: long rows of the largest codes.
    #[test]
    fn long_rows_do_not_overflow() {
        let k = 200_000;
        let scheme = Scheme { zero_points: true, ..Scheme::INT8 };
        let codes = Codes { codes: vec![255; k], scales: vec![1.0], zeros: vec![0] };
        let bytes = pack_panels(&codes, k, scheme);
        let w = Panels::new(Floats::Quant(&bytes, scheme), 1, k).unwrap();
        for isa in Isa::ALL.into_iter().filter(|i| i.is_supported()) {
            let mut out = [0.0; 2];
            let x = [vec![-1.0; k], vec![1.0; k]].concat();
            Kernels::with_isa(1, isa).unwrap().linear(&x, &w, None, None, true, &mut out);
            let e = 255.0 * k as f32;
            assert!((out[0] + e).abs() < 1e-4 * e && (out[1] - e).abs() < 1e-4 * e, "{isa:?} {out:?}");
        }
    }

    #[test]
    fn numbers_that_are_not_finite_do_no_harm() {
        let k = 40;
        let codes = Codes::of(&vec![0.5; 20 * k], k, Scheme::INT4, Method::Round);
        let bytes = pack_panels(&codes, k, Scheme::INT4);
        let w = Panels::new(Floats::Quant(&bytes, Scheme::INT4), 20, k).unwrap();
        for isa in Isa::ALL.into_iter().filter(|i| i.is_supported()) {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN_POSITIVE / 2.0] {
                let mut x = vec![1.0; 3 * k];
                x[k + 1] = bad;
                let mut out = vec![0.0; 60];
                Kernels::with_isa(1, isa).unwrap().linear(&x, &w, None, None, true, &mut out);
                for row in [&out[..20], &out[40..]] {
                    assert!(row.iter().all(|v| (v - 20.0).abs() < 0.1), "{isa:?} {bad}: {row:?}");
                }
            }
        }
    }

    #[test]
    fn lengths_that_do_not_fit_are_refused() {
        let scheme = Scheme::INT4;
        let len = panel_bytes(scheme, 64).unwrap();
        let bytes = vec![0; 2 * len];
        assert!(Panels::new(Floats::Quant(&bytes, scheme), 17, 64).is_some());
        assert!(Panels::new(Floats::Quant(&bytes, scheme), 16, 64).is_none());
        assert!(Panels::new(Floats::Quant(&bytes[1..], scheme), 17, 64).is_none());
        assert!(Panels::new(Floats::Quant(&[], scheme), usize::MAX, usize::MAX).is_none());
    }
}
