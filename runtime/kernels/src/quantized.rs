//! Products with quantized matrices in panels.
//!
//! Either `x` is rounded to 8 bits and multiplied with the codes in integers, 4 columns at a time, or the codes are widened to
//! `f32`. Both go by segments: runs of columns that share a scale, cut so short that a segment's integers fit 32 bits, however
//! long a row is. What many rows need is in [`many`], how `x` is rounded in [`rounded`], the second way in [`widened`]; matrices whose codes lie in two halves are in [`planes`].

mod many;
mod planes;
mod rounded;
mod widened;

pub(crate) use self::planes::Planes;
pub use self::rounded::Rounded;
use self::{many::Matrix, widened::Widened};
use crate::{
    Isa, Kernels, elementwise,
    ints::Ints,
    isa::{IntTask, Task},
    lanes::{ASK_FAR, Lanes, N, into, prefetch, prefetch_far},
    linear::OutColumns,
};
use half::f16;
use std::ops::Range;
use vlmc_artifact::{
    Scheme,
    program::{PANEL, Unary},
    quant::{RUN, code_at, code_blocks, panel_bytes},
};

/// Most columns of a segment, and columns of a block of them: sums of so many products of 255 * 127 are far from 2^31, codes of
/// four panels stay in the second cache, and sums are seldom put aside. The sizes of groups divide it.
const BLOCK: usize = 5120;
/// Columns whose codes make a vector: 4 bytes of each of 16 rows.
const WORD: usize = 4;
/// Most rows of rounded `x` that are multiplied at once.
const ROWS: usize = 6;
/// Most rows of a piece of a product whose codes need no unpacking.
const PART: usize = 40 * ROWS;
/// Rows that are many: from here on it pays to unpack codes.
const MANY: usize = 97;
/// Least columns of a segment that many rows are multiplied with: 64 products of vectors for each sum that becomes a float.
const WIDE: usize = 256;

/// Rows of `m` that lie together: equal parts of few.
fn block_rows(m: usize) -> usize {
    m.div_ceil(m.div_ceil(ROWS).max(1)).max(1)
}

/// Calls a function with a constant for [`block_rows`].
macro_rules! with_rows {
    ($m:expr, $R:ident => $call:expr) => {
        with_rows!(@ $m, $R => $call, 1 2 3 4 5)
    };
    (@ $m:expr, $R:ident => $call:expr, $($n:literal)*) => {
        match block_rows($m) {
            $($n => { const $R: usize = $n; $call })*
            _ => { const $R: usize = ROWS; $call }
        }
    };
}
use with_rows;

/// How the panels of a matrix with `k` columns lie.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Grid {
    pub(crate) scheme: Scheme,
    pub(crate) k: usize,
}

/// A segment of a panel.
#[derive(Clone, Copy, Default)]
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
        let (n, step) = (self.segments(), BLOCK / self.segment_len());
        (0..n).step_by(step).map(move |i| i..n.min(i + step))
    }

    /// The segments of a panel.
    #[inline(always)]
    pub(crate) fn segments_of(self, panel: &[u8]) -> Segments<'_> {
        Segments::new(self, panel, |columns| code_blocks(self.scheme, columns))
    }

    /// Segment `i` of a panel.
    #[inline(always)]
    pub(crate) fn segment(self, panel: &[u8], i: usize) -> Segment<'_> {
        let mut segments = self.segments_of(panel);
        // A group is one segment, or the whole row.
        let (groups, within) = if self.scheme.group_len(self.k) <= BLOCK { (i, 0) } else { (0, i) };
        segments.rest = &segments.rest[groups * segments.group_bytes..];
        segments.nth(within).unwrap_or_default()
    }

    /// What `m` rows are multiplied with if they are many: the matrix itself, or, of small groups of fewer bits, its numbers rounded to
    /// 8 bits with a scale for [`WIDE`] columns, which changes them by at most a 254th of the largest number among these.
    /// `None` for few rows, and for small groups of 8 bits, which would lose what they are for.
    pub(crate) fn wide(self, m: usize) -> Option<Self> {
        let wide = Scheme { bits: 8, group: Some(WIDE as u16), zero_points: false };
        match self.scheme.bits {
            _ if m < MANY => None,
            _ if self.scheme.group_len(self.k) >= WIDE.min(self.k) => Some(self),
            8 => None,
            _ => Some(Self::new(wide, self.k)),
        }
    }

    /// Whether many rows can be multiplied with all codes where they lie.
    pub(crate) fn lies(self, m: usize) -> bool {
        self.wide(m).is_some() && self.blocks().all(|block| self.lie(&block))
    }

    /// Whether the codes of a block of segments are bytes that no scale is between.
    fn lie(self, block: &Range<usize>) -> bool {
        self.scheme.bits == 8 && block.len() == 1
    }

    /// Row `r` of a panel.
    pub(crate) fn row(self, panel: &[u8], r: usize, out: &mut [f32]) {
        for (i, segment) in self.segments_of(panel).enumerate() {
            self.numbers(&segment, r, |c| code_at(self.scheme, segment.codes, r, c), &mut out[self.columns(i)]);
        }
    }

    /// Numbers of row `r` of a segment; the code of column `c` is `code(c)`.
    fn numbers(self, segment: &Segment<'_>, r: usize, code: impl Fn(usize) -> u8, out: &mut [f32]) {
        let scale = segment.scale(r);
        let zero = segment.zeros.map_or(self.scheme.middle(), |z| z[r]);
        for (c, out) in out.iter_mut().enumerate() {
            *out = scale * f32::from(i16::from(code(c)) - i16::from(zero));
        }
    }

    /// 32-bit words of a block of `rows` rows of rounded `x`: codes of whole vectors of each row, then of each segment the rows' scales
    /// and what their zeros take from a sum.
    #[inline(always)]
    fn words(self, rows: usize) -> usize {
        rows * (self.vectors() + 2 * self.segments())
    }

    /// Vectors of codes of a row.
    #[inline(always)]
    fn vectors(self) -> usize {
        self.vectors_of(self.k)
    }

    /// Vectors of codes of so many columns: whole blocks of 8 columns, so that they serve 4 and 8 bits, or whole runs.
    #[inline(always)]
    fn vectors_of(self, columns: usize) -> usize {
        let whole = if self.scheme.bits == 3 { RUN } else { 2 * WORD };
        columns.div_ceil(whole) * (whole / WORD)
    }
}

/// The segments of a panel, one after the other: small groups are many, so that a division for each would cost as much as its products.
pub(crate) struct Segments<'a> {
    /// Groups that have not begun.
    rest: &'a [u8],
    /// The last one that has, without what was given.
    group: Segment<'a>,
    group_bytes: usize,
    scale_bytes: usize,
    zero_bytes: usize,
    /// Blocks of codes of a segment.
    blocks: usize,
}

impl<'a> Segments<'a> {
    /// Of a panel with so many blocks of codes for columns.
    #[inline(always)]
    fn new(grid: Grid, panel: &'a [u8], blocks: impl Fn(usize) -> usize) -> Self {
        let scale_bytes = PANEL * grid.scheme.scale_bytes();
        let zero_bytes = if grid.scheme.zero_points { PANEL } else { 0 };
        let group_bytes = scale_bytes + zero_bytes + blocks(grid.scheme.group_len(grid.k)) * 4 * PANEL;
        Self { rest: panel, group: Segment::default(), group_bytes, scale_bytes, zero_bytes, blocks: blocks(grid.segment_len()) }
    }

    /// The same if each is a group with a small scale, and nothing else: a loop that knows so is up to twice as fast.
    #[inline(always)]
    fn plain(grid: Grid, panel: &'a [u8], blocks: impl Fn(usize) -> usize) -> Option<impl Iterator<Item = Segment<'a>>> {
        let len = grid.scheme.group_len(grid.k);
        let plain = grid.scheme.scale_bytes() == 2 && !grid.scheme.zero_points && grid.segment_len() == len;
        let group = 2 * PANEL + blocks(len) * 4 * PANEL;
        plain.then(|| {
            panel.chunks(group).filter_map(|group| {
                let (scales, codes) = group.split_first_chunk::<{ 2 * PANEL }>()?;
                Some(Segment { scales, zeros: None, codes: codes.as_chunks().0 })
            })
        })
    }
}

impl<'a> Iterator for Segments<'a> {
    type Item = Segment<'a>;

    #[inline(always)]
    fn next(&mut self) -> Option<Segment<'a>> {
        if self.group.codes.is_empty() {
            let (group, rest) = self.rest.split_at(self.group_bytes.min(self.rest.len()));
            let (scales, group) = group.split_at_checked(self.scale_bytes)?;
            let (zeros, codes) = group.split_at_checked(self.zero_bytes)?;
            self.group = Segment { scales, zeros: zeros.first_chunk(), codes: codes.as_chunks().0 };
            self.rest = rest;
        }
        let (codes, rest) = self.group.codes.split_at(self.blocks.min(self.group.codes.len()));
        self.group.codes = rest;
        Some(Segment { codes, ..self.group })
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

    /// What zeros take from the products of rounded `x`, of which `correction` tells what a zero, or a zero of 1, takes.
    ///
    /// # Safety
    /// The CPU has the instruction set of `I`.
    #[inline(always)]
    unsafe fn correction<I: Ints>(&self, correction: i32) -> I {
        // SAFETY: the caller's promise.
        unsafe {
            let correction = I::splat(correction);
            match self.zeros {
                Some(zeros) => Self::zeros::<I>(zeros).mul(correction),
                None => correction,
            }
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
unsafe fn halves<I: Ints>(both: I) -> [I; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let mask = I::splat(0x0f0f_0f0f);
        [both.and(mask), both.shift_right::<4>().and(mask)]
    }
}

/// Words 0 to 7 of the codes of a run of 3 bits, 4 columns each.
///
/// # Safety
/// The CPU has the instruction set of `I`.
#[inline(always)]
unsafe fn eighths<I: Ints>(run: &[[u8; 4 * PANEL]; 3]) -> [I; RUN / WORD] {
    // SAFETY: the caller's promise.
    unsafe {
        let [a, b, c] = [I::load(&run[0]), I::load(&run[1]), I::load(&run[2])];
        let (all, low, high) = (I::splat(0x0707_0707), I::splat(0x0303_0303), I::splat(0x0404_0404));
        let [d, e, f] = [a.shift_right::<3>(), b.shift_right::<3>(), c.shift_right::<3>()];
        [
            a.and(all),
            d.and(all),
            b.and(all),
            e.and(all),
            c.and(all),
            f.and(all),
            a.shift_right::<6>().and(low).add(c.shift_right::<4>().and(high)),
            b.shift_right::<6>().and(low).add(c.shift_right::<5>().and(high)),
        ]
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
    /// Activation of the results, and what computes it.
    pub(crate) act: Option<(Isa, Unary)>,
    pub(crate) out: OutColumns,
    pub(crate) m: usize,
}

impl Piece<'_> {
    pub(crate) fn bytes(&self) -> usize {
        self.grid.panel_bytes().unwrap_or(0).max(1)
    }

    /// Writes results, through the activation, of rows from `row` on and panels from `column` on.
    ///
    /// # Safety
    /// This thread has these columns.
    #[inline(always)]
    unsafe fn write<const P: usize>(&self, row: usize, column: usize, values: &mut [[[f32; N]; P]]) {
        if let Some((isa, act)) = self.act {
            activate(isa, act, values.as_flattened_mut().as_flattened_mut());
        }
        for (r, values) in values.iter().enumerate() {
            let (values, width) = (values.as_flattened(), (P * N).min(self.out.columns() - column));
            // A length that the compiler knows, mostly.
            let values = if width < P * N { &values[..width] } else { values };
            // SAFETY: the caller's promise.
            unsafe { self.out.write_part(row + r, column, values) };
        }
    }
}

/// Not a part of each kind of product, which would be long to compile and lack registers.
#[inline(never)]
fn activate(isa: Isa, act: Unary, values: &mut [f32]) {
    isa.run(Activate { act, values });
}

struct Activate<'a> {
    act: Unary,
    values: &'a mut [f32],
}

impl Task for Activate<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        // SAFETY: the caller's promise.
        unsafe { elementwise::map::<L>(self.act, self.values) }
    }
}

/// Rows of rounded `x` in blocks of `R`, so few that panels are multiplied with them as they come from memory.
struct Few<'a, const R: usize> {
    piece: Piece<'a>,
    x: &'a [i32],
}

impl<const R: usize> IntTask for Few<'_, R> {
    #[inline(always)]
    unsafe fn run<I: Ints>(self) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.piece.grid.scheme.bits {
                3 => self.products::<I, 3>(),
                4 => self.products::<I, 4>(),
                _ => self.products::<I, 8>(),
            }
        }
    }
}

impl<const R: usize> Few<'_, R> {
    #[inline(always)]
    unsafe fn products<I: Ints, const BITS: u8>(self) {
        let Self { piece, x } = self;
        for (p, panel) in piece.panels.chunks_exact(piece.bytes()).enumerate() {
            let column = (piece.first_panel + p) * N;
            // Biases come from memory too, where each panel would wait for a few.
            prefetch::<{ into::FIRST }, _>(piece.bias.as_ptr().wrapping_add(column + N));
            for (b, x) in x.chunks_exact(piece.grid.words(R)).enumerate() {
                // SAFETY: the caller's promise.
                let mut values = unsafe { Self::block::<I, BITS>(piece.grid, panel, x, &piece.out.bias(piece.bias, column)) };
                let rows = R.min(piece.m - b * R);
                // SAFETY: this thread has these columns.
                unsafe { piece.write::<1>(b * R, column, &mut values[..rows]) };
            }
        }
    }

    /// `bias` + a block of rows times a panel.
    #[inline(always)]
    unsafe fn block<I: Ints, const BITS: u8>(grid: Grid, panel: &[u8], x: &[i32], bias: &[f32; N]) -> [[[f32; N]; 1]; R] {
        let blocks = |columns| code_blocks(grid.scheme, columns);
        // SAFETY: the caller's promise.
        unsafe {
            // Sums of more rows find no registers then.
            match Segments::plain(grid, panel, blocks).filter(|_| R <= 4) {
                Some(groups) => Self::sums::<I, BITS>(grid, groups, x, bias),
                None => Self::sums::<I, BITS>(grid, Segments::new(grid, panel, blocks), x, bias),
            }
        }
    }

    /// [`Self::block`] of the segments of a panel.
    #[inline(always)]
    unsafe fn sums<'b, I: Ints, const BITS: u8>(
        grid: Grid,
        segments: impl Iterator<Item = Segment<'b>>,
        x: &[i32],
        bias: &[f32; N],
    ) -> [[[f32; N]; 1]; R] {
        let (codes, rest) = x.split_at(grid.vectors() * R);
        let (scales, corrections) = rest.split_at(grid.segments() * R);
        let ((scales, _), (corrections, _)) = (scales.as_chunks::<R>(), corrections.as_chunks::<R>());
        let rows: [&[i32]; R] = std::array::from_fn(|r| &codes[r * grid.vectors()..][..grid.vectors()]);
        let (far, mut values) = (*ASK_FAR, [[[0.0; N]]; R]);
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [I::Floats::load(bias); R];
            let mut first = 0;
            for ((segment, corrections), scales) in segments.zip(corrections).zip(scales) {
                // Of the last segment of a row there may be fewer.
                let end = rows[0].len().min(first + grid.vectors_of(grid.segment_len()));
                let x = rows.map(|row| &row[first..end]);
                first = end;
                let mut products = [I::splat(0); R];
                for r in 0..R {
                    products[r] = segment.correction(corrections[r]);
                }
                dot::<I, BITS, R>(&mut products, segment.codes, x, far);
                let scale = segment.scales::<I::Floats>();
                for r in 0..R {
                    let scale = scale.mul(I::Floats::splat(f32::from_bits(scales[r] as u32)));
                    sums[r] = products[r].to_f32().mul_add(scale, sums[r]);
                }
            }
            sums.iter().zip(&mut values).for_each(|(sum, [values])| sum.store(values));
        }
        values
    }
}

/// Rows that are so few that reading codes takes longer than multiplying with them.
const FEWEST: usize = 3;

/// Adds codes times `R` rows of `x`; `far` is that of [`prefetch_once`]. Two sums of a row at once hide the latency of the additions where rows are few.
///
/// # Safety
/// The CPU has the instruction set of `I`.
#[inline(always)]
unsafe fn dot<I: Ints, const BITS: u8, const R: usize>(sums: &mut [I; R], codes: &[[u8; 4 * PANEL]], x: [&[i32]; R], far: bool) {
    // Vectors of codes that there are; the codes of a pair or a run that has fewer are 0.
    let words = x[0].len();
    assert!(x.iter().all(|x| x.len() == words));
    // SAFETY of words of `x`: these are below `words`. Else: the caller's promise.
    unsafe {
        // Words of few rows are spread as they are loaded. Of more, so many loads would be waited for: both at once go through general registers
        // (Zen 5: 6 rows take three fifths of the time so).
        let pair = |i: usize| {
            x.map(|x| {
                if R <= 2 { [*x.get_unchecked(i), *x.get_unchecked(i + 1)] } else { x.as_ptr().add(i).cast::<[i32; 2]>().read_unaligned() }
            })
        };
        let mut others = [I::splat(0); R];
        if BITS == 3 {
            for (i, run) in codes.as_chunks::<3>().0.iter().enumerate().take(words / (RUN / WORD)) {
                run.iter().for_each(|block| prefetch_for::<R>(block, far));
                let codes = eighths(run);
                for (j, codes) in codes.as_chunks::<2>().0.iter().enumerate() {
                    multiply::<I, BITS, R>(sums, &mut others, *codes, pair(RUN / WORD * i + 2 * j));
                }
            }
        } else if BITS == 4 {
            for (i, block) in codes.iter().enumerate().take(words / 2) {
                prefetch_for::<R>(block, far);
                multiply::<I, BITS, R>(sums, &mut others, halves(I::load(block)), pair(2 * i));
            }
        } else {
            let (pairs, last) = codes.as_chunks::<2>();
            for (i, codes) in pairs.iter().enumerate().take(words / 2) {
                codes.iter().for_each(|block| prefetch_for::<R>(block, far));
                multiply::<I, BITS, R>(sums, &mut others, [I::load(&codes[0]), I::load(&codes[1])], pair(2 * i));
            }
            if let Some(codes) = last.first().filter(|_| 2 * pairs.len() + 1 < words) {
                multiply::<I, BITS, R>(sums, &mut others, [I::load(codes), I::splat(0)], pair(2 * pairs.len()));
            }
        }
        for (sum, other) in sums.iter_mut().zip(others) {
            *sum = sum.add(other);
        }
    }
}

/// Two vectors of codes times `R` rows of `x`; the second's products go to `others` where rows are few.
///
/// # Safety
/// The CPU has the instruction set of `I`.
#[inline(always)]
unsafe fn multiply<I: Ints, const BITS: u8, const R: usize>(sums: &mut [I; R], others: &mut [I; R], codes: [I; 2], x: [[i32; 2]; R]) {
    for r in 0..R {
        // SAFETY: the caller's promise.
        unsafe {
            sums[r] = sums[r].dot::<BITS>(codes[0], x[r][0]);
            let other = if R <= 2 { &mut others[r] } else { &mut sums[r] };
            *other = other.dot::<BITS>(codes[1], x[r][1]);
        }
    }
}

/// Asks for a block behind `block`, since the CPU's own prefetching stops at pages of 4 KiB. Codes that are multiplied as they come are asked
/// for [`prefetch_far`] with `far`, which is [`ASK_FAR`]; else a little ahead and into the second cache: the CPU goes as far as memory can
/// answer by itself, and more would come in its way (Zen 4, a thread: 32 blocks into the first cache take a sixth longer).
#[inline(always)]
fn prefetch_once(block: &[u8; 4 * PANEL], far: bool) {
    let block = std::ptr::from_ref(block);
    if far { prefetch_far(block) } else { prefetch::<{ into::SECOND }, _>(block.wrapping_add(12)) }
}

/// The same where much is done with each block.
#[inline(always)]
fn prefetch_ahead(block: &[u8; 4 * PANEL]) {
    prefetch::<{ into::FIRST }, _>(std::ptr::from_ref(block).wrapping_add(32));
}

/// The same where blocks are multiplied with `R` rows.
#[inline(always)]
fn prefetch_for<const R: usize>(block: &[u8; 4 * PANEL], far: bool) {
    if R <= FEWEST { prefetch_once(block, far) } else { prefetch_ahead(block) }
}

impl Kernels {
    /// Products of rows that [`Self::round_rows`] has rounded.
    pub(crate) fn rounded_product(&self, x: &[i32], piece: Piece<'_>) {
        match piece.grid.wide(piece.m) {
            Some(wide) => self.isa.run_ints(Matrix { piece, wide, x }),
            None => with_rows!(piece.m, R => self.isa.run_ints(Few::<R> { piece, x })),
        }
    }

    /// [`Self::rounded_product`] with a matrix that [`Grid::lies`], by all threads. Since nothing has to be unpacked, pieces are of some rows
    /// only: a thread that is kept from working delays the others by as little as one of them.
    pub(crate) fn split_product(&self, x: &[i32], piece: Piece<'_>) {
        let Piece { grid, panels, out, m, .. } = piece;
        let (bytes, words) = (many::PANELS * piece.bytes(), grid.words(ROWS));
        // Of a half of the rows, with which some threads begin, all panels; of panels, the parts of that.
        let (groups, parts) = (panels.len().div_ceil(bytes), m.div_ceil(2 * PART));
        let rows = m.div_ceil(2 * parts).next_multiple_of(ROWS);
        self.pool.run(2 * groups * parts, |i| {
            let (half, i) = (i / (groups * parts), i % (groups * parts));
            let (i, row) = (i / parts, m.min((half * parts + i % parts) * rows));
            let (panels, m) = (&panels[i * bytes..panels.len().min((i + 1) * bytes)], rows.min(m - row));
            let piece = Piece { panels, first_panel: i * many::PANELS, out: out.rows_from(row), m, ..piece };
            self.isa.run_ints(Matrix { piece, wide: grid, x: &x[row / ROWS * words..][..m.div_ceil(ROWS) * words] });
        });
    }

    /// Products with widened codes; `x` is `[m, k]`.
    pub(crate) fn widened_product(&self, x: &[f32], piece: Piece<'_>) {
        self.isa.run_ints(Widened { piece, x });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BadIndex, Floats, Isa, Panels, Table};
    use proptest::prelude::*;
    use vlmc_artifact::{
        program::{Layout, Unary},
        quant::{Codes, GROUPS, Method, pack_panels},
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
        let group = prop::option::of(prop::sample::select(&GROUPS));
        (prop::sample::select(vec![3u8, 4, 8]), group, any::<bool>())
            .prop_map(|(bits, group, zero_points)| Scheme { bits, group, zero_points })
            .prop_filter("3 bits lie in runs", |s| s.bits != 3 || s.group != Some(16))
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

        /// Many rows: `x` and small groups are rounded to 8 bits in long runs, or both to bf16 where there are tiles.
        #[test]
        fn products_of_many_rows_are_near_those_of_the_numbers(
            scheme in scheme(), m in prop_oneof![32usize..MANY, MANY..600], n in 1usize..140, k in prop_oneof![1usize..100, 500usize..1100],
            threads in 1usize..3, act: bool, mut seed: u32,
        ) {
            let (x, bias) = (floats(&mut seed, m * k), floats(&mut seed, n));
            let codes = codes(&mut seed, n, k, scheme);
            let bytes = pack_panels(&codes, k, scheme);
            let w = Panels::new(Floats::Quant(&bytes, scheme), n, k).unwrap();
            let act = act.then_some(Unary::Silu);
            let product = |isa: Isa, threads: usize, dynamic: bool| {
                let mut out = vec![f32::NAN; m * n];
                Kernels::with_isa(threads, isa).unwrap().linear(&x, &w, Some(&bias), act, dynamic, &mut out);
                out
            };
            let (exact, scalar) = (product(Isa::Scalar, 1, false), product(Isa::Scalar, 1, true));
            // Steps of `x` and of the matrix, of a row and column.
            let group = scheme.group_len(k);
            let run = group.max(WIDE);
            let largest = |x: &[f32]| x.iter().fold(0f32, |m, v| m.max(v.abs()));
            let x_steps: Vec<f32> = x.chunks(k).flat_map(|row| row.chunks(run).map(|x| largest(x) / 127.0).collect::<Vec<_>>()).collect();
            let of_groups: Vec<f32> = codes.scales.iter().zip(&codes.zeros)
                .map(|(scale, zero)| scale.abs() * f32::from((*zero).max(scheme.max_code() - zero)) / 127.0).collect();
            let merged = scheme.bits < 8 && group < WIDE;
            let steps: Vec<f32> = of_groups.chunks(scheme.groups(k)).flat_map(|row| row.chunks(run / group).map(largest).collect::<Vec<_>>())
                .map(|step| if merged { step } else { 0.0 }).collect();
            let dense = codes.dequantize(k, scheme);
            let runs = k.div_ceil(run);
            let deviation: Vec<f32> = (0..m * n).map(|i| {
                let (row, column) = (i / n, i % n);
                let of = |c: usize| {
                    let (x, w) = (x[row * k + c], dense[column * k + c]);
                    let [a, b] = [w * x_steps[row * runs + c / run], x * steps[column * runs + c / run]];
                    (a * a + b * b) / 12.0 + (x * w / 256.0).powi(2)
                };
                (0..k).map(of).sum::<f32>().sqrt()
            }).collect();
            for isa in Isa::ALL.into_iter().filter(|i| i.is_supported()) {
                let out = product(isa, threads, true);
                for (i, o) in out.iter().enumerate() {
                    // 6 standard deviations are never seen.
                    prop_assert!((o - exact[i]).abs() <= 6.0 * deviation[i] + 1e-3, "{isa:?}: {o}, not {}, {}", exact[i], deviation[i]);
                    let same = (o - scalar[i]).abs() <= 1e-2 * deviation[i] + 1e-4;
                    #[cfg(target_arch = "x86_64")]
                    let same = same || isa == Isa::Amx;
                    prop_assert!(same, "{isa:?}: {o}, not {}", scalar[i]);
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

    /// Many rows of more columns than a block give what few of them give, which go through no blocks.
    #[test]
    fn blocks_of_long_rows_add_up() {
        let (m, n, k) = (MANY + 1, 70, 2 * BLOCK + 300);
        let mut seed = 7;
        let (x, bias) = (floats(&mut seed, m * k), floats(&mut seed, n));
        for scheme in [Scheme::INT8, Scheme { zero_points: true, ..Scheme::INT8 }, Scheme { group: Some(256), ..Scheme::INT4 }] {
            let codes = codes(&mut seed, n, k, scheme);
            let bytes = pack_panels(&codes, k, scheme);
            let w = Panels::new(Floats::Quant(&bytes, scheme), n, k).unwrap();
            // With tiles, rows are rounded to another type.
            for isa in Isa::ALL.into_iter().filter(|i| i.is_supported() && *i != Isa::Amx) {
                let product = |rows: Range<usize>| {
                    let mut out = vec![f32::NAN; rows.len() * n];
                    let x = &x[rows.start * k..rows.end * k];
                    Kernels::with_isa(2, isa).unwrap().linear(x, &w, Some(&bias), None, true, &mut out);
                    out
                };
                let many = product(0..m);
                let size = many.iter().fold(0f32, |size, v| size.max(v.abs()));
                for few in [0..5, m - 5..m] {
                    for (a, b) in many[few.start * n..few.end * n].iter().zip(product(few.clone())) {
                        assert!((a - b).abs() <= 1e-5 * size, "{isa:?}, {scheme:?}: {a} instead of {b}");
                    }
                }
            }
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
