//! The verifier finds what passes and frontends can get wrong, all of it at once, and says where.

use vlmc_ir::{DType, Program, Symbol, ValueId, text::parse, verify};

const TEXT: &str = "program p
symbol n: 1..=8
symbol past: 0..=8

graph g(%x: f32[n, 4], %h: f32[1, 2, n, 2]) -> (y: f32[n, 4]) {
  state past.0 -> present.0: f32[1, 2, past, 2] grows 2
  [layers.0]
  %0 = append(%past.0, %h) {axis=2} -> f32[1, 2, n + past, 2]
  %1 = linear(%x, @.w f32[4, 4]) -> f32[n, 4]
  [layers.1]
  %2 = add(%1, %x) -> f32[n, 4]
  return %2
}
";

/// What is wrong with the program after `damage`.
fn found(damage: impl FnOnce(&mut Program)) -> String {
    let mut program = parse(TEXT).unwrap_or_else(|e| panic!("{e}"));
    damage(&mut program);
    verify(program).map_or_else(|d| d.iter().map(|d| format!("  {d}\n")).collect(), |_| "  nothing\n".into())
}

/// The result of the first node whose op has that name.
fn result(p: &Program, op: &str) -> ValueId {
    p.graphs[0].nodes().find(|(_, n)| n.op.name() == op).expect("an op").1.outs[0]
}

#[test]
fn everything_wrong_is_found() {
    type Damage = fn(&mut Program);
    let cases: [(&str, Damage); 11] = [
        ("as it was", |_| {}),
        ("no symbols", |p| p.symbols.clear()),
        ("empty range", |p| p.symbols[0].min = 9),
        ("symbol twice", |p| p.symbols.push(Symbol { name: "n".into(), min: 1, max: 2 })),
        ("no weights", |p| p.weights.clear()),
        ("weight of another shape", |p| p.weights.values_mut().for_each(|w| w.shape = vec![4, 5])),
        ("weight of integers", |p| p.weights.values_mut().for_each(|w| w.dtype = DType::I64)),
        ("graph twice", |p| p.graphs.push(p.graphs[0].clone())),
        ("name twice", |p| p.graphs[0].outputs[0].name = "x".into()),
        ("use before definition, of another shape, and a state without append", |p| {
            let (x, sum) = (p.graphs[0].inputs[1].value, result(p, "add"));
            let past = p.graphs[0].states[0].past;
            p.graphs[0] = p.graphs[0].substitute(|v| {
                if v == past {
                    x
                } else if v == result(p, "linear") {
                    sum
                } else {
                    v
                }
            });
        }),
        ("a node gone", |p| {
            let gone = p.graphs[0].producer(result(p, "linear"));
            p.graphs[0] = p.graphs[0].retain(|n| Some(n) != gone);
        }),
    ];
    let all: String = cases.iter().map(|(name, damage)| format!("{name}:\n{}", found(*damage))).collect();
    insta::assert_snapshot!(all);
}
