//! Quantized weights: what their numbers mean, and how they are found.
//!
//! Element `(r, c)` of a matrix `[n, k]` is `scale[r, c / group] * (code[r, c] - zero[r, c / group])`. The compiler, the
//! interpreter and the kernels share these definitions; how codes lie in memory is the layout's matter
//! ([`crate::program::Layout`]).

use crate::program::PANEL;
use half::f16;
use serde::{Deserialize, Serialize};
use std::{fmt, ops::Range, str::FromStr};

/// How the elements of a quantized weight are kept. Prints as `int8` (a scale per row), `int4g32` (a scale per 32 columns), or
/// `int3g128z` (and a zero point).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Scheme {
    /// Bits of a code: 3, 4 or 8.
    pub bits: u8,
    /// Columns that share a scale: 16 (not with 3 bits), 32, 64, 128 or 256; `None` for the whole row. The last group of a row may be
    /// shorter.
    pub group: Option<u16>,
    /// Whether groups have zero points of their own; else the zero is the middle code, 4, 8 or 128.
    pub zero_points: bool,
}

/// How scales are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// The largest number gets the largest code (round to nearest).
    Round,
    /// The least squared error among a fixed set of scales, each refitted to its codes.
    Search,
}

/// Sizes of groups. Codes of 3 bits lie in runs of 32 columns.
pub const GROUPS: [u16; 5] = [16, 32, 64, 128, 256];

impl Scheme {
    /// 8 bits, a scale per row.
    pub const INT8: Self = Self { bits: 8, group: None, zero_points: false };
    /// 4 bits, a scale per 32 columns: 4.5 bits per weight.
    pub const INT4: Self = Self { bits: 4, group: Some(32), zero_points: false };
    /// 4 bits, a scale per 128 columns: 4.125 bits per weight.
    pub const INT4G128: Self = Self { group: Some(128), ..Self::INT4 };
    /// 3 bits, a scale per 128 columns: 3.125 bits per weight.
    pub const INT3G128: Self = Self { bits: 3, ..Self::INT4G128 };

    /// Columns that share a scale, in rows of `k`.
    #[inline]
    pub fn group_len(self, k: usize) -> usize {
        self.group.map_or(k, usize::from).max(1)
    }

    /// Scales of a row of `k` columns.
    #[inline]
    pub fn groups(self, k: usize) -> usize {
        k.div_ceil(self.group_len(k))
    }

    /// The code that stands for 0 where there are no zero points.
    #[inline]
    pub fn middle(self) -> u8 {
        1 << (self.bits - 1)
    }

    /// Largest code.
    #[inline]
    pub fn max_code(self) -> u8 {
        (((1u16 << self.bits) - 1) & 0xff) as u8
    }

    /// Bytes of a scale: `f16` for groups, `f32` for whole rows, of which there are few.
    #[inline]
    pub fn scale_bytes(self) -> usize {
        if self.group.is_some() { 2 } else { 4 }
    }

    /// A scale as it is kept.
    #[inline(always)]
    pub fn keep(self, scale: f32) -> f32 {
        if self.group.is_some() { f16::from_f32(scale.clamp(-65504.0, 65504.0)).to_f32() } else { scale }
    }

    /// Bits per weight in rows of `k` columns, scales and zero points counted.
    pub fn bits_per_weight(self, k: usize) -> f64 {
        let per_group = 8 * (self.scale_bytes() + usize::from(self.zero_points));
        f64::from(self.bits) + (per_group * self.groups(k)) as f64 / k.max(1) as f64
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let group = self.group.map_or(String::new(), |g| format!("g{g}"));
        f.pad(&format!("int{}{group}{}", self.bits, if self.zero_points { "z" } else { "" }))
    }
}

impl FromStr for Scheme {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let unknown = || {
            format!(
                "unknown scheme '{s}': int3, int4 or int8, then a group as g16 (not int3), g32, g64, g128 or g256, then z for zero points"
            )
        };
        let (rest, zero_points) = s.strip_suffix('z').map_or((s, false), |rest| (rest, true));
        let (bits, group) = rest.split_once('g').map_or((rest, None), |(bits, group)| (bits, Some(group)));
        let bits = match bits {
            "int3" => 3,
            "int4" => 4,
            "int8" => 8,
            _ => return Err(unknown()),
        };
        let groups = if bits == 3 { &GROUPS[1..] } else { &GROUPS };
        let group = group.map(|g| g.parse().ok().filter(|g| groups.contains(g)).ok_or_else(unknown)).transpose()?;
        Ok(Self { bits, group, zero_points })
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Round => "round",
            Self::Search => "search",
        })
    }
}

impl FromStr for Method {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        [Self::Round, Self::Search]
            .into_iter()
            .find(|m| m.to_string() == s)
            .ok_or_else(|| format!("unknown way to choose scales '{s}': round or search"))
    }
}

impl Serialize for Scheme {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Scheme {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Codes of rows, row-major and a byte each, with their scales and zeros.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Codes {
    /// `[rows, k]`.
    pub codes: Vec<u8>,
    /// `[rows, groups]`, as they are kept.
    pub scales: Vec<f32>,
    /// `[rows, groups]`: the zero points, or the middle code.
    pub zeros: Vec<u8>,
}

impl Codes {
    /// Quantizes rows of `k` columns.
    #[inline(always)]
    pub fn of(rows: &[f32], k: usize, scheme: Scheme, method: Method) -> Self {
        let mut out = Self { codes: vec![0; rows.len()], ..Self::default() };
        let k = k.max(1);
        for (row, codes) in rows.chunks_exact(k).zip(out.codes.chunks_exact_mut(k)) {
            let len = scheme.group_len(k);
            for (x, codes) in row.chunks(len).zip(codes.chunks_mut(len)) {
                let (scale, zero) = quantize_group(x, scheme, method, codes);
                out.scales.push(scale);
                out.zeros.push(zero);
            }
        }
        out
    }

    /// Some of the rows, each of `k` columns.
    pub fn rows(&self, rows: Range<usize>, k: usize, scheme: Scheme) -> Self {
        let groups = scheme.groups(k);
        let of = |r: &Range<usize>, width: usize| r.start * width..r.end * width;
        Self {
            codes: self.codes[of(&rows, k)].to_vec(),
            scales: self.scales[of(&rows, groups)].to_vec(),
            zeros: self.zeros[of(&rows, groups)].to_vec(),
        }
    }

    /// Adds rows of equal length.
    pub fn append(&mut self, more: Self) {
        self.codes.extend(more.codes);
        self.scales.extend(more.scales);
        self.zeros.extend(more.zeros);
    }

    /// The numbers that the codes stand for, `[rows, k]`.
    pub fn dequantize(&self, k: usize, scheme: Scheme) -> Vec<f32> {
        let k = k.max(1);
        let groups = scheme.groups(k);
        let row = |(r, codes): (usize, &[u8])| {
            codes
                .chunks(scheme.group_len(k))
                .enumerate()
                .flat_map(|(g, codes)| {
                    let at = r * groups + g;
                    let (scale, zero) = (self.scales[at], i16::from(self.zeros[at]));
                    codes.iter().map(move |c| scale * f32::from(i16::from(*c) - zero)).collect::<Vec<_>>()
                })
                .collect::<Vec<_>>()
        };
        self.codes.chunks_exact(k).enumerate().flat_map(row).collect()
    }
}

/// Columns of a block of codes in a panel that has whole ones: 8 columns at 4 bits and 4 at 8 bits, 4 bytes of a row.
#[inline]
pub fn block_len(scheme: Scheme) -> usize {
    32 / usize::from(scheme.bits)
}

/// Columns whose codes of 3 bits lie in three blocks.
pub const RUN: usize = 32;

/// Blocks of codes of so many columns of a group, or of all. A block has 4 bytes of each of 16 rows.
#[inline]
pub fn code_blocks(scheme: Scheme, columns: usize) -> usize {
    if scheme.bits == 3 { 3 * columns.div_ceil(RUN) } else { columns.div_ceil(block_len(scheme)) }
}

/// The code of column `c` of row `r` of a panel in `blocks`, the first of which has column 0.
#[inline]
pub fn code_at(scheme: Scheme, blocks: &[[u8; 4 * PANEL]], r: usize, c: usize) -> u8 {
    let byte = |block: usize| blocks[block][4 * r + c % 4];
    match scheme.bits {
        3 => {
            let first = 3 * (c / RUN);
            match c % RUN / 4 {
                word @ 0..6 => byte(first + word / 2) >> (word % 2 * 3) & 7,
                word => byte(first + word - 6) >> 6 | byte(first + 2) >> (word - 2) & 4,
            }
        }
        4 => byte(c / 8) >> (c % 8 / 4 * 4) & 15,
        _ => byte(c / 4),
    }
}

/// Bytes of a panel of 16 rows of `k` columns, see [`crate::program::Layout::Panel16`]; `None` if that is no number.
#[inline]
pub fn panel_bytes(scheme: Scheme, k: usize) -> Option<usize> {
    let len = scheme.group_len(k);
    let head = PANEL * (scheme.scale_bytes() + usize::from(scheme.zero_points));
    let group = |columns: usize| code_blocks(scheme, columns).checked_mul(4 * PANEL)?.checked_add(head);
    let (whole, rest) = (k / len, k % len);
    let rest = if rest > 0 { group(rest)? } else { 0 };
    group(len)?.checked_mul(whole)?.checked_add(rest)
}

/// Bytes of the upper and the lower plane of a panel, see [`crate::program::Layout::Planes16`]; `None` if a group is not whole pairs of
/// blocks, codes have no halves, or a panel's bytes are no number.
#[inline]
pub fn plane_bytes(scheme: Scheme, k: usize) -> Option<[usize; 2]> {
    let pairs = (scheme.bits != 3 && k.is_multiple_of(2 * block_len(scheme))).then_some(k / (2 * block_len(scheme)))?;
    Some([panel_bytes(scheme, k)? - pairs * 4 * PANEL, pairs * 4 * PANEL])
}

/// In a byte of codes, the upper half of the bits of each, and how far it is from the lower half.
#[inline]
pub fn upper_bits(scheme: Scheme) -> (u8, u32) {
    if scheme.bits == 4 { (0xcc, 2) } else { (0xf0, 4) }
}

/// Panels of rows of `k` columns to their planes, the upper and the lower ones.
///
/// # Panics
/// If they have none, see [`plane_bytes`].
pub fn split_planes(panels: &[u8], k: usize, scheme: Scheme) -> [Vec<u8>; 2] {
    let (bytes, [upper_bytes, lower_bytes]) = panel_bytes(scheme, k).zip(plane_bytes(scheme, k)).expect("there are planes");
    let count = panels.len() / bytes.max(1);
    let (mut upper, mut lower) = (Vec::with_capacity(count * upper_bytes), Vec::with_capacity(count * lower_bytes));
    let head = PANEL * (scheme.scale_bytes() + usize::from(scheme.zero_points));
    let group = head + scheme.group_len(k).div_ceil(block_len(scheme)) * 4 * PANEL;
    let (mask, shift) = upper_bits(scheme);
    for group in panels.chunks_exact(bytes.max(1)).flat_map(|panel| panel.chunks(group)) {
        let (head, codes) = group.split_at(head);
        upper.extend_from_slice(head);
        for pair in codes.chunks_exact(8 * PANEL) {
            let (first, second) = pair.split_at(4 * PANEL);
            upper.extend(first.iter().zip(second).map(|(a, b)| (a & mask) >> shift | b & mask));
            lower.extend(first.iter().zip(second).map(|(a, b)| a & !mask | (b & !mask) << shift));
        }
    }
    [upper, lower]
}

/// Codes of any number of rows to panels; rows that the last panel lacks have scale 0.
pub fn pack_panels(rows: &Codes, k: usize, scheme: Scheme) -> Vec<u8> {
    let n = rows.codes.len() / k.max(1);
    let (len, groups) = (scheme.group_len(k), scheme.groups(k));
    let mut out = Vec::with_capacity(n.div_ceil(PANEL) * panel_bytes(scheme, k).unwrap_or(0));
    for first in (0..n).step_by(PANEL) {
        let panel = PANEL.min(n - first);
        for g in 0..groups {
            let at = |r: usize| (first + r) * groups + g;
            for r in 0..PANEL {
                let scale = if r < panel { rows.scales[at(r)] } else { 0.0 };
                match scheme.group {
                    Some(_) => out.extend_from_slice(&f16::from_f32(scale).to_le_bytes()),
                    None => out.extend_from_slice(&scale.to_le_bytes()),
                }
            }
            if scheme.zero_points {
                out.extend((0..PANEL).map(|r| if r < panel { rows.zeros[at(r)] } else { 0 }));
            }
            let columns = g * len..k.min((g + 1) * len);
            let start = out.len();
            out.resize(start + code_blocks(scheme, columns.len()) * 4 * PANEL, 0);
            let cells = out[start..].as_chunks_mut::<4>().0;
            for r in 0..panel {
                let row = &rows.codes[(first + r) * k..][columns.clone()];
                let mut cells = cells[r..].iter_mut().step_by(PANEL);
                let mut put = |word: u32| cells.next().into_iter().for_each(|cell| *cell = word.to_le_bytes());
                match scheme.bits {
                    3 => row.chunks(RUN).flat_map(|run| pack_run(words(run))).for_each(put),
                    4 => row.chunks(8).map(words).for_each(|[low, high]| put(low | high << 4)),
                    _ => row.chunks(4).map(words).for_each(|[word]| put(word)),
                }
            }
        }
    }
    out
}

/// Codes of 4 columns to a word; those that are missing are 0.
fn words<const N: usize>(codes: &[u8]) -> [u32; N] {
    let mut whole = [[0; 4]; N];
    whole.as_flattened_mut()[..codes.len()].copy_from_slice(codes);
    whole.map(u32::from_le_bytes)
}

/// Words of codes of 3 bits to those of three blocks, see [`crate::program::Layout::Panel16`].
fn pack_run(words: [u32; 8]) -> [u32; 3] {
    let [a, b, c, d, e, f, g, h] = words;
    let (low, high) = (0x0303_0303, 0x0404_0404);
    [a | b << 3 | (g & low) << 6, c | d << 3 | (h & low) << 6, e | f << 3 | (g & high) << 4 | (h & high) << 5]
}

/// Candidates of [`Method::Search`]: codes that the largest number of a group gets, of 8 (with 3 bits half of them, of 4). Smaller ones spend range on it;
/// larger ones cut it off. The lowest code has one more step than the highest, so it gets codes of either sign: the second half is
/// the first with the other sign.
pub const PEAKS: [f32; LANES] = [-6.8, -7.2, -7.6, -8.0, -8.4, -8.9, -9.5, -10.4, 6.8, 7.2, 7.6, 8.0, 8.4, 8.9, 9.5, 10.4];
/// The same for ranges with a zero point: the part of the range that is kept.
const SHRINKS: [f32; 8] = [1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7];

const LANES: usize = 16;

/// Sums of `f(x)` and `g(x)` over a group, in a fixed order, so that every machine chooses alike; in lanes, so that compilers
/// vectorise it.
#[inline(always)]
fn sums(x: &[f32], f: impl Fn(f32) -> (f32, f32)) -> (f32, f32) {
    let (mut a, mut b) = ([0f32; LANES], [0f32; LANES]);
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            let (p, q) = f(chunk[i]);
            a[i] += p;
            b[i] += q;
        }
    }
    for (i, v) in rest.iter().enumerate() {
        let (p, q) = f(*v);
        a[i] += p;
        b[i] += q;
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            a[i] += a[i + width];
            b[i] += b[i + width];
        }
        width /= 2;
    }
    (a[0], b[0])
}

/// `v` within bounds, as one instruction for each; not-a-number stays one.
#[inline(always)]
fn bounded(v: f32, low: f32, high: f32) -> f32 {
    let v = if v < low { low } else { v };
    if v > high { high } else { v }
}

/// 1.5 * 2^23: adding it to a number below 2^22 leaves no room for a fraction, so that it is rounded to the nearest integer, of two
/// to the even one. The low bits of the sum are that integer's.
pub const MAGIC: f32 = 12_582_912.0;

/// To the nearest integer, ties to even, for numbers below 2^22.
#[inline(always)]
fn round(v: f32) -> f32 {
    (v + MAGIC) - MAGIC
}

/// An integer from 0 to 255; of not-a-number 0. Unlike `as u8`, compilers vectorise it.
#[inline(always)]
fn byte(v: f32) -> u8 {
    if v >= 0.0 { ((v + MAGIC).to_bits() & 0xff) as u8 } else { 0 }
}

/// Codes of one group that share a scale; gives the scale, as it is kept, and the zero. Not-a-number counts as 0.
#[inline(always)]
fn quantize_group(x: &[f32], scheme: Scheme, method: Method, codes: &mut [u8]) -> (f32, u8) {
    let (scale, zero) = choose_scale(x, scheme, method);
    codes_of(x, scale, zero, scheme, codes);
    (scale, zero)
}

/// The codes nearest to `x`, in lanes as in [`sums`].
#[inline(always)]
pub fn codes_of(x: &[f32], scale: f32, zero: u8, scheme: Scheme, codes: &mut [u8]) {
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let ((chunks, rest), (code_chunks, code_rest)) = (x.as_chunks::<LANES>(), codes.as_chunks_mut::<LANES>());
    for (x, codes) in chunks.iter().zip(code_chunks) {
        for i in 0..LANES {
            codes[i] = code_of(x[i], inverse, zero, scheme);
        }
    }
    for (x, code) in rest.iter().zip(code_rest) {
        *code = code_of(*x, inverse, zero, scheme);
    }
}

/// The scale of a group, as it is kept, and its zero.
#[inline(always)]
pub fn choose_scale(x: &[f32], scheme: Scheme, method: Method) -> (f32, u8) {
    if scheme.zero_points { asymmetric(x, scheme, method) } else { (symmetric(x, scheme, method), scheme.middle()) }
}

/// The code nearest to `x`, where `inverse` is 1 / scale, or 0 if the scale is 0.
#[inline(always)]
pub fn code_of(x: f32, inverse: f32, zero: u8, scheme: Scheme) -> u8 {
    byte(bounded(round(bounded(x * inverse, -512.0, 512.0)) + f32::from(zero), 0.0, f32::from(scheme.max_code())))
}

/// The lowest and the highest number, 0 among them.
#[inline(always)]
fn range(x: &[f32]) -> (f32, f32) {
    let (mut low, mut high) = ([0f32; LANES], [0f32; LANES]);
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            low[i] = if chunk[i] < low[i] { chunk[i] } else { low[i] };
            high[i] = if chunk[i] > high[i] { chunk[i] } else { high[i] };
        }
    }
    for (i, v) in rest.iter().enumerate() {
        low[i] = if *v < low[i] { *v } else { low[i] };
        high[i] = if *v > high[i] { *v } else { high[i] };
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            low[i] = if low[i + width] < low[i] { low[i + width] } else { low[i] };
            high[i] = if high[i + width] > high[i] { high[i + width] } else { high[i] };
        }
        width /= 2;
    }
    (low[0], high[0])
}

/// The number of largest size, with its sign.
#[inline(always)]
fn peak(x: &[f32]) -> f32 {
    let (low, high) = range(x);
    let peak = if -low > high { low } else { high };
    if peak.is_finite() { peak } else { f32::MAX.copysign(peak) }
}

#[inline(always)]
fn symmetric(x: &[f32], scheme: Scheme, method: Method) -> f32 {
    let peak = peak(x);
    let middle = f32::from(scheme.middle());
    if peak == 0.0 {
        return 0.0;
    }
    let plain = scheme.keep(peak.abs() / (middle - 1.0));
    if method == Method::Round || scheme.bits == 8 {
        return plain;
    }
    // A lane for each candidate, so that nothing is summed across lanes.
    let inverse = PEAKS.map(|code| code * (middle / 8.0) / peak);
    let (mut xy, mut yy) = ([0f32; LANES], [0f32; LANES]);
    for v in x {
        for i in 0..LANES {
            let y = bounded(round(v * inverse[i]), -middle, middle - 1.0);
            xy[i] += v * y;
            yy[i] += y * y;
        }
    }
    // The codes' best scale is xy / yy, and leaves the error xx - xy² / yy (llama.cpp, `make_qx_quants`).
    let mut best = (f32::NEG_INFINITY, plain);
    for (xy, yy) in xy.iter().zip(yy) {
        let gain = if yy > 0.0 { xy * xy / yy } else { 0.0 };
        if gain > best.0 {
            best = (gain, xy / yy);
        }
    }
    scheme.keep(best.1)
}

#[inline(always)]
fn asymmetric(x: &[f32], scheme: Scheme, method: Method) -> (f32, u8) {
    let (low, high) = range(x);
    let top = f32::from(scheme.max_code());
    let at = |shrink: f32| {
        let scale = scheme.keep(((high - low).min(f32::MAX) * shrink) / top);
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        (scale, inverse, round(-low * shrink * inverse).clamp(0.0, top))
    };
    let (plain, _, zero) = at(1.0);
    if method == Method::Round || plain == 0.0 {
        return (plain, zero as u8);
    }
    let mut best = (f32::INFINITY, plain, zero);
    for shrink in SHRINKS {
        let (_, inverse, zero) = at(shrink);
        let code = |v: f32| bounded(round(bounded(v * inverse, -512.0, 512.0)) + zero, 0.0, top) - zero;
        let (xy, yy) = sums(x, |v| (v * code(v), code(v) * code(v)));
        if yy == 0.0 {
            continue;
        }
        let scale = scheme.keep(xy / yy);
        let (error, _) = sums(x, |v| ((v - scale * code(v)) * (v - scale * code(v)), 0.0));
        if error < best.0 {
            best = (error, scale, zero);
        }
    }
    (best.1, best.2 as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        let mut uniform = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            f64::from(state) / f64::from(u32::MAX)
        };
        (0..n).map(|_| ((0..12).map(|_| uniform()).sum::<f64>() - 6.0) as f32 * 0.02).collect()
    }

    fn error(x: &[f32], k: usize, scheme: Scheme, method: Method) -> f64 {
        let y = Codes::of(x, k, scheme, method).dequantize(k, scheme);
        let square = |v: f64| v * v;
        let e: f64 = x.iter().zip(&y).map(|(a, b)| square(f64::from(a - b))).sum();
        (e / x.iter().map(|v| square(f64::from(*v))).sum::<f64>()).sqrt()
    }

    #[test]
    fn names() {
        for name in ["int8", "int4", "int4g32", "int4g128z", "int8g64", "int8z", "int3", "int3g128", "int3g32z"] {
            assert_eq!(name.parse::<Scheme>().unwrap().to_string(), name);
        }
        for name in ["int5", "int2", "int4g33", "int3g16", "int4gz", "", "int4z32"] {
            assert!(name.parse::<Scheme>().is_err(), "{name}");
        }
    }

    #[test]
    fn errors_are_as_expected() {
        let x = noise(256 * 64, 1);
        let of = |s: &str, m| error(&x, 256, s.parse().unwrap(), m);
        // Of a normal distribution: round to nearest 4-bit groups of 32 lose about 9 %.
        let (round, search) = (of("int4g32", Method::Round), of("int4g32", Method::Search));
        assert!((0.085..0.10).contains(&round), "{round}");
        assert!(search < 0.9 * round, "{search} of {round}");
        assert!(of("int4g32z", Method::Search) < of("int4g32z", Method::Round));
        assert!(of("int4g32z", Method::Search) < round);
        assert!(of("int8", Method::Round) < 0.01);
        // By the quantizer of least error for that distribution, of any 8 numbers, 19 %.
        assert!((0.15..0.2).contains(&of("int3g128", Method::Search)));
        assert!(of("int4g128", Method::Search) < of("int4g128", Method::Round));
    }

    #[test]
    fn panels_have_their_length() {
        for name in ["int8", "int4", "int4g32", "int4g16z", "int8g64", "int8z", "int3", "int3g32", "int3g64z"] {
            let scheme: Scheme = name.parse().unwrap();
            for (n, k) in [(1, 1), (16, 32), (17, 40), (33, 100)] {
                let codes = Codes::of(&noise(n * k, 3), k, scheme, Method::Search);
                let bytes = pack_panels(&codes, k, scheme);
                assert_eq!(bytes.len(), n.div_ceil(PANEL) * panel_bytes(scheme, k).unwrap(), "{name} {n} {k}");
            }
        }
        assert_eq!(panel_bytes(Scheme::INT4, 64), Some(2 * (32 + 256)));
        assert_eq!(panel_bytes("int3g64".parse().unwrap(), 64), Some(32 + 2 * 192));
    }

    #[test]
    fn odd_groups() {
        let scheme = Scheme::INT4;
        for x in [vec![], vec![0.0; 40], vec![f32::NAN; 40], vec![f32::INFINITY, 1.0], vec![1e-30; 33], vec![3.0; 17]] {
            let k = x.len();
            let codes = Codes::of(&x, k, scheme, Method::Search);
            assert_eq!(codes.scales.len(), scheme.groups(k.max(1)) * usize::from(k > 0));
            assert!(codes.scales.iter().all(|s| s.is_finite()) && codes.codes.iter().all(|c| *c < 16));
        }
        let three = Codes::of(&[3.0; 17], 17, scheme, Method::Search).dequantize(17, scheme);
        assert!(three.iter().all(|v| (v - 3.0).abs() < 2e-3), "{three:?}");
    }
}
