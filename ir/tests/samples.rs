//! Runs of several samples in step: weights come when they are needed and go, and an observer sees and changes them.
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

use ndarray::{ArrayD, IxDyn};
use std::{borrow::Cow, cell::RefCell, collections::BTreeMap};
use vlmc_ir::{
    Bindings, Builder, DType, Dim, Graph, Node, Type,
    interp::{self, Array, Env, Observer, Resident, Sample},
};

fn floats(shape: &[usize], seed: usize) -> Array {
    let n: usize = shape.iter().product();
    let values = (0..n).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.5 - 1.0).collect();
    Array::F32(ArrayD::from_shape_vec(IxDyn(shape), values).unwrap())
}

/// `h = x aᵀ aᵀ + x` and `y = h n`.
fn graph() -> Graph {
    let g = Builder::new("g", None);
    let x = g.input("x", DType::F32, [Dim::symbol("rows"), 8.into()]);
    let a = g.weight_value("a", Type::new(DType::F32, [8, 8]));
    let n = g.weight_value("n", Type::new(DType::F32, [8]));
    let h = g.linear_with(g.linear_with(x, a, None), a, None) + x;
    g.output("y", h * n);
    g.output("h", h);
    g.output("again", h);
    g.finish().unwrap()
}

/// Writes down what happens, and puts `replace` in the place of the first weight `a`.
struct Log<'a> {
    events: &'a RefCell<Vec<String>>,
    replace: Option<Array>,
}

impl Observer for Log<'_> {
    fn before(&mut self, node: &Node, weights: &mut Resident<'_>, operands: &[Vec<Option<&Array>>]) -> Result<(), String> {
        let held: Vec<_> = weights.keys().cloned().collect();
        let rows: Vec<_> = operands.iter().map(|o| o[0].unwrap().shape()[0]).collect();
        self.events.borrow_mut().push(format!("{} {held:?} {rows:?}", node.op.name()));
        self.replace.take().map(|new| weights.insert("a".into(), Cow::Owned(new)));
        Ok(())
    }

    fn after(&mut self, node: &Node, _: &Resident<'_>, operands: &[Vec<Option<&Array>>], results: &mut [Vec<Array>]) -> Result<(), String> {
        let rows = |a: &Array| a.shape()[0];
        let same = operands.iter().zip(results).all(|(o, r)| rows(o[0].unwrap()) == rows(&r[0]));
        if same { Ok(()) } else { Err(format!("{} changed the number of rows", node.op.name())) }
    }
}

#[test]
fn weights_come_and_go() {
    let graph = graph();
    let table: BTreeMap<String, Array> = [("a".into(), floats(&[8, 8], 1)), ("n".into(), floats(&[8], 2))].into();
    let inputs: Vec<BTreeMap<String, Array>> = [3, 5].map(|rows| [("x".to_string(), floats(&[rows, 8], rows))].into()).into();
    let symbols: Vec<Bindings> = [3, 5].map(|rows| [("rows", rows)].into_iter().collect()).into();
    let samples: Vec<Sample<'_>> = inputs.iter().zip(&symbols).map(|(inputs, symbols)| Sample { symbols, inputs }).collect();

    let events = RefCell::new(vec![]);
    let load = |name: &str| {
        events.borrow_mut().push(format!("load {name}"));
        Ok(Cow::Borrowed(&table[name]))
    };
    let outs = interp::run_samples(&graph, &samples, &load, &mut Log { events: &events, replace: None }).unwrap();
    assert_eq!(
        *events.borrow(),
        ["load a", r#"linear ["a"] [3, 5]"#, r#"linear ["a"] [3, 5]"#, "add [] [3, 5]", "load n", r#"mul ["n"] [3, 5]"#]
    );
    for (sample, out) in samples.iter().zip(&outs) {
        let alone = interp::run(&graph, &Env { symbols: sample.symbols, inputs: sample.inputs, weights: &table }).unwrap();
        assert_eq!(*out, alone);
        assert_eq!(out["h"], out["again"]);
    }

    // A weight in the place of another is what all its nodes compute with.
    let zeros = Array::F32(ArrayD::zeros(IxDyn(&[8, 8])));
    let outs = interp::run_samples(&graph, &samples, &load, &mut Log { events: &events, replace: Some(zeros) }).unwrap();
    assert_eq!(outs[0]["h"], inputs[0]["x"]);

    let missing = |name: &str| Err(format!("no weight '{name}'"));
    let failed = interp::run_samples(&graph, &samples, &missing, &mut Log { events: &events, replace: None }).unwrap_err();
    assert_eq!(failed.to_string(), "g: linear: no weight 'a'");
    let wrong = |_: &str| Ok(Cow::Borrowed(&table["n"]));
    let failed = interp::run_samples(&graph, &samples, &wrong, &mut Log { events: &events, replace: None }).unwrap_err();
    assert_eq!(failed.to_string(), "g: linear: 'a' must be f32[8, 8], here [8, 8], got f32[8]");
}

/// The direct way of a linear layer is its decomposition, bit for bit.
#[test]
fn linear_is_its_decomposition() {
    for (rows, n, k, bias) in [(1, 700, 33, true), (70, 16, 8, false), (0, 3, 2, true), (5, 300, 600, true)] {
        let g = Builder::new("g", None);
        let x = g.input("x", DType::F32, [1, rows, k]);
        let w = g.input("w", DType::F32, [n, k]);
        let b = g.input("b", DType::F32, [n]);
        g.output("direct", g.linear_with(x, w, bias.then_some(b)));
        let y = g.matmul(x, g.transpose(w, &[1, 0]));
        g.output("decomposed", if bias { y + b } else { y });
        let graph = g.finish().unwrap();
        let inputs = [("x", floats(&[1, rows, k], 1)), ("w", floats(&[n, k], 2)), ("b", floats(&[n], 3))];
        let inputs = inputs.into_iter().map(|(n, a)| (n.to_string(), a)).collect();
        let out = interp::run(&graph, &Env { symbols: &Bindings::default(), inputs: &inputs, weights: &BTreeMap::new() }).unwrap();
        assert_eq!(out["direct"], out["decomposed"]);
    }
}
