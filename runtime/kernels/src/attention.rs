//! Attention: scores, softmax and the weighted sum, per head and block of queries.
//!
//! Many queries: keys and values of the range that a run of queries sees are packed into panels once, and both products go
//! through the tile kernel of [`crate::linear`], or, if they may be rounded, in tiles of bf16 ([`crate::flash`]). Few queries
//! (decoding): [`crate::few`].

use crate::{
    Arithmetic, Isa, Kernels, few,
    isa::Task,
    lanes::{self, Lanes, N},
    linear::{OutColumns, ROWS, Tile},
    norm::{rotate, rotated},
};
use half::bf16;
use std::{borrow::Cow, ops::Range};

/// Queries from which packing pays. Fewer are computed one by one, so that the result of one does not depend on their number.
const PACK: usize = 17;
/// Queries per block: bounds the buffer of scores.
const BLOCK: usize = 4 * ROWS;
/// Queries of a causal run, for which keys and values are packed once.
const CAUSAL: usize = 4 * BLOCK;

/// Rows of heads: of queries in `f32`, of keys and values as they are [`Kept`].
#[derive(Clone, Copy)]
pub struct Heads<D> {
    /// Rows.
    pub data: D,
    /// Rows from one batch, one head and one row of a head to the next.
    strides: [usize; 3],
}

impl<D> Heads<D> {
    /// `[lead, heads, _, width]`, each head with room for `room` rows.
    pub fn new(data: D, heads: usize, room: usize) -> Self {
        Self { data, strides: [heads * room, room, 1] }
    }

    /// Number of a row.
    #[inline(always)]
    pub(crate) fn at(&self, lead: usize, head: usize, row: usize) -> usize {
        let [l, h, r] = self.strides;
        lead * l + head * h + row * r
    }

    /// Rows up to the last one of `[lead, heads, n]`.
    fn rows(&self, size: [usize; 3]) -> usize {
        if size.contains(&0) { 0 } else { self.at(size[0] - 1, size[1] - 1, size[2] - 1) + 1 }
    }
}

/// Queries, keys and values that lie side by side: `qkv [lead, s, (heads + 2 kv_heads) d]`.
pub fn side_by_side(qkv: &[f32], [heads, kv_heads, s, d]: [usize; 4]) -> (Heads<&[f32]>, [Heads<Kept<'_>>; 2]) {
    let all = heads + 2 * kv_heads;
    let from = |head: usize| qkv.get(head * d..).unwrap_or_default();
    let strides = [s * all, 1, all];
    let kept = [heads, heads + kv_heads].map(|head| Heads { data: Kept::F32(from(head)), strides });
    (Heads { data: qkv, strides }, kept)
}

/// Rows of keys or values as they are kept.
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub enum Kept<'a> {
    F32(&'a [f32]),
    BF16(&'a [bf16]),
    /// And the scale of each row.
    I8(&'a [i8], &'a [f32]),
}

impl<'a> Kept<'a> {
    /// Whether there are `n` rows of `width`.
    fn reaches(&self, n: usize, width: usize) -> bool {
        match self {
            Self::F32(rows) => rows.len() >= n * width,
            Self::BF16(rows) => rows.len() >= n * width,
            Self::I8(rows, scales) => rows.len() >= n * width && scales.len() >= n,
        }
    }

    /// Rows from `first` on.
    pub(crate) fn from(self, first: usize, width: usize) -> Self {
        match self {
            Self::F32(rows) => Kept::F32(&rows[first * width..]),
            Self::BF16(rows) => Kept::BF16(&rows[first * width..]),
            Self::I8(rows, scales) => Kept::I8(&rows[first * width..], &scales[first..]),
        }
    }

    /// Row `i` in `f32`, as it lies or in `room`, which is as long.
    #[inline(always)]
    pub(crate) fn row<'b>(self, i: usize, room: &'b mut [f32]) -> &'b [f32]
    where
        'a: 'b,
    {
        if let Self::F32(rows) = self {
            return &rows[i * room.len()..(i + 1) * room.len()];
        }
        self.widen(i, room);
        room
    }

    /// Asks for row `i` of `width` elements.
    #[inline(always)]
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn ask(self, i: usize, width: usize) {
        if let Self::F32(rows) = self {
            let row = rows.as_ptr().wrapping_add(i * width);
            (0..width + N).step_by(N).for_each(|c| lanes::prefetch::<{ lanes::into::FIRST }, _>(row.wrapping_add(c)));
        }
    }

    /// Row `i` in `f32`.
    #[inline(always)]
    pub(crate) fn widen(self, i: usize, out: &mut [f32]) {
        let place = i * out.len()..(i + 1) * out.len();
        match self {
            Self::F32(rows) => out.copy_from_slice(&rows[place]),
            Self::BF16(rows) => out.iter_mut().zip(&rows[place]).for_each(|(o, v)| *o = v.to_f32()),
            Self::I8(rows, scales) => out.iter_mut().zip(&rows[place]).for_each(|(o, v)| *o = scales[i] * f32::from(*v)),
        }
    }
}

/// Which keys a query sees.
#[derive(Clone, Copy)]
pub enum Seen<'a> {
    /// All.
    All,
    /// Query `i` of `s` sees the keys `j <= t - s + i` whose `mask [lead, t]` is not 0.
    Causal(&'a [i64]),
    /// Query `i` sees the keys `j` with `segments[j] == segments[i]`; `s` is `t`.
    Segments(&'a [i64]),
    /// Those for which the mask is not 0.
    Given(&'a [u8], Strides),
    /// All; the bias is added to the scores.
    Biased(&'a [f32], Strides),
}

/// Elements of a mask from one batch, head, query and key to the next; 0 along an axis that it does not have.
pub type Strides = [usize; 4];

/// Operands of [`Kernels::attention`].
#[derive(Clone, Copy)]
pub struct Attention<'a> {
    /// Queries, `s` of each head.
    pub q: Heads<&'a [f32]>,
    /// Keys, `t` of each head.
    pub k: Heads<Kept<'a>>,
    /// Values, `t` of each head.
    pub v: Heads<Kept<'a>>,
    /// Batch, or 1.
    pub lead: usize,
    /// Heads of queries, a multiple of `kv_heads`.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Queries per head.
    pub s: usize,
    /// Keys per head.
    pub t: usize,
    /// Width of a head of queries and keys.
    pub d: usize,
    /// Width of a head of values.
    pub dv: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// Mask.
    pub seen: Seen<'a>,
    /// cos and sin `[lead, s, d/2]` by which queries are rotated first, and keys if they are `packed`.
    pub rotary: Option<[&'a [f32]; 2]>,
    /// Whether heads lie [`side_by_side`], and so do the results: `[lead, s, heads, dv]`.
    pub packed: bool,
    /// Whether operands of both products may be rounded, as [`Isa::attention_arithmetic`] says, where the CPU multiplies that faster.
    pub bf16: bool,
}

/// A run of queries and the range of keys outside of which they see nothing.
pub(crate) struct Run {
    pub(crate) queries: Range<usize>,
    pub(crate) keys: Range<usize>,
    /// Whether they see all keys of the range.
    dense: bool,
}

impl Run {
    /// The same in runs of at most `len` queries.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn parts(&self, len: usize) -> impl Iterator<Item = Self> {
        let Self { queries, keys, dense } = self;
        queries.clone().step_by(len).map(move |start| Self {
            queries: start..queries.end.min(start + len),
            keys: keys.clone(),
            dense: *dense,
        })
    }
}

impl Attention<'_> {
    /// Queries that share a range of keys.
    fn runs(&self) -> Vec<Run> {
        let all = |dense| vec![Run { queries: 0..self.s, keys: 0..self.t, dense }];
        match self.seen {
            Seen::All => all(true),
            Seen::Causal(_) => (0..self.s)
                .step_by(CAUSAL)
                .map(|start| {
                    let end = (start + CAUSAL).min(self.s);
                    // Saturating: with fewer keys than queries the first ones see nothing.
                    Run { queries: start..end, keys: 0..(self.t + end).saturating_sub(self.s), dense: false }
                })
                .collect(),
            // Sorted segments are contiguous, and each sees itself only.
            Seen::Segments(ids) if ids.is_sorted() => {
                let mut runs = vec![];
                let mut start = 0;
                for segment in ids.chunk_by(|a, b| a == b) {
                    let range = start..start + segment.len();
                    start = range.end;
                    runs.push(Run { queries: range.clone(), keys: range, dense: true });
                }
                runs
            }
            Seen::Segments(_) | Seen::Given(..) | Seen::Biased(..) => all(false),
        }
    }

    /// What is added to a score: -inf if the query does not see the key.
    fn bias(&self, lead: usize, head: usize, query: usize, key: usize) -> f32 {
        let at = |[l, h, q, k]: Strides| lead * l + head * h + query * q + key * k;
        let sees = match self.seen {
            Seen::All => true,
            Seen::Causal(mask) => key + self.s <= self.t + query && mask[lead * self.t + key] != 0,
            Seen::Segments(ids) => ids[query] == ids[key],
            Seen::Given(mask, strides) => mask[at(strides)] != 0,
            Seen::Biased(bias, strides) => return bias[at(strides)],
        };
        if sees { 0.0 } else { f32::NEG_INFINITY }
    }

    /// Keys before the first one that neither query `query` nor any before it sees.
    #[inline(always)]
    pub(crate) fn reach(&self, query: usize) -> usize {
        if matches!(self.seen, Seen::Causal(_)) { (self.t + query + 1).saturating_sub(self.s).min(self.t) } else { self.t }
    }

    /// The mask, applied to the scores of a query with the keys from `first` on: of keys that it does not see they become -inf.
    #[inline(always)]
    pub(crate) fn hide(&self, lead: usize, head: usize, query: usize, first: usize, scores: &mut [f32]) {
        match self.seen {
            Seen::All => {}
            Seen::Causal(mask) => {
                let (seen, later) = scores.split_at_mut(self.reach(query).saturating_sub(first).min(scores.len()));
                let mask = &mask[lead * self.t + first..];
                seen.iter_mut().zip(mask).for_each(|(s, m)| *s = if *m == 0 { f32::NEG_INFINITY } else { *s });
                later.fill(f32::NEG_INFINITY);
            }
            _ => scores.iter_mut().enumerate().for_each(|(j, s)| *s += self.bias(lead, head, query, first + j)),
        }
    }

    /// cos and sin of a query's place, if it is to be rotated.
    #[inline(always)]
    pub(crate) fn angles(&self, lead: usize, query: usize) -> Option<[&[f32]; 2]> {
        let half = self.d / 2;
        let at = (lead * self.s + query) * half;
        self.rotary.map(|angles| angles.map(|a| &a[at..at + half]))
    }

    /// Key `j` of a head, rotated if it is to be: as it lies, or in `room`.
    #[inline(always)]
    pub(crate) fn key<'b>(&'b self, lead: usize, head: usize, j: usize, room: &'b mut [f32]) -> &'b [f32] {
        let at = self.k.at(lead, head, j);
        if self.packed
            && let Some([cos, sin]) = self.angles(lead, j)
        {
            if let Kept::F32(rows) = self.k.data {
                rotated(&rows[at * room.len()..(at + 1) * room.len()], cos, sin, 1.0, room);
            } else {
                self.k.data.widen(at, room);
                rotate(room, cos, sin);
            }
            return room;
        }
        self.k.data.row(at, room)
    }

    /// Row and column of a query's result, whose rows are of [`Self::columns`].
    #[inline(always)]
    pub(crate) fn place(&self, lead: usize, head: usize, query: usize) -> [usize; 2] {
        if self.packed { [lead * self.s + query, head * self.dv] } else { [(lead * self.heads + head) * self.s + query, 0] }
    }

    fn columns(&self) -> usize {
        if self.packed { self.heads * self.dv } else { self.dv }
    }

    /// Whether a mask has an element for every score.
    fn reaches(&self, len: usize, [l, h, q, k]: Strides) -> bool {
        let last = |n: usize, stride: usize| n.saturating_sub(1) * stride;
        last(self.lead, l) + last(self.heads, h) + last(self.s, q) + last(self.t, k) < len
    }
}

/// One head's run.
struct Head<'a, 'b> {
    a: &'a Attention<'b>,
    lead: usize,
    head: usize,
    run: &'a Run,
    out: OutColumns,
    /// Of at least [`attention_scratch`] elements.
    scratch: &'a mut [f32],
}

/// Floats that a thread needs for `s` queries of `group` heads that share `t` keys of width `d` and values of width `dv`: scores and
/// queries, or where there are many queries scores, a row and the panels of keys and values. Saturates.
pub fn attention_scratch(group: usize, s: usize, t: usize, d: usize, dv: usize) -> usize {
    if s < PACK { few::scratch(group.saturating_mul(s), t, d) } else { packed_attention_scratch(s, t, d, dv) }
}

/// [`attention_scratch`] where heads are packed.
pub fn packed_attention_scratch(s: usize, t: usize, d: usize, dv: usize) -> usize {
    let columns = t.saturating_add(N - 1) / N * N;
    let rows = d.saturating_add(dv.saturating_add(N - 1) / N * N).saturating_add(BLOCK.min(s));
    columns.saturating_mul(rows).saturating_add(d.max(dv))
}

impl Task for Head<'_, '_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        if self.run.keys.is_empty() {
            for first in (0..self.a.dv).step_by(N) {
                (0..self.run.queries.len()).for_each(|i| self.write(i, first, &[0.0; N]));
            }
            return;
        }
        // SAFETY: the caller's promise.
        unsafe { self.in_panels::<L>() };
    }
}

impl Head<'_, '_> {
    /// The queries `[run, d]`, rotated if they are to be.
    #[inline(always)]
    fn queries(&self) -> Cow<'_, [f32]> {
        let (a, d, len) = (self.a, self.a.d, self.run.queries.len() * self.a.d);
        if !a.packed && a.rotary.is_none() {
            return Cow::Borrowed(&a.q.data[a.q.at(self.lead, self.head, self.run.queries.start) * d..][..len]);
        }
        let mut q = vec![0.0; len];
        for (row, i) in q.chunks_exact_mut(d.max(1)).zip(self.run.queries.clone()) {
            row.copy_from_slice(&a.q.data[a.q.at(self.lead, self.head, i) * d..][..d]);
            if let Some([cos, sin]) = a.angles(self.lead, i) {
                rotate(row, cos, sin);
            }
        }
        Cow::Owned(q)
    }

    /// Writes columns of the result of query `i` of the run from `first` on, as many as there are.
    #[inline(always)]
    fn write(&self, i: usize, first: usize, values: &[f32; N]) {
        let [row, column] = self.a.place(self.lead, self.head, self.run.queries.start + i);
        let width = N.min(self.a.dv - first);
        // SAFETY: a head's run belongs to one thread.
        unsafe { self.out.write_part(row, column + first, &values[..width]) };
    }

    /// # Safety
    /// As [`Task::run`].
    #[inline(always)]
    unsafe fn in_panels<L: Lanes>(mut self) {
        let scratch = std::mem::take(&mut self.scratch);
        let (a, d, dv, keys) = (self.a, self.a.d, self.a.dv, self.run.keys.clone());
        let (q, kv_head) = (self.queries(), self.head / (a.heads / a.kv_heads));
        let t = keys.len();
        let columns = t.next_multiple_of(N);
        let (row, rest) = scratch.split_at_mut(d.max(dv));
        let (keys_panels, rest) = rest.split_at_mut(columns * d);
        let (value_panels, rest) = rest.split_at_mut(dv.div_ceil(N) * t * N);
        let scores = &mut rest[..BLOCK.min(self.run.queries.len()) * columns];
        keys_panels[t / N * N * d..].fill(0.0);
        for (j, key) in keys.clone().enumerate() {
            let key = a.key(self.lead, kv_head, key, &mut row[..d]);
            let panel = &mut keys_panels[j / N * N * d..];
            key.iter().enumerate().for_each(|(c, v)| panel[c * N + j % N] = *v);
        }
        // Values as the panels of their transpose: [ceil(dv / 16), t, 16].
        value_panels[dv / N * t * N..].fill(0.0);
        for (j, key) in keys.enumerate() {
            let v = &mut row[..dv];
            a.v.data.widen(a.v.at(self.lead, kv_head, key), v);
            for (p, part) in v.chunks(N).enumerate() {
                value_panels[(p * t + j) * N..][..part.len()].copy_from_slice(part);
            }
        }
        let mut tile = [[0.0; N]; ROWS];
        for first in (0..self.run.queries.len()).step_by(BLOCK) {
            let block = BLOCK.min(self.run.queries.len() - first);
            let seen = self.reach(first + block - 1);
            for (p, panel) in keys_panels.chunks_exact(d * N).take(seen.div_ceil(N)).enumerate() {
                for row in (0..block).step_by(ROWS) {
                    let rows = ROWS.min(block - row);
                    let x = &q[(first + row) * d..];
                    // SAFETY: the caller's promise.
                    unsafe { Tile { x, x_stride: d, k: d, rows, panel, out: &mut tile }.compute::<L>() };
                    for (r, values) in tile.iter().enumerate().take(rows) {
                        let to = &mut scores[(row + r) * columns + p * N..][..N];
                        to.iter_mut().zip(values).for_each(|(s, v)| *s = v * self.a.scale);
                    }
                }
            }
            for (row, scores) in scores.chunks_exact_mut(columns).enumerate().take(block) {
                let scores = &mut scores[..seen];
                if !self.run.dense {
                    self.a.hide(self.lead, self.head, self.run.queries.start + first + row, self.run.keys.start, scores);
                }
                // SAFETY: the caller's promise.
                unsafe { softmax::<L>(scores) };
            }
            for (p, panel) in value_panels.chunks_exact(t * N).enumerate() {
                for row in (0..block).step_by(ROWS) {
                    let rows = ROWS.min(block - row);
                    let (x, panel) = (&scores[row * columns..], &panel[..seen * N]);
                    // SAFETY: the caller's promise.
                    unsafe { Tile { x, x_stride: columns, k: seen, rows, panel, out: &mut tile }.compute::<L>() };
                    for (r, values) in tile.iter().enumerate().take(rows) {
                        self.write(first + row + r, p * N, values);
                    }
                }
            }
        }
    }

    /// Keys of the run before the first one that neither query `i` of the run nor any before it sees.
    #[inline(always)]
    fn reach(&self, i: usize) -> usize {
        let keys = &self.run.keys;
        self.a.reach(self.run.queries.start + i).saturating_sub(keys.start).min(keys.len())
    }
}

/// Weights of this size are none: products of smaller ones could be subnormal, which is a hundred times slower.
const NOTHING: f32 = 1e-30;

/// Softmax of scores, of which -inf stands for unseen; zeros if all are.
///
/// # Safety
/// The CPU has the instruction set of `L`.
#[inline(always)]
pub(crate) unsafe fn softmax<L: Lanes>(scores: &mut [f32]) {
    // SAFETY of all blocks: the caller's promise.
    let largest = {
        let (chunks, tail) = scores.as_chunks::<N>();
        let start = tail.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        unsafe { chunks.iter().fold(L::splat(start), |m, c| m.max(L::load(c))).largest() }
    };
    if largest == f32::NEG_INFINITY {
        scores.fill(0.0);
        return;
    }
    let (chunks, tail) = scores.as_chunks_mut::<N>();
    let mut sum = unsafe {
        let mut sum = L::splat(0.0);
        let shift = L::splat(-largest);
        for c in chunks.iter_mut() {
            let e = lanes::exp(L::load(c).add(shift)).sub(L::splat(NOTHING)).max(L::splat(0.0));
            e.store(c);
            sum = sum.add(e);
        }
        sum.sum()
    };
    for s in tail.iter_mut() {
        *s = ((*s - largest).exp() - NOTHING).max(0.0);
        sum += *s;
    }
    let scale = 1.0 / sum;
    scores.iter_mut().for_each(|s| *s *= scale);
}

impl Isa {
    /// What [`Kernels::attention`] multiplies `s` queries of a head in, unless a mask is given for each query and key. Towers' operands are
    /// rounded to 8 bits, as what their linear layers multiply is; decoders', some of which have keys with few very large elements, are not.
    pub fn attention_arithmetic(self, bf16: bool, s: usize, causal: bool) -> Arithmetic {
        match self {
            Self::Avx512Bf16 if bf16 && s >= PACK && !causal => Arithmetic::Int8,
            Self::Avx512Bf16 | Self::Amx if bf16 && s >= PACK => Arithmetic::Bf16,
            _ => Arithmetic::F32,
        }
    }
}

impl Kernels {
    /// `softmax(scale q kᵀ) v` to `out [lead, heads, s, dv]`, or `[lead, s, heads, dv]` if heads are packed. A query that sees no key
    /// gives zeros. `scratch` is of [`attention_scratch`] floats for each thread of the pool, or of [`packed_attention_scratch`].
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn attention(&self, a: &Attention<'_>, scratch: &mut [f32], out: &mut [f32]) {
        let Attention { lead, heads, kv_heads, s, t, d, dv, .. } = *a;
        assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "heads must be a multiple of kv_heads");
        let rows = lead * heads * s;
        assert!(out.len() == rows * dv, "out must be of lead * heads * s * dv");
        assert!(Kept::F32(a.q.data).reaches(a.q.rows([lead, heads, s]), d), "q must have s rows of d for each head");
        for (keys, d) in [(&a.k, d), (&a.v, dv)] {
            assert!(keys.data.reaches(keys.rows([lead, kv_heads, t]), d), "k and v must have t rows of d and dv for each head");
        }
        let is_run = [a.q.strides, a.k.strides, a.v.strides].iter().all(|s| s[2] == 1);
        assert!(if a.packed { s == t } else { is_run }, "packed heads have as many keys as queries; rows of others follow each other");
        match a.seen {
            Seen::All => {}
            Seen::Causal(mask) => assert_eq!(mask.len(), lead * t, "mask must be [lead, t]"),
            Seen::Segments(ids) => assert!(ids.len() == t && s == t, "segments must be [t], and s equal t"),
            Seen::Given(mask, strides) => assert!(rows * t == 0 || a.reaches(mask.len(), strides), "the mask is too small"),
            Seen::Biased(bias, strides) => assert!(rows * t == 0 || a.reaches(bias.len(), strides), "the bias is too small"),
        }
        if let Some([cos, sin]) = a.rotary {
            let fits = d.is_multiple_of(2) && cos.len() == lead * s * (d / 2) && sin.len() == cos.len();
            assert!(fits, "cos and sin must be [lead, s, d/2], with even d");
        }
        let need = if a.packed { packed_attention_scratch(s, t, d, dv) } else { attention_scratch(heads / kv_heads, s, t, d, dv) };
        assert!(scratch.len() / self.pool.threads() >= need, "scratch is too small");
        if out.is_empty() {
            return;
        }
        if s < PACK && !a.packed {
            self.few_queries(a, scratch, out);
            return;
        }
        let runs = a.runs();
        let out = OutColumns::new(out, a.columns());
        #[cfg(target_arch = "x86_64")]
        let causal = matches!(a.seen, Seen::Causal(_));
        #[cfg(target_arch = "x86_64")]
        if self.isa.attention_arithmetic(a.bf16, s, causal) != Arithmetic::F32 && (causal || runs.iter().all(|r| r.dense)) {
            self.tile_attention(a, &runs, out);
            return;
        }
        // Later runs of causal attention see more keys: start with the longest.
        self.pool.pieces_with((0..lead * heads * runs.len()).rev(), scratch, |_, i, scratch| {
            let (head, run) = (i / runs.len(), &runs[i % runs.len()]);
            self.isa.run(Head { a, lead: head / heads, head: head % heads, run, out, scratch });
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The results, and of each row the root of the sum of its squared weights: errors of single terms add up so.
    fn naive(a: &Attention<'_>) -> (Vec<f32>, Vec<f32>) {
        let (mut out, mut sizes) = (vec![], vec![]);
        for head in 0..a.lead * a.heads {
            let (batch, kv) = (head / a.heads, head % a.heads / (a.heads / a.kv_heads));
            let row = |x: &Heads<Kept<'_>>, d: usize, j: usize| {
                let mut row = vec![0.0; d];
                x.data.widen(x.at(batch, kv, j), &mut row);
                row.iter().map(|v| f64::from(*v)).collect::<Vec<_>>()
            };
            for i in 0..a.s {
                let q = &a.q.data[a.q.at(batch, head % a.heads, i) * a.d..][..a.d];
                let weight = |j: usize| {
                    let dot: f64 = q.iter().zip(row(&a.k, a.d, j)).map(|(q, k)| f64::from(*q) * k).sum();
                    (dot * f64::from(a.scale) + f64::from(a.bias(batch, head % a.heads, i, j))).exp()
                };
                let weights: Vec<f64> = (0..a.t).map(weight).collect();
                let sum = weights.iter().sum::<f64>().max(f64::MIN_POSITIVE);
                let mut o = vec![0.0; a.dv];
                for (j, w) in weights.iter().enumerate() {
                    o.iter_mut().zip(row(&a.v, a.dv, j)).for_each(|(o, v)| *o += w / sum * v);
                }
                out.extend(o.iter().map(|v| *v as f32));
                sizes.push(weights.iter().map(|w| (w / sum).powi(2)).sum::<f64>().sqrt() as f32);
            }
        }
        (out, sizes)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn attention_matches_its_formula(
            lead in 1usize..3, kv_heads in 1usize..3, groups in 1usize..4, s in prop_oneof![5 => 0usize..60, 4 => 1usize..PACK, 1 => 180usize..210, 1 => 250usize..300],
            past in prop_oneof![9 => 0usize..20, 1 => 250usize..300],
            d in 1usize..40, dv in 1usize..40, wide: bool, slack in 0usize..50, kind in 0usize..6, kept in 0usize..3, threads in 1usize..4, seed: u32,
        ) {
            let mut state = seed;
            let mut next = || { state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223); state >> 8 };
            let heads = kv_heads * groups;
            // More than the registers hold of a value; the products of many queries are rounded, so there may not be so many.
            let [d, dv] = [d, dv].map(|width| if wide && s < PACK { width + 110 } else { width });
            let t = if matches!(kind, 2 | 3) { s } else { s + past };
            let head_stride = t + slack;
            let mut floats = |n: usize| (0..n).map(|_| next() as f32 / (1 << 23) as f32 - 1.0).collect::<Vec<_>>();
            let (q, k, v) = (floats(lead * heads * s * d), floats(lead * kv_heads * head_stride * d), floats(lead * kv_heads * head_stride * dv));
            let mask: Vec<i64> = (0..lead * t).map(|_| i64::from(next() % 4 != 0)).collect();
            let mut ids: Vec<i64> = (0..t).map(|_| i64::from(next() % 4)).collect();
            if kind == 2 { ids.sort_unstable(); }
            // A mask for all heads, and a bias for each head and all batches.
            let given: Vec<u8> = (0..lead * s * t).map(|_| u8::from(next() % 3 != 0)).collect();
            let bias: Vec<f32> = (0..heads * s * t).map(|_| next() as f32 / (1 << 23) as f32 - 1.0).collect();
            let seen = match kind {
                0 => Seen::All,
                1 => Seen::Causal(&mask),
                2 | 3 => Seen::Segments(&ids),
                4 => Seen::Given(&given, [s * t, 0, t, 1]),
                _ => Seen::Biased(&bias, [0, s * t, t, 1]),
            };
            let narrow = |x: &[f32]| x.iter().map(|v| bf16::from_f32(*v)).collect::<Vec<_>>();
            let (k16, v16) = (narrow(&k), narrow(&v));
            let round = |x: &[f32], width: usize| {
                let (mut codes, mut scales) = (vec![0; x.len()], vec![0.0; x.len() / width]);
                Kernels::new(1).round(x, width, &mut codes, &mut scales);
                (codes, scales)
            };
            let (k8, v8) = (round(&k, d), round(&v, dv));
            let keys = |data| Heads::new(data, kv_heads, head_stride);
            let (k, v) = match kept {
                0 => (Kept::F32(&k), Kept::F32(&v)),
                1 => (Kept::BF16(&k16), Kept::BF16(&v16)),
                _ => (Kept::I8(&k8.0, &k8.1), Kept::I8(&v8.0, &v8.1)),
            };
            let (q, k, v) = (Heads::new(&q[..], heads, s), keys(k), keys(v));
            let a = Attention { q, k, v, lead, heads, kv_heads, s, t, d, dv, scale: 0.3, seen, rotary: None, packed: false, bf16: false };
            let (expected, sizes) = naive(&a);
            for isa in Isa::ALL.into_iter().filter(|i| i.is_supported()) {
                let mut out = vec![f32::NAN; lead * heads * s * dv];
                // Whatever was left in it.
                let mut scratch = vec![f32::NAN; threads * attention_scratch(heads / kv_heads, s, t, d, dv)];
                Kernels::with_isa(threads, isa).unwrap().attention(&a, &mut scratch, &mut out);
                for (o, e) in out.iter().zip(&expected) {
                    prop_assert!((o - e).abs() <= 1e-5, "{isa:?}: {o} instead of {e}");
                }
                // Scores of 40 products at most, weights and values, each rounded by 2^-9: four times that was never seen. Or by a 254th of
                // the largest, weights even by twice that: in 2000 cases more than 0.02 was seen, 0.03 was not.
                let mut rounded = vec![f32::NAN; out.len()];
                Kernels::with_isa(threads, isa).unwrap().attention(&Attention { bf16: true, ..a }, &mut scratch, &mut rounded);
                for (i, (o, e)) in rounded.iter().zip(&expected).enumerate() {
                    let off = if isa.attention_arithmetic(true, s, kind == 1) == Arithmetic::Int8 { 0.03 } else { 0.012 };
                    prop_assert!((o - e).abs() <= 1e-5 + off * sizes[i / dv], "{isa:?}: {o} instead of {e}");
                }
                // Queries that are rotated here give what queries give that were rotated before.
                if d.is_multiple_of(2) {
                    let k = Kernels::with_isa(threads, isa).unwrap();
                    let (sin, cos): (Vec<f32>, Vec<f32>) = (0..lead * s * d / 2).map(|i| (i as f32).sin_cos()).unzip();
                    let (mut turned, mut before, mut within) = (vec![0.0; q.data.len()], vec![f32::NAN; out.len()], vec![f32::NAN; out.len()]);
                    k.rotary(q.data, &cos, &sin, [lead, heads, s, d], &mut turned);
                    k.attention(&Attention { q: Heads::new(&turned[..], heads, s), ..a }, &mut scratch, &mut before);
                    k.attention(&Attention { rotary: Some([&cos, &sin]), ..a }, &mut scratch, &mut within);
                    prop_assert_eq!(before, within);
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn heads_side_by_side_give_what_they_give_apart(
            lead in 1usize..3, kv_heads in 1usize..3, groups in 1usize..3, s in prop_oneof![5 => 0usize..60, 1 => 250usize..300],
            half in 1usize..20, kind in 0usize..4, rotates: bool, bf16: bool, threads in 1usize..4, seed: u32,
        ) {
            let mut state = seed;
            let mut next = || { state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223); state >> 8 };
            let (heads, d) = (kv_heads * groups, 2 * half);
            let all = heads + 2 * kv_heads;
            let qkv: Vec<f32> = (0..lead * s * all * d).map(|_| next() as f32 / (1 << 23) as f32 - 1.0).collect();
            let apart = |first: usize, count: usize| -> Vec<f32> {
                let row = |l: usize, h: usize, i: usize| &qkv[((l * s + i) * all + first + h) * d..][..d];
                let rows = (0..lead).flat_map(|l| (0..count).flat_map(move |h| (0..s).map(move |i| (l, h, i))));
                rows.flat_map(|(l, h, i)| row(l, h, i)).copied().collect()
            };
            let (q, k, v) = (apart(0, heads), apart(heads, kv_heads), apart(heads + kv_heads, kv_heads));
            let (sin, cos): (Vec<f32>, Vec<f32>) = (0..lead * s * half).map(|i| (i as f32).sin_cos()).unzip();
            let mask: Vec<i64> = (0..lead * s).map(|_| i64::from(next() % 4 != 0)).collect();
            let ids: Vec<i64> = (0..s).map(|i| (i / 7) as i64).collect();
            let given: Vec<u8> = (0..lead * s * s).map(|_| u8::from(next() % 3 != 0)).collect();
            let seen = [Seen::All, Seen::Causal(&mask), Seen::Segments(&ids), Seen::Given(&given, [s * s, 0, s, 1])][kind];
            for isa in Isa::ALL.into_iter().filter(|i| i.is_supported()) {
                let kernels = Kernels::with_isa(threads, isa).unwrap();
                let (mut rotated_q, mut rotated_k) = (q.clone(), k.clone());
                if rotates {
                    kernels.rotary(&q, &cos, &sin, [lead, heads, s, d], &mut rotated_q);
                    kernels.rotary(&k, &cos, &sin, [lead, kv_heads, s, d], &mut rotated_k);
                }
                let keys = |rows| Heads::new(Kept::F32(rows), kv_heads, s);
                let (q, k, v) = (Heads::new(&rotated_q[..], heads, s), keys(&rotated_k), keys(&v));
                let a = Attention { q, k, v, lead, heads, kv_heads, s, t: s, d, dv: d, scale: 0.3, seen, rotary: None, packed: false, bf16 };
                let mut before = vec![f32::NAN; lead * heads * s * d];
                kernels.attention(&a, &mut vec![f32::NAN; threads * attention_scratch(groups, s, s, d, d)], &mut before);
                let (q, [k, v]) = side_by_side(&qkv, [heads, kv_heads, s, d]);
                let a = Attention { q, k, v, rotary: rotates.then_some([&cos, &sin]), packed: true, ..a };
                let mut out = vec![f32::NAN; before.len()];
                kernels.attention(&a, &mut vec![f32::NAN; threads * packed_attention_scratch(s, s, d, d)], &mut out);
                for (i, o) in out.iter().enumerate() {
                    let [l, query, h] = [i / d / heads / s, i / d / heads % s, i / d % heads];
                    let e = before[((l * heads + h) * s + query) * d + i % d];
                    prop_assert!(if s < PACK { (o - e).abs() <= 1e-5 } else { *o == e }, "{isa:?}: {o} instead of {e}");
                }
            }
        }
    }

    /// One key has the weight of 2000 others, or of 100, as with registers and other keys that all queries of some towers look at.
    #[test]
    fn small_weights_count_beside_a_large_one() {
        let (s, t, d) = (20, 250, 32);
        for others in [100.0_f32, 2000.0] {
            let q = vec![1.0; s * d];
            let k: Vec<f32> = (0..t * d).map(|i| if i / d == 77 { others.ln() / d as f32 } else { 0.0 }).collect();
            let v: Vec<f32> = (0..t * d).map(|i| if i / d == 77 { 0.0 } else { 1.0 }).collect();
            let keys = |rows| Heads::new(Kept::F32(rows), 1, t);
            let (q, k, v) = (Heads::new(&q[..], 1, s), keys(&k), keys(&v));
            let a = Attention {
                q,
                k,
                v,
                lead: 1,
                heads: 1,
                kv_heads: 1,
                s,
                t,
                d,
                dv: d,
                scale: 1.0,
                seen: Seen::All,
                rotary: None,
                packed: false,
                bf16: true,
            };
            let expected = (t - 1) as f32 / (others + (t - 1) as f32);
            for isa in Isa::ALL.into_iter().filter(|i| i.is_supported()) {
                let (mut out, mut scratch) = (vec![f32::NAN; s * d], vec![f32::NAN; attention_scratch(1, s, t, d, d)]);
                Kernels::with_isa(1, isa).unwrap().attention(&a, &mut scratch, &mut out);
                assert!(out.iter().all(|o| (o / expected - 1.0).abs() <= 0.03), "{isa:?}: {} instead of {expected}", out[0]);
            }
        }
    }

    /// Scores from -150 to 150, whose largest of a query grows from block to block; all products of queries and keys are exact in bf16.
    #[test]
    fn what_was_summed_for_smaller_scores_is_scaled_down() {
        let (s, d, dv) = (70, 80, 72);
        for t in [70, 129, 700] {
            let mut q = vec![0.0; s * d];
            q.iter_mut().step_by(d).enumerate().for_each(|(i, q)| *q = 1.0 + (i % 3) as f32);
            let mut k = vec![0.0; t * d];
            k.iter_mut().step_by(d).enumerate().for_each(|(j, k)| *k = ((j * 37 % 130 + 270 * j / t) as f32 - 200.0) / 4.0);
            let v: Vec<f32> = (0..t * dv).map(|i| (i * 7 % 255) as f32 / 128.0 - 1.0).collect();
            let keys = |rows| Heads::new(Kept::F32(rows), 1, t);
            let (q, k, v) = (Heads::new(&q[..], 1, s), keys(&k), keys(&v));
            // Some queries see no key at first.
            let mask: Vec<i64> = (0..t).map(|j| i64::from(j > 40)).collect();
            for seen in [Seen::All, Seen::Causal(&mask)] {
                // Weights are powers of 2.
                let scale = std::f32::consts::LN_2;
                let a = Attention {
                    q,
                    k,
                    v,
                    lead: 1,
                    heads: 1,
                    kv_heads: 1,
                    s,
                    t,
                    d,
                    dv,
                    scale,
                    seen,
                    rotary: None,
                    packed: false,
                    bf16: true,
                };
                let (expected, sizes) = naive(&a);
                for isa in Isa::ALL.into_iter().filter(|i| i.is_supported()) {
                    let (mut out, mut scratch) = (vec![f32::NAN; s * dv], vec![f32::NAN; attention_scratch(1, s, t, d, dv)]);
                    Kernels::with_isa(1, isa).unwrap().attention(&a, &mut scratch, &mut out);
                    for (i, (o, e)) in out.iter().zip(&expected).enumerate() {
                        assert!((o - e).abs() <= 1e-5 + 0.012 * sizes[i / dv], "{isa:?}, {t} keys: {o} instead of {e}");
                    }
                }
            }
        }
    }
}
