//! Memory plan: which results share a slot of the arena. Sizes are functions of the symbols, so one plan serves every input.

use std::collections::HashMap;
use vlmc_ir::{Bindings, Dim, Graph, Op, Symbol, Type, ValueId};

/// Slots of a graph's results.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Bytes of each slot.
    pub slots: Vec<Dim>,
    of: HashMap<ValueId, u32>,
}

impl Plan {
    /// The slot of a value; `None` for inputs, weights, literals, states, and reshapes of these.
    pub fn slot(&self, v: ValueId) -> Option<u32> {
        self.of.get(&v).copied()
    }
}

/// Gives every result of `graph` a slot such that no two that are alive at the same time share one, but: a reshape lies where
/// its operand lies, and a node may overwrite with its first result an operand that dies there if `in_place` lists it and their types are the same.
///
/// Slots are handed out in execution order. A value takes a free slot that is large enough for all values of the symbols, if
/// possible the smallest; else it enlarges the largest free slot that it covers; else it opens one.
pub fn plan(graph: &Graph, symbols: &[Symbol], in_place: fn(&Op) -> &'static [usize]) -> Plan {
    // Sizes that compare for no or only some values are ranked at a typical request.
    let typical: Bindings = symbols.iter().map(|s| (s.name.as_str(), s.max.min(256).max(s.min))).collect();
    let rank = |d: &Dim| d.eval(&typical).unwrap_or(i64::MAX);

    // What a reshape shows is what its operand holds.
    let mut root: HashMap<ValueId, ValueId> = HashMap::new();
    let mut last_use: HashMap<ValueId, usize> = HashMap::new();
    for (id, node) in graph.nodes() {
        for a in &node.args {
            let r = *root.get(a).unwrap_or(a);
            last_use.insert(r, id.index());
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
    // Node at whose end each slot becomes free.
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
            let ty = graph.ty(*out);
            let until = last_use.get(out).copied().unwrap_or(now);
            let dying = |operand: &usize| {
                let v = *node.args.get(*operand)?;
                let slot = plan.slot(v)?;
                let alone = node.args.iter().filter(|a| plan.slot(**a) == Some(slot)).count() == 1;
                (alone && graph.ty(v) == ty && busy_until[slot as usize] == now).then_some(slot)
            };
            let overwritten = if result == 0 { in_place(&node.op) } else { &[] };
            let slot = match overwritten.iter().find_map(dying) {
                Some(slot) => slot,
                None => {
                    let size = bytes(ty);
                    let free = || (0..plan.slots.len()).filter(|s| busy_until[*s] < now);
                    let fitting = free().filter(|s| plan.slots[*s].covers(&size)).min_by_key(|s| rank(&plan.slots[*s]));
                    let growable = || free().filter(|s| size.covers(&plan.slots[*s])).max_by_key(|s| rank(&plan.slots[*s]));
                    match fitting.or_else(growable) {
                        Some(s) => {
                            if !plan.slots[s].covers(&size) {
                                plan.slots[s] = size;
                            }
                            s as u32
                        }
                        None => {
                            plan.slots.push(size);
                            busy_until.push(0);
                            plan.slots.len() as u32 - 1
                        }
                    }
                }
            };
            busy_until[slot as usize] = until;
            plan.of.insert(*out, slot);
        }
    }
    plan
}

fn bytes(t: &Type) -> Dim {
    &t.elements() * t.dtype.size()
}
