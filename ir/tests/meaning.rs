//! What ops mean, against the formulas of the papers written out here in `f64` loops.
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

use ndarray::{ArrayD, Dimension, IxDyn};
use std::collections::BTreeMap;
use vlmc_artifact::program::{Reduce, Unary};
use vlmc_ir::{
    Bindings, Builder, DType, Op, Type, Val,
    interp::{self, Array, Env, EvalError},
    ops::{Append, FakeQuantize, Linear, Mask, Moe, NtkRope, RoutedMoe},
};

fn floats(shape: &[usize], f: impl FnMut(usize) -> f64) -> Array {
    let n = shape.iter().product();
    Array::F32(ArrayD::from_shape_vec(IxDyn(shape), (0..n).map(f).map(|v| v as f32).collect()).unwrap())
}

fn ints(shape: &[usize], data: &[i64]) -> Array {
    Array::I64(ArrayD::from_shape_vec(IxDyn(shape), data.to_vec()).unwrap())
}

/// Numbers without a pattern, in -1..1.
fn noise(seed: usize) -> impl Fn(usize) -> f64 {
    move |i| ((i * 7919 + seed * 104_729) % 1009) as f64 / 504.5 - 1.0
}

/// Runs what `build` makes of inputs.
fn run(inputs: &[Array], build: impl for<'g> Fn(&'g Builder<'g>, &[Val<'g>]) -> Vec<Val<'g>>) -> Result<Vec<Array>, EvalError> {
    let b = Builder::new("g", None);
    let values: Vec<Val<'_>> =
        inputs.iter().enumerate().map(|(i, a)| b.input(&format!("in{i}"), a.dtype(), a.shape().iter().copied())).collect();
    let outs = build(&b, &values);
    let count = outs.len();
    outs.into_iter().enumerate().for_each(|(i, v)| b.output(&format!("out{i}"), v));
    drop(values);
    let graph = b.finish().unwrap();
    let named = inputs.iter().enumerate().map(|(i, a)| (format!("in{i}"), a.clone())).collect();
    let mut out = interp::run(&graph, &Env { symbols: &Bindings::default(), inputs: &named, weights: &BTreeMap::new() })?;
    Ok((0..count).map(|i| out.remove(&format!("out{i}")).unwrap()).collect())
}

fn close(got: &Array, shape: &[usize], expected: impl Fn(&[usize]) -> f64) {
    assert_eq!(got.shape(), shape);
    for (at, v) in got.f32().unwrap().indexed_iter() {
        let at: Vec<usize> = (0..at.ndim()).map(|i| at[i]).collect();
        let e = expected(&at);
        assert!((f64::from(*v) - e).abs() < 1e-5, "{at:?}: {v} instead of {e}");
    }
}

/// Grouped-query attention with each kind of mask.
#[test]
fn attention() {
    let (batch, heads, kv_heads, s, t, d) = (2, 4, 2, 3, 5, 6);
    let (q, k, v) =
        (floats(&[batch, heads, s, d], noise(1)), floats(&[batch, kv_heads, t, d], noise(2)), floats(&[batch, kv_heads, t, d], noise(3)));
    let mask = [1, 1, 1, 1, 1, 0, 1, 1, 0, 1];
    let at = |a: &Array, i: &[usize]| f64::from(a.f32().unwrap()[IxDyn(i)]);
    for kind in [Mask::Full, Mask::Causal] {
        let inputs = [q.clone(), k.clone(), v.clone(), ints(&[batch, t], &mask)];
        let out = run(&inputs, |g, x| vec![g.attention(x[0], x[1], x[2], 0.3, kind, (kind == Mask::Causal).then_some(x[3]))]).unwrap();
        close(&out[0], &[batch, heads, s, d], |i| {
            let [b, h, row, col] = i.try_into().unwrap();
            let kv = h / (heads / kv_heads);
            let sees = |j: usize| kind == Mask::Full || (j <= t - s + row && mask[b * t + j] != 0);
            let score = |j: usize| (0..d).map(|c| at(&q, &[b, h, row, c]) * at(&k, &[b, kv, j, c])).sum::<f64>() * 0.3;
            let e: Vec<f64> = (0..t).map(|j| if sees(j) { score(j).exp() } else { 0.0 }).collect();
            (0..t).map(|j| e[j] * at(&v, &[b, kv, j, col])).sum::<f64>() / e.iter().sum::<f64>()
        });
    }
    // Segments: rows 0 and 1, rows 2 to 4.
    let (x, ids) = (floats(&[2, 5, 4], noise(4)), [7, 7, 9, 9, 9]);
    let out = run(&[x.clone(), ints(&[5], &ids)], |g, v| vec![g.attention(v[0], v[0], v[0], 1.0, Mask::Segments, Some(v[1]))]).unwrap();
    close(&out[0], &[2, 5, 4], |i| {
        let [h, row, col] = i.try_into().unwrap();
        let score = |j: usize| (0..4).map(|c| at(&x, &[h, row, c]) * at(&x, &[h, j, c])).sum::<f64>();
        let e: Vec<f64> = (0..5).map(|j| if ids[j] == ids[row] { score(j).exp() } else { 0.0 }).collect();
        (0..5).map(|j| e[j] * at(&x, &[h, j, col])).sum::<f64>() / e.iter().sum::<f64>()
    });
}

/// Two pictures and a video of two frames: patches come in blocks of 2 x 2.
#[test]
fn grid_positions() {
    let grid = [[1, 2, 4], [2, 4, 2]];
    let out = run(&[ints(&[2, 3], &grid.concat())], |g, x| g.grid_positions(x[0], 24, 2).to_vec()).unwrap();
    let mut expected: [Vec<i64>; 3] = Default::default();
    let mut segment = 0;
    for [t, h, w] in grid {
        for _ in 0..t {
            for (block_row, block_col) in (0..h / 2).flat_map(|r| (0..w / 2).map(move |c| (r, c))) {
                for (row, col) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                    [block_row * 2 + row, block_col * 2 + col, segment].into_iter().zip(&mut expected).for_each(|(v, e)| e.push(v));
                }
            }
            segment += 1;
        }
    }
    for (got, expected) in out.iter().zip(&expected) {
        assert_eq!(got.i64().unwrap().as_slice().unwrap(), expected);
    }
}

/// Qwen2.5-VL's windows against the order of the reference: the frame padded to whole windows, cut, and the padding left out.
#[test]
fn window_order() {
    let (merge, side) = (2usize, 3usize);
    let grid = [[1, 2, 4], [2, 10, 14], [1, 12, 6], [3, 4, 16]];
    let tokens: i64 = grid.iter().map(|[t, h, w]| t * h * w / 4).sum();
    let out = run(&[ints(&[4, 3], &grid.concat())], |g, x| g.window_order(x[0], tokens as usize, merge, side).to_vec()).unwrap();
    let (mut patches, mut windows, mut places) = (vec![], vec![], vec![0; tokens as usize]);
    let (mut start, mut count) = (0, 0);
    for [t, h, w] in grid {
        let (h, w) = (h as usize / merge, w as usize / merge);
        for _ in 0..t {
            for (top, left) in (0..h).step_by(side).flat_map(|r| (0..w).step_by(side).map(move |c| (r, c))) {
                for (r, c) in (top..h.min(top + side)).flat_map(|r| (left..w.min(left + side)).map(move |c| (r, c))) {
                    let block = start + r * w + c;
                    places[block] = (patches.len() / 4) as i64;
                    patches.extend((0..4).map(|i| (block * 4 + i) as i64));
                    windows.extend([count; 4]);
                }
                count += 1;
            }
            start += h * w;
        }
    }
    assert_eq!(out[0].i64().unwrap().as_slice().unwrap(), patches);
    assert_eq!(out[2].i64().unwrap().as_slice().unwrap(), places);
    let ids = out[1].i64().unwrap();
    let same = |a: i64, b: i64| ids[a as usize] == ids[b as usize];
    assert!(ids.as_slice().unwrap().is_sorted());
    assert!((1..windows.len()).all(|i| same(i as i64, i as i64 - 1) == (windows[i] == windows[i - 1])));
}

/// Qwen3-VL's table of positions, corner to corner, against bilinear interpolation.
#[test]
fn stretched_positions() {
    let (side, width) = (4usize, 3usize);
    let table = floats(&[side * side, width], noise(6));
    let grid = [[1usize, 2, 2], [2, 4, 6], [1, 10, 2]];
    let ids: Vec<i64> = grid.concat().iter().map(|v| *v as i64).collect();
    let rows = grid.iter().map(|[t, h, w]| t * h * w).sum::<usize>();
    let out = run(&[table.clone(), ints(&[3, 3], &ids)], |g, x| vec![g.stretched_positions(x[0], x[1], rows, 2, side)]).unwrap();
    let mut places = vec![];
    for [t, h, w] in grid {
        for _ in 0..t {
            for (r, c) in (0..h / 2).flat_map(|r| (0..w / 2).map(move |c| (r, c))) {
                places.extend([(0, 0), (0, 1), (1, 0), (1, 1)].map(|(a, b)| [(2 * r + a, h), (2 * c + b, w)]));
            }
        }
    }
    close(&out[0], &[rows, width], |i| {
        let taps = places[i[0]].map(|(at, size)| {
            let source = (at * (side - 1)) as f64 / (size - 1) as f64;
            let low = source.floor() as usize;
            [(low, 1.0 - source.fract()), ((low + 1).min(side - 1), source.fract())]
        });
        let at = |r: usize, c: usize| f64::from(table.f32().unwrap()[[r * side + c, i[1]]]);
        taps[0].iter().flat_map(|(r, a)| taps[1].iter().map(move |(c, b)| a * b * at(*r, *c))).sum()
    });
}

/// Qwen-VL's positions: the base grows with each doubling of the trained length, and late queries are scaled.
#[test]
fn positions_beyond_the_training() {
    let positions = [0, 3, 11, 12];
    for (length, alpha) in [(1, 1.0), (8, 1.0), (9, 3.0), (16, 3.0), (17, 7.0), (32, 7.0), (33, 15.0), (1000, 15.0)] {
        let op = NtkRope { head_dim: 6, theta: 100.0, trained: 8, levels: 4 };
        let inputs = [ints(&[2, 2], &positions), ints(&[1], &[length])];
        let out = run(&inputs, |g, x| <[Val<'_>; 2]>::from(g.ntk_rope(op.clone(), x[0], x[1])).to_vec()).unwrap();
        let base = 100.0 * f64::powf(alpha, 6.0 / 4.0);
        for (out, f) in out.iter().zip([f64::cos, f64::sin]) {
            close(out, &[2, 2, 3], |i| f(positions[i[0] * 2 + i[1]] as f64 * base.powf(-2.0 * i[2] as f64 / 6.0)));
        }
    }
    let out = run(&[ints(&[2, 2], &positions)], |g, x| vec![g.log_n(x[0], 8)]).unwrap();
    close(&out[0], &[2, 1, 2, 1], |i| (positions[i[0] * 2 + i[2]] as f64 + 1.0).log(8.0).max(1.0));
}

#[test]
fn rotary_embeddings() {
    let positions = [3, 0, 5, 1, 2, 8];
    let out =
        run(&[ints(&[3, 1, 2], &positions)], |g, x| <[Val<'_>; 2]>::from(g.mrope(x[0], 12, 100.0, [1, 2, 3], false)).to_vec()).unwrap();
    for (out, f) in out.iter().zip([f64::cos, f64::sin]) {
        close(out, &[1, 2, 6], |i| {
            let kind = [0, 1, 1, 2, 2, 2][i[2]];
            f(positions[kind * 2 + i[1]] as f64 * 100f64.powf(-2.0 * i[2] as f64 / 12.0))
        });
    }
    // The kinds in turns, as long as each has angles left.
    let out =
        run(&[ints(&[3, 1, 2], &positions)], |g, x| <[Val<'_>; 2]>::from(g.mrope(x[0], 12, 100.0, [3, 2, 1], true)).to_vec()).unwrap();
    for (out, f) in out.iter().zip([f64::cos, f64::sin]) {
        close(out, &[1, 2, 6], |i| {
            let kind = [0, 1, 2, 0, 1, 0][i[2]];
            f(positions[kind * 2 + i[1]] as f64 * 100f64.powf(-2.0 * i[2] as f64 / 12.0))
        });
    }
    let (row, col) = ([0, 1, 9], [4, 0, 2]);
    let out =
        run(&[ints(&[3], &row), ints(&[3], &col)], |g, x| <[Val<'_>; 2]>::from(g.rotary_2d(x[0], x[1], 8, 10_000.0)).to_vec()).unwrap();
    for (out, f) in out.iter().zip([f64::cos, f64::sin]) {
        close(out, &[3, 4], |i| f([row, col][i[1] / 2][i[0]] as f64 * 10_000f64.powf(-4.0 * (i[1] % 2) as f64 / 8.0)));
    }
    // A turn by the angle of each pair (i, i + d/2).
    let (x, angle) = (floats(&[2, 1, 4], noise(5)), [0.3f64, 1.1]);
    let (cos, sin) = (floats(&[1, 2], |i| angle[i].cos()), floats(&[1, 2], |i| angle[i].sin()));
    let out = run(&[x.clone(), cos, sin], |g, v| vec![g.rotary(v[0], (v[1], v[2]))]).unwrap();
    close(&out[0], &[2, 1, 4], |i| {
        let at = |c: usize| f64::from(x.f32().unwrap()[[i[0], 0, c]]);
        let pair = i[2] % 2;
        let (a, b) = (at(pair), at(pair + 2));
        if i[2] < 2 { a * angle[pair].cos() - b * angle[pair].sin() } else { b * angle[pair].cos() + a * angle[pair].sin() }
    });
}

/// Features go to their places in reading order, over all rows of a batch.
#[test]
fn merge_features() {
    let here = Array::Bool(ArrayD::from_shape_vec(IxDyn(&[2, 3]), vec![false, true, true, true, false, false]).unwrap());
    let out = run(&[floats(&[2, 3, 2], |i| i as f64), here, floats(&[3, 2], |i| 100.0 + i as f64)], |g, x| {
        vec![g.merge_features(x[0], x[1], x[2])]
    })
    .unwrap();
    assert_eq!(out[0].f32().unwrap().as_slice().unwrap(), [0., 1., 100., 101., 102., 103., 104., 105., 8., 9., 10., 11.]);
}

#[test]
fn sums() {
    let x = floats(&[2, 3], |i| i as f64);
    let out = run(&[x], |g, x| {
        let all = [Reduce::Sum, Reduce::Max, Reduce::Mean].map(|f| g.reduce(f, x[0], &[1]));
        all.into_iter().chain([g.cumsum(x[0], 1), g.cumsum(x[0], 0)]).collect()
    })
    .unwrap();
    let data: Vec<Vec<f32>> = out.iter().map(|a| a.f32().unwrap().iter().copied().collect()).collect();
    assert_eq!(data, [vec![3., 12.], vec![2., 5.], vec![1., 4.], vec![0., 1., 3., 3., 7., 12.], vec![0., 1., 2., 3., 5., 7.]]);
}

/// Values without meaning are errors that name the graph, not panics.
#[test]
fn values_without_meaning() {
    let gather = |i: i64| {
        run(&[floats(&[3, 2], noise(1)), ints(&[1], &[i])], |g, x| vec![g.gather(x[0], x[1], 0)]).map(|_| ()).map_err(|e| e.to_string())
    };
    assert_eq!(gather(2), Ok(()));
    for bad in [3, -1, i64::MAX] {
        assert!(gather(bad).unwrap_err().starts_with("g: "), "{:?}", gather(bad));
    }
    let division = run(&[ints(&[2], &[1, 2]), ints(&[2], &[1, 0])], |_, x| vec![x[0] / x[1]]);
    assert!(division.is_err());
    let b = Builder::new("g", None);
    let x = b.input("x", DType::F32, [2, 3]);
    b.output("y", x + b.input("z", DType::F32, [2, 4]));
    assert_eq!(b.finish().unwrap_err().to_string(), "g: add(f32[2, 3], f32[2, 4]): dims 3 and 4 do not broadcast");
}

/// A linear layer of quantized weights with dynamic activations: steps of 1/127 of each group's largest number.
#[test]
fn dynamic_linear_rounds_its_operand() {
    let op = Op::from(Linear { dynamic: true, act: None });
    let types = [Type::new(DType::F32, [1, 40]), Type::new("int4g32".parse().unwrap(), [1, 40])];
    // The second group has 8 columns, and the largest of them is 254: steps of 2, halves to even.
    let numbers = [(0, 127.0), (1, 1.4), (2, -0.6), (32, 254.0), (33, 1.0), (34, 3.0), (35, -3.0)];
    let x = floats(&[1, 40], |i| numbers.iter().find(|(at, _)| *at == i).map_or(0.0, |(_, v)| *v));
    for (at, want) in [(0, 127.0), (1, 1.0), (2, -1.0), (3, 0.0), (32, 254.0), (33, 0.0), (34, 4.0), (35, -4.0)] {
        let one = floats(&[1, 40], |i| f64::from(u8::from(i == at)));
        let out = interp::eval(&op, &types, &[&x, &one], &Bindings::default()).unwrap();
        assert_eq!(out[0], floats(&[1, 1], |_| want), "column {at}");
    }
    assert!(op.infer(&[types[0].clone(), Type::new(DType::F32, [1, 40])]).is_err());
}

/// One expert of identities: `x * silu(x)` of rounded numbers, rounded again.
#[test]
fn dynamic_moe_rounds_what_its_stacks_multiply() {
    let op = |dynamic| Op::from(Moe { act: Unary::Silu, dynamic });
    let types = |stack: &str| {
        let stack = Type::new(stack.parse().unwrap(), [1, 2, 2]);
        vec![
            Type::new(DType::F32, [1, 2]),
            Type::new(DType::I64, [1, 1]),
            Type::new(DType::F32, [1, 1]),
            stack.clone(),
            stack.clone(),
            stack,
        ]
    };
    let run = |dynamic: bool| {
        let identity = floats(&[1, 2, 2], |i| f64::from(u8::from(i % 3 == 0)));
        // 0.102 is 12.95 steps of 1 / 127.
        let x = floats(&[1, 2], |i| [1.0, 0.102][i]);
        let args = [x, ints(&[1, 1], &[0]), floats(&[1, 1], |_| 1.0), identity.clone(), identity.clone(), identity];
        interp::eval(&op(dynamic), &types("int8"), &args.each_ref(), &Bindings::default()).unwrap().remove(0)
    };
    let gated = |v: f64| v * v / (1.0 + (-v).exp());
    close(&run(false), &[1, 2], |i| [gated(1.0), gated(0.102)][i[1]]);
    let step = gated(1.0) / 127.0;
    close(&run(true), &[1, 2], |i| [gated(1.0), (gated(13.0 / 127.0) / step).round() * step][i[1]]);
    assert!(op(false).infer(&types("f32")).is_ok());
    assert!(op(true).infer(&types("f32")).is_err());
}

/// Of three experts, the two with the largest logits count as the softmax of all says; rows of gate and up come in turn.
#[test]
fn routed_moe() {
    let types = [vec![1, 2], vec![1, 3], vec![3, 2, 2], vec![3, 2, 1]].map(|shape| Type::new(DType::F32, shape));
    let x = floats(&[1, 2], |i| [1.0, 2.0][i]);
    let logits = floats(&[1, 3], |i| [0.5, -1.0, 1.5][i]);
    // The gate reads the first column, up the second; expert `e` multiplies by 2^e, and gives it to the second column too.
    let gate_up = floats(&[3, 2, 2], |i| f64::from(u8::from(matches!(i % 4, 0 | 3))));
    let down = floats(&[3, 2, 1], |i| f64::from(1 << (i / 2)));
    let run = |dynamic: bool, types: &[Type]| {
        let op = Op::from(RoutedMoe { k: 2, dynamic });
        interp::eval(&op, types, &[&x, &logits, &gate_up, &down], &Bindings::default()).unwrap().remove(0)
    };
    let exp = [0.5f64, -1.0, 1.5].map(f64::exp);
    let inner = 2.0 / (1.0 + (-1.0f64).exp());
    close(&run(false, &types), &[1, 2], |_| inner * (exp[0] + 4.0 * exp[2]) / exp.iter().sum::<f64>());
    // 1 of at most 2 is 63.5 steps of 2 / 127, and that is 64.
    let quantized = types.each_ref().map(|t| if t.rank() == 3 { t.with_dtype("int8".parse().unwrap()) } else { t.clone() });
    let gate = 128.0 / 127.0f64;
    let inner = 2.0 * gate / (1.0 + (-gate).exp());
    close(&run(true, &quantized), &[1, 2], |_| inner * (exp[0] + 4.0 * exp[2]) / exp.iter().sum::<f64>());
    let op = |k| Op::from(RoutedMoe { k, dynamic: false });
    assert!(op(3).infer(&types).is_ok() && op(4).infer(&types).is_err());
}

/// Steps of the scale, halves to even, and what 8 bits hold.
#[test]
fn fake_quantize() {
    let op = Op::from(FakeQuantize { scale: 0.5 });
    let types = [Type::new(DType::F32, [6])];
    let x = floats(&[6], |i| [0.2, 0.25, 0.75, -0.26, 100.0, -100.0][i]);
    let got = interp::eval(&op, &types, &[&x], &Bindings::default()).unwrap();
    assert_eq!(got, [floats(&[6], |i| [0.0, 0.0, 1.0, -0.5, 63.5, -64.0][i])]);
    assert!(Op::from(FakeQuantize { scale: 0.0 }).infer(&types).is_err());
}

/// What a state keeps in 8 bits is rounded once, when it is appended: rows have steps of their own.
#[test]
fn append_rounds_what_is_new() {
    let op = |keep: &str| Op::from(Append { axis: 0, keep: keep.parse().unwrap() });
    let types = |d| [Type::new(DType::F32, [1, 2]), Type::new(d, [2, 2])];
    let run = |keep: &str| {
        let (past, new) = (floats(&[1, 2], |i| [0.1, 0.3][i]), floats(&[2, 2], |i| [1.27, 0.0149, -254.0, 3.1][i]));
        interp::eval(&op(keep), &types(DType::F32), &[&past, &new], &Bindings::default()).unwrap().remove(0)
    };
    close(&run("f32"), &[3, 2], |i| [0.1, 0.3, 1.27, 0.0149, -254.0, 3.1][2 * i[0] + i[1]]);
    close(&run("i8"), &[3, 2], |i| [0.1, 0.3, 1.27, 0.01, -254.0, 4.0][2 * i[0] + i[1]]);
    close(&run("bf16"), &[3, 2], |i| [0.1, 0.3, 1.2734375, 0.014892578, -254.0, 3.09375][2 * i[0] + i[1]]);
    assert!(op("i64").infer(&types(DType::F32)).is_err());
}
