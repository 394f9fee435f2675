//! Functions of each element.

use crate::{
    Kernels, Src,
    isa::Task,
    lanes::{self, Lanes, N},
    moves::Walk,
};
use vlmc_artifact::program::Unary;

/// Elements per piece of work for one thread.
const PIECE: usize = 1 << 14;

/// The shape of an elementwise result and the strides of two operands in it.
pub struct Broadcast<'a> {
    /// Shape of the result.
    pub shape: &'a [usize],
    /// Element strides of the operands, 0 along broadcast axes.
    pub strides: [&'a [usize]; 2],
}

struct Map<'a> {
    f: Unary,
    data: &'a mut [f32],
}

impl Task for Map<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        // SAFETY: the caller's promise.
        unsafe { map::<L>(self.f, self.data) }
    }
}

/// `f` of each element.
///
/// # Safety
/// The CPU has the instruction set of `L`.
#[inline(always)]
pub(crate) unsafe fn map<L: Lanes>(f: Unary, data: &mut [f32]) {
    let scalar = |data: &mut [f32], f: fn(f32) -> f32| data.iter_mut().for_each(|x| *x = f(*x));
    // A macro, because what a closure calls is not compiled for the instruction set.
    macro_rules! each {
        ($x:ident => $f:expr) => {{
            let (chunks, tail) = data.as_chunks_mut::<N>();
            // The last vector is filled up with zeros.
            let mut last = [0.0; N];
            last[..tail.len()].copy_from_slice(tail);
            // SAFETY: the caller's promise.
            unsafe {
                for c in chunks.iter_mut().chain((!tail.is_empty()).then_some(&mut last)) {
                    let $x = L::load(c);
                    $f.store(c);
                }
            }
            tail.copy_from_slice(&last[..tail.len()]);
        }};
    }
    match f {
        Unary::Neg => scalar(data, |x| -x),
        Unary::Abs => scalar(data, f32::abs),
        Unary::Log => scalar(data, f32::ln),
        Unary::Sqrt => scalar(data, f32::sqrt),
        Unary::Sin => scalar(data, f32::sin),
        Unary::Cos => scalar(data, f32::cos),
        Unary::Exp => scalar(data, f32::exp),
        Unary::Floor => scalar(data, f32::floor),
        Unary::Round => scalar(data, f32::round_ties_even),
        Unary::Tanh => scalar(data, f32::tanh),
        // Booleans do not come here.
        Unary::Not => {}
        Unary::Sigmoid => each!(x => sigmoid(x)),
        Unary::Silu => each!(x => x.mul(sigmoid(x))),
        Unary::QuickGelu => each!(x => x.mul(sigmoid(x.mul(L::splat(1.702))))),
        Unary::Erf => each!(x => erf(x)),
        Unary::Gelu => each!(x => x.mul(L::splat(0.5)).mul(L::splat(1.0).add(erf(x.mul(L::splat(std::f32::consts::FRAC_1_SQRT_2)))))),
        // 1/2 (1 + tanh y) = sigmoid(2 y)
        Unary::GeluTanh => each!(x => {
            let cube = x.mul(x).mul(x);
            x.mul(sigmoid(cube.mul_add(L::splat(0.044_715), x).mul(L::splat(1.595_769_2))))
        }),
    }
}

/// `1 / (1 + e^-x)` to 2e-7: `e^-x` as `2^n 2^r`, with the polynomial of least relative error in `r`, at most a half. What `x log2 e` is
/// rounded by counts only where the result is near 0.
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
unsafe fn sigmoid<L: Lanes>(x: L) -> L {
    // SAFETY: the caller's promise.
    unsafe {
        let s = |v: f32| L::splat(v);
        let t = x.mul(s(-std::f32::consts::LOG2_E)).min(s(125.0)).max(s(-125.0));
        let n = t.round();
        let r = t.sub(n);
        let mut p = s(EXP2[0]);
        for c in &EXP2[1..] {
            p = p.mul_add(r, s(*c));
        }
        p.scale(n).add(s(1.0)).reciprocal()
    }
}

/// `2^r` for `|r| <= 1/2`, from the highest power on.
const EXP2: [f32; 6] = [1.326_472_7e-3, 9.671_513e-3, 5.550_733_7e-2, 0.240_222_42, std::f32::consts::LN_2, 1.0];

/// `act(a) * b` of two slices.
pub(crate) struct Gate<'a> {
    pub(crate) f: Unary,
    pub(crate) a: &'a [f32],
    pub(crate) b: &'a [f32],
    pub(crate) out: &'a mut [f32],
}

impl Task for Gate<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        self.out.copy_from_slice(self.a);
        // SAFETY: the caller's promise.
        unsafe { map::<L>(self.f, self.out) };
        self.out.iter_mut().zip(self.b).for_each(|(o, b)| *o *= b);
    }
}

/// The error function to 1.5e-7 (Abramowitz and Stegun, 7.1.26), by its Taylor series near 0, where that would lose digits.
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
unsafe fn erf<L: Lanes>(x: L) -> L {
    // SAFETY: the caller's promise.
    unsafe {
        let s = |v: f32| L::splat(v);
        let a = x.max(s(0.0).sub(x));
        let t = s(1.0).div(a.mul_add(s(0.327_591_1), s(1.0)));
        let mut p = s(1.061_405_4);
        for c in [-1.453_152, 1.421_413_8, -0.284_496_74, 0.254_829_6] {
            p = p.mul_add(t, s(c));
        }
        let far = s(1.0).sub(p.mul(t).mul(lanes::exp(s(0.0).sub(a.mul(a)))));
        // x (2/sqrt pi) (1 - x²/3 + x⁴/10 - x⁶/42 + x⁸/216), better than 1e-7 below 0.3.
        let q = x.mul(x);
        let mut near = s(1.0 / 216.0);
        for c in [-1.0 / 42.0, 0.1, -1.0 / 3.0, 1.0] {
            near = near.mul_add(q, s(c));
        }
        let near = near.mul(x).mul(s(std::f32::consts::FRAC_2_SQRT_PI));
        let mut out = [0.0; N];
        let (mut xs, mut fars, mut nears) = ([0.0; N], [0.0; N], [0.0; N]);
        x.store(&mut xs);
        far.store(&mut fars);
        near.store(&mut nears);
        for i in 0..N {
            out[i] = if xs[i].abs() < 0.3 { nears[i] } else { fars[i].copysign(xs[i]) };
        }
        L::load(&out)
    }
}

impl Kernels {
    /// `f` of each element of `x`.
    ///
    /// # Panics
    /// If the lengths differ, or for [`Unary::Not`], which is of booleans.
    pub fn unary(&self, f: Unary, x: Src<'_, f32>, out: &mut [f32]) {
        assert!(f != Unary::Not, "'not' is a function of booleans");
        if let Src::Slice(x) = x {
            assert_eq!(x.len(), out.len(), "x and out must have one length");
        }
        self.pool.chunks(out, PIECE, |i, data| {
            if let Src::Slice(x) = x {
                data.copy_from_slice(&x[i * PIECE..i * PIECE + data.len()]);
            }
            self.isa.run(Map { f, data });
        });
    }

    /// `x [rows, 2 n]` to `out [rows, n]`: `f` of the first half of each row times the second.
    ///
    /// # Panics
    /// If the lengths do not fit, or for [`Unary::Not`], which is of booleans.
    pub fn gated(&self, f: Unary, x: &[f32], n: usize, out: &mut [f32]) {
        assert!(f != Unary::Not, "'not' is a function of booleans");
        assert!(x.len() == 2 * out.len() && out.len().is_multiple_of(n.max(1)), "x must be [rows, 2 n], out [rows, n]");
        // A token's row is short, and yet worth the work of all threads.
        let piece = out.len().div_ceil(self.pool.threads()).clamp(PIECE / 8, PIECE);
        self.pool.chunks(out, piece, |i, mut out| {
            let mut at = i * piece;
            while !out.is_empty() {
                let (row, column) = (at / n, at % n);
                let len = (n - column).min(out.len());
                let (part, rest) = out.split_at_mut(len);
                let (a, b) = x[row * 2 * n..][..2 * n].split_at(n);
                self.isa.run(Gate { f, a: &a[column..][..len], b: &b[column..][..len], out: part });
                (out, at) = (rest, at + len);
            }
        });
    }

    /// `f` of the elements of two operands.
    ///
    /// # Panics
    /// If the strides lead out of an operand.
    pub fn binary<T: Copy + Send + Sync, R: Copy + Send>(
        &self,
        b: &Broadcast<'_>,
        left: &[T],
        right: &[T],
        out: &mut [R],
        f: impl Fn(T, T) -> R + Sync,
    ) {
        let walk = Walk::new(b.shape, b.strides);
        let step = walk.step();
        walk.rows(&self.pool, out, |[l, r], out| {
            let n = out.len();
            match step {
                [1, 1] => out.iter_mut().zip(&left[l..l + n]).zip(&right[r..r + n]).for_each(|((o, a), b)| *o = f(*a, *b)),
                [1, 0] => out.iter_mut().zip(&left[l..l + n]).for_each(|(o, a)| *o = f(*a, right[r])),
                [0, 1] => out.iter_mut().zip(&right[r..r + n]).for_each(|(o, b)| *o = f(left[l], *b)),
                [sl, sr] => out.iter_mut().enumerate().for_each(|(i, o)| *o = f(left[l + i * sl], right[r + i * sr])),
            }
        });
    }

    /// [`Self::binary`] whose first operand is what `out` holds; `strides` are the other's.
    ///
    /// # Panics
    /// If the strides lead out of the operand.
    pub fn update<T: Copy + Send + Sync>(
        &self,
        shape: &[usize],
        strides: &[usize],
        other: &[T],
        out: &mut [T],
        f: impl Fn(T, T) -> T + Sync,
    ) {
        let own = crate::moves::strides(shape);
        let walk = Walk::new(shape, [&own, strides]);
        let [_, step] = walk.step();
        walk.rows(&self.pool, out, |[_, base], out| match step {
            1 => out.iter_mut().zip(&other[base..]).for_each(|(o, b)| *o = f(*o, *b)),
            _ => out.iter_mut().enumerate().for_each(|(i, o)| *o = f(*o, other[base + i * step])),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    /// `erf` by its Maclaurin series in f64.
    fn exact_erf(x: f64) -> f64 {
        if x.abs() > 5.0 {
            return x.signum();
        }
        let (mut term, mut sum) = (x, x);
        for n in 1..120 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    }

    #[test]
    fn functions_match_f64() {
        let x: Vec<f32> = (-900..=900).map(|i| i as f32 * 0.01).chain([-90.0, 90.0, 1e-8, -1e-8]).collect();
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let cases: [(Unary, &dyn Fn(f64) -> f64); 8] = [
            (Unary::Sigmoid, &sigmoid),
            (Unary::Silu, &|x| x * sigmoid(x)),
            (Unary::QuickGelu, &|x| x * sigmoid(1.702 * x)),
            (Unary::Gelu, &|x| 0.5 * x * (1.0 + exact_erf(x / 2f64.sqrt()))),
            (Unary::GeluTanh, &|x| 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x)).tanh())),
            (Unary::Erf, &exact_erf),
            (Unary::Tanh, &f64::tanh),
            (Unary::Neg, &|x| -x),
        ];
        for isa in Isa::ALL.into_iter().filter(|i| i.is_supported()) {
            let k = Kernels::with_isa(2, isa).unwrap();
            for (f, exact) in cases {
                let mut out = vec![0.0; x.len()];
                k.unary(f, Src::Slice(&x), &mut out);
                for (x, y) in x.iter().zip(&out) {
                    let e = exact(f64::from(*x));
                    assert!((f64::from(*y) - e).abs() <= 1e-6 * e.abs().max(1.0), "{isa:?} {f:?}({x}) = {y} instead of {e}");
                }
                let mut in_place = x.clone();
                k.unary(f, Src::InPlace, &mut in_place);
                assert_eq!(in_place, out);
            }
        }
    }

    #[test]
    fn gates_multiply_halves() {
        // Rows that pieces of work cut, and short ones.
        for (rows, n) in [(3, PIECE - 5), (1, 2 * PIECE + 7), (5, 3), (0, 4), (4, 0)] {
            let x: Vec<f32> = (0..rows * 2 * n).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
            for isa in Isa::ALL.into_iter().filter(|i| i.is_supported()) {
                let k = Kernels::with_isa(2, isa).unwrap();
                let (mut out, mut gates) = (vec![f32::NAN; rows * n], vec![f32::NAN; rows * 2 * n]);
                k.gated(Unary::Silu, &x, n, &mut out);
                k.unary(Unary::Silu, Src::Slice(&x), &mut gates);
                for (i, o) in out.iter().enumerate() {
                    let at = i / n * 2 * n + i % n;
                    let e = gates[at] * x[at + n];
                    assert!((o - e).abs() <= 1e-6 * (1.0 + e.abs()), "{isa:?} {rows} {n} {i}: {o} instead of {e}");
                }
            }
        }
    }

    #[test]
    fn binary_broadcasts() {
        let k = Kernels::new(2);
        let (a, b): (Vec<i64>, Vec<i64>) = ((0..6).collect(), vec![10, 20]);
        let mut out = vec![0; 12];
        let shape = [2, 3, 2];
        let strides = [crate::moves::broadcast_strides(&[2, 3, 1], &shape), crate::moves::broadcast_strides(&[2], &shape)];
        k.binary(&Broadcast { shape: &shape, strides: [&strides[0], &strides[1]] }, &a, &b, &mut out, |a, b| a + b);
        assert_eq!(out, [10, 20, 11, 21, 12, 22, 13, 23, 14, 24, 15, 25]);
        k.update(&shape, &strides[1], &b, &mut out, |a, b| a - b);
        assert_eq!(out, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]);
    }
}
