//! Attention of few queries (decoding): keys and values are read where they lie, once for the queries of all heads that share them.
//! The result of a query is bit by bit the same whatever other queries there are.

use crate::{
    Kernels,
    attention::{Attention, Kept, Keys, softmax},
    isa::Task,
    lanes::{Lanes, N},
    linear::Element,
    norm::rotate,
};

/// Keys or values that stay in the first cache while queries go by.
const BLOCK: usize = 32;
/// Queries that read a key at once.
const QUERIES: usize = 4;

/// Some queries of the heads that share keys.
struct Few<'a, 'b> {
    a: &'a Attention<'b>,
    lead: usize,
    /// The first of the heads.
    head: usize,
    /// The first of the queries, numbered through the heads.
    first: usize,
    /// `[t, d]`.
    k: Kept<'a>,
    /// `[t, dv]`.
    v: Kept<'a>,
    /// `[queries, dv]`.
    out: &'a mut [f32],
    /// Of at least [`scratch`] elements.
    scratch: &'a mut [f32],
}

/// Floats that a thread needs for `queries` queries and `t` keys of width `d`, the same for many `t`, so that memory is not planned
/// anew for each token. Saturates.
pub(crate) fn scratch(queries: usize, t: usize, d: usize) -> usize {
    let t = t.checked_next_multiple_of(256).unwrap_or(t);
    queries.saturating_mul(t.saturating_add(d))
}

/// Queries, or their scores and results, of one step: up to [`QUERIES`] rows; those beyond the last repeat it.
#[inline(always)]
fn rows(first: usize, count: usize) -> [usize; QUERIES] {
    std::array::from_fn(|i| first + i.min(count - 1))
}

impl Task for Few<'_, '_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(mut self) {
        let Attention { s, t, d, dv, .. } = *self.a;
        let count = self.out.len() / dv;
        let (scores, rest) = std::mem::take(&mut self.scratch).split_at_mut(count * t);
        let q = &mut rest[..count * d];
        self.rotated(q);
        // SAFETY, of all blocks: the caller's promise.
        for keys in (0..t).step_by(BLOCK) {
            for first in (0..count).step_by(QUERIES) {
                let at = rows(first, QUERIES.min(count - first));
                let q = at.map(|r| &q[r * d..(r + 1) * d]);
                for key in keys..t.min(keys + BLOCK) {
                    let dots = unsafe { self.k.dots::<L>(q, key) };
                    at.into_iter().zip(dots).for_each(|(r, dot)| scores[r * t + key] = dot * self.a.scale);
                }
            }
        }
        for r in 0..count {
            let (head, query) = ((self.first + r) / s, (self.first + r) % s);
            let seen = self.a.reach(query);
            let (scores, later) = scores[r * t..(r + 1) * t].split_at_mut(seen);
            self.a.hide(self.lead, self.head + head, query, 0, scores);
            unsafe { softmax::<L>(scores) };
            later.fill(0.0);
        }
        self.out.fill(0.0);
        for keys in (0..t).step_by(BLOCK) {
            let keys = keys..t.min(keys + BLOCK);
            for first in (0..count).step_by(QUERIES) {
                let used = QUERIES.min(count - first);
                let weights = rows(first, used).map(|r| &scores[r * t..(r + 1) * t]);
                let out = &mut self.out[first * dv..(first + used) * dv];
                unsafe { self.v.add_to::<L>(out, dv, weights, keys.clone()) };
            }
        }
    }
}

impl Few<'_, '_> {
    /// The queries, rotated if they are to be.
    #[inline(always)]
    fn rotated(&self, out: &mut [f32]) {
        let Attention { s, d, .. } = *self.a;
        let heads = (self.lead * self.a.heads + self.head) * s + self.first;
        out.copy_from_slice(&self.a.q[heads * d..][..out.len()]);
        if let Some([cos, sin]) = self.a.rotary {
            for (r, row) in out.chunks_exact_mut(d.max(1)).enumerate() {
                let at = (self.lead * s + (self.first + r) % s) * (d / 2);
                rotate(row, &cos[at..at + d / 2], &sin[at..at + d / 2]);
            }
        }
    }
}

impl Kept<'_> {
    /// Products of queries with row `i`.
    ///
    /// # Safety
    /// The CPU has the instruction set of `L`.
    #[inline(always)]
    unsafe fn dots<L: Lanes>(self, q: [&[f32]; QUERIES], i: usize) -> [f32; QUERIES] {
        let place = i * q[0].len()..(i + 1) * q[0].len();
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::F32(rows) => dots::<L, _>(q, &rows[place]),
                Self::BF16(rows) => dots::<L, _>(q, &rows[place]),
                Self::I8(rows, scales) => dots::<L, _>(q, &rows[place]).map(|dot| dot * scales[i]),
            }
        }
    }

    /// Adds weighted rows `keys` to `out`, up to [`QUERIES`] rows of `width`. Weights of all rows that there are, for each query.
    ///
    /// # Safety
    /// The CPU has the instruction set of `L`.
    #[inline(always)]
    unsafe fn add_to<L: Lanes>(self, out: &mut [f32], width: usize, weights: [&[f32]; QUERIES], keys: std::ops::Range<usize>) {
        let place = keys.start * width..keys.end * width;
        let weights = weights.map(|w| &w[keys.clone()]);
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::F32(rows) => add_rows::<L, _>(out, width, &rows[place], |key, r| weights[r][key]),
                Self::BF16(rows) => add_rows::<L, _>(out, width, &rows[place], |key, r| weights[r][key]),
                Self::I8(rows, scales) => {
                    let scales = &scales[keys];
                    add_rows::<L, _>(out, width, &rows[place], |key, r| weights[r][key] * scales[key]);
                }
            }
        }
    }
}

/// # Safety
/// The CPU has the instruction set of `L`.
#[inline(always)]
unsafe fn dots<L: Lanes, W: Element>(q: [&[f32]; QUERIES], key: &[W]) -> [f32; QUERIES] {
    let (key, key_tail) = key.as_chunks::<N>();
    let split = q.map(|q| q.as_chunks::<N>());
    // SAFETY: the caller's promise.
    let mut sums = unsafe {
        let mut acc = [L::splat(0.0); QUERIES];
        for (i, key) in key.iter().enumerate() {
            let key = W::lanes::<L>(key);
            for (acc, (q, _)) in acc.iter_mut().zip(split) {
                *acc = key.mul_add(L::load(&q[i]), *acc);
            }
        }
        acc.map(|acc| acc.sum())
    };
    if !key_tail.is_empty() {
        for (sum, (_, tail)) in sums.iter_mut().zip(split) {
            *sum += tail.iter().zip(key_tail).map(|(q, k)| q * k.to_f32()).sum::<f32>();
        }
    }
    sums
}

/// `out[r] += weight(i, r) * rows[i]` for rows of `width` and up to [`QUERIES`] of `out`, one row after the other.
///
/// # Safety
/// The CPU has the instruction set of `L`.
#[inline(always)]
unsafe fn add_rows<L: Lanes, W: Element>(out: &mut [f32], width: usize, rows: &[W], weight: impl Fn(usize, usize) -> f32) {
    let whole = width / N * N;
    for column in (0..whole).step_by(N) {
        let part = |r: usize| r.min(out.len() / width - 1) * width + column;
        // SAFETY: the caller's promise.
        unsafe {
            let mut acc: [L; QUERIES] = std::array::from_fn(|r| L::load(chunk(&out[part(r)..])));
            for (i, row) in rows.chunks_exact(width).enumerate() {
                let row = W::lanes::<L>(chunk(&row[column..]));
                for (r, acc) in acc.iter_mut().enumerate() {
                    *acc = row.mul_add(L::splat(weight(i, r)), *acc);
                }
            }
            for (r, out) in out.chunks_exact_mut(width).enumerate() {
                if let Some(out) = out[column..].first_chunk_mut::<N>() {
                    acc[r].store(out);
                }
            }
        }
    }
    for (r, out) in out.chunks_exact_mut(width).enumerate() {
        for (i, row) in rows.chunks_exact(width).enumerate() {
            out[whole..].iter_mut().zip(&row[whole..]).for_each(|(o, v)| *o += weight(i, r) * v.to_f32());
        }
    }
}

/// The first 16 elements.
#[inline(always)]
fn chunk<T>(row: &[T]) -> &[T; N] {
    let (chunks, _) = row.as_chunks::<N>();
    &chunks[0]
}

impl Kernels {
    /// [`Kernels::attention`] of few queries.
    pub(crate) fn few_queries(&self, a: &Attention<'_>, scratch: &mut [f32], out: &mut [f32]) {
        let Attention { heads, kv_heads, s, d, dv, .. } = *a;
        let group = heads / kv_heads * s;
        // The fewest equal parts of the queries that share keys with which there is work for all threads.
        let wanted = self.pool.threads().div_ceil(a.lead * kv_heads);
        let parts = (wanted..group).find(|n| group.is_multiple_of(*n)).unwrap_or(group);
        let count = group / parts;
        self.pool.pieces_with(out.chunks_exact_mut(count * dv), scratch, |i, out, scratch| {
            let (head, part) = (i / parts, i % parts);
            // Without keys there may be no rows at all.
            let of = |keys: &Keys<'_>| if a.t == 0 { 0 } else { head * keys.head_stride };
            self.isa.run(Few {
                a,
                lead: head / kv_heads,
                head: head % kv_heads * (heads / kv_heads),
                first: part * count,
                k: a.k.data.from(of(&a.k), d),
                v: a.v.data.from(of(&a.v), dv),
                out,
                scratch,
            });
        });
    }
}
