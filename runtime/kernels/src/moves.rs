//! Kernels that move elements, and reductions and sums of any element type: plain loops over rows of the output.

use crate::{BadIndex, Pool};
use smallvec::{SmallVec, smallvec};

/// Elements per piece of work for one thread.
const PIECE: usize = 1 << 15;

/// Numbers of the axes of a tensor; of as many as models have, without memory of their own.
pub type Axes = SmallVec<[usize; 8]>;

/// Element strides of a row-major tensor.
pub fn strides(shape: &[usize]) -> Axes {
    let mut strides: Axes = smallvec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i] * shape[i];
    }
    strides
}

/// Element strides with which a tensor of `shape` is read as one of shape `to` (NumPy broadcasting).
///
/// # Panics
/// If it does not broadcast.
pub fn broadcast_strides(shape: &[usize], to: &[usize]) -> Axes {
    assert!(shape.len() <= to.len(), "{shape:?} does not broadcast to {to:?}");
    let missing = to.len() - shape.len();
    let mut out: Axes = smallvec![0; missing];
    for ((d, s), t) in shape.iter().zip(strides(shape)).zip(&to[missing..]) {
        assert!(d == t || *d == 1, "{shape:?} does not broadcast to {to:?}");
        out.push(if *d == 1 { 0 } else { s });
    }
    out
}

/// A walk over the elements of a tensor that reads `N` operands by strides, with adjacent axes merged where all operands allow.
pub(crate) struct Walk<const N: usize> {
    shape: Axes,
    strides: [Axes; N],
}

impl<const N: usize> Walk<N> {
    pub(crate) fn new(shape: &[usize], strides: [&[usize]; N]) -> Self {
        let mut walk = Self { shape: Axes::new(), strides: std::array::from_fn(|_| Axes::new()) };
        for (axis, len) in shape.iter().enumerate().filter(|(_, d)| **d != 1) {
            let merges = !walk.shape.is_empty() && (0..N).all(|i| walk.strides[i].last() == Some(&(strides[i][axis] * len)));
            if merges {
                if let Some(last) = walk.shape.last_mut() {
                    *last *= len;
                }
            } else {
                walk.shape.push(*len);
            }
            for (merged, operand) in walk.strides.iter_mut().zip(strides) {
                if merges {
                    merged.pop();
                }
                merged.push(operand[axis]);
            }
        }
        if walk.shape.is_empty() {
            walk.shape.push(if shape.contains(&0) { 0 } else { 1 });
            walk.strides.iter_mut().for_each(|s| s.push(1));
        }
        walk
    }

    /// Length of a row: the last axis.
    pub(crate) fn row(&self) -> usize {
        self.shape[self.shape.len() - 1]
    }

    /// Strides of the operands along a row.
    pub(crate) fn step(&self) -> [usize; N] {
        std::array::from_fn(|i| self.strides[i][self.shape.len() - 1])
    }

    /// Where each operand's row begins.
    pub(crate) fn base(&self, mut row: usize) -> [usize; N] {
        let mut base = [0; N];
        for axis in (0..self.shape.len() - 1).rev() {
            let at = row % self.shape[axis];
            row /= self.shape[axis];
            (0..N).for_each(|i| base[i] += at * self.strides[i][axis]);
        }
        base
    }

    /// Calls `f` with the bases of each row and the row of `out`.
    pub(crate) fn rows<T: Send>(&self, pool: &Pool, out: &mut [T], f: impl Fn([usize; N], &mut [T]) + Sync) {
        let row = self.row();
        if out.is_empty() {
            return;
        }
        assert_eq!(out.len(), self.shape.iter().product::<usize>(), "the output must have the shape walked");
        let rows = (PIECE / row).max(1);
        if self.shape.len() == 1 {
            // One long row is cut into pieces.
            let step = self.step();
            pool.chunks(out, PIECE, |i, piece| f(step.map(|s| i * PIECE * s), piece));
            return;
        }
        pool.chunks(out, rows * row, |i, piece| {
            for (r, out) in piece.chunks_exact_mut(row).enumerate() {
                f(self.base(i * rows + r), out);
            }
        });
    }
}

/// Copies `x`, read with `x_strides`, to `out` of shape `shape`: transposition, broadcast.
///
/// # Panics
/// If the strides lead out of `x`.
pub fn strided_copy<T: Copy + Send + Sync>(pool: &Pool, x: &[T], x_strides: &[usize], shape: &[usize], out: &mut [T]) {
    let walk = Walk::new(shape, [x_strides]);
    let [step] = walk.step();
    walk.rows(pool, out, |[base], out| match step {
        1 => out.copy_from_slice(&x[base..base + out.len()]),
        0 => out.fill(x[base]),
        _ => out.iter_mut().enumerate().for_each(|(i, o)| *o = x[base + i * step]),
    });
}

/// Copies the elements of `x` whose `condition` is not 0 to `out`; both are read by their strides.
///
/// # Panics
/// If the strides lead out of an operand.
pub fn overwrite_where<T: Copy>(condition: &[u8], c_strides: &[usize], x: &[T], x_strides: &[usize], shape: &[usize], out: &mut [T]) {
    let walk = Walk::new(shape, [c_strides, x_strides]);
    if out.is_empty() {
        return;
    }
    let [sc, sx] = walk.step();
    for (row, out) in out.chunks_exact_mut(walk.row()).enumerate() {
        let [c, x_base] = walk.base(row);
        for (i, o) in out.iter_mut().enumerate() {
            if condition[c + i * sc] != 0 {
                *o = x[x_base + i * sx];
            }
        }
    }
}

/// `data [outer, axis, inner]` to the rows `index` of the axis: `[outer, index, inner]`.
///
/// # Errors
/// An index outside of the axis.
///
/// # Panics
/// If the lengths do not fit.
pub fn gather<T: Copy + Send + Sync>(
    pool: &Pool,
    data: &[T],
    [outer, axis, inner]: [usize; 3],
    index: &[i64],
    out: &mut [T],
) -> Result<(), BadIndex> {
    assert!(data.len() == outer * axis * inner && out.len() == outer * index.len() * inner, "lengths do not fit");
    if let Some(bad) = index.iter().find(|i| !usize::try_from(**i).is_ok_and(|i| i < axis)) {
        return Err(BadIndex { index: *bad, len: axis });
    }
    if out.is_empty() {
        return Ok(());
    }
    if inner == 1 {
        pool.chunks(out, index.len(), |o, out| out.iter_mut().zip(index).for_each(|(v, i)| *v = data[o * axis + *i as usize]));
        return Ok(());
    }
    let rows = (PIECE / inner).max(1);
    pool.chunks(out, rows * inner, |piece, out| {
        for (r, out) in out.chunks_exact_mut(inner).enumerate() {
            let row = piece * rows + r;
            let from = (row / index.len() * axis + index[row % index.len()] as usize) * inner;
            out.copy_from_slice(&data[from..from + inner]);
        }
    });
    Ok(())
}

/// Joins operands `[outer, axis_i, inner]` along the axis.
///
/// # Panics
/// If the lengths do not fit.
pub fn concat<T: Copy + Send + Sync>(pool: &Pool, parts: &[(&[T], usize)], outer: usize, inner: usize, out: &mut [T]) {
    let axis: usize = parts.iter().map(|(_, n)| n).sum();
    assert_eq!(out.len(), outer * axis * inner, "lengths do not fit");
    pool.chunks(out, axis * inner, |o, out| {
        let mut at = 0;
        for (part, n) in parts {
            let len = n * inner;
            out[at..at + len].copy_from_slice(&part[o * len..(o + 1) * len]);
            at += len;
        }
    });
}

/// Elements `start..` of the axis of `x [outer, axis, inner]`, as many as `out [outer, len, inner]` has.
///
/// # Panics
/// If the lengths do not fit.
pub fn slice<T: Copy + Send + Sync>(pool: &Pool, x: &[T], [outer, axis, inner]: [usize; 3], start: usize, len: usize, out: &mut [T]) {
    assert!(x.len() == outer * axis * inner && out.len() == outer * len * inner && start + len <= axis, "lengths do not fit");
    let row = len * inner;
    let rows = (PIECE / row.max(1)).max(1);
    pool.chunks(out, rows * row, |piece, out| {
        for (r, out) in out.chunks_exact_mut(row).enumerate() {
            let from = ((piece * rows + r) * axis + start) * inner;
            out.copy_from_slice(&x[from..from + row]);
        }
    });
}

/// Folds the axes of `x` that `reduced` marks: `out` has the shape of the others.
///
/// # Panics
/// If the lengths do not fit.
pub fn reduce<T: Copy>(x: &[T], shape: &[usize], reduced: &[bool], init: T, f: impl Fn(T, T) -> T, out: &mut [T]) {
    let kept: Axes = shape.iter().zip(reduced).filter(|(_, r)| !**r).map(|(d, _)| *d).collect();
    assert!(x.len() == shape.iter().product::<usize>() && out.len() == kept.iter().product::<usize>(), "lengths do not fit");
    let mut kept_strides = strides(&kept).into_iter();
    let out_strides: Axes = reduced.iter().map(|r| if *r { 0 } else { kept_strides.next().unwrap_or(0) }).collect();
    out.fill(init);
    if x.is_empty() {
        return;
    }
    let walk = Walk::new(shape, [&out_strides]);
    let [step] = walk.step();
    for (row, x) in x.chunks_exact(walk.row()).enumerate() {
        let [base] = walk.base(row);
        for (i, x) in x.iter().enumerate() {
            let out = &mut out[base + i * step];
            *out = f(*out, *x);
        }
    }
}

/// Running sums along the axis of `x [outer, axis, inner]`.
///
/// # Panics
/// If the lengths do not fit.
pub fn cumsum<T: Copy>(x: &[T], [outer, axis, inner]: [usize; 3], add: impl Fn(T, T) -> T, out: &mut [T]) {
    assert!(x.len() == outer * axis * inner && out.len() == x.len(), "lengths do not fit");
    out.copy_from_slice(x);
    for o in 0..outer {
        for i in (o * axis + 1) * inner..(o + 1) * axis * inner {
            out[i] = add(out[i - inner], out[i]);
        }
    }
}

/// Indices of the largest elements of `x`, as many as `out` takes, largest first and of equals the first first.
///
/// # Panics
/// If `x` has fewer elements.
pub fn top_k(x: &[f32], out: &mut [i64]) {
    assert!(out.len() <= x.len(), "there are fewer elements");
    let mut found = 0;
    for (i, v) in x.iter().enumerate() {
        let at = out[..found].partition_point(|o| x[*o as usize].total_cmp(v).is_ge());
        if at < out.len() {
            found = out.len().min(found + 1);
            out[at..found].rotate_right(1);
            out[at] = i as i64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shapes() -> impl Strategy<Value = Vec<usize>> {
        proptest::collection::vec(0usize..5, 1..5)
    }

    /// All index vectors of a shape, in row-major order.
    fn indices(shape: &[usize]) -> Vec<Vec<usize>> {
        shape.iter().fold(vec![vec![]], |all, d| all.iter().flat_map(|i| (0..*d).map(|v| [i.as_slice(), &[v]].concat())).collect())
    }

    fn offset(index: &[usize], strides: &[usize]) -> usize {
        index.iter().zip(strides).map(|(i, s)| i * s).sum()
    }

    proptest! {
        #[test]
        fn transpose_and_broadcast(shape in shapes(), rotate in 0usize..4, ones in any::<[bool; 5]>()) {
            let pool = Pool::new(2);
            let x: Vec<usize> = (0..shape.iter().product()).collect();
            let perm: Vec<usize> = (0..shape.len()).map(|i| (i + rotate) % shape.len()).collect();
            let (to, from) = (perm.iter().map(|p| shape[*p]).collect::<Vec<_>>(), strides(&shape));
            let by: Vec<usize> = perm.iter().map(|p| from[*p]).collect();
            let mut out = vec![0; x.len()];
            strided_copy(&pool, &x, &by, &to, &mut out);
            let expected: Vec<usize> = indices(&to).iter().map(|i| x[offset(i, &by)]).collect();
            prop_assert_eq!(out, expected);

            let small: Vec<usize> = shape.iter().zip(ones).map(|(d, one)| if one { 1 } else { *d }).collect();
            let x: Vec<usize> = (0..small.iter().product()).collect();
            let by = broadcast_strides(&small, &shape);
            let mut out = vec![0; shape.iter().product()];
            strided_copy(&pool, &x, &by, &shape, &mut out);
            let expected: Vec<usize> = indices(&shape).iter().map(|i| x[offset(i, &by)]).collect();
            prop_assert_eq!(out, expected);
        }

        #[test]
        fn reductions_and_sums(shape in shapes(), mask in any::<[bool; 5]>(), axis in 0usize..4) {
            let x: Vec<i64> = (0..shape.iter().product::<usize>() as i64).map(|v| v * 7 % 11).collect();
            let reduced = &mask[..shape.len()];
            let kept = |i: &[usize]| i.iter().zip(reduced).filter(|(_, r)| !**r).map(|(i, _)| *i).collect::<Vec<_>>();
            let out_shape = kept(&shape);
            let mut expected = vec![0; out_shape.iter().product()];
            for (i, v) in indices(&shape).iter().zip(&x) {
                expected[offset(&kept(i), &strides(&out_shape))] += v;
            }
            let mut out = vec![0; expected.len()];
            reduce(&x, &shape, reduced, 0, |a, b| a + b, &mut out);
            prop_assert_eq!(out, expected);

            let axis = axis % shape.len();
            let (outer, inner) = (shape[..axis].iter().product(), shape[axis + 1..].iter().product());
            let mut out = vec![0; x.len()];
            cumsum(&x, [outer, shape[axis], inner], |a, b| a + b, &mut out);
            for (i, v) in indices(&shape).iter().zip(&out) {
                let upto = (0..=i[axis]).map(|a| { let mut i = i.clone(); i[axis] = a; x[offset(&i, &strides(&shape))] }).sum::<i64>();
                prop_assert_eq!(*v, upto);
            }
        }

        #[test]
        fn the_largest_come_first(x in proptest::collection::vec(-3i8..3, 0..20), k in 0usize..20) {
            let x: Vec<f32> = x.into_iter().map(f32::from).collect();
            let mut out = vec![-1; k.min(x.len())];
            top_k(&x, &mut out);
            let mut order: Vec<i64> = (0..x.len() as i64).collect();
            // Stable: of equals the first stays first.
            order.sort_by(|a, b| x[*b as usize].total_cmp(&x[*a as usize]));
            prop_assert_eq!(&out[..], &order[..out.len()]);
        }

        #[test]
        fn gather_slice_concat(outer in 0usize..4, axis in 1usize..6, inner in 0usize..5, index in proptest::collection::vec(0i64..6, 0..7), start in 0usize..6) {
            let pool = Pool::new(2);
            let x: Vec<usize> = (0..outer * axis * inner).collect();
            let at = |o: usize, a: usize, i: usize| x[(o * axis + a) * inner + i];
            let mut out = vec![0; outer * index.len() * inner];
            let result = gather(&pool, &x, [outer, axis, inner], &index, &mut out);
            match index.iter().find(|i| **i >= axis as i64) {
                Some(bad) => prop_assert_eq!(result, Err(BadIndex { index: *bad, len: axis })),
                None => {
                    let expected: Vec<usize> = indices(&[outer, index.len(), inner]).iter().map(|v| at(v[0], index[v[1]] as usize, v[2])).collect();
                    prop_assert_eq!(&out, &expected);
                }
            }
            let start = start % axis;
            let (mut head, mut tail) = (vec![0; outer * start * inner], vec![0; outer * (axis - start) * inner]);
            slice(&pool, &x, [outer, axis, inner], 0, start, &mut head);
            slice(&pool, &x, [outer, axis, inner], start, axis - start, &mut tail);
            let expected: Vec<usize> = indices(&[outer, axis - start, inner]).iter().map(|v| at(v[0], start + v[1], v[2])).collect();
            prop_assert_eq!(&tail, &expected);
            let mut both = vec![0; x.len()];
            concat(&pool, &[(&head, start), (&tail, axis - start)], outer, inner, &mut both);
            prop_assert_eq!(both, x);
        }
    }
}
