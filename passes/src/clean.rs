//! Clean-up: constants, common subexpressions, dead code.

use crate::{Contract, Pass, map_graphs};
use petgraph::visit::{Dfs, Walker};
use std::collections::{BTreeSet, HashMap};
use vlmc_ir::{Bindings, Def, Graph, Literal, Op, Type, ValueId, interp, rewrite};

/// Literals of more elements than this are not made: they would hide the graph's sense.
const MAX_LITERAL: usize = 64;

/// Computes nodes all of whose operands are literals.
pub(crate) const FOLD: Pass = Pass::new("fold", "nodes of literals only, computed", Contract::Exact, |_, program| {
    map_graphs(program, |graph| {
        // A folded result is an operand of the next node in the new graph only, so literals are tracked by hand.
        let mut known: HashMap<ValueId, Literal> = HashMap::new();
        rewrite(graph, |g, node, _| {
            let literal = |v: &ValueId| match graph.def(*v) {
                Def::Literal(l) => Some(l.clone()),
                _ => known.get(v).cloned(),
            };
            let literals: Vec<Literal> = node.args.iter().map(literal).collect::<Option<_>>()?;
            let folded = fold(&node.op, &literals)?;
            known.extend(node.outs.iter().copied().zip(folded.iter().cloned()));
            Some(folded.into_iter().map(|l| g.literal(l)).collect())
        })
        .map_err(Into::into)
    })
});

fn fold(op: &Op, literals: &[Literal]) -> Option<Vec<Literal>> {
    let types: Vec<Type> = literals.iter().map(Literal::ty).collect();
    let outs = op.infer(&types).ok()?;
    let small = |t: &Type| t.elements().as_const().is_some_and(|n| n <= MAX_LITERAL as i64);
    if !outs.iter().all(small) {
        return None;
    }
    let args = literals.iter().map(|l| l.try_into().ok()).collect::<Option<Vec<interp::Array>>>()?;
    let values = interp::eval(op, &types, &args.iter().collect::<Vec<_>>(), &Bindings::default()).ok()?;
    let literal = |(a, t): (&interp::Array, &Type)| {
        let data = match a {
            interp::Array::F32(a) => a.iter().map(|v| f64::from(*v)).collect::<Vec<_>>(),
            interp::Array::I64(a) => a.iter().map(|v| *v as f64).collect(),
            interp::Array::Bool(a) => a.iter().map(|v| f64::from(u8::from(*v))).collect(),
        };
        data.iter().all(|v| v.is_finite()).then(|| Literal { dtype: t.dtype, shape: a.shape().to_vec(), data })
    };
    values.iter().zip(&outs).map(literal).collect()
}

/// Computes what is computed twice once.
pub(crate) const CSE: Pass = Pass::new("cse", "what is computed twice, computed once", Contract::Exact, |_, program| {
    map_graphs(program, |graph| {
        // Of each value, the first one that is equal to it.
        let mut first: HashMap<ValueId, ValueId> = HashMap::new();
        let mut literals: HashMap<String, ValueId> = HashMap::new();
        for (v, _, def) in graph.values() {
            if let Def::Literal(l) = def {
                first.insert(v, *literals.entry(format!("{l:?}")).or_insert(v));
            }
        }
        let mut seen: HashMap<(String, Vec<ValueId>), &[ValueId]> = HashMap::new();
        for (_, node) in graph.nodes().filter(|(_, n)| n.op.appends().is_empty()) {
            let args = node.args.iter().map(|a| *first.get(a).unwrap_or(a)).collect();
            let outs = *seen.entry((format!("{:?}", node.op), args)).or_insert(&node.outs);
            first.extend(node.outs.iter().copied().zip(outs.iter().copied()));
        }
        Ok(graph.substitute(|v| *first.get(&v).unwrap_or(&v)))
    })
});

/// Drops nodes whose results reach neither an output nor a state, and weights that no graph uses.
pub(crate) const DCE: Pass = Pass::new("dce", "what reaches no output, dropped", Contract::Exact, |_, program| {
    let mut program = map_graphs(program, |graph| Ok::<_, crate::PassError>(live(graph)))?;
    let used =
        |g: &Graph| g.values().filter_map(|(_, _, d)| if let Def::Weight(n) = d { Some(n.clone()) } else { None }).collect::<Vec<_>>();
    let used: BTreeSet<String> = program.graphs.iter().flat_map(used).collect();
    program.weights.retain(|name, _| used.contains(name));
    Ok(program)
});

/// The graph without nodes whose results reach neither an output nor a state.
pub(crate) fn live(graph: &Graph) -> Graph {
    let mut live = BTreeSet::new();
    for root in graph.roots() {
        live.extend(Dfs::new(graph, root).iter(graph));
    }
    graph.retain(|n| live.contains(&n))
}
