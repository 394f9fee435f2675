//! Attention in tiles, whose softmax goes along with the keys (Milakov and Gimelshein, 2018; Dao et al., 2022): scores of a
//! block of keys are made, weighed and spent before the next, and what was summed for a smaller maximum is scaled down.
//!
//! Scores are made transposed, keys by queries. So keys are rows of tiles as they lie, maxima and sums of 16 queries are one
//! vector each, and weights become the second product's tiles without moving between lanes. Only values are transposed, once for
//! all queries. All are bf16, or bytes: queries and keys with a scale for each row, values for each column of a block of keys, and weights
//! are parts of the largest one of such a block.

use crate::{
    Isa, Kernels,
    amx::{Factors, ROW, SIDE, Sums, TILE, bf16_products, byte_products, configure, dot_products, lines, release},
    attention::{Attention, Kept, Run, Seen},
    lanes::{Avx512, N},
    linear::OutColumns,
    norm::rotated,
    probe::Arithmetic,
    round::steps,
};
use bytemuck::{Pod, Zeroable};
use half::bf16;
use std::{arch::x86_64::*, cell::RefCell, ops::Range};

/// Queries that one task serves: their tiles and sums stay in the second cache while keys and values go by.
const QUERIES: usize = 256;
/// Keys of a block: their scores for [`SIDE`] queries stay in the first cache.
const KEYS: usize = 256;
/// Bytes of keys and values that are packed at once, or those of one head.
const PACKED: usize = 8 << 20;

/// Rows from one that is packed to one that is asked for, where rows of a head do not follow each other.
const AHEAD: usize = 8;

/// A cache line, so that rows of tiles do not cross two.
#[repr(C, align(64))]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Line([u8; ROW]);

/// Tiles of a block of keys and values of one head.
#[derive(Clone, Copy)]
struct Tiling {
    /// Whether elements are bytes, or bf16.
    bytes: bool,
    /// Tiles across a key.
    depth: usize,
    /// Tiles across a value, an even number.
    across: usize,
}

impl Tiling {
    fn new(a: &Attention<'_>, bytes: bool) -> Self {
        let row = if bytes { ROW } else { SIDE };
        Self { bytes, depth: a.d.div_ceil(row).max(1), across: a.dv.div_ceil(SIDE) * 2 }
    }

    /// Elements of a row of a tile.
    fn row(self) -> usize {
        if self.bytes { ROW } else { SIDE }
    }

    /// Bytes of the keys of a block: `[KEYS / 16, depth]` tiles of 16 keys and a row of their elements.
    fn keys(self) -> usize {
        KEYS / N * self.depth * TILE
    }

    /// Bytes of the values of a block: `[across, KEYS / row]` tiles of 16 of their elements and a row of keys.
    fn values(self) -> usize {
        self.across * (KEYS / self.row()) * TILE
    }

    /// Bytes of a block: keys, values, and of bytes the [`Factors`] of 32 keys or elements of values each.
    fn block(self) -> usize {
        self.keys() + self.values() + if self.bytes { (KEYS / SIDE + self.across / 2) * size_of::<Factors>() } else { 0 }
    }
}

/// What a thread works in, made when it is first needed.
#[derive(Default)]
struct Work {
    /// Room for two rows in `f32`.
    row: Vec<f32>,
    /// For each [`SIDE`] queries, `[2, depth]` tiles: pairs of elements of 16 queries, or four bytes.
    queries: Vec<Line>,
    /// For each [`SIDE`] queries that are bytes, their scales.
    scales: Vec<[f32; SIDE]>,
    /// For each [`SIDE`] queries, the sums of `across / 2` times [`SIDE`] elements of values.
    out: Vec<Sums>,
    /// For each [`SIDE`] queries.
    states: Vec<State>,
    /// Of a block of keys and [`SIDE`] queries.
    scores: Vec<Sums>,
    /// `[2, KEYS / row]` tiles: pairs of keys and 16 queries, or four.
    weights: Vec<Line>,
}

thread_local! {
    static WORK: RefCell<Work> = RefCell::default();
}

/// What is added to bytes of queries, which so are unsigned, as weights are: one side of a product has to be.
const OFFSET: u8 = 128;

/// A weight of 1 that is a byte, to which [`DITHER`] and the error of [`exp2`] may be added.
const ONE: f32 = 254.0;

/// What is added to the weight of each of [`SIDE`] keys before it is cut off to a byte. What weights lose so is 0 on the average, even if
/// most are less than half a step, as where one key is seen by all: as many of them become 1 as is their part of a step, since the multiples
/// of the golden ratio, of which these are what is behind the point, are evenly spread wherever they are cut.
const DITHER: [f32; SIDE] = {
    let mut dither = [0.0; SIDE];
    let mut key = 0;
    while key < SIDE {
        let multiple = (key as f64 + 0.5) * 0.618_033_988_749_895;
        dither[key] = (multiple - multiple as usize as f64) as f32;
        key += 1;
    }
    dither
};

/// The softmax of [`SIDE`] queries so far.
#[derive(Clone, Copy)]
struct State {
    largest: [[f32; N]; 2],
    sum: [[f32; N]; 2],
}

impl State {
    /// Of no keys.
    const EMPTY: Self = Self { largest: [[f32::NEG_INFINITY; N]; 2], sum: [[0.0; N]; 2] };
}

/// Moves rows to columns.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn transposed(r: [__m512i; N]) -> [__m512i; N] {
    let mut t = r;
    for i in (0..N).step_by(2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    let mut u = t;
    for i in (0..N).step_by(4) {
        u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // Now the quarter `l` of `u[4 k + c]` is of column `4 l + c` and rows `4 k` to `4 k + 3`.
    for c in 0..4 {
        let (even, odd) = (_mm512_shuffle_i32x4::<0x88>(u[c], u[4 + c]), _mm512_shuffle_i32x4::<0xdd>(u[c], u[4 + c]));
        let (even_2, odd_2) = (_mm512_shuffle_i32x4::<0x88>(u[8 + c], u[12 + c]), _mm512_shuffle_i32x4::<0xdd>(u[8 + c], u[12 + c]));
        t[c] = _mm512_shuffle_i32x4::<0x88>(even, even_2);
        t[4 + c] = _mm512_shuffle_i32x4::<0x88>(odd, odd_2);
        t[8 + c] = _mm512_shuffle_i32x4::<0xdd>(even, even_2);
        t[12 + c] = _mm512_shuffle_i32x4::<0xdd>(odd, odd_2);
    }
    t
}

/// Two vectors of 16 as 32 of bf16, in their order.
///
/// # Safety
/// The CPU has AVX-512 F and BF16.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn narrow(first: __m512, second: __m512) -> __m512i {
    // SAFETY: both are 512 bits.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second, first)) }
}

/// Floats from `first` on, up to 16, and zeros.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load(row: &[f32], first: usize) -> __m512 {
    let there = row.len().saturating_sub(first).min(N);
    // SAFETY: the caller's promise; only floats that there are are read.
    unsafe { _mm512_maskz_loadu_ps(((1_u32 << there) - 1) as u16, row.as_ptr().wrapping_add(first)) }
}

/// A row as row `i` of tiles in rows of `depth`, filled up with zeros.
///
/// # Safety
/// The CPU has AVX-512 F and BF16.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn put_row(row: &[f32], i: usize, depth: usize, tiles: &mut [u8]) {
    for step in 0..depth {
        let to = &mut tiles[(i / N * depth + step) * TILE + i % N * ROW..][..ROW];
        // SAFETY: the caller's promise; `to` is of 64 bytes.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), narrow(load(row, step * SIDE), load(row, step * SIDE + N))) };
    }
}

/// A row, rounded to 8 bits, as row `i` of tiles in rows of `depth`, filled up with zeros, and `offset` added to each byte. Gives its scale and
/// the sum of its bytes.
///
/// # Safety
/// The CPU has AVX-512 F, BW, DQ and VL.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn put_bytes(row: &[f32], i: usize, depth: usize, offset: u8, tiles: &mut [u8]) -> (f32, i32) {
    // SAFETY: the caller's promise; 16 bytes are stored to as many.
    unsafe {
        let (inverse, scale) = steps::<Avx512>(row);
        let (inverse, offset) = (_mm512_set1_ps(inverse), _mm_set1_epi8(offset.cast_signed()));
        let mut sum = _mm512_setzero_si512();
        for step in 0..depth {
            let to = &mut tiles[(i / N * depth + step) * TILE + i % N * ROW..][..ROW];
            for (part, to) in to.as_chunks_mut::<N>().0.iter_mut().enumerate() {
                let words = _mm512_cvtps_epi32(_mm512_mul_ps(load(row, step * ROW + part * N), inverse));
                sum = _mm512_add_epi32(sum, words);
                _mm_storeu_si128(to.as_mut_ptr().cast(), _mm_add_epi8(_mm512_cvtepi32_epi8(words), offset));
            }
        }
        (scale, _mm512_reduce_add_epi32(sum))
    }
}

/// Four vectors of 16 integers of 16 bits as bytes, each followed by those of the others: `SIGNED`, or from 0 to 255.
///
/// # Safety
/// The CPU has AVX-512 F and BW.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn quads<const SIGNED: bool>([a, b, c, d]: [__m512i; 4]) -> __m512i {
    // Of quarters of registers, to which packing keeps.
    let (ab, cd) = (_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
    let bytes = if SIGNED { _mm512_packs_epi16(ab, cd) } else { _mm512_packus_epi16(ab, cd) };
    let order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    _mm512_shuffle_epi8(bytes, order)
}

/// A number and a power of 2, as the bits that come to the exponent by it, whose product is `2^x` to 1.1e-4 of it, a twentieth of what
/// rounding it to bf16 takes, and exactly if `x` is whole. 2^-127 if `x` is less. `x` is an integer, the power, and the rest, at most a half:
/// the number is a polynomial of it with least relative error. Few of the operations are multiplications, which products wait for.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn power(x: __m512) -> (__m512, __m512i) {
    /// Among numbers of this size the next one is 1 greater: a sum with it is rounded to an integer, in the lowest bits.
    const WHOLE: f32 = 1.5 * (1 << 23) as f32;
    // The larger of both, since bits of negative numbers are in reverse order.
    let x = _mm512_castsi512_ps(_mm512_min_epu32(_mm512_castps_si512(x), _mm512_castps_si512(_mm512_set1_ps(-127.0))));
    let shifted = _mm512_add_ps(x, _mm512_set1_ps(WHOLE));
    let r = _mm512_sub_ps(x, _mm512_sub_ps(shifted, _mm512_set1_ps(WHOLE)));
    let mut p = _mm512_set1_ps(0.055_009);
    for c in [0.242_211, 0.693_283, 1.0] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    }
    (p, _mm512_slli_epi32::<23>(_mm512_castps_si512(shifted)))
}

/// `2^x` as [`power`] has it, but 0 from 2^-127 down, or subnormal, which products of bf16 take as 0.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn exp2(x: __m512) -> __m512 {
    // SAFETY: the caller's promise.
    let (p, exponent) = unsafe { power(x) };
    _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), exponent))
}

/// Weights of 16 queries, half of those that `scores` are of, as rows of pairs of bf16; gives their sums. They are cut off, which is as far
/// from even as rounding them: what they lose on the average, their sum loses too.
///
/// # Safety
/// The CPU has AVX-512 F and BF16.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn weigh(scores: &[Sums], half: usize, largest: __m512, to: &mut [u8]) -> __m512 {
    // SAFETY: the caller's promise; a half of a row is of 16 floats, and rows of tiles are of 64 bytes.
    unsafe {
        let ones = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi16(bf16::ONE.to_bits().cast_signed()));
        let mut sum = _mm512_setzero_ps();
        for (scores, to) in scores.iter().zip(to.as_chunks_mut::<{ SIDE / 2 * ROW }>().0) {
            for ([even, odd], to) in scores.0.as_chunks().0.iter().zip(to.as_chunks_mut::<ROW>().0) {
                let [even, odd] = [even, odd].map(|scores| _mm512_loadu_ps(scores[half * N..].as_ptr().cast()));
                let even = _mm512_castps_si512(exp2(_mm512_sub_ps(even, largest)));
                let odd = _mm512_castps_si512(exp2(_mm512_sub_ps(odd, largest)));
                let pair = _mm512_or_si512(_mm512_srli_epi32::<16>(even), _mm512_and_si512(odd, _mm512_set1_epi32(0xffff << 16)));
                _mm512_storeu_si512(to.as_mut_ptr().cast(), pair);
                // The sum is of what is multiplied.
                sum = _mm512_dpbf16_ps(sum, std::mem::transmute::<__m512i, __m512bh>(pair), ones);
            }
        }
        sum
    }
}

/// [`weigh`] to rows of four bytes, [`ONE`] times as large.
///
/// # Safety
/// The CPU has AVX-512 F, BW and VNNI.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn weigh_bytes(scores: &[Sums], half: usize, largest: __m512, to: &mut [u8]) -> __m512 {
    // SAFETY: as above.
    unsafe {
        let largest = _mm512_sub_ps(largest, _mm512_set1_ps(ONE.log2()));
        let mut sum = _mm512_setzero_si512();
        for (scores, to) in scores.iter().zip(to.as_chunks_mut::<{ SIDE / 4 * ROW }>().0) {
            let scores = scores.0.as_chunks::<4>().0.iter().zip(DITHER.as_chunks::<4>().0);
            for ((scores, dither), to) in scores.zip(to.as_chunks_mut::<ROW>().0) {
                let mut weights = [_mm512_setzero_si512(); 4];
                for i in 0..4 {
                    let (p, exponent) = power(_mm512_sub_ps(_mm512_loadu_ps(scores[i][half * N..].as_ptr().cast()), largest));
                    let exponent = _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_castps_si512(_mm512_set1_ps(1.0))));
                    weights[i] = _mm512_cvttps_epi32(_mm512_fmadd_ps(p, exponent, _mm512_set1_ps(dither[i])));
                }
                let weights = quads::<false>(weights);
                _mm512_storeu_si512(to.as_mut_ptr().cast(), weights);
                sum = _mm512_dpbusd_epi32(sum, weights, _mm512_set1_epi8(1));
            }
        }
        _mm512_cvtepi32_ps(sum)
    }
}

/// A block of keys and values of one head to tiles.
struct Pack<'a, 'b> {
    tiling: Tiling,
    a: &'a Attention<'b>,
    lead: usize,
    /// Of keys and values.
    head: usize,
    /// The block's first key.
    first: usize,
    tiles: &'a mut [u8],
}

impl Pack<'_, '_> {
    /// # Safety
    /// The CPU has AVX-512 F, BW, DQ, VL, VNNI and BF16.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")]
    unsafe fn run(self, row: &mut Vec<f32>) {
        let Tiling { bytes, depth, across } = self.tiling;
        let (keys, rest) = self.tiles.split_at_mut(self.tiling.keys());
        let (values, factors) = rest.split_at_mut(self.tiling.values());
        let (key_factors, value_factors) =
            bytemuck::cast_slice_mut::<_, Factors>(factors).split_at_mut(if bytes { KEYS / SIDE } else { 0 });
        let Self { a, lead, head, first, .. } = self;
        // Keys there are; others are zeros.
        let count = KEYS.min(a.t - first);
        if count < KEYS {
            keys.fill(0);
            key_factors.fill(Factors::zeroed());
        }
        row.resize(row.len().max(a.d).max(4 * a.dv + across * N), 0.0);
        for j in 0..count {
            if a.packed {
                a.k.data.ask(a.k.at(lead, head, first + j + AHEAD), a.d);
            }
            let key = a.key(lead, head, first + j, &mut row[..a.d]);
            // SAFETY: the caller's promise.
            unsafe {
                if bytes {
                    let (scale, sum) = put_bytes(key, j, depth, 0, keys);
                    let factors = &mut key_factors[j / SIDE];
                    (factors.scales[j % SIDE], factors.before[j % SIDE]) = (scale, -i32::from(OFFSET) * sum);
                } else {
                    put_row(key, j, depth, keys);
                }
            }
        }
        let value = |j: usize| a.v.at(lead, head, first + j);
        // Steps per 1 of an element, if it is rounded.
        let (inverses, row) = row.split_at_mut(across * N);
        if bytes {
            inverses.fill(0.0);
            for j in 0..count {
                if a.packed {
                    a.v.data.ask(value(j + AHEAD), a.dv);
                }
                let value = a.v.data.row(value(j), &mut row[..a.dv]);
                inverses.iter_mut().zip(value).for_each(|(m, v)| *m = v.abs().max(*m));
            }
            for (i, inverse) in inverses.iter_mut().enumerate() {
                let factors = &mut value_factors[i / SIDE];
                (factors.scales[i % SIDE], factors.before[i % SIDE]) = (*inverse / 127.0, 0);
                *inverse = 127.0 / inverse.max(1e-30);
            }
        }
        let inverses = &*inverses;
        let together = if bytes { 4 } else { 2 };
        let steps = KEYS / self.tiling.row();
        for step in 0..steps {
            let tile = |a: usize| (a * steps + step) * TILE;
            for i in 0..N {
                let j = (step * N + i) * together;
                if a.packed && !bytes {
                    (j..j + together).for_each(|j| a.v.data.ask(value(j + AHEAD), a.dv));
                }
                let mut rows: [&[f32]; 4] = [&[]; 4];
                for ((row, j), room) in rows[..together].iter_mut().zip(j..count).zip(row.chunks_exact_mut(a.dv.max(1))) {
                    *row = a.v.data.row(value(j), &mut room[..a.dv]);
                }
                for (a, inverse) in inverses.as_chunks::<N>().0.iter().enumerate() {
                    let to = &mut values[tile(a) + i * ROW..][..ROW];
                    // SAFETY: the caller's promise; `to` is of 64 bytes.
                    unsafe {
                        let together = if bytes {
                            let inverse = _mm512_loadu_ps(inverse.as_ptr());
                            let mut words = [_mm512_setzero_si512(); 4];
                            for (words, row) in words.iter_mut().zip(rows) {
                                *words = _mm512_cvtps_epi32(_mm512_mul_ps(load(row, a * N), inverse));
                            }
                            quads::<true>(words)
                        } else {
                            interleaved(narrow(load(rows[0], a * N), load(rows[1], a * N)))
                        };
                        _mm512_storeu_si512(to.as_mut_ptr().cast(), together);
                    }
                }
            }
            for a in 0..across {
                // SAFETY: the caller's promise.
                unsafe { transpose(&mut values[tile(a)..][..TILE]) };
            }
        }
    }
}

/// The first 16 of 32 bf16, each followed by one of the last 16.
///
/// # Safety
/// The CPU has AVX-512 F and BW.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn interleaved(x: __m512i) -> __m512i {
    const ORDER: [u16; 2 * N] = {
        let mut order = [0; 2 * N];
        let mut i = 0;
        while i < N {
            order[2 * i] = i as u16;
            order[2 * i + 1] = (N + i) as u16;
            i += 1;
        }
        order
    };
    // SAFETY: `ORDER` is of 64 bytes.
    unsafe { _mm512_permutexvar_epi16(_mm512_loadu_si512(ORDER.as_ptr().cast()), x) }
}

/// Rows of a tile, of 32-bit elements, to columns.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn transpose(tile: &mut [u8]) {
    let (rows, _) = tile.as_chunks_mut::<ROW>();
    assert!(rows.len() == N);
    // SAFETY: the caller's promise; rows are of 64 bytes.
    unsafe {
        let mut columns = [_mm512_setzero_si512(); N];
        columns.iter_mut().zip(&*rows).for_each(|(column, row)| *column = _mm512_loadu_si512(row.as_ptr().cast()));
        columns = transposed(columns);
        rows.iter_mut().zip(columns).for_each(|(row, column)| _mm512_storeu_si512(row.as_mut_ptr().cast(), column));
    }
}

/// Up to [`QUERIES`] queries of a head.
struct Block<'a, 'b> {
    isa: Isa,
    a: &'a Attention<'b>,
    tiling: Tiling,
    lead: usize,
    /// Of queries.
    head: usize,
    run: &'a Run,
    /// Blocks of keys and values.
    tiles: &'a [u8],
    out: OutColumns,
}

impl Block<'_, '_> {
    /// # Safety
    /// The CPU has AVX-512 F, BW, DQ, VL, VNNI and BF16; if it has AMX, [`configure`] has been called on this thread.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")]
    unsafe fn run(self, work: &mut Work) {
        let Tiling { depth, across, .. } = self.tiling;
        let groups = self.run.queries.len().div_ceil(SIDE);
        work.queries.resize(QUERIES / SIDE * 2 * depth * N, Line([0; ROW]));
        work.out.resize(QUERIES / SIDE * across / 2, Sums([[0; SIDE]; SIDE]));
        work.scores.resize(KEYS / SIDE, Sums([[0; SIDE]; SIDE]));
        work.weights.resize(2 * KEYS / self.tiling.row() * N, Line([0; ROW]));
        work.scales.resize(QUERIES / SIDE, [0.0; SIDE]);
        work.states.clear();
        work.states.resize(groups, State::EMPTY);
        // SAFETY: the caller's promise.
        unsafe { self.pack(work) };
        let Range { start, end } = self.run.keys;
        for block in start / KEYS..end.div_ceil(KEYS) {
            for group in 0..groups {
                let seen = self.reach(group);
                let keys = start.max(block * KEYS)..end.min((block + 1) * KEYS).min(seen);
                if !keys.is_empty() {
                    // SAFETY: the caller's promise.
                    unsafe { self.step(work, group, block, keys) };
                }
            }
        }
        for group in 0..groups {
            // SAFETY: the caller's promise.
            unsafe { self.finish(work, group) };
        }
    }

    /// The first key that none of a group of queries sees, nor any later one.
    fn reach(&self, group: usize) -> usize {
        match self.a.seen {
            Seen::Causal(_) => {
                let last = (self.run.queries.start + (group + 1) * SIDE).min(self.run.queries.end);
                (self.a.t + last).saturating_sub(self.a.s)
            }
            _ => self.run.keys.end,
        }
    }

    /// Queries, rotated and scaled, to tiles. Scores are powers of 2, not of e.
    ///
    /// # Safety
    /// As [`Self::run`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")]
    unsafe fn pack(&self, work: &mut Work) {
        let (a, d, Tiling { bytes, depth, .. }) = (self.a, self.a.d, self.tiling);
        let all = a.scale * std::f32::consts::LOG2_E;
        // Of bytes, it goes to the scale of the row.
        let scale = if bytes { 1.0 } else { all };
        let tiles: &mut [u8] = bytemuck::cast_slice_mut(&mut work.queries);
        let row = &mut work.row;
        row.resize(row.len().max(d), 0.0);
        for i in 0..self.run.queries.len().next_multiple_of(SIDE) {
            let query = self.run.queries.start + i;
            if query >= self.run.queries.end {
                // SAFETY: the caller's promise.
                unsafe { put_row(&[], i, depth, tiles) };
                work.scales[i / SIDE][i % SIDE] = 0.0;
                continue;
            }
            if a.packed {
                Kept::F32(a.q.data).ask(a.q.at(self.lead, self.head, query + AHEAD), d);
            }
            let q = &a.q.data[a.q.at(self.lead, self.head, query) * d..][..d];
            let row = &mut row[..d];
            match a.angles(self.lead, query) {
                Some([cos, sin]) => rotated(q, cos, sin, scale, row),
                None => row.iter_mut().zip(q).for_each(|(to, q)| *to = q * scale),
            }
            // SAFETY: the caller's promise.
            unsafe {
                if bytes {
                    work.scales[i / SIDE][i % SIDE] = put_bytes(row, i, depth, OFFSET, tiles).0 * all;
                } else {
                    put_row(row, i, depth, tiles);
                }
            }
        }
        let used = self.run.queries.len().div_ceil(SIDE) * 2 * depth * TILE;
        for tile in tiles[..used].chunks_exact_mut(TILE) {
            // SAFETY: the caller's promise.
            unsafe { transpose(tile) };
        }
    }

    /// One block of keys for one group of queries.
    ///
    /// # Safety
    /// As [`Self::run`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")]
    unsafe fn step(&self, work: &mut Work, group: usize, block: usize, keys: Range<usize>) {
        let Tiling { bytes, depth, across } = self.tiling;
        let tiles = &self.tiles[block * self.tiling.block()..][..self.tiling.block()];
        let (key_tiles, rest) = tiles.split_at(self.tiling.keys());
        let (value_tiles, factors) = rest.split_at(self.tiling.values());
        let (key_factors, value_factors) = bytemuck::cast_slice::<_, Factors>(factors).split_at(if bytes { KEYS / SIDE } else { 0 });
        let queries: &[u8] = &bytemuck::cast_slice(&work.queries)[group * 2 * depth * TILE..][..2 * depth * TILE];
        let queries = [&queries[..depth * TILE], &queries[depth * TILE..]];
        // Tiles of the block's values.
        let row = self.tiling.row();
        let steps = (keys.start - block * KEYS) / row..(keys.end - block * KEYS).div_ceil(row);
        let scores = &mut work.scores[..steps.len() * row / SIDE];
        let state = &mut work.states[group];
        let fresh = state.sum == State::EMPTY.sum && state.largest == State::EMPTY.largest;
        let out = &mut work.out[group * across / 2..][..across / 2];
        let weights: &mut [u8] = bytemuck::cast_slice_mut(&mut work.weights);
        let (first, second) = weights.split_at_mut(KEYS / row * TILE);
        let [first, second] = [&mut first[..steps.len() * TILE], &mut second[..steps.len() * TILE]];
        // Of weights that are bytes: what 1 stands for, times [`ONE`].
        let mut units = [0.0; SIDE];
        // SAFETY: the caller's promise; what is loaded and stored are arrays of 16 elements and rows of tiles.
        unsafe {
            let none = _mm512_set1_ps(f32::NEG_INFINITY);
            let mut of_block = [none; 2];
            for (step, scores) in (steps.start * row / SIDE..).zip(scores.iter_mut()) {
                let keys_of = |half: usize| &key_tiles[(2 * step + half) * depth * TILE..][..depth * TILE];
                if bytes {
                    let size = [SIDE, self.a.d.div_ceil(4)];
                    byte_products([keys_of(0), keys_of(1)], queries, size, &key_factors[step], &work.scales[group], true, scores);
                } else {
                    self.products([keys_of(0), keys_of(1)], queries, [SIDE, self.a.d.div_ceil(2)], true, scores);
                }
                self.hide(scores, group, block * KEYS + step * SIDE, &keys);
                for row in &scores.0 {
                    of_block[0] = _mm512_max_ps(of_block[0], _mm512_loadu_ps(row.as_ptr().cast()));
                    of_block[1] = _mm512_max_ps(of_block[1], _mm512_loadu_ps(row[N..].as_ptr().cast()));
                }
            }
            for (half, to) in [&mut *first, &mut *second].into_iter().enumerate() {
                let before = _mm512_loadu_ps(state.largest[half].as_ptr());
                // Rounded up to an integer, so that what was summed so far is scaled seldom and without rounding.
                let largest = _mm512_roundscale_ps::<{ _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC }>(of_block[half]);
                let largest = _mm512_max_ps(before, largest);
                _mm512_storeu_ps(state.largest[half].as_mut_ptr(), largest);
                // Without a key so far any shift does: all weights are 0.
                let some = |largest| _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(largest, none), largest);
                let shift = some(largest);
                let shrink = exp2(_mm512_sub_ps(before, shift));
                let sum = _mm512_mul_ps(_mm512_loadu_ps(state.sum[half].as_ptr()), shrink);
                if !fresh && _mm512_cmp_ps_mask::<_CMP_NEQ_OQ>(shrink, _mm512_set1_ps(1.0)) != 0 {
                    for row in out.iter_mut().flat_map(|s| &mut s.0) {
                        let at = row[half * N..].as_mut_ptr().cast::<f32>();
                        _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), shrink));
                    }
                }
                let sum = if bytes {
                    let unit = exp2(_mm512_sub_ps(of_block[half], shift));
                    _mm512_storeu_ps(units[half * N..].as_mut_ptr(), unit);
                    _mm512_fmadd_ps(weigh_bytes(scores, half, some(of_block[half]), to), unit, sum)
                } else {
                    _mm512_add_ps(weigh(scores, half, shift, to), sum)
                };
                _mm512_storeu_ps(state.sum[half].as_mut_ptr(), sum);
            }
        }
        let weights = [&*first, &*second];
        for (i, out) in out.iter_mut().enumerate() {
            let values = [0, 1].map(|half| &value_tiles[((2 * i + half) * (KEYS / row) + steps.start) * TILE..][..steps.len() * TILE]);
            let size = [SIDE.min(self.a.dv - i * SIDE), steps.len() * N];
            // SAFETY: the caller's promise.
            unsafe {
                if bytes {
                    byte_products(values, weights, size, &value_factors[i], &units, fresh, out);
                } else {
                    self.products(values, weights, size, fresh, out);
                }
            }
        }
    }

    /// Products of the first rows of `a` and pairs of elements, as many as `size` says, or also of others.
    ///
    /// # Safety
    /// As [`Self::run`].
    #[inline(always)]
    unsafe fn products(&self, a: [&[u8]; 2], b: [&[u8]; 2], size: [usize; 2], fresh: bool, sums: &mut Sums) {
        // SAFETY: the caller's promise.
        unsafe {
            if self.isa == Isa::Amx {
                bf16_products(a, b, size[1].div_ceil(N), fresh, sums);
            } else {
                dot_products(a, b, size, fresh, sums);
            }
        }
    }

    /// -inf for what queries do not see: `scores` are of [`SIDE`] keys from `first` on, of which there are those in `keys`.
    #[inline(always)]
    fn hide(&self, scores: &mut Sums, group: usize, first: usize, keys: &Range<usize>) {
        const HIDDEN: u32 = f32::NEG_INFINITY.to_bits();
        let mask = if let Seen::Causal(mask) = self.a.seen { Some(&mask[self.lead * self.a.t..][..self.a.t]) } else { None };
        let query = self.run.queries.start + group * SIDE;
        let end = first + SIDE;
        let seen = |m: &[i64]| end + self.a.s <= self.a.t + query + 1 && m[first..end].iter().all(|m| *m != 0);
        if keys.start <= first && end <= keys.end && mask.is_none_or(seen) {
            return;
        }
        for (j, row) in (first..).zip(&mut scores.0) {
            if !keys.contains(&j) || mask.is_some_and(|m| m[j] == 0) {
                row.fill(HIDDEN);
            } else if mask.is_some() {
                // The first query that sees the key.
                let seeing = (j + self.a.s).saturating_sub(self.a.t + query);
                row[..seeing.min(SIDE)].fill(HIDDEN);
            }
        }
    }

    /// Sums to the results of a group of queries.
    ///
    /// # Safety
    /// As [`Self::run`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")]
    unsafe fn finish(&self, work: &Work, group: usize) {
        let (dv, across) = (self.a.dv, self.tiling.across);
        for half in 0..2 {
            let first = group * SIDE + half * N;
            let rows = (self.run.queries.len()).saturating_sub(first).min(N);
            // SAFETY: the caller's promise; what is loaded are arrays of 16 elements, what is stored as many as there are, and a head's
            // run belongs to one thread.
            unsafe {
                let sum = _mm512_loadu_ps(work.states[group].sum[half].as_ptr());
                // A query that saw no key has sums that were never made, or zeros.
                let some = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(sum, _mm512_setzero_ps());
                let inverse = _mm512_div_ps(_mm512_set1_ps(1.0), sum);
                for a in 0..dv.div_ceil(N) {
                    let sums = &work.out[group * across / 2 + a / 2].0[a % 2 * N..][..N];
                    let mut columns = [_mm512_setzero_si512(); N];
                    for (column, sums) in columns.iter_mut().zip(sums) {
                        let sums = _mm512_loadu_ps(sums[half * N..].as_ptr().cast());
                        *column = _mm512_castps_si512(_mm512_maskz_mul_ps(some, sums, inverse));
                    }
                    let columns = transposed(columns);
                    let width = N.min(dv - a * N);
                    for (i, column) in columns.iter().enumerate().take(rows) {
                        let [row, start] = self.a.place(self.lead, self.head, self.run.queries.start + first + i);
                        let to = self.out.place(row, start + a * N, width);
                        // Stores with a mask are slow (Zen 4: a fortieth of attention).
                        if width == N {
                            _mm512_storeu_si512(to.cast(), *column);
                        } else {
                            _mm512_mask_storeu_epi32(to.cast(), u16::MAX >> (N - width), *column);
                        }
                    }
                }
            }
        }
    }
}

impl Kernels {
    /// [`Kernels::attention`] in tiles, with [`Isa::Avx512Bf16`] or [`Isa::Amx`]. Each run sees keys of its range, all of them or as
    /// [`Seen::Causal`] says.
    pub(crate) fn tile_attention(&self, a: &Attention<'_>, runs: &[Run], out: OutColumns) {
        let bytes = self.isa.attention_arithmetic(a.bf16, a.s, matches!(a.seen, Seen::Causal(_))) == Arithmetic::Int8;
        let tiling = Tiling::new(a, bytes);
        let (blocks, group) = (a.t.div_ceil(KEYS), a.heads / a.kv_heads);
        let head_bytes = blocks * tiling.block();
        let runs: Vec<Run> = runs.iter().flat_map(|run| run.parts(QUERIES)).collect();
        let heads = a.lead * a.kv_heads;
        let at_once = (PACKED / head_bytes.max(1)).clamp(1, heads);
        let mut words = self.take_scratch();
        let tiles: &mut [u8] = bytemuck::cast_slice_mut(lines(&mut words, at_once * head_bytes / 4));
        for some in (0..heads).step_by(at_once) {
            let count = at_once.min(heads - some);
            let used = &mut tiles[..count * head_bytes];
            self.pool.chunks(used, tiling.block(), |i, tiles| {
                let (head, first) = (some + i / blocks, i % blocks * KEYS);
                let mut work = WORK.take();
                let pack = Pack { tiling, a, lead: head / a.kv_heads, head: head % a.kv_heads, first, tiles };
                // SAFETY: this is a CPU with AVX-512 and BF16 (`Isa::is_supported`).
                unsafe { pack.run(&mut work.row) };
                WORK.set(work);
            });
            let used = &*used;
            // Later runs of causal attention see more keys: start with the longest.
            self.pool.pieces((0..count * group * runs.len()).rev(), |_, i| {
                let (head, run) = (i / runs.len(), &runs[i % runs.len()]);
                let tiles = &used[head / group * head_bytes..][..head_bytes];
                let head = some * group + head;
                let (lead, head) = (head / a.heads, head % a.heads);
                let mut work = WORK.take();
                // SAFETY: as above.
                unsafe {
                    let amx = self.isa == Isa::Amx;
                    if amx {
                        configure();
                    }
                    Block { isa: self.isa, a, tiling, lead, head, run, tiles, out }.run(&mut work);
                    if amx {
                        release();
                    }
                }
                WORK.set(work);
            });
        }
        self.give_scratch(words);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_of_two_are_near_and_never_of_what_is_unseen() {
        if !Isa::Avx512Bf16.is_supported() {
            return;
        }
        let power = |x: f32| {
            let mut out = [0.0; N];
            // SAFETY: the CPU has AVX-512 F; `out` is of 16 floats.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), exp2(_mm512_set1_ps(x))) };
            out[0]
        };
        for i in 0..126_000 {
            let x = -i as f32 / 1000.0;
            let expected = f64::from(x).exp2();
            assert!((f64::from(power(x)) / expected - 1.0).abs() <= 1.1e-4, "{x}");
            let whole = x.trunc();
            assert_eq!(f64::from(power(whole)), f64::from(whole).exp2());
        }
        for i in 0..2000 {
            let small = power(-126.0 - i as f32 / 1000.0);
            assert!((0.0..=2.0 * f32::MIN_POSITIVE).contains(&small), "{i}: {small}");
        }
        assert_eq!([-128.0, -1e30, f32::MIN, f32::NEG_INFINITY].map(power), [0.0; 4]);
    }
}
