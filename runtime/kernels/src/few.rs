//! Attention of few queries (decoding): keys and values are read where they lie, once for the queries of all heads that share them.
//! The result of a query is bit by bit the same whatever other queries there are.

use crate::{
    Kernels,
    attention::{Attention, Heads, Kept, softmax},
    isa::Task,
    lanes::{ASK_FAR, Lanes, N, into, prefetch},
    linear::Element,
    norm::rotate,
};

/// Queries that read keys and values at once, at most.
const QUERIES: usize = 6;
/// Keys that these queries read at once, if their sums find room in registers.
const KEYS: usize = 2;
/// Vectors of a value that these queries read at once, if their sums find room in registers.
const COLUMNS: usize = 4;
/// Bytes from what is read to what is asked for: about what a thread reads until memory answers. The CPU's own prefetching stops at
/// pages of 4 KiB.
fn ahead() -> usize {
    if *ASK_FAR { 8192 } else { 4096 }
}

/// Vectors of 16 keys for each of some queries, whose sums are the products with the keys.
type Partial = [[[f32; N]; N]; QUERIES];

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
    let up = |n: usize, to: usize| n.checked_next_multiple_of(to).unwrap_or(n);
    queries.saturating_mul(up(t, 256).saturating_add(up(d, N)))
}

/// Calls `$f::<.., R>` for `R` queries.
macro_rules! with_queries {
    ($n:expr, $f:ident::<$($t:ty),*>$args:tt) => {
        match $n {
            1 => $f::<$($t,)* 1> $args,
            2 => $f::<$($t,)* 2> $args,
            3 => $f::<$($t,)* 3> $args,
            4 => $f::<$($t,)* 4> $args,
            5 => $f::<$($t,)* 5> $args,
            _ => $f::<$($t,)* QUERIES> $args,
        }
    };
}

impl Task for Few<'_, '_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(mut self) {
        let Attention { s, t, d, dv, .. } = *self.a;
        let count = self.out.len() / dv;
        // Equal parts, as far as that goes.
        let at_once = count.div_ceil(count.div_ceil(QUERIES));
        let stride = t.next_multiple_of(N);
        let (scores, rest) = std::mem::take(&mut self.scratch).split_at_mut(count * stride);
        let q = &mut rest[..count * d.next_multiple_of(N)];
        self.rotated(q);
        // SAFETY, of all blocks: the caller's promise.
        unsafe {
            match self.k {
                Kept::F32(rows) => multiply::<L, _>(q, &rows[..t * d], self.a, at_once, scores),
                Kept::BF16(rows) => multiply::<L, _>(q, &rows[..t * d], self.a, at_once, scores),
                Kept::I8(rows, _) => multiply::<L, _>(q, &rows[..t * d], self.a, at_once, scores),
            }
        }
        for (r, scores) in scores.chunks_exact_mut(stride.max(1)).enumerate() {
            let (head, query) = ((self.first + r) / s, (self.first + r) % s);
            self.k.scale(scores);
            self.a.hide(self.lead, self.head + head, query, 0, &mut scores[..t]);
            scores[t..].fill(f32::NEG_INFINITY);
            unsafe { softmax::<L>(scores) };
            self.v.scale(scores);
        }
        self.out.fill(0.0);
        unsafe {
            match self.v {
                Kept::F32(rows) => add_weighted::<L, _>(scores, &rows[..t * dv], dv, at_once, self.out),
                Kept::BF16(rows) => add_weighted::<L, _>(scores, &rows[..t * dv], dv, at_once, self.out),
                Kept::I8(rows, _) => add_weighted::<L, _>(scores, &rows[..t * dv], dv, at_once, self.out),
            }
        }
    }
}

impl Few<'_, '_> {
    /// The queries, rotated if they are to be, each with zeros up to a multiple of 16.
    #[inline(always)]
    fn rotated(&self, out: &mut [f32]) {
        let Attention { s, d, .. } = *self.a;
        for (r, row) in out.chunks_exact_mut(d.next_multiple_of(N).max(1)).enumerate() {
            let (row, rest) = row.split_at_mut(d);
            let (head, query) = ((self.first + r) / s, (self.first + r) % s);
            row.copy_from_slice(&self.a.q.data[self.a.q.at(self.lead, self.head + head, query) * d..][..d]);
            rest.fill(0.0);
            if let Some([cos, sin]) = self.a.angles(self.lead, query) {
                rotate(row, cos, sin);
            }
        }
    }
}

impl Kept<'_> {
    /// Multiplies a query's numbers, one for each row, by the scales of the rows.
    #[inline(always)]
    fn scale(self, numbers: &mut [f32]) {
        if let Self::I8(_, scales) = self {
            numbers.iter_mut().zip(scales).for_each(|(n, scale)| *n *= scale);
        }
    }
}

/// Products of queries with the rows `keys [t, d]` times `a.scale` to `scores`. `q` and `scores` are rows up to a multiple of 16, what
/// `scores` has beyond `t` is of no meaning.
///
/// # Safety
/// The CPU has the instruction set of `L`.
#[inline(always)]
unsafe fn multiply<L: Lanes, W: Element>(q: &[f32], keys: &[W], a: &Attention<'_>, at_once: usize, scores: &mut [f32]) {
    let (depth, stride) = (a.d.next_multiple_of(N), a.t.next_multiple_of(N));
    let mut partial = [[[0.0; N]; N]; QUERIES];
    if a.d == 0 {
        scores.fill(0.0);
    }
    for (i, rows) in keys.chunks((N * a.d).max(1)).enumerate() {
        for (q, scores) in q.chunks(at_once * depth).zip(scores.chunks_mut(at_once * stride)) {
            let queries = q.len() / depth;
            // SAFETY: the caller's promise.
            unsafe {
                with_queries!(queries, dots::<L, W>(q, rows, a.d, &mut partial));
                for (scores, partial) in scores.chunks_exact_mut(stride).zip(&partial) {
                    L::sums(partial).mul(L::splat(a.scale)).store(first_mut(&mut scores[i * N..]));
                }
            }
        }
    }
}

/// Products of `R` queries with up to 16 rows of width `d`, whose last one stands for those that are missing of the last [`KEYS`].
///
/// # Safety
/// The CPU has the instruction set of `L`.
#[inline(always)]
unsafe fn dots<L: Lanes, W: Element, const R: usize>(q: &[f32], rows: &[W], d: usize, out: &mut Partial) {
    // SAFETY: the caller's promise.
    unsafe { if L::MANY_REGISTERS { dots_of::<L, W, R, KEYS>(q, rows, d, out) } else { dots_of::<L, W, R, 1>(q, rows, d, out) } }
}

/// [`dots`], `B` rows at once.
///
/// # Safety
/// The CPU has the instruction set of `L`.
#[inline(always)]
unsafe fn dots_of<L: Lanes, W: Element, const R: usize, const B: usize>(q: &[f32], rows: &[W], d: usize, out: &mut Partial) {
    let (count, ahead) = (rows.len() / d, ahead());
    let q: [&[[f32; N]]; R] = std::array::from_fn(|r| &q.as_chunks::<N>().0[r * d.div_ceil(N)..][..d.div_ceil(N)]);
    for first in (0..count).step_by(B) {
        let keys: [&[W]; B] = std::array::from_fn(|b| &rows[(first + b).min(count - 1) * d..][..d]);
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [[L::splat(0.0); R]; B];
            for c in 0..d / N {
                let mut vectors = [L::splat(0.0); B];
                for b in 0..B {
                    vectors[b] = load(&keys[b][c * N..], ahead);
                }
                add_products(&mut sums, vectors, q, c);
            }
            if !d.is_multiple_of(N) {
                let mut vectors = [L::splat(0.0); B];
                for b in 0..B {
                    vectors[b] = padded(&keys[b][d / N * N..]);
                }
                add_products(&mut sums, vectors, q, d / N);
            }
            for b in 0..B {
                for r in 0..R {
                    sums[b][r].store(&mut out[r][first + b]);
                }
            }
        }
    }
}

/// Adds products of vector `c` of queries with that of keys.
///
/// # Safety
/// The CPU has the instruction set of `L`.
#[inline(always)]
unsafe fn add_products<L: Lanes, const R: usize, const B: usize>(sums: &mut [[L; R]; B], keys: [L; B], q: [&[[f32; N]]; R], c: usize) {
    for r in 0..R {
        // SAFETY: the caller's promise.
        unsafe {
            let q = L::load(&q[r][c]);
            for b in 0..B {
                sums[b][r] = keys[b].mul_add(q, sums[b][r]);
            }
        }
    }
}

/// Adds the rows `values [t, width]` to `out [queries, width]`, times `weights`, of each query as many as a multiple of 16.
///
/// # Safety
/// The CPU has the instruction set of `L`.
#[inline(always)]
unsafe fn add_weighted<L: Lanes, W: Element>(weights: &[f32], values: &[W], width: usize, at_once: usize, out: &mut [f32]) {
    let stride = weights.len() / (out.len() / width);
    for (i, rows) in values.chunks(N * width).enumerate() {
        for (weights, out) in weights.chunks(at_once * stride).zip(out.chunks_mut(at_once * width)) {
            let weights = &weights[i * N..];
            let queries = out.len() / width;
            // SAFETY: the caller's promise.
            unsafe { with_queries!(queries, add_rows::<L, W>(weights, stride, rows, width, out)) };
        }
    }
}

/// `out[r] += weights[r][i] * rows[i]` for `R` rows of `out`, one row after the other.
///
/// # Safety
/// The CPU has the instruction set of `L`.
#[inline(always)]
unsafe fn add_rows<L: Lanes, W: Element, const R: usize>(weights: &[f32], stride: usize, rows: &[W], width: usize, out: &mut [f32]) {
    let weights: [&[f32]; R] = std::array::from_fn(|r| &weights[r * stride..][..rows.len() / width]);
    let many = if L::MANY_REGISTERS { width / (COLUMNS * N) * COLUMNS * N } else { 0 };
    // SAFETY: the caller's promise.
    unsafe {
        for column in (0..many).step_by(COLUMNS * N) {
            add_columns::<L, W, R, COLUMNS>(weights, &rows[column..], width, &mut out[column..]);
        }
        for column in (many..width / N * N).step_by(N) {
            add_columns::<L, W, R, 1>(weights, &rows[column..], width, &mut out[column..]);
        }
        let last = width / N * N;
        if last < width {
            for r in 0..R {
                let out = &mut out[r * width + last..(r + 1) * width];
                let mut sum: L = padded(out);
                for (weight, row) in weights[r].iter().zip(rows.chunks_exact(width)) {
                    sum = padded::<L, W>(&row[last..]).mul_add(L::splat(*weight), sum);
                }
                let mut sums = [0.0; N];
                sum.store(&mut sums);
                out.copy_from_slice(&sums[..width - last]);
            }
        }
    }
}

/// [`add_rows`] of the first `B` vectors of rows that are `width` apart.
///
/// # Safety
/// The CPU has the instruction set of `L`.
#[inline(always)]
unsafe fn add_columns<L: Lanes, W: Element, const R: usize, const B: usize>(
    weights: [&[f32]; R],
    rows: &[W],
    width: usize,
    out: &mut [f32],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let (mut sums, ahead) = ([[L::splat(0.0); B]; R], ahead());
        for r in 0..R {
            for b in 0..B {
                sums[r][b] = L::load(first_of(&out[r * width + b * N..]));
            }
        }
        for (i, row) in rows.chunks(width).enumerate().take(weights[0].len()) {
            let mut vectors = [L::splat(0.0); B];
            for b in 0..B {
                vectors[b] = load(&row[b * N..], ahead);
            }
            for r in 0..R {
                let weight = L::splat(weights[r][i]);
                for b in 0..B {
                    sums[r][b] = vectors[b].mul_add(weight, sums[r][b]);
                }
            }
        }
        for r in 0..R {
            for b in 0..B {
                sums[r][b].store(first_mut(&mut out[r * width + b * N..]));
            }
        }
    }
}

/// The first 16 elements. What lies so many bytes behind them is asked for.
///
/// # Safety
/// The CPU has the instruction set of `L`.
#[inline(always)]
unsafe fn load<L: Lanes, W: Element>(row: &[W], ahead: usize) -> L {
    prefetch::<{ into::FIRST }, _>(row.as_ptr().cast::<u8>().wrapping_add(ahead));
    // SAFETY: the caller's promise.
    unsafe { W::lanes(first_of(row)) }
}

/// Fewer than 16 elements, then zeros.
///
/// # Safety
/// The CPU has the instruction set of `L`.
#[inline(always)]
unsafe fn padded<L: Lanes, W: Element>(few: &[W]) -> L {
    let mut all = [0.0; N];
    all.iter_mut().zip(few).for_each(|(to, v)| *to = v.to_f32());
    // SAFETY: the caller's promise.
    unsafe { L::load(&all) }
}

/// The first 16 elements.
#[inline(always)]
fn first_of<T>(row: &[T]) -> &[T; N] {
    &row.as_chunks().0[0]
}

/// The first 16 elements.
#[inline(always)]
fn first_mut<T>(row: &mut [T]) -> &mut [T; N] {
    &mut row.as_chunks_mut().0[0]
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
            let of = |keys: &Heads<Kept<'_>>| if a.t == 0 { 0 } else { keys.at(head / kv_heads, head % kv_heads, 0) };
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

#[cfg(test)]
mod tests {
    use crate::{Attention, Heads, Isa, Kept, Kernels, Seen, attention_scratch};
    use half::bf16;

    #[test]
    fn a_query_gives_the_same_alone_and_among_others() {
        let (heads, kv_heads, d, dv) = (14, 2, 70, 75);
        let floats = |n: usize| (0..n).map(|i| (i * 7919 % 2003) as f32 / 1001.0 - 1.0).collect::<Vec<_>>();
        let narrow = |x: &[f32]| x.iter().map(|v| bf16::from_f32(*v)).collect::<Vec<_>>();
        for (s, past) in [(2, 14), (5, 40), (16, 0), (16, 301)] {
            let t = past + s;
            let (q, k, v, mask) = (floats(heads * s * d), floats(kv_heads * t * d), narrow(&floats(kv_heads * t * dv)), vec![1; t]);
            let run = |threads: usize, isa: Isa, queries: std::ops::Range<usize>| {
                let (count, t) = (queries.len(), past + queries.end);
                let q: Vec<f32> = (0..heads).flat_map(|h| &q[(h * s + queries.start) * d..(h * s + queries.end) * d]).copied().collect();
                let keys = |data| Heads::new(data, kv_heads, past + s);
                let (k, v, seen) = (keys(Kept::F32(&k)), keys(Kept::BF16(&v)), Seen::Causal(&mask[..t]));
                let (q, scale) = (Heads::new(&q[..], heads, count), 0.2);
                let a = Attention {
                    q,
                    k,
                    v,
                    lead: 1,
                    heads,
                    kv_heads,
                    s: count,
                    t,
                    d,
                    dv,
                    scale,
                    seen,
                    rotary: None,
                    packed: false,
                    bf16: true,
                };
                let mut scratch = vec![f32::NAN; threads * attention_scratch(heads / kv_heads, count, t, d, dv)];
                let mut out = vec![f32::NAN; heads * count * dv];
                Kernels::with_isa(threads, isa).unwrap().attention(&a, &mut scratch, &mut out);
                out
            };
            for isa in Isa::ALL.into_iter().filter(|i| i.is_supported()) {
                let together = run(1, isa, 0..s);
                assert!(together.iter().all(|v| v.is_finite()));
                for threads in [2, 5] {
                    assert_eq!(together, run(threads, isa, 0..s), "{isa:?}, {threads} threads");
                }
                for query in 0..s {
                    let alone = run(1, isa, query..query + 1);
                    for (head, alone) in alone.chunks_exact(dv).enumerate() {
                        assert_eq!(alone, &together[(head * s + query) * dv..][..dv], "{isa:?}, query {query} of {s}");
                    }
                }
            }
        }
    }
}
