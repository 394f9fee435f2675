//! Random programs through every pass, and through whole pipelines, against the reference interpreter; and a rule that is wrong,
//! which is caught.
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

mod common;

use proptest::prelude::*;
use vlmc_artifact::program::{Binary, Reduce, Unary};
use vlmc_ir::{
    Builder, DType, Dim, Literal, Op, Patch, Program, Symbol, Val, Verified, W, WeightSource, Weights,
    ops::{AddRmsNorm, Mask},
    verify,
};
use vlmc_passes::{CheckError, Contract, Match, Pass, Pattern, Rule, check};

/// A checkpoint that has every tensor that is asked for: layers have types, and some tensors others than their layer.
struct Everything;

impl WeightSource for Everything {
    fn contains(&self, _: &str) -> Option<bool> {
        None
    }
    fn resolve(&self, name: &str, _: &[usize]) -> Result<DType, String> {
        let layer = name.split('.').find_map(|part| part.parse::<usize>().ok()).unwrap_or(0);
        let odd = layer % 5 == 4 && (name.contains("k_proj") || name.contains("up_proj"));
        Ok([DType::F32, DType::BF16, DType::F16][(layer + usize::from(odd)) % 3])
    }
}

/// Elements of a token.
const WIDTH: usize = 8;

/// What a step can use: values `f32[batch, seq, 8]` and what positions and masks are made of.
struct Pool<'g> {
    values: Vec<Val<'g>>,
    rope: (Val<'g>, Val<'g>),
    mask: Val<'g>,
    segments: Val<'g>,
    /// States made so far.
    states: usize,
}

impl<'g> Pool<'g> {
    fn pick(&self, i: u8) -> Val<'g> {
        // Rather the last ones.
        self.values[self.values.len() - 1 - usize::from(i) % self.values.len().min(4)]
    }
}

/// Attention as models have it, or nearly: rotated or not, cached or not, of one value or two.
fn attention<'g>(g: &'g Builder<'g>, w: W<'g>, pool: &mut Pool<'g>, x: Val<'g>, y: Val<'g>, variant: u8) -> Val<'g> {
    let on = |bit: u8| variant >> bit & 1 == 1;
    let project = |x: Val<'g>, name: &str, width: usize| {
        if on(0) { g.linear_bias(x, w / name, width) } else { g.linear(x, w / name, width) }
    };
    let kv_heads = if on(1) { 1 } else { 2 };
    let q = g.split_heads(project(x, "q_proj", WIDTH), 2);
    let k = g.split_heads(project(if on(2) { y } else { x }, "k_proj", 4 * kv_heads), kv_heads);
    let v = g.split_heads(project(x, "v_proj", 4 * kv_heads), kv_heads);
    let (q, k) = if on(3) { (g.rms_norm(q, w / "q_norm", 1e-6), k) } else { (q, k) };
    let (q, k) = if on(4) { (q, k) } else { (g.rotary(q, pool.rope), if on(5) { k } else { g.rotary(k, pool.rope) }) };
    let q = if variant.is_multiple_of(7) { q * 0.5 } else { q };
    let (k, v, kind, mask) = match variant % 3 {
        0 => {
            let append = |kind: &str, new: Val<'g>| {
                let shape = [new.dim(0), new.dim(1), Dim::symbol("past"), new.dim(3)];
                let n = pool.states;
                g.append(g.state(&format!("past.{n}.{kind}"), &format!("present.{n}.{kind}"), DType::F32, shape, 2), new, 2)
            };
            let (k, v) = (append("key", k), append("value", v));
            pool.states += 1;
            (k, v, Mask::Causal, Some(pool.mask))
        }
        1 => (k, v, Mask::Segments, Some(pool.segments)),
        _ => (k, v, Mask::Full, None),
    };
    g.merge_heads(g.attention(q, k, v, 0.4, kind, mask))
}

/// One of the things that model code does.
fn step<'g>(g: &'g Builder<'g>, w: W<'g>, pool: &mut Pool<'g>, kind: u8, pick: u8, variant: u8) -> Val<'g> {
    let (x, y) = (pool.pick(pick), pool.pick(pick / 4));
    let act = [Unary::Silu, Unary::QuickGelu, Unary::Gelu, Unary::GeluTanh, Unary::Tanh, Unary::Neg][usize::from(variant % 6)];
    match kind % 15 {
        0 | 1 => x + y,
        2 => g.rms_norm(x + y, w / "norm", 1e-6),
        3 => g.layer_norm(x + g.table(w / "offset", &[WIDTH]), w / "ln", 1e-5),
        4 => g.layer_norm(x + y, w / "ln", 1e-5),
        5 => g.linear(g.unary(act, g.linear_bias(x, w / "fc1", 12)), w / "fc2", WIDTH),
        6 => {
            let h = g.linear(x, w / "fc", WIDTH);
            if variant.is_multiple_of(4) { g.unary(act, h) + h } else { g.unary(act, h) }
        }
        7 => {
            let gate = g.linear(x, w / "gate_proj", 12);
            let up = g.linear(if variant.is_multiple_of(8) { y } else { x }, w / "up_proj", 12);
            g.linear(if variant.is_multiple_of(2) { g.unary(act, gate) * up } else { up * g.unary(act, gate) }, w / "down_proj", WIDTH)
        }
        8..=10 => attention(g, w, pool, x, y, variant),
        11 => g.concat(&[g.slice(x, 2, 3, 5), g.slice(y, 2, 0, 3)], 2),
        12 => {
            let (batch, seq) = (x.dim(0), x.dim(1));
            let split = g.reshape(x, [batch.clone(), seq.clone(), 2.into(), 4.into()]);
            g.reshape(g.transpose(split, &[0, 1, 3, 2]), [batch, seq, WIDTH.into()])
        }
        13 => {
            let scale = g.floats([1.0, 2.0]) * g.floats([0.5, f64::from(variant)]);
            let scale = g.reshape(g.concat(&[scale, scale, scale, scale], 0), [WIDTH]);
            x * g.unary(Unary::Sigmoid, scale)
        }
        _ => x - g.unsqueeze(g.reduce(Reduce::Mean, g.select(g.binary(Binary::Le, x, y), x, y), &[2]), 2),
    }
}

fn program(steps: &[(u8, u8, u8)], outputs: usize) -> Verified {
    let weights = Weights::new(&Everything);
    let b = Builder::new("main", Some(&weights));
    {
        let g = &b;
        let [batch, seq, past] = ["batch", "seq", "past"].map(Dim::symbol);
        let x = g.input("x", DType::F32, [batch.clone(), seq.clone(), WIDTH.into()]);
        let angles = g.input("angles", DType::F32, [batch.clone(), seq.clone(), 2.into()]);
        let mask = g.input("mask", DType::I64, [batch, &past + &seq]);
        let segments = g.input("segments", DType::I64, [seq]);
        let rope = (g.unary(Unary::Cos, angles), g.unary(Unary::Sin, angles));
        let mut pool = Pool { values: vec![x], rope, mask, segments, states: 0 };
        for (i, (kind, pick, variant)) in steps.iter().enumerate() {
            let _scope = g.scope(format!("layers.{i}"));
            // Norms keep numbers small; some steps go without.
            let y = step(g, g.weights("layers") / i, &mut pool, *kind, *pick, *variant);
            pool.values.push(y);
        }
        let last = pool.values.iter().rev().take(outputs.max(1)).enumerate();
        last.for_each(|(i, v)| g.output(&format!("y{i}"), *v));
    }
    let graphs = vec![b.finish().unwrap_or_else(|e| panic!("{e}"))];
    let symbol = |name: &str, min, max| Symbol { name: name.into(), min, max };
    let symbols = vec![symbol("batch", 1, 3), symbol("seq", 1, 64), symbol("past", 0, 64)];
    verify(Program { name: "random".into(), symbols, graphs, weights: weights.into_table() }).unwrap_or_else(|found| panic!("{}", found[0]))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whole pipelines: each pass on what the ones before it made.
    #[test]
    fn pipelines_keep_the_meaning(steps in proptest::collection::vec(any::<(u8, u8, u8)>(), 1..14), outputs in 1usize..3, seed: u64) {
        let program = program(&steps, outputs);
        let weights = common::drawn_weights(&program);
        for target in vlmc::target::TARGETS {
            let checked = check(target, program.clone(), target.passes, seed, &weights);
            prop_assert!(checked.is_ok(), "{}: {}\n{}", target.name, checked.unwrap_err(), *program);
        }
    }

    /// Each pass by itself, on what no other pass has changed but the one that gives weights the types that the target knows.
    #[test]
    fn passes_keep_the_meaning(steps in proptest::collection::vec(any::<(u8, u8, u8)>(), 1..14), outputs in 1usize..3, seed: u64) {
        let program = program(&steps, outputs);
        let weights = common::drawn_weights(&program);
        for target in vlmc::target::TARGETS {
            let [storage, others @ ..] = target.passes else { panic!("no passes") };
            for pass in others {
                let checked = check(target, program.clone(), &[*storage, *pass], seed, &weights);
                prop_assert!(checked.is_ok(), "{}: {}\n{}", target.name, checked.unwrap_err(), *program);
            }
        }
    }
}

/// The programs are such that every rule fires on some and refuses others; otherwise the properties say little.
#[test]
fn every_rule_fires_and_refuses() {
    let target = vlmc::target::named("cpu").unwrap();
    let (mut fired, mut refused) = (std::collections::BTreeSet::new(), std::collections::BTreeSet::new());
    let mut state = 1u32;
    let mut byte = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    for _ in 0..200 {
        let steps: Vec<_> = (0..10).map(|_| (byte(), byte(), byte())).collect();
        vlmc_passes::run(target, program(&steps, 1), target.passes, |trace, _| {
            for e in &trace.events {
                if e.refused.is_none() {
                    fired.insert(trace.pass)
                } else {
                    refused.insert(trace.pass)
                };
            }
        })
        .unwrap();
    }
    let rules = ["fuse-activation", "fuse-packed-attention", "fuse-residual-norm", "fuse-rotary-attention", "pack-gate-up", "pack-qkv"];
    assert!(fired.iter().eq(&rules), "{fired:?}");
    assert!(refused.iter().eq(&rules), "{refused:?}");
}

/// `norm(x + y)` by a rule that forgets what it should not.
fn broken(replace: fn(&Match<'_>) -> Result<vlmc_passes::Fused, String>) -> Pass {
    Pass::rule("broken", "a rule that is wrong", Contract::Close, Rule { pattern: norm_of_sum, replace })
}

fn norm_of_sum() -> Pattern {
    let sum = (Pattern::value("x") + Pattern::value("y")).named("sum");
    Pattern::op("rms_norm", |op| matches!(op, Op::RmsNorm(_)), [sum])
}

/// A rule that is wrong is found, with its name, the graph and the output.
#[test]
fn a_broken_rule_is_caught() {
    let target = vlmc::target::named("cpu").unwrap();
    // A residual and its norm, whose sum is an output too.
    let program = program(&[(2, 0, 0), (5, 0, 0), (2, 0, 4)], 3);
    let weights = common::drawn_weights(&program);
    let run = |pass: Pass| check(target, program.clone(), &[target.passes[0], pass], 7, &weights);

    // Another epsilon: the values are a little off.
    let other_eps = broken(|m| {
        let (sum, norm) = (m.node("sum")?, m.graph.node(m.root));
        Ok(Patch {
            at: sum.0,
            takes: vec![m.value("x")?, m.value("y")?, norm.args[1]],
            gives: vec![m.value("sum")?, m.result()],
            build: Box::new(|g, args| g.apply_op(AddRmsNorm { eps: 1e-3 }.into(), args)),
        }
        .into())
    });
    // The residual forgotten.
    let no_residual = broken(|m| {
        let norm = m.graph.node(m.root);
        let op = norm.op.clone();
        let takes = vec![m.value("x")?, norm.args[1]];
        Ok(Patch { at: m.root, takes, gives: vec![m.result()], build: Box::new(move |g, args| g.apply_op(op.clone(), args)) }.into())
    });
    for pass in [other_eps, no_residual] {
        let error = run(pass).unwrap_err();
        let CheckError::Broken { pass, graph, output, how } = &error else { panic!("{error}") };
        assert_eq!((*pass, graph.as_str()), ("broken", "main"));
        assert!(output.starts_with('y') && how.contains("differs"), "{error}");
    }

    // A promise that is not kept: packed products may differ in the last bit, so "exact" needs luck; a rounded weight has none.
    let rounded = Pass::new("rounded", "weights in 16 bits", Contract::Close, |_, mut program| {
        program.map_weights(|_, w| w.cast(DType::BF16).cast(DType::F32));
        Ok(program)
    });
    assert!(matches!(run(rounded), Err(CheckError::Broken { pass: "rounded", .. })));

    // The same rule without the mistake passes.
    let right = broken(|m| {
        let norm = m.graph.node(m.root);
        let op = norm.op.clone();
        let takes = vec![m.value("sum")?, norm.args[1]];
        Ok(Patch { at: m.root, takes, gives: vec![m.result()], build: Box::new(move |g, args| g.apply_op(op.clone(), args)) }.into())
    });
    let checked = run(right).unwrap();
    assert!(checked[1].trace.events.iter().any(|e| e.refused.is_none()));
}

/// What cannot be checked is refused, not passed.
#[test]
fn limits_are_stated() {
    let target = vlmc::target::named("cpu").unwrap();
    let weights = Weights::new(&Everything);
    let b = Builder::new("main", Some(&weights));
    {
        let g = &b;
        let x = g.input("x", DType::F32, [1, 8192]);
        g.output("y", g.linear(x, g.weights("large"), 16384));
    }
    let graphs = vec![b.finish().unwrap()];
    let large = verify(Program { name: "large".into(), symbols: vec![], graphs, weights: weights.into_table() }).unwrap();
    let error = check(target, large, target.passes, 0, &|_| unreachable!()).unwrap_err();
    assert!(error.to_string().contains("536870912 bytes") && error.to_string().contains("at most 268435456"), "{error}");

    // No input has a meaning: every index is out of range.
    let b = Builder::new("lookup", None);
    {
        let g = &b;
        let x = g.input("x", DType::F32, [2]);
        let i = g.literal(Literal::vector(DType::I64, vec![5.0]));
        g.output("y", g.gather(x, i, 0));
    }
    let lookup = Program { name: "lookup".into(), graphs: vec![b.finish().unwrap()], ..Program::default() };
    let error = check(target, verify(lookup).unwrap(), target.passes, 0, &|_| unreachable!()).unwrap_err();
    assert!(matches!(&error, CheckError::NoInputs { graph, .. } if graph == "lookup"), "{error}");
}
