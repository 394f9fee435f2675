//! Codes of weights, found at the speed of the CPU.

use crate::{
    Isa,
    isa::Task,
    lanes::{Lanes, N},
};
use vlmc_artifact::{
    Scheme,
    quant::{Codes, MAGIC, Method, PEAKS, codes_of},
};

struct Quantize<'a> {
    rows: &'a [f32],
    k: usize,
    scheme: Scheme,
    method: Method,
}

impl Task for Quantize<'_> {
    type Out = Codes;

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> Codes {
        let Self { rows, k, scheme, method } = self;
        let len = scheme.group_len(k);
        let searched = method == Method::Search && scheme.bits < 8 && !scheme.zero_points && len <= LONGEST;
        // Columns are loaded four at a time.
        if !searched || !len.is_multiple_of(4) || !k.is_multiple_of(len) || !rows.len().is_multiple_of(k) {
            // The definition itself, which compilers vectorise well; being the same operations in the same order, every instruction
            // set gives the same bytes.
            return Codes::of(rows, k, scheme, method);
        }
        let groups = rows.len() / len;
        let mut out = Codes { codes: vec![0; rows.len()], scales: Vec::with_capacity(groups), zeros: vec![scheme.middle(); groups] };
        let blocks = rows.chunks(N * len).zip(out.codes.chunks_mut(N * len));
        let mut columns = [[0.0; N]; LONGEST];
        for (x, codes) in blocks {
            // SAFETY: the caller's promise.
            let Some(scales) = (unsafe { search::<L>(x, &mut columns[..len], scheme) }) else {
                let plain = Codes::of(x, len, scheme, method);
                codes.copy_from_slice(&plain.codes);
                out.scales.extend(plain.scales);
                continue;
            };
            for ((x, codes), scale) in x.chunks_exact(len).zip(codes.chunks_exact_mut(len)).zip(scales) {
                let scale = scheme.keep(scale);
                codes_of(x, scale, scheme.middle(), scheme, codes);
                out.scales.push(scale);
            }
        }
        out
    }
}

/// Longest group whose scale is found here.
const LONGEST: usize = 256;
/// Between these, codes that are looked for can neither overflow nor lose bits.
const SANE: std::ops::RangeInclusive<f32> = 1e-30..=1e30;

/// The scales, before they are kept, that [`Method::Search`] chooses for 16 groups: what `quant::choose_scale` computes,
/// by the same operations but for those that cannot change the result, for 16 groups at once. `None` if there are not 16 groups, or
/// numbers that are too large, too small or none.
///
/// # Safety
/// The CPU has the instruction set of `L`.
#[inline(always)]
unsafe fn search<L: Lanes>(x: &[f32], columns: &mut [[f32; N]], scheme: Scheme) -> Option<[f32; N]> {
    let len = columns.len();
    if x.len() != N * len {
        return None;
    }
    let (mut largest, mut bits) = ([0u32; N], [0u32; N]);
    for x in x.as_chunks::<N>().0 {
        for i in 0..N {
            largest[i] = largest[i].max(x[i].abs().to_bits());
            bits[i] |= x[i].to_bits();
        }
    }
    if largest.iter().any(|v| *v > SANE.end().to_bits()) {
        return None;
    }
    transpose(x, columns);
    // The product of a number and a code of 3 bits and a sign (or 8) is exact if the number's last 3 bits are 0, as those of
    // numbers that were 16-bit floats are.
    let exact = bits.iter().all(|b| b & 0b111 == 0);
    // SAFETY: the caller's promise.
    unsafe { if exact { search_columns::<L, true>(columns, scheme) } else { search_columns::<L, false>(columns, scheme) } }
}

/// 16 rows, one after another, to as many columns as there are.
#[inline(always)]
fn transpose(x: &[f32], columns: &mut [[f32; N]]) {
    let len = columns.len();
    for (r, rows) in x.chunks_exact(4 * len).enumerate() {
        let row = |i: usize| rows[i * len..][..len].as_chunks::<4>().0.iter();
        for ((((a, b), c), d), out) in row(0).zip(row(1)).zip(row(2)).zip(row(3)).zip(columns.as_chunks_mut::<4>().0) {
            for (out, column) in out.iter_mut().zip(transpose4([*a, *b, *c, *d])) {
                out[4 * r..][..4].copy_from_slice(&column);
            }
        }
    }
}

/// Rows to columns. Left alone, compilers find slower ways.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn transpose4(rows: [[f32; 4]; 4]) -> [[f32; 4]; 4] {
    use std::arch::x86_64::{_MM_TRANSPOSE4_PS, _mm_loadu_ps, _mm_storeu_ps};
    let mut out = rows;
    // SAFETY: every x86-64 CPU has SSE; loads and stores are of arrays of 4 elements.
    unsafe {
        let [mut a, mut b, mut c, mut d] = rows.map(|row| _mm_loadu_ps(row.as_ptr()));
        _MM_TRANSPOSE4_PS(&mut a, &mut b, &mut c, &mut d);
        for (out, column) in out.iter_mut().zip([a, b, c, d]) {
            _mm_storeu_ps(out.as_mut_ptr(), column);
        }
    }
    out
}

/// Rows to columns.
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn transpose4(rows: [[f32; 4]; 4]) -> [[f32; 4]; 4] {
    std::array::from_fn(|c| rows.map(|row| row[c]))
}

/// [`search`] of 16 groups, one in each lane. If products of numbers and codes are `EXACT`, they may be fused with the sum.
///
/// # Safety
/// The CPU has the instruction set of `L`.
#[inline(always)]
unsafe fn search_columns<L: Lanes, const EXACT: bool>(columns: &[[f32; N]], scheme: Scheme) -> Option<[f32; N]> {
    // SAFETY: the caller's promise.
    unsafe {
        let splat = |v: f32| L::splat(v);
        let (mut low, mut high) = (splat(0.0), splat(0.0));
        for x in columns {
            let x = L::load(x);
            (low, high) = (low.min(x), high.max(x));
        }
        let (mut lows, mut peaks) = ([0.0; N], [0.0; N]);
        low.store(&mut lows);
        high.store(&mut peaks);
        for (low, peak) in lows.into_iter().zip(&mut peaks) {
            *peak = if -low > *peak { low } else { *peak };
            if *peak != 0.0 && peak.abs() < *SANE.start() {
                return None;
            }
        }
        let peak = L::load(&peaks);
        let middle = f32::from(scheme.middle());
        let (least, most) = (splat(-middle), splat(middle - 1.0));
        // Sums of x * y and y * y for codes y, by candidate.
        let (mut xys, mut yys) = ([[0f32; N]; PEAKS.len()], [[0f32; N]; PEAKS.len()]);
        const HALF: usize = PEAKS.len() / 2;
        for i in 0..HALF {
            let size = PEAKS[HALF + i] * (middle / 8.0);
            let inverse = splat(size).div(peak);
            let magic = splat(MAGIC);
            let sums = |(xy, yy): (L, L), x: L, y: L| {
                let xy = if EXACT { x.mul_add(y, xy) } else { xy.add(x.mul(y)) };
                // Squares of codes are integers, and so are their sums.
                (xy, y.mul_add(y, yy))
            };
            let zero = (splat(0.0), splat(0.0));
            // The candidate of the other sign has the same codes with the other sign, which is not taken from the products but from
            // their sum.
            let (mut plus, mut minus) = (zero, zero);
            if size < middle - 0.5 {
                for x in columns {
                    let x = L::load(x);
                    plus = sums(plus, x, x.mul(inverse).add(magic).sub(magic));
                }
                minus = plus;
            } else if size < middle + 0.5 {
                for x in columns {
                    let x = L::load(x);
                    let y = x.mul(inverse).add(magic).sub(magic);
                    plus = sums(plus, x, y.min(most));
                    minus = sums(minus, x, y.max(splat(1.0 - middle)));
                }
            } else {
                for x in columns {
                    let x = L::load(x);
                    let y = x.mul(inverse).add(magic).sub(magic);
                    plus = sums(plus, x, y.min(most).max(least));
                    minus = sums(minus, x, y.min(splat(middle)).max(splat(1.0 - middle)));
                }
            }
            plus.0.store(&mut xys[HALF + i]);
            plus.1.store(&mut yys[HALF + i]);
            splat(0.0).sub(minus.0).store(&mut xys[i]);
            minus.1.store(&mut yys[i]);
        }
        let (mut gains, mut best_xy, mut best_yy) = ([f32::NEG_INFINITY; N], [0f32; N], [1f32; N]);
        for (xy, yy) in xys.iter().zip(&yys) {
            for i in 0..N {
                let gain = xy[i] * xy[i] / yy[i];
                let better = gain > gains[i];
                gains[i] = if better { gain } else { gains[i] };
                best_xy[i] = if better { xy[i] } else { best_xy[i] };
                best_yy[i] = if better { yy[i] } else { best_yy[i] };
            }
        }
        let mut scales = [0f32; N];
        for i in 0..N {
            scales[i] = if peaks[i] == 0.0 { 0.0 } else { best_xy[i] / best_yy[i] };
        }
        Some(scales)
    }
}

/// Quantizes rows of `k` columns: [`Codes::of`], on an instruction set that this CPU has.
///
/// # Panics
/// If it has not.
pub fn quantize(isa: Isa, rows: &[f32], k: usize, scheme: Scheme, method: Method) -> Codes {
    assert!(isa.is_supported(), "{isa:?} is not there");
    isa.run(Quantize { rows, k, scheme, method })
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;
    use proptest::prelude::*;

    /// Numbers of one kind and size, and some of all kinds.
    fn number() -> impl Strategy<Value = f32> {
        prop_oneof![
            20 => -3f32..3.0,
            20 => (-3f32..3.0).prop_map(|v| bf16::from_f32(v).to_f32()),
            4 => -0.01f32..0.01,
            1 => prop_oneof![Just(0.0), Just(-0.0)],
        ]
    }

    proptest! {
        #[test]
        fn all_instruction_sets_choose_alike(
            x in prop::collection::vec(-3f32..3.0, 1..300), k in 1usize..100, scheme in 0usize..7, search: bool,
        ) {
            let scheme: Scheme = ["int4g32", "int4g16z", "int8", "int8g64", "int4", "int8z", "int3g64"][scheme].parse().unwrap();
            let method = if search { Method::Search } else { Method::Round };
            let x = &x[..x.len() / k * k];
            let plain = Codes::of(x, k, scheme, method);
            for isa in Isa::ALL.into_iter().filter(|isa| isa.is_supported()) {
                prop_assert_eq!(&quantize(isa, x, k, scheme, method), &plain);
            }
        }

        /// Many groups at once, of numbers whose products with codes are exact or not, and of odd ones.
        #[test]
        fn searching_many_groups_is_searching_each(
            mut x in prop::collection::vec(number(), 40 * 64), narrow: bool, size in -44f32..37.0, groups in 1usize..40, len in 0usize..3,
            odd in prop::option::of((0usize..40 * 64, prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::MAX, 1e-42, 1e30]))),
            zeros in 0usize..40, bits in 3u8..5,
        ) {
            let len = [32, 64, 16][if bits == 3 { len % 2 } else { len }];
            x.iter_mut().for_each(|v| *v *= 10f32.powf(size));
            x[zeros * len..(zeros + 1) * len].fill(0.0);
            if narrow {
                x.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32());
            }
            if let Some((at, v)) = odd {
                x[at] = v;
            }
            let scheme = Scheme { bits, group: Some(len as u16), zero_points: false };
            let x = &x[..groups * len];
            // Not-a-number differs from itself, and its sign may be either.
            let bits = |c: Codes| (c.codes, c.scales.iter().map(|s| if s.is_nan() { None } else { Some(s.to_bits()) }).collect::<Vec<_>>(), c.zeros);
            let plain = bits(Codes::of(x, groups * len, scheme, Method::Search));
            for isa in Isa::ALL.into_iter().filter(|isa| isa.is_supported()) {
                prop_assert_eq!(&bits(quantize(isa, x, groups * len, scheme, Method::Search)), &plain);
            }
        }
    }
}
