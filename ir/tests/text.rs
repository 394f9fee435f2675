//! The text form: whatever the builder can make prints, and parses back to the same graph.
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

use proptest::prelude::*;
use vlmc_artifact::program::{Binary, Reduce, Unary};
use vlmc_ir::{Builder, DType, Dim, Literal, Program, Symbol, Val, W, WeightSource, Weights, ops::Mask, rewrite, text::parse, verify};

/// A checkpoint that has every tensor that is asked for.
struct Everything;

impl WeightSource for Everything {
    fn contains(&self, _: &str) -> Option<bool> {
        None
    }
    fn resolve(&self, name: &str, _: &[usize]) -> Result<DType, String> {
        // The same in every layer.
        let letters = name.bytes().filter(u8::is_ascii_alphabetic).count();
        Ok(if letters.is_multiple_of(2) { DType::F32 } else { DType::BF16 })
    }
}

/// One of some thirty things that model code does to `f32[seq, 8]`.
fn step<'g>(g: &'g Builder<'g>, w: W<'g>, pool: &[Val<'g>], kind: u8, pick: u8) -> Val<'g> {
    let at = |i: u8| pool[usize::from(i) % pool.len()];
    let (x, y) = (at(pick), at(pick / 3));
    let seq = || x.dim(0);
    match kind % 16 {
        0 => x + y,
        1 => x * f64::from(pick) - y,
        2 => g.unary([Unary::Silu, Unary::Neg, Unary::QuickGelu, Unary::Tanh][usize::from(pick % 4)], x),
        3 => g.rms_norm(x, w / "norm", 1e-6),
        4 => g.layer_norm(x, w / "ln", 1e-5),
        5 => g.linear(x, w / "proj", 8),
        6 => g.linear_bias(x, w / "fc1", 8),
        7 => {
            let at = i64::from(pick % 7) + 1;
            g.concat(&[g.slice(x, 1, at, 8 - at), g.slice(y, 1, 0, at)], 1)
        }
        8 => g.select(g.binary(Binary::Le, x, y), x, y),
        9 => g.cast(g.cast(x, DType::I64), DType::F32),
        10 => g.reshape(g.transpose(g.reshape(x, [seq(), 2.into(), 4.into()]), &[0, 2, 1]), [seq(), 8.into()]),
        11 => x + g.unsqueeze(g.reduce(Reduce::Mean, y, &[1]), 1),
        12 => {
            let heads = |v: Val<'g>| g.split_heads(v, 2);
            let segments = g.iota(seq());
            g.merge_heads(g.attention(heads(x), heads(y), heads(x), 0.25, Mask::Segments, Some(segments)))
        }
        13 => {
            x + g.literal(Literal {
                dtype: DType::F32,
                shape: vec![1, 8],
                data: (0..8).map(|i| f64::from(i) * 0.1 + f64::from(pick)).collect(),
            })
        }
        14 => g.gather(x, g.iota(seq()), 0),
        _ => x + g.cast(g.dim(&(&seq() * 2) + 1), DType::F32),
    }
}

/// Steps in a scope of their own.
fn steps<'g>(g: &'g Builder<'g>, pool: &mut Vec<Val<'g>>, scope: &str, kinds: &[(u8, u8)]) {
    let _scope = g.scope(scope);
    for (i, (kind, pick)) in kinds.iter().enumerate() {
        let v = step(g, g.weights(scope) / format!("part{i}"), pool, *kind, *pick);
        pool.push(v);
    }
}

/// Layers of the same steps, which fold when printed, between steps of their own.
fn program(before: &[(u8, u8)], layer: &[(u8, u8)], layers: usize, after: &[(u8, u8)]) -> Program {
    let weights = Weights::new(&Everything);
    let b = Builder::new("main", Some(&weights));
    {
        let g = &b;
        let seq = Dim::symbol("seq");
        let mut pool = vec![g.input("x", DType::F32, [seq.clone(), 8.into()]), g.input("y", DType::F32, [seq.clone(), 8.into()])];
        steps(g, &mut pool, "stem", before);
        for i in 0..layers {
            // A layer sees what the one before it gave, and the inputs.
            let mut inner = vec![pool[pool.len() - 1], pool[0]];
            steps(g, &mut inner, &format!("model.layers.{i}"), layer);
            pool.push(inner[inner.len() - 1]);
        }
        steps(g, &mut pool, "head", after);
        g.output("out", pool[pool.len() - 1]);
        g.output("first", pool[0] * 1.0);
    }
    let graphs = vec![b.finish().unwrap()];
    Program { name: "random".into(), symbols: vec![Symbol { name: "seq".into(), min: 1, max: 64 }], graphs, weights: weights.into_table() }
}

/// Without what the text form leaves out: values that nothing uses, and their order.
fn normal(program: &Program) -> Program {
    let graphs = program.graphs.iter().map(|g| rewrite(g, |_, _, _| None).unwrap()).collect();
    Program { graphs, ..program.clone() }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn round_trip(
        before in prop::collection::vec(any::<(u8, u8)>(), 0..6),
        layer in prop::collection::vec(any::<(u8, u8)>(), 1..7),
        layers in 0usize..5,
        after in prop::collection::vec(any::<(u8, u8)>(), 0..6),
    ) {
        let program = verify(program(&before, &layer, layers, &after)).unwrap();
        let text = program.to_string();
        let parsed = parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
        prop_assert_eq!(parsed.to_string(), text);
        prop_assert_eq!(normal(&parsed), normal(&program));
        verify(parsed).unwrap();
    }

    /// Text that was damaged gives an error or another program, never a panic.
    #[test]
    fn damaged_text(
        layer in prop::collection::vec(any::<(u8, u8)>(), 1..7),
        edits in prop::collection::vec((any::<prop::sample::Index>(), 32u8..127), 1..4),
    ) {
        let mut text = program(&[], &layer, 3, &[]).to_string().into_bytes();
        for (at, byte) in edits {
            let at = at.index(text.len());
            text[at] = byte;
        }
        if let Ok(program) = parse(&String::from_utf8(text).unwrap()) {
            let _ = verify(program);
        }
    }
}

#[test]
fn repeated_layers_are_folded() {
    let text = program(&[(5, 0)], &[(3, 0), (6, 2), (0, 0)], 24, &[]).to_string();
    assert!(text.contains("repeat i in 0..24"), "{text}");
    assert!(text.lines().count() < 25, "{text}");
}

#[test]
fn mistakes_are_explained() {
    let graph = |body: &str| format!("program p\nsymbol n: 1..=8\n\ngraph g(%x: f32[n, 4]) -> (y: f32[n, 4]) {{\n{body}\n}}\n");
    let cases = [
        graph("  %0 = add(%x, %x) -> f32[n, 5]\n  return %0"),
        graph("  %0 = frobnicate(%x) -> f32[n, 4]\n  return %0"),
        graph("  %0 = add(%x, %7) -> f32[n, 4]\n  return %0"),
        graph("  %0 = add(%x) -> f32[n, 4]\n  return %0"),
        graph("  %0 = reduce_sum(%x) {axis=1} -> f32[n]\n  return %0"),
        graph("  %0 = linear(%x, @w bf16[4, 5]) -> f32[n, 4]\n  return %0"),
        graph("  %0 = add(%x, f32(1.5) -> f32[n, 4]\n  return %0"),
        graph("  repeat i in 0..99999999999 (%0 = %x) {\n    yield %0\n  } -> %1\n  return %1"),
        graph("  return"),
        "program p\ngraph g(".into(),
        String::new(),
    ];
    let all: String = cases.iter().map(|text| format!("{}\n", parse(text).unwrap_err())).collect();
    insta::assert_snapshot!(all);
}
