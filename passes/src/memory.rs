//! Memory plan: which results share memory. Where it lies follows from sizes and lives, which the runtime knows when it knows
//! the symbols.

use std::collections::HashMap;
use vlmc_ir::{Graph, Op, ValueId};

/// Slots of a graph's results.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    of: HashMap<ValueId, u32>,
}

impl Plan {
    /// The slot of a value; `None` for inputs, weights, literals, states, and reshapes of these.
    pub fn slot(&self, v: ValueId) -> Option<u32> {
        self.of.get(&v).copied()
    }
}

/// Gives every result of `graph` a slot of its own, but: a reshape lies where its operand lies, and a node overwrites with its first
/// result an operand that dies there if `in_place` lists it and their types are the same.
pub fn plan(graph: &Graph, in_place: fn(&Op) -> &'static [usize]) -> Plan {
    // What a reshape shows is what its operand holds.
    let mut root: HashMap<ValueId, ValueId> = HashMap::new();
    let mut last_use: HashMap<ValueId, usize> = HashMap::new();
    for (id, node) in graph.nodes() {
        for a in &node.args {
            last_use.insert(*root.get(a).unwrap_or(a), id.index());
        }
        if matches!(node.op, Op::Reshape(_)) {
            let r = *root.get(&node.args[0]).unwrap_or(&node.args[0]);
            root.insert(node.outs[0], r);
        }
    }
    for o in &graph.outputs {
        last_use.insert(*root.get(&o.value).unwrap_or(&o.value), usize::MAX);
    }

    let mut plan = Plan::default();
    // The node that last uses what each slot holds.
    let mut busy_until: Vec<usize> = vec![];
    for (id, node) in graph.nodes() {
        let now = id.index();
        if matches!(node.op, Op::Reshape(_)) {
            if let Some(slot) = plan.slot(node.args[0]) {
                plan.of.insert(node.outs[0], slot);
            }
            continue;
        }
        for (result, out) in node.outs.iter().enumerate() {
            // A state lies elsewhere.
            if node.op.appends().iter().any(|(_, present)| *present == result) {
                continue;
            }
            let dying = |operand: &usize| {
                let v = *node.args.get(*operand)?;
                let slot = plan.slot(v)?;
                let alone = node.args.iter().filter(|a| plan.slot(**a) == Some(slot)).count() == 1;
                (alone && graph.ty(v) == graph.ty(*out) && busy_until[slot as usize] == now).then_some(slot)
            };
            let overwritten = if result == 0 { in_place(&node.op) } else { &[] };
            let slot = overwritten.iter().find_map(dying).unwrap_or_else(|| {
                busy_until.push(0);
                busy_until.len() as u32 - 1
            });
            busy_until[slot as usize] = last_use.get(out).copied().unwrap_or(now);
            plan.of.insert(*out, slot);
        }
    }
    plan
}
