//! Factors of columns, which make layers easier to quantize: `W x = (W s) (x / s)`, where the norm that makes `x` divides by `s`.

use super::gptq::output_error;
use vlmc_ir::{
    Def, Graph, Op, Program, Scheme, ValueId,
    quant::{Codes, Method},
};

/// Where factors of some inputs go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fold {
    /// Vectors of the norm that makes the inputs, which are divided: its weight, and its bias if it has one.
    pub vectors: Vec<String>,
    /// Weights of the linear layers that read them, whose columns are multiplied.
    pub readers: Vec<String>,
}

/// How columns of what reads `x` can be scaled.
///
/// # Errors
/// Why not.
pub fn fold(program: &Program, graph: &Graph, x: ValueId) -> Result<Fold, String> {
    let norm = graph.producer(x).map(|n| graph.node(n)).ok_or("what it reads comes from outside")?;
    if !matches!(norm.op, Op::RmsNorm(_) | Op::LayerNorm(_)) {
        return Err(format!("what it reads comes from '{}', not from a norm", norm.op.name()));
    }
    if graph.roots().any(|n| graph.node(n).outs.contains(&x)) {
        return Err("what it reads also leaves the graph".into());
    }
    let all_nodes = || program.graphs.iter().flat_map(|g| g.nodes().map(move |(_, n)| (g, n)));
    let uses = |name: &str| all_nodes().flat_map(|(g, n)| n.args.iter().map(move |v| g.def(*v))).filter(|d| is(d, name)).count();
    let own = |v: &ValueId| match graph.def(*v) {
        Def::Weight(name) if uses(name) == 1 => Ok(name.clone()),
        Def::Weight(name) => Err(format!("'{name}' is used elsewhere too")),
        _ => Err("a factor of the norm is computed".into()),
    };
    let vectors = norm.args[1..].iter().map(own).collect::<Result<_, _>>()?;
    let reader = |(_, n): (_, &vlmc_ir::Node)| match (&n.op, n.args.iter().position(|a| *a == x)) {
        (Op::Linear(_), Some(0)) => own(&n.args[1]),
        _ => Err(format!("'{}' reads it too", n.op.name())),
    };
    let readers = graph.nodes().filter(|(_, n)| n.args.contains(&x)).map(reader).collect::<Result<_, _>>()?;
    Ok(Fold { vectors, readers })
}

fn is(def: &Def, weight: &str) -> bool {
    matches!(def, Def::Weight(name) if name == weight)
}

/// A matrix whose columns may be scaled.
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    /// `[n, k]`.
    pub rows: &'a [f32],
    /// How it will be kept.
    pub scheme: Scheme,
}

/// AWQ (Lin et al., 2024): factors `mean|x|^a` of the columns of layers that read the same `x`, with the `a` of 0, 0.05, ... 0.95 that
/// leaves the smallest error of their outputs. `None` if `a` = 0 does.
///
/// `moments` is `Σ x xᵀ`, `[k, k]`, and `means` is the mean |x| of each column.
pub fn awq(layers: &[Layer<'_>], moments: &[f32], means: &[f32]) -> Option<Vec<f32>> {
    let k = means.len();
    let error = |factors: &[f32]| -> f64 {
        let of = |layer: &Layer<'_>| {
            let q = unscaled(&Codes::of(&scaled(layer.rows, factors), k, layer.scheme, Method::Search), layer.scheme, factors);
            output_error(&layer.rows.iter().zip(&q).map(|(w, q)| w - q).collect::<Vec<_>>(), moments, k)
        };
        layers.iter().map(of).sum()
    };
    let plain = error(&vec![1.0; k]);
    let tried = (1..20).map(|step| centred(means.iter().map(|m| m.powf(step as f32 / 20.0)).collect()));
    let best = tried.map(|f| (error(&f), f)).min_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 < plain).then_some(best.1)
}

/// SmoothQuant (Xiao et al., 2023): factors `max|x|^(-a) max|w|^(1-a)`, inverted, of the columns of layers that read the same `x`, which
/// is rounded to 8 bits row by row; with the `a` of 0.3, 0.4, ... 0.8 that leaves the smallest error of their outputs on `inputs`,
/// rows of `k`. `None` if no factors are better.
pub fn smooth(layers: &[Layer<'_>], inputs: &[f32], k: usize) -> Option<Vec<f32>> {
    let largest = |rows: &mut dyn Iterator<Item = &[f32]>| {
        rows.fold(vec![0f32; k], |mut m, row| {
            m.iter_mut().zip(row).for_each(|(m, v)| *m = m.max(v.abs()));
            m
        })
    };
    let of_x = largest(&mut inputs.chunks_exact(k.max(1)));
    let of_w = largest(&mut layers.iter().flat_map(|l| l.rows.chunks_exact(k.max(1))));
    let error = |factors: &[f32]| -> f64 {
        let divided: Vec<f32> = inputs.chunks_exact(k.max(1)).flat_map(|x| x.iter().zip(factors).map(|(x, s)| x / s)).collect();
        let x: Vec<f32> = divided.chunks_exact(k.max(1)).flat_map(rounded).collect();
        let of = |layer: &Layer<'_>| {
            let q = Codes::of(&scaled(layer.rows, factors), k, layer.scheme, Method::Search).dequantize(k, layer.scheme);
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
            let pairs = inputs.chunks_exact(k.max(1)).zip(x.chunks_exact(k.max(1)));
            let row = |(exact, x): (&[f32], &[f32])| -> f64 {
                let weights = layer.rows.chunks_exact(k.max(1)).zip(q.chunks_exact(k.max(1)));
                weights.map(|(w, q)| f64::from(dot(w, exact) - dot(q, x)).powi(2)).sum()
            };
            pairs.map(row).sum::<f64>()
        };
        layers.iter().map(of).sum()
    };
    let plain = error(&vec![1.0; k]);
    let factors = |a: f32| centred(of_x.iter().zip(&of_w).map(|(x, w)| x.powf(a) / w.max(1e-5).powf(1.0 - a)).collect());
    let best = (3..=8).map(|a| factors(a as f32 / 10.0)).map(|f| (error(&f), f)).min_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 < plain).then_some(best.1)
}

/// Factors with the geometric middle of the largest and the smallest at 1, none of them far from it.
fn centred(mut factors: Vec<f32>) -> Vec<f32> {
    factors.iter_mut().for_each(|f| *f = if f.is_finite() { f.clamp(1e-4, 1e4) } else { 1.0 });
    let (low, high) = factors.iter().fold((f32::MAX, 0f32), |(l, h), f| (l.min(*f), h.max(*f)));
    let middle = (low * high).sqrt();
    factors.iter_mut().for_each(|f| *f /= middle);
    factors
}

/// Rows with their columns multiplied.
pub fn scaled(rows: &[f32], factors: &[f32]) -> Vec<f32> {
    rows.chunks_exact(factors.len().max(1)).flat_map(|row| row.iter().zip(factors).map(|(w, s)| w * s)).collect()
}

/// What codes of scaled rows stand for.
pub fn unscaled(codes: &Codes, scheme: Scheme, factors: &[f32]) -> Vec<f32> {
    let inverse: Vec<f32> = factors.iter().map(|s| 1.0 / s).collect();
    scaled(&codes.dequantize(factors.len(), scheme), &inverse)
}

/// A row rounded to 8 bits, as [`vlmc_ir::ops::Linear`] does it.
fn rounded(row: &[f32]) -> Vec<f32> {
    let step = row.iter().fold(0f32, |m, v| m.max(v.abs())) / 127.0;
    row.iter().map(|v| if step > 0.0 { (v / step).round_ties_even() * step } else { 0.0 }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vlmc_ir::{Builder, DType, Dim, Val, W, WeightSource, Weights};

    struct Everything;

    impl WeightSource for Everything {
        fn contains(&self, _: &str) -> Option<bool> {
            None
        }
        fn resolve(&self, _: &str, _: &[usize]) -> Result<DType, String> {
            Ok(DType::F32)
        }
    }

    /// What becomes of the second operand of the first linear layer.
    fn folded(model: impl for<'g> Fn(&'g Builder<'g>, W<'g>, Val<'g>) -> Val<'g>) -> Result<Fold, String> {
        let weights = Weights::new(&Everything);
        let b = Builder::new("main", Some(&weights));
        let x = b.input("x", DType::F32, [Dim::symbol("seq"), 8.into()]);
        b.output("y", model(&b, b.weights("m"), x));
        let graphs = vec![b.finish().unwrap()];
        let program = Program { name: "model".into(), symbols: vec![], graphs, weights: weights.into_table() };
        let graph = &program.graphs[0];
        let linear = graph.nodes().find(|(_, n)| matches!(n.op, Op::Linear(_))).unwrap().1.args[0];
        fold(&program, graph, linear)
    }

    #[test]
    fn folds_go_into_norms() {
        let names = |n: [&str; 2]| n.iter().map(|n| n.to_string()).collect::<Vec<_>>();
        let fold = folded(|g, w, x| {
            let y = g.layer_norm(x, w / "norm", 1e-5);
            g.linear(y, w / "q", 8) + g.linear(y, w / "k", 8)
        });
        let expected = Fold { vectors: names(["m.norm.weight", "m.norm.bias"]), readers: names(["m.q.weight", "m.k.weight"]) };
        assert_eq!(fold.unwrap(), expected);
        let why = |r: Result<Fold, String>| r.unwrap_err();
        assert!(why(folded(|g, w, x| g.linear(x, w / "q", 8))).contains("from outside"));
        assert!(why(folded(|g, w, x| g.linear(x + 1.0, w / "q", 8))).contains("comes from 'add'"));
        assert!(
            why(folded(|g, w, x| {
                let y = g.rms_norm(x, w / "norm", 1e-5);
                g.linear(y, w / "q", 8) + y
            }))
            .contains("'add' reads it too")
        );
        assert!(
            why(folded(|g, w, x| {
                let y = g.rms_norm(x, w / "norm", 1e-5);
                g.linear(y, w / "q", 8) + g.rms_norm(x + 1.0, w / "norm", 1e-5)
            }))
            .contains("'m.norm.weight' is used elsewhere too")
        );
    }

    const K: usize = 64;

    fn noise(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        let mut uniform = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            (state >> 8) as f32 / (1 << 24) as f32
        };
        (0..n).map(|_| (0..6).map(|_| uniform()).sum::<f32>() - 3.0).collect()
    }

    /// Inputs of which every ninth column is large, as those of transformers are.
    fn inputs() -> Vec<f32> {
        noise(200 * K, 2).iter().enumerate().map(|(i, v)| if (i % K).is_multiple_of(9) { v * 30.0 } else { *v }).collect()
    }

    #[test]
    fn awq_keeps_what_large_inputs_meet() {
        let (w, x) = (noise(24 * K, 1), inputs());
        let mut h = vec![0.0; K * K];
        x.chunks_exact(K).for_each(|x| (0..K * K).for_each(|i| h[i] += x[i / K] * x[i % K]));
        let means: Vec<f32> = (0..K).map(|c| x.iter().skip(c).step_by(K).map(|v| v.abs()).sum::<f32>() / 200.0).collect();
        let layers = [Layer { rows: &w, scheme: Scheme::INT4 }];
        let factors = awq(&layers, &h, &means).unwrap();
        assert!(factors[0] > 1.5 * factors[1]);
        let error = |factors: &[f32]| {
            let q = unscaled(&Codes::of(&scaled(&w, factors), K, Scheme::INT4, Method::Search), Scheme::INT4, factors);
            output_error(&w.iter().zip(&q).map(|(w, q)| w - q).collect::<Vec<_>>(), &h, K)
        };
        let (scaled, plain) = (error(&factors), error(&[1.0; K]));
        assert!(scaled < 0.6 * plain, "{scaled} of {plain}");
        // Nothing to gain where all columns are alike.
        let identity: Vec<f32> = (0..K * K).map(|i| f32::from(u8::from(i % (K + 1) == 0))).collect();
        assert_eq!(awq(&layers, &identity, &[1.0; K]), None);
    }

    #[test]
    fn smoothing_leaves_room_in_the_inputs() {
        let (w, x) = (noise(24 * K, 1), inputs());
        let factors = smooth(&[Layer { rows: &w, scheme: Scheme::INT8 }], &x, K).unwrap();
        assert!(factors[0] > 2.0 * factors[1]);
        assert_eq!(smooth(&[Layer { rows: &[0.0; K], scheme: Scheme::INT8 }], &[0.0; K], K), None);
    }
}
