//! The target's table, obeyed.

use crate::{Contract, Pass, PassError, Support, Target, map_graphs};
use vlmc_ir::{Graph, Type, rewrite};

/// Decomposes every op that the target does not run itself.
pub(crate) const LEGALIZE: Pass =
    Pass::new("legalize", "ops that the target lacks, decomposed into ops that it has", Contract::Close, |target, program| {
        map_graphs(program, |graph| legalize(target, graph))
    });

fn legalize(target: &Target, graph: &Graph) -> Result<Graph, PassError> {
    let mut graph = graph.clone();
    loop {
        let mut todo = 0;
        for (_, node) in graph.nodes() {
            let types: Vec<Type> = node.args.iter().map(|a| graph.ty(*a).clone()).collect();
            let reject = |reason: String| {
                let shown: Vec<_> = types.iter().map(Type::to_string).collect();
                let op = format!("{}({})", node.op.name(), shown.join(", "));
                PassError::Rejected { target: target.name, graph: graph.name.clone(), scope: node.scope.clone(), op, reason }
            };
            match target.support(&node.op, &types) {
                Support::Native => {}
                Support::Decompose => todo += 1,
                Support::Reject(reason) => return Err(reject(reason)),
            }
        }
        if todo == 0 {
            return Ok(graph);
        }
        let mut stuck = None;
        graph = rewrite(&graph, |g, node, args| {
            let types: Vec<Type> = args.iter().map(|a| a.ty()).collect();
            if target.support(&node.op, &types) != Support::Decompose {
                return None;
            }
            let outs = node.op.decompose(g, args);
            if outs.is_none() {
                stuck = Some(node.clone());
            }
            outs
        })?;
        if let Some(node) = stuck {
            let reason = "the target does not run it, and it is a primitive".into();
            return Err(PassError::Rejected {
                target: target.name,
                graph: graph.name.clone(),
                scope: node.scope,
                op: node.op.name(),
                reason,
            });
        }
    }
}
