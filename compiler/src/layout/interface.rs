//! Graphs with other inputs and outputs than the frontends gave them.

use vlmc_artifact::program::Binary;
use vlmc_ir::{BuildError, Builder, DType, Dim, Graph, Literal, Op, Program, Type, Val, inline, rewrite};

/// A graph that `build` makes.
pub(super) fn build(name: &str, build: impl for<'g> FnOnce(&'g Builder<'g>)) -> Result<Graph, BuildError> {
    let g = Builder::new(name, None);
    build(&g);
    g.finish()
}

/// An input of that type.
pub(super) fn input<'g>(g: &'g Builder<'g>, name: &str, ty: &Type) -> Val<'g> {
    g.input(name, ty.dtype, ty.shape.iter())
}

/// `vision` with the features of pictures as rows, and inputs under the names that `name` gives.
pub(super) fn vision(graph: &Graph, name: fn(&str) -> &str) -> Result<Graph, BuildError> {
    build(&graph.name, |g| {
        let values = inline(graph, g, |given, ty| input(g, name(given), ty));
        graph.outputs.iter().zip(values).for_each(|(o, v)| g.output(&o.name, rows(g, v)));
    })
}

/// `embed` that finds the places of pictures by their token, if it has been told them by `images_seq_mask`.
pub(super) fn embed(graph: &Graph, image_token_id: Option<i64>) -> Result<Graph, BuildError> {
    build(&graph.name, |g| {
        let mut ids = None;
        let values = inline(graph, g, |name, ty| match (name, ids, image_token_id) {
            ("images_seq_mask", Some(ids), Some(token)) => g.binary(Binary::Eq, ids, g.literal(Literal::scalar(DType::I64, token as f64))),
            ("images_seq_mask", ..) => g.fail("the token of pictures is not known: the checkpoint has no tokenizer.json"),
            ("input_ids", ..) => *ids.insert(input(g, name, ty)),
            _ => input(g, name, ty),
        });
        graph.outputs.iter().zip(values).for_each(|(o, v)| g.output(&o.name, v));
    })
}

/// `embed` of tokens alone, for clients that put features among them on their own.
pub(super) fn embed_tokens(graph: &Graph) -> Result<Graph, BuildError> {
    let tokens = rewrite(graph, |_, node, args| matches!(node.op, Op::MergeFeatures(_)).then(|| vec![args[0]]))?;
    embed(&tokens, None)
}

/// `decoder` that gives the logits of the last token: `f32[batch, 1, vocab]`. A prompt's length is that of the training, if it asks for
/// one: clients do not tell it.
pub(super) fn decoder(graph: &Graph) -> Result<Graph, BuildError> {
    build(&graph.name, |g| {
        let values = inline(graph, g, |name, ty| match name {
            "logit_positions" => g.reshape(g.dim(Dim::symbol("seq")) - 1.0, [1]),
            "prompt_length" => g.literal(Literal::vector(DType::I64, vec![1.0])),
            _ => input(g, name, ty),
        });
        graph.outputs.iter().zip(values).for_each(|(o, v)| g.output(&o.name, v));
    })
}

/// A decoder that keeps the values of attention as wide as the keys, with zeros behind them.
pub(super) fn values_as_wide_as_keys(graph: &Graph) -> Result<Graph, BuildError> {
    let key = |value: &str| graph.states.iter().find(|s| s.past_name == value.replace(".value", ".key")).map(|s| graph.ty(s.past).clone());
    let wide = graph.with_states(|s, ty| key(&s.past_name).unwrap_or_else(|| ty.clone()));
    rewrite(&wide, |g, node, args| {
        let Op::Append(_) = node.op else { return None };
        let (last, mut gap) = (args[1].ty().rank().checked_sub(1)?, args[1].ty());
        let (kept, width) = (args[0].dim(last).as_const()?, args[1].dim(last).as_const()?);
        if kept <= width {
            return None;
        }
        gap.shape[last] = (kept - width).into();
        let zeros = g.broadcast(g.literal(Literal::scalar(gap.dtype, 0.0)), gap.shape);
        let [all] = g.apply(node.op.clone(), &[args[0], g.concat(&[args[1], zeros], last)]);
        Some(vec![g.slice(all, last, 0, width)])
    })
}

/// Several graphs as one: what one gives under a name, a later one takes under that name.
pub(super) fn joined(name: &str, graphs: &[&Graph]) -> Result<Graph, BuildError> {
    build(name, |g| {
        let mut given: Vec<(&str, Val<'_>)> = vec![];
        for graph in graphs {
            let known = |name: &str| given.iter().find(|(n, _)| *n == name).map(|(_, v)| *v);
            let values = inline(graph, g, |name, ty| known(name).unwrap_or_else(|| input(g, name, ty)));
            given.extend(graph.outputs.iter().map(|o| o.name.as_str()).zip(values));
        }
        given.iter().for_each(|(name, v)| g.output(name, *v));
    })
}

/// `features [.., width]` as rows.
fn rows<'g>(g: &'g Builder<'g>, features: Val<'g>) -> Val<'g> {
    let shape = features.ty().shape;
    match shape.split_last() {
        Some((width, [first, rest @ ..])) if !rest.is_empty() => {
            let n = rest.iter().fold(first.clone(), |n, d| &n * d);
            g.reshape(features, [n, width.clone()])
        }
        _ => features,
    }
}

/// A graph without `attention_mask`: all tokens count.
pub(super) fn without_mask(graph: &Graph) -> Result<Graph, BuildError> {
    build(&graph.name, |g| {
        let all = |ty: &Type| g.broadcast(g.literal(Literal::scalar(ty.dtype, 1.0)), ty.shape.to_vec());
        let values = inline(graph, g, |name, ty| if name == "attention_mask" { all(ty) } else { input(g, name, ty) });
        graph.outputs.iter().zip(values).for_each(|(o, v)| g.output(&o.name, v));
    })
}

/// A graph with these outputs, under the names beside theirs.
pub(super) fn with_outputs(graph: &Graph, names: &[(&str, &str)]) -> Result<Graph, BuildError> {
    build(&graph.name, |g| {
        let values = inline(graph, g, |name, ty| input(g, name, ty));
        for (o, v) in graph.outputs.iter().zip(values) {
            names.iter().filter(|(from, _)| *from == o.name).for_each(|(_, to)| g.output(to, v));
        }
    })
}

/// The program of other graphs, with the symbols that these have.
pub(super) fn with_graphs(program: Program, graphs: Vec<Graph>) -> Program {
    let mut used = std::collections::BTreeSet::new();
    for (_, ty, _) in graphs.iter().flat_map(Graph::values) {
        ty.shape.iter().for_each(|d| d.for_each_symbol(&mut |s| _ = used.insert(s.to_string())));
    }
    let symbols = program.symbols.into_iter().filter(|s| used.contains(&s.name)).collect();
    Program { symbols, graphs, ..program }
}
