//! Products of many rows with quantized matrices in AMX tiles: 16 rows of 64 bytes times 16 columns of 64 bytes at once.
//!
//! A matrix of 8 bits with one scale per row is multiplied in integers, as it lies: blocks of its panels are rows of tiles. Other
//! codes are widened to bf16, and so is `x`, which is finer than rounding it to 8 bits: sums of a group could not leave the tiles
//! as fast as they are made. Neither is bit by bit what few rows give (sums are rounded elsewhere).

use crate::{
    Kernels, elementwise,
    isa::Task,
    lanes::{Avx512, Lanes, N},
    quantized::{Grid, Piece},
    round::{round_to, steps as steps_of},
};
use bytemuck::{Pod, Zeroable};
use std::{arch::x86_64::*, cell::RefCell, sync::OnceLock};

/// Rows from which tiles pay.
pub(crate) const MIN_ROWS: usize = 32;
/// Rows whose `x` is packed at once: a block of their columns stays in the second cache.
const CHUNK: usize = 512;
/// Rows and columns that a step of the kernel makes: two by two tiles.
pub(crate) const SIDE: usize = 32;
/// Bytes of a tile.
pub(crate) const TILE: usize = 1024;
/// Bytes of a row of a tile.
pub(crate) const ROW: usize = 64;
/// Tiles of a panel's columns that are multiplied at once: two panels' stay in the first cache.
const STEPS: usize = 8;
/// Pairs of panels that are multiplied with a block of columns of all rows, before the next block: that block of `x` and the sums
/// stay in the second cache.
const GROUP: usize = 16;
/// Longest row whose products fit 32 bits, whatever the codes: 255 * 127 * 2^16 < 2^31.
const MAX_INT_COLUMNS: usize = 1 << 16;

/// Whether this CPU multiplies tiles of bytes and bf16 and the system lets this process use it, which is asked once.
pub(crate) fn is_supported() -> bool {
    static SUPPORTED: OnceLock<bool> = OnceLock::new();
    *SUPPORTED.get_or_init(|| {
        const BF16: u32 = 1 << 22;
        const TILES: u32 = 1 << 24;
        const INT8: u32 = 1 << 25;
        let wanted = BF16 | TILES | INT8;
        __cpuid_count(7, 0).edx & wanted == wanted && request()
    })
}

/// Asks Linux for the state of tiles, which a process must do before its first use of them (arch_prctl(2), kernel documentation
/// `x86/xstate.rst`).
#[cfg(target_os = "linux")]
fn request() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and changes nothing but this process's permission.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn request() -> bool {
    false
}

/// All 8 tiles of 16 rows of 64 bytes (Intel SDM, `LDTILECFG`).
#[repr(align(64))]
struct Config([u8; 64]);

static CONFIG: Config = {
    let mut bytes = [0; 64];
    bytes[0] = 1;
    let mut tile = 0;
    while tile < 8 {
        bytes[16 + 2 * tile] = ROW as u8;
        bytes[48 + tile] = 16;
        tile += 1;
    }
    Config(bytes)
};

/// Sums of 32 rows and 32 columns, of 32 bits each.
#[repr(align(64))]
#[derive(Clone, Copy)]
pub(crate) struct Sums(pub(crate) [[u32; SIDE]; SIDE]);

/// Columns of two panels in tiles, whose rows are cache lines.
#[repr(align(64))]
#[derive(Clone)]
struct Columns([[u8; STEPS * TILE]; 2]);

/// What a thread works in, made when it is first needed.
#[derive(Default)]
struct Work {
    /// For each pair of panels of a group, the sums of blocks of rows.
    sums: Vec<Sums>,
    /// One.
    tiles: Vec<Columns>,
}

thread_local! {
    static WORK: RefCell<Work> = RefCell::default();
}

/// `len` words of `words`, which grow if need be and keep what they hold, from a cache line's beginning on: rows of tiles that are
/// lines are loaded twice as fast.
pub(crate) fn lines(words: &mut Vec<i32>, len: usize) -> &mut [i32] {
    words.resize(words.len().max(len + ROW / 4), 0);
    let first = words.as_ptr().align_offset(ROW).min(ROW / 4);
    &mut words[first..first + len]
}

/// Makes the tiles of this thread what [`CONFIG`] says, until [`release`]. Once for many products: it takes as long as a few of them.
///
/// # Safety
/// The CPU has AMX and the process may use it.
pub(crate) unsafe fn configure() {
    // SAFETY: the caller's promise; compiled code does not use tiles.
    unsafe { std::arch::asm!("ldtilecfg [{}]", in(reg) &CONFIG.0, options(nostack, readonly)) };
}

/// Ends what [`configure`] began: threads without tiles are cheaper to switch between.
///
/// # Safety
/// As [`configure`].
pub(crate) unsafe fn release() {
    // SAFETY: as above.
    unsafe { std::arch::asm!("tilerelease", options(nostack, nomem)) };
}

macro_rules! products {
    ($(#[$doc:meta])* $name:ident, $dot:literal) => {
        $(#[$doc])*
        ///
        /// Adds to `sums`, or to zeros if they are `fresh`, the products of `a`, two rows of `steps` tiles, with `b`, two columns
        /// of `steps` tiles.
        ///
        /// # Safety
        /// [`configure`] has been called on this thread.
        pub(crate) unsafe fn $name(a: [&[u8]; 2], b: [&[u8]; 2], steps: usize, fresh: bool, sums: &mut Sums) {
            assert!(steps > 0 && [a[0], a[1], b[0], b[1]].iter().all(|t| t.len() >= steps * TILE));
            // SAFETY: the caller's promise; the tiles that are read are in `a` and `b`, and `sums` is 4 tiles with rows of 128
            // bytes.
            unsafe {
                std::arch::asm!(
                    "test {fresh}, {fresh}",
                    "jnz 2f",
                    "tileloadd tmm0, [{c} + {cs}]",
                    "tileloadd tmm1, [{c} + {cs} + 64]",
                    "tileloadd tmm2, [{d} + {cs}]",
                    "tileloadd tmm3, [{d} + {cs} + 64]",
                    "jmp 3f",
                    "2:",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "3:",
                    "tileloadd tmm4, [{a0} + {s}]",
                    "tileloadd tmm6, [{b0} + {s}]",
                    concat!($dot, " tmm0, tmm4, tmm6"),
                    "tileloadd tmm7, [{b1} + {s}]",
                    concat!($dot, " tmm1, tmm4, tmm7"),
                    "tileloadd tmm5, [{a1} + {s}]",
                    concat!($dot, " tmm2, tmm5, tmm6"),
                    concat!($dot, " tmm3, tmm5, tmm7"),
                    "add {a0}, 1024",
                    "add {a1}, 1024",
                    "add {b0}, 1024",
                    "add {b1}, 1024",
                    "dec {steps}",
                    "jnz 3b",
                    "tilestored [{c} + {cs}], tmm0",
                    "tilestored [{c} + {cs} + 64], tmm1",
                    "tilestored [{d} + {cs}], tmm2",
                    "tilestored [{d} + {cs} + 64], tmm3",
                    fresh = in(reg) usize::from(fresh),
                    a0 = inout(reg) a[0].as_ptr() => _,
                    a1 = inout(reg) a[1].as_ptr() => _,
                    b0 = inout(reg) b[0].as_ptr() => _,
                    b1 = inout(reg) b[1].as_ptr() => _,
                    steps = inout(reg) steps => _,
                    c = in(reg) sums.0.as_mut_ptr(),
                    d = in(reg) sums.0[SIDE / 2..].as_mut_ptr(),
                    cs = in(reg) 4 * SIDE,
                    s = in(reg) ROW,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}
products!(
    /// Of signed bytes with unsigned ones, in 32 bits.
    int_products,
    "tdpbsud"
);
products!(
    /// Of bf16, in `f32`.
    bf16_products,
    "tdpbf16ps"
);

/// What [`bf16_products`] makes, on a CPU without tiles: of the first `rows` of `a`, others are left as they are, and the first
/// `pairs` of elements.
///
/// # Safety
/// The CPU has AVX-512 F and BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(crate) unsafe fn dot_products(a: [&[u8]; 2], b: [&[u8]; 2], [rows, pairs]: [usize; 2], fresh: bool, sums: &mut Sums) {
    /// Rows at once: as many accumulators for two columns as half of the registers.
    const ROWS: usize = 8;
    assert!([a[0], a[1], b[0], b[1]].iter().all(|t| t.len() >= pairs.div_ceil(N) * TILE));
    let pairs = |half: usize| b[half].as_chunks::<ROW>().0[..pairs].iter();
    for (r, sums) in sums.0.as_chunks_mut::<ROWS>().0.iter_mut().enumerate().take(rows.div_ceil(ROWS)) {
        let (tile, first) = (a[r * ROWS / N].as_ptr(), r * ROWS % N * ROW);
        // SAFETY: the caller's promise; sums and pairs are of 64 bytes, and elements of rows lie within `steps` tiles.
        unsafe {
            let at = |row: &mut [u32; SIDE], half: usize| row.as_mut_ptr().add(half * N).cast::<f32>();
            let mut acc = [[_mm512_setzero_ps(); 2]; ROWS];
            if !fresh {
                for (acc, row) in acc.iter_mut().zip(sums.iter_mut()) {
                    *acc = [_mm512_loadu_ps(at(row, 0)), _mm512_loadu_ps(at(row, 1))];
                }
            }
            for (i, pair) in pairs(0).zip(pairs(1)).enumerate() {
                let pair = [pair.0, pair.1].map(|p| std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(p.as_ptr().cast())));
                let element = tile.add(i / N * TILE + first + i % N * 4);
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = _mm512_set1_epi32(element.add(r * ROW).cast::<i32>().read_unaligned());
                    let x = std::mem::transmute::<__m512i, __m512bh>(x);
                    *acc = [_mm512_dpbf16_ps(acc[0], x, pair[0]), _mm512_dpbf16_ps(acc[1], x, pair[1])];
                }
            }
            for (acc, row) in acc.iter().zip(sums.iter_mut()) {
                _mm512_storeu_ps(at(row, 0), acc[0]);
                _mm512_storeu_ps(at(row, 1), acc[1]);
            }
        }
    }
}

/// Of [`SIDE`] rows of signed bytes.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct Factors {
    /// What products with a row are multiplied with.
    pub(crate) scales: [f32; SIDE],
    /// What is added to them before.
    pub(crate) before: [i32; SIDE],
}

/// As [`dot_products`] of bytes, in `f32`: the first `quads` times 4 elements of the first `rows` of `a`, signed, with those of `b`, unsigned,
/// times the scales of both.
///
/// # Safety
/// The CPU has AVX-512 F and VNNI.
#[target_feature(enable = "avx512f,avx512vnni")]
pub(crate) unsafe fn byte_products(
    a: [&[u8]; 2],
    b: [&[u8]; 2],
    [rows, quads]: [usize; 2],
    factors: &Factors,
    scales: &[f32; SIDE],
    fresh: bool,
    sums: &mut Sums,
) {
    /// Rows at once: as many accumulators for two columns as half of the registers.
    const ROWS: usize = 8;
    assert!([a[0], a[1], b[0], b[1]].iter().all(|t| t.len() >= quads.div_ceil(N) * TILE));
    let quads = |half: usize| b[half].as_chunks::<ROW>().0[..quads].iter();
    let factors = factors.scales.as_chunks::<ROWS>().0.iter().zip(factors.before.as_chunks::<ROWS>().0);
    for ((r, sums), (row_scales, before)) in sums.0.as_chunks_mut::<ROWS>().0.iter_mut().enumerate().zip(factors).take(rows.div_ceil(ROWS))
    {
        let (tile, first) = (a[r * ROWS / N].as_ptr(), r * ROWS % N * ROW);
        // SAFETY: the caller's promise; sums, scales and quads are of 64 bytes, and elements of rows lie within their tiles.
        unsafe {
            let mut acc = [[_mm512_setzero_si512(); 2]; ROWS];
            for (acc, before) in acc.iter_mut().zip(before) {
                *acc = [_mm512_set1_epi32(*before); 2];
            }
            for (i, (first_quad, second_quad)) in quads(0).zip(quads(1)).enumerate() {
                let quads = [first_quad, second_quad].map(|quad| _mm512_loadu_si512(quad.as_ptr().cast()));
                let element = tile.add(i / N * TILE + first + i % N * 4);
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = _mm512_set1_epi32(element.add(r * ROW).cast::<i32>().read_unaligned());
                    *acc = [_mm512_dpbusd_epi32(acc[0], quads[0], x), _mm512_dpbusd_epi32(acc[1], quads[1], x)];
                }
            }
            let columns = [_mm512_loadu_ps(scales.as_ptr()), _mm512_loadu_ps(scales[N..].as_ptr())];
            for ((acc, row), scale) in acc.iter().zip(sums.iter_mut()).zip(row_scales) {
                for half in 0..2 {
                    let at = row[half * N..].as_mut_ptr().cast();
                    let scale = _mm512_mul_ps(columns[half], _mm512_set1_ps(*scale));
                    let before = if fresh { _mm512_setzero_ps() } else { _mm512_loadu_ps(at) };
                    _mm512_storeu_ps(at, _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[half]), scale, before));
                }
            }
        }
    }
}

/// Whether a matrix is multiplied in integers.
pub(crate) fn in_integers(grid: Grid) -> bool {
    grid.scheme.bits == 8 && grid.scheme.group.is_none() && grid.k <= MAX_INT_COLUMNS
}

/// Tiles of a row of `x`.
fn steps(grid: Grid) -> usize {
    (grid.k * if in_integers(grid) { 1 } else { 2 }).div_ceil(ROW)
}

/// Up to 16 rows of `x` to tiles `[steps, 16, 64 bytes]`, with the scale and the sum of each if they are rounded to bytes.
struct Pack<'a> {
    grid: Grid,
    x: &'a [f32],
    tiles: &'a mut [u8],
    scales: &'a mut [f32],
    sums: &'a mut [f32],
}

impl Pack<'_> {
    /// # Safety
    /// The CPU has AVX-512 F, BW, DQ, VL and BF16.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    unsafe fn run(self) {
        let ints = in_integers(self.grid);
        // Columns that there are not.
        let last = (steps(self.grid) - 1) * TILE;
        self.tiles[last..].fill(0);
        for (r, x) in self.x.chunks_exact(self.grid.k).enumerate() {
            if ints {
                // SAFETY: the caller's promise.
                unsafe {
                    let (inverse, scale) = steps_of::<Avx512>(x);
                    self.scales[r] = scale;
                    let mut sum = Avx512::splat(0.0);
                    for (i, x) in x.chunks(N).enumerate() {
                        let mut bytes = [0; N];
                        sum = round_to(x, Avx512::splat(inverse), &mut bytes).add(sum);
                        let at = i * N / ROW * TILE + r * ROW + i * N % ROW;
                        self.tiles[at..at + N].copy_from_slice(bytemuck::cast_slice(&bytes));
                    }
                    self.sums[r] = sum.sum();
                }
                continue;
            }
            for (i, x) in x.chunks(N).enumerate() {
                let mut padded = [0.0; N];
                padded[..x.len()].copy_from_slice(x);
                let at = i / 2 * TILE + r * ROW + i % 2 * 2 * N;
                let to = &mut self.tiles[at..at + 2 * N];
                // SAFETY: the caller's promise; `to` is of 32 bytes.
                unsafe {
                    let narrow = _mm512_cvtneps_pbh(_mm512_loadu_ps(padded.as_ptr()));
                    _mm256_storeu_si256(to.as_mut_ptr().cast(), std::mem::transmute::<__m256bh, __m256i>(narrow));
                }
            }
        }
    }
}

/// Columns of a panel from `first` on to tiles of bf16: pairs of columns of each of 16 rows, zeros beyond the last column.
///
/// # Safety
/// The CPU has AVX-512 F, BW, DQ and VL.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn widen(grid: Grid, panel: &[u8], first: usize, tiles: &mut [u8]) {
    let bits = grid.scheme.bits;
    let (mut pairs, _) = tiles.as_chunks_mut::<ROW>();
    // SAFETY: the caller's promise; vectors are loaded from and stored to arrays of their size.
    unsafe {
        let numbers = _mm512_setr_ps(0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0);
        let (half, byte) = (_mm512_set1_epi32(0x8000), _mm512_set1_epi32(0xff));
        // Pairs of columns in a block of codes.
        let count = if bits == 4 { 4 } else { 2 };
        let mut segment = first / grid.segment_len();
        let mut skipped = first % grid.segment_len() / (2 * count);
        while !pairs.is_empty() && segment < grid.segments() {
            let s = grid.segment(panel, segment);
            let scale = s.scales::<Avx512>().0;
            let mut zeros = [f32::from(grid.scheme.middle()); N];
            if let Some(given) = s.zeros {
                zeros.iter_mut().zip(given).for_each(|(z, g)| *z = f32::from(*g));
            }
            // scale * code - scale * zero
            let offset = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(scale, _mm512_loadu_ps(zeros.as_ptr())));
            for block in s.codes.iter().skip(std::mem::take(&mut skipped)) {
                let words = _mm512_loadu_si512(block.as_ptr().cast());
                let number = |shift: u32| {
                    let code = _mm512_srl_epi32(words, _mm_cvtsi32_si128(shift as i32));
                    let value =
                        if bits == 4 { _mm512_permutexvar_ps(code, numbers) } else { _mm512_cvtepi32_ps(_mm512_and_si512(code, byte)) };
                    // To bf16: the nearest one.
                    _mm512_add_epi32(_mm512_castps_si512(_mm512_fmadd_ps(value, scale, offset)), half)
                };
                let (now, rest) = pairs.split_at_mut(count.min(pairs.len()));
                for (i, to) in now.iter_mut().enumerate() {
                    // Columns 0 to 3 are the bytes, or their low halves; 4 to 7 the high halves.
                    let shift = (i % 2 * 16 + i / 2 * 4) as u32;
                    let (even, odd) = (number(shift), number(shift + 8));
                    let pair = _mm512_mask_blend_epi16(0xaaaa_aaaa, _mm512_srli_epi32::<16>(even), odd);
                    _mm512_storeu_si512(to.as_mut_ptr().cast(), pair);
                }
                pairs = rest;
            }
            segment += 1;
        }
    }
    pairs.as_flattened_mut().fill(0);
}

impl Columns {
    /// `count` tiles of a pair of panels from tile `from` on.
    ///
    /// # Safety
    /// As [`widen`].
    #[inline(always)]
    unsafe fn columns<'a>(&'a mut self, grid: Grid, pair: [&'a [u8]; 2], from: usize, count: usize) -> [&'a [u8]; 2] {
        if in_integers(grid) {
            // Codes follow one segment's head, whatever the number of segments: there is one group.
            let codes = pair.map(|panel| &panel[panel.len() - grid.k.div_ceil(4) * ROW + from * TILE..]);
            if codes[0].len() >= count * TILE {
                return codes;
            }
            // The last tile is not all there.
            for (to, from) in self.0.iter_mut().zip(codes) {
                to[..from.len()].copy_from_slice(from);
                to[from.len()..count * TILE].fill(0);
            }
        } else {
            for (to, panel) in self.0.iter_mut().zip(pair) {
                // SAFETY: the caller's promise.
                unsafe { widen(grid, panel, from * SIDE, &mut to[..count * TILE]) };
            }
        }
        self.0.each_ref().map(|tiles| &tiles[..count * TILE])
    }
}

/// Panels of one thread times a chunk of packed rows.
struct Panels<'a> {
    piece: Piece<'a>,
    /// `[rows / 16, steps]` tiles.
    x: &'a [u8],
    /// Of each row.
    scales: &'a [f32],
    sums: &'a [f32],
    first_row: usize,
    rows: usize,
}

impl Task for Panels<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        // SAFETY: the caller's promise: `Kernels::tile_product` is for CPUs with AMX only.
        unsafe {
            // Taken, since the products may not be in a closure: closures are not compiled for the instruction set.
            let mut work = WORK.take();
            work.sums.resize(GROUP * CHUNK / SIDE, Sums([[0; SIDE]; SIDE]));
            work.tiles.resize(1, Columns([[0; STEPS * TILE]; 2]));
            configure();
            self.products::<L>(&mut work);
            release();
            WORK.set(work);
        }
    }
}

impl Panels<'_> {
    /// # Safety
    /// As [`Task::run`], after [`configure`].
    #[inline(always)]
    unsafe fn products<L: Lanes>(&self, work: &mut Work) {
        let grid = self.piece.grid;
        let steps = steps(grid);
        let bytes = self.piece.bytes();
        let blocks = self.rows.div_ceil(SIDE);
        for (g, group) in self.piece.panels.chunks(GROUP * 2 * bytes).enumerate() {
            // Of an odd number the last one is its own second, whose sums nobody needs.
            let pairs = || group.chunks(2 * bytes).map(|pair| [&pair[..bytes], &pair[pair.len() - bytes..]]);
            for from in (0..steps).step_by(STEPS) {
                let count = STEPS.min(steps - from);
                for (sums, pair) in work.sums.chunks_exact_mut(CHUNK / SIDE).zip(pairs()) {
                    // SAFETY: the caller's promise.
                    let columns = unsafe { work.tiles[0].columns(grid, pair, from, count) };
                    for (i, sums) in sums.iter_mut().enumerate().take(blocks) {
                        let x = [0, 1].map(|half| &self.x[((2 * i + half) * steps + from) * TILE..][..count * TILE]);
                        // SAFETY: the caller's promise.
                        unsafe {
                            if in_integers(grid) {
                                int_products(x, columns, count, from == 0, sums);
                            } else {
                                bf16_products(x, columns, count, from == 0, sums);
                            }
                        }
                    }
                }
            }
            for (p, (sums, pair)) in work.sums.chunks_exact(CHUNK / SIDE).zip(pairs()).enumerate() {
                let column = (self.piece.first_panel + 2 * (GROUP * g + p)) * N;
                for (i, sums) in sums.iter().enumerate().take(blocks) {
                    // SAFETY: the caller's promise.
                    unsafe { self.finish::<L>(sums, i * SIDE, column, pair) };
                }
            }
        }
    }

    /// Writes the results of 32 rows and 2 panels.
    ///
    /// # Safety
    /// As [`Task::run`].
    #[inline(always)]
    unsafe fn finish<L: Lanes>(&self, sums: &Sums, row: usize, column: usize, panels: [&[u8]; 2]) {
        let Piece { grid, out, bias, .. } = self.piece;
        let rows = SIDE.min(self.rows - row);
        for (half, panel) in panels.into_iter().enumerate() {
            let column = column + half * N;
            if column >= out.columns() {
                break;
            }
            let mut values = [[0.0; N]; SIDE];
            let bias = out.bias(bias, column);
            // SAFETY: the caller's promise; no other thread has this panel's columns.
            unsafe {
                let bias = L::load(&bias);
                if in_integers(grid) {
                    let segment = grid.segment(panel, 0);
                    let scales = segment.scales::<L>();
                    let zeros = segment.zeros.map_or([f32::from(grid.scheme.middle()); N], |z| z.map(f32::from));
                    for (r, values) in values.iter_mut().enumerate().take(rows) {
                        // Both are integers below 2^31; their difference, too, is exact in 32 bits.
                        let sum = self.sums[row + r] as i32;
                        let products = std::array::from_fn(|c| {
                            (sums.0[r][half * N + c] as i32).wrapping_sub(sum.wrapping_mul(zeros[c] as i32)) as f32
                        });
                        let scale = scales.mul(L::splat(self.scales[row + r]));
                        L::load(&products).mul_add(scale, bias).store(values);
                    }
                } else {
                    for (r, values) in values.iter_mut().enumerate().take(rows) {
                        let products = std::array::from_fn(|c| f32::from_bits(sums.0[r][half * N + c]));
                        L::load(&products).add(bias).store(values);
                    }
                }
                if let Some((_, act)) = self.piece.act {
                    elementwise::map::<L>(act, values[..rows].as_flattened_mut());
                }
                for (r, values) in values.iter().enumerate().take(rows) {
                    out.write(self.first_row + row + r, column, values);
                }
            }
        }
    }
}

impl Kernels {
    /// [`Kernels::linear`] of quantized weights and at least [`MIN_ROWS`] rows, on a CPU with AMX: `job` calls its argument with
    /// each piece of the panels. `packed` is memory to work in.
    pub(crate) fn tile_product(
        &self,
        x: &[f32],
        m: usize,
        grid: Grid,
        packed: &mut Vec<i32>,
        pieces: impl Fn(&(dyn Fn(Piece<'_>) + Sync)),
    ) {
        let steps = steps(grid);
        for first_row in (0..m).step_by(CHUNK) {
            let rows = CHUNK.min(m - first_row);
            let blocks = rows.div_ceil(SIDE) * 2;
            // Tiles of 16 rows, then their scales and sums.
            let words = (steps * TILE) / 4 + 2 * N;
            let (tiles, rest) = lines(packed, blocks * words).split_at_mut(blocks * steps * TILE / 4);
            let (scales, sums) = bytemuck::cast_slice_mut::<i32, f32>(rest).split_at_mut(blocks * N);
            let x = &x[first_row * grid.k..(first_row + rows) * grid.k];
            let parts = tiles.chunks_mut(steps * TILE / 4).zip(scales.chunks_mut(N)).zip(sums.chunks_mut(N));
            self.pool.pieces(parts.zip(x.chunks(N * grid.k)), |_, (((tiles, scales), sums), x)| {
                // SAFETY: this is a CPU with AMX, and so with AVX-512 (`Isa::is_supported`).
                unsafe { Pack { grid, x, tiles: bytemuck::cast_slice_mut(tiles), scales, sums }.run() }
            });
            let (tiles, scales, sums) = (bytemuck::cast_slice(tiles), &*scales, &*sums);
            pieces(&|piece| self.isa.run(Panels { piece, x: tiles, scales, sums, first_row, rows }));
        }
    }
}
