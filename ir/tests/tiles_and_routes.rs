//! What the ops of tiled pictures and of experts mean, against loops as the references have them.
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

use ndarray::{ArrayD, IxDyn};
use std::collections::BTreeMap;
use vlmc_ir::{
    Bindings, Builder, Val,
    interp::{self, Array, Env},
    ops::{GridRelative, Route, TileRows},
};

fn floats(shape: &[usize], seed: usize) -> ArrayD<f32> {
    let n: usize = shape.iter().product();
    let values = (0..n).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.5 - 1.0).collect();
    ArrayD::from_shape_vec(IxDyn(shape), values).unwrap()
}

fn ints(shape: &[usize], data: Vec<i64>) -> Array {
    Array::I64(ArrayD::from_shape_vec(IxDyn(shape), data).unwrap())
}

/// Runs what `build` makes of inputs, composites by their decompositions.
fn run(inputs: &[Array], build: impl for<'g> Fn(&'g Builder<'g>, &[Val<'g>]) -> Vec<Val<'g>>) -> Vec<Array> {
    let b = Builder::new("g", None);
    let values: Vec<Val<'_>> =
        inputs.iter().enumerate().map(|(i, a)| b.input(&format!("x{i}"), a.dtype(), a.shape().iter().copied())).collect();
    for (i, out) in build(&b, &values).into_iter().enumerate() {
        b.output(&format!("y{i}"), out);
    }
    let graph = b.finish().unwrap_or_else(|e| panic!("{e}"));
    let (symbols, weights) = (Bindings::default(), BTreeMap::new());
    let given = inputs.iter().enumerate().map(|(i, a)| (format!("x{i}"), a.clone())).collect();
    let out = interp::run(&graph, &Env { symbols: &symbols, inputs: &given, weights: &weights }).unwrap_or_else(|e| panic!("{e}"));
    out.into_values().collect()
}

/// Adjacent pictures, rows of the batch with unlike numbers of them, and rows without.
#[test]
fn tile_rows() {
    let (side, tiles) = (3, 9);
    let crops: [[[usize; 2]; 3]; 3] = [[[2, 1], [1, 3], [0, 0]], [[0, 0]; 3], [[2, 2], [1, 1], [0, 0]]];
    for global_first in [true, false] {
        let (cells, mut expected) = (side * side, vec![]);
        let (newline, separator) = (3 * tiles * cells, 3 * tiles * cells + 1);
        for (row, pictures) in crops.iter().enumerate() {
            let mut tile = row * tiles;
            for [across, down] in pictures.iter().filter(|p| p[0] > 0) {
                let view = |first: usize, across: usize, down: usize| {
                    let mut out = vec![];
                    for y in 0..down * side {
                        for x in 0..across * side {
                            let at = first + y / side * across + x / side;
                            out.push(at * cells + y % side * side + x % side);
                        }
                        out.push(newline);
                    }
                    out
                };
                let (global, local) = (view(tile, 1, 1), view(tile + 1, *across, *down));
                let (a, b) = if global_first { (global, local) } else { (local, global) };
                expected.extend(a.into_iter().chain([separator]).chain(b).map(|i| i as i64));
                tile += 1 + across * down;
            }
        }
        let crop = ints(&[3, 3, 2], crops.iter().flatten().flatten().map(|v| *v as i64).collect());
        let positions = ints(&[expected.len()], (0..expected.len() as i64).collect());
        let out = run(&[crop, positions], |g, x| g.apply::<1>(TileRows { tiles: tiles.into(), side, global_first }, x).into());
        assert_eq!(out[0].i64().unwrap().iter().copied().collect::<Vec<_>>(), expected);
    }
}

fn route(route: &Route, logits: &ArrayD<f32>, bias: Option<&ArrayD<f32>>) -> Vec<(Vec<i64>, Vec<f32>)> {
    let e = logits.shape()[1];
    logits
        .outer_iter()
        .map(|row| {
            let sum: f32 = row.iter().map(|v| v.exp()).sum();
            let score: Vec<f32> = row.iter().map(|v| if route.sigmoid { 1.0 / (1.0 + (-v).exp()) } else { v.exp() / sum }).collect();
            let mut choice: Vec<f32> = score.iter().enumerate().map(|(i, s)| s + bias.map_or(0.0, |b| b[i])).collect();
            let best = |values: &[f32], n: usize| {
                let mut order: Vec<usize> = (0..values.len()).collect();
                order.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
                order.truncate(n);
                order
            };
            let size = e / route.groups;
            let worth: Vec<f32> =
                choice.chunks(size).map(|group| best(group, if bias.is_some() { 2 } else { 1 }).iter().map(|i| group[*i]).sum()).collect();
            let kept = best(&worth, route.kept_groups);
            if route.groups > 1 {
                choice.iter_mut().enumerate().filter(|(i, _)| !kept.contains(&(i / size))).for_each(|(_, c)| *c = 0.0);
            }
            let experts = best(&choice, route.k);
            let mut weights: Vec<f32> = experts.iter().map(|i| score[*i]).collect();
            let total: f32 = weights.iter().sum();
            weights.iter_mut().for_each(|w| *w *= route.scale as f32 / if route.normalize { total } else { 1.0 });
            (experts.iter().map(|i| *i as i64).collect(), weights)
        })
        .collect()
}

#[test]
fn routes() {
    let (logits, bias) = (floats(&[7, 12], 1), floats(&[12], 2) * 0.3);
    let greedy = Route { k: 3, sigmoid: false, groups: 1, kept_groups: 1, normalize: false, scale: 1.0 };
    let limited = Route { groups: 4, kept_groups: 2, scale: 1.5, ..greedy.clone() };
    let loss_free = Route { sigmoid: true, normalize: true, groups: 3, ..limited.clone() };
    for (op, bias) in [(greedy, None), (limited, None), (loss_free, Some(&bias))] {
        let inputs: Vec<Array> = [&logits].into_iter().chain(bias).map(|a| Array::F32(a.clone())).collect();
        let out = run(&inputs, |g, x| {
            let (experts, weights) = g.route(op.clone(), x[0], x.get(1).copied());
            vec![experts, weights]
        });
        for (i, (experts, weights)) in route(&op, &logits, bias).into_iter().enumerate() {
            let row = |a: &Array, j: usize| (a.i64().map_or(0, |a| a[[i, j]]), a.f32().map_or(0.0, |a| a[[i, j]]));
            for j in 0..op.k {
                assert_eq!(row(&out[0], j).0, experts[j], "{op:?}");
                assert!((row(&out[1], j).1 - weights[j]).abs() < 1e-6, "{op:?}");
            }
        }
    }
}

#[test]
fn relative_positions_on_a_grid() {
    let (side, d, scale) = (3usize, 4usize, 0.5);
    let cells = side * side;
    let (q, k) = (floats(&[2, cells, d], 1), floats(&[2, cells, d], 2));
    let (rows, columns) = (floats(&[2 * side - 1, d], 3), floats(&[2 * side - 1, d], 4));
    let inputs = [&q, &k, &rows, &columns].map(|a| Array::F32(a.clone()));
    let out = run(&inputs, |g, x| g.apply::<2>(GridRelative { side, scale }, x).into());
    let (q2, k2) = (out[0].f32().unwrap(), out[1].f32().unwrap());
    for (head, i, j) in (0..2).flat_map(|h| (0..cells).flat_map(move |i| (0..cells).map(move |j| (h, i, j)))) {
        let dot = |f: &dyn Fn(usize) -> f32| (0..d).map(|c| q[[head, i, c]] * f(c)).sum::<f32>();
        let (row, column) = (i / side + side - 1 - j / side, i % side + side - 1 - j % side);
        let expected = scale as f32 * dot(&|c| k[[head, j, c]]) + dot(&|c| rows[[row, c]]) + dot(&|c| columns[[column, c]]);
        let got: f32 = (0..d + 2 * side).map(|c| q2[[head, i, c]] * k2[[head, j, c]]).sum();
        assert!((got - expected).abs() < 1e-5, "{head} {i} {j}: {got} {expected}");
    }
}
