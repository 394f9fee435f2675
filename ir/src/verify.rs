//! Checks a program and says everything that is wrong with it.

use crate::{Def, Graph, NodeId, Program, Type, ValueId};
use std::{
    collections::{BTreeSet, HashSet},
    fmt,
    ops::Deref,
};

/// A program that has passed [`verify`]; backends take nothing else.
#[derive(Clone, Debug)]
pub struct Verified(Program);

impl Deref for Verified {
    type Target = Program;
    fn deref(&self) -> &Program {
        &self.0
    }
}

impl Verified {
    /// Gives the program back, to be rewritten.
    pub fn into_inner(self) -> Program {
        self.0
    }
}

/// One thing that is wrong. Prints as `decoder: layers.3.mlp: %41 = linear: last dim of ... differ`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// Graph name.
    pub graph: String,
    /// The node, if it is about one.
    pub node: Option<NodeId>,
    /// Scope of the node.
    pub scope: String,
    /// What is wrong.
    pub message: String,
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [self.graph.as_str(), self.scope.as_str(), self.message.as_str()];
        for (i, p) in parts.into_iter().filter(|p| !p.is_empty()).enumerate() {
            write!(f, "{}{p}", if i > 0 { ": " } else { "" })?;
        }
        Ok(())
    }
}

/// Checks symbols, names, definitions before uses, types of all nodes, states and weights.
///
/// # Errors
/// All that is wrong, in the order of the graphs and nodes.
pub fn verify(program: Program) -> Result<Verified, Vec<Diagnostic>> {
    let mut found = vec![];
    let mut report = |message: String| found.push(Diagnostic { graph: String::new(), node: None, scope: String::new(), message });
    let mut symbols = BTreeSet::new();
    for s in &program.symbols {
        if s.min > s.max || s.min < 0 {
            report(format!("symbol '{}' has the empty or negative range {}..={}", s.name, s.min, s.max));
        }
        if !symbols.insert(s.name.as_str()) {
            report(format!("symbol '{}' is declared twice", s.name));
        }
    }
    let mut names = HashSet::new();
    for g in &program.graphs {
        if !names.insert(&g.name) {
            report(format!("graph '{}' is declared twice", g.name));
        }
    }
    for (name, w) in &program.weights {
        if !w.dtype.is_float() {
            report(format!("weight '{name}' has dtype {}", w.dtype));
        }
    }
    for g in &program.graphs {
        GraphCheck { program: &program, graph: g, symbols: &symbols, found: &mut found }.check();
    }
    if found.is_empty() { Ok(Verified(program)) } else { Err(found) }
}

struct GraphCheck<'a> {
    program: &'a Program,
    graph: &'a Graph,
    symbols: &'a BTreeSet<&'a str>,
    found: &'a mut Vec<Diagnostic>,
}

impl GraphCheck<'_> {
    fn report(&mut self, node: Option<NodeId>, message: String) {
        let scope = node.map_or(String::new(), |n| self.graph.node(n).scope.clone());
        self.found.push(Diagnostic { graph: self.graph.name.clone(), node, scope, message });
    }

    fn check(mut self) {
        let g = self.graph;
        let mut ports = HashSet::new();
        let states = g.states.iter().flat_map(|s| [&s.past_name, &s.present_name]);
        for name in g.inputs.iter().chain(&g.outputs).map(|p| &p.name).chain(states) {
            if !ports.insert(name) {
                self.report(None, format!("'{name}' names two inputs, outputs or states"));
            }
        }
        let mut unknown = BTreeSet::new();
        for (_, ty, def) in g.values() {
            let symbols = self.symbols;
            ty.shape.iter().for_each(|d| d.for_each_symbol(&mut |s| _ = !symbols.contains(s) && unknown.insert(s.to_string())));
            if let Def::Weight(name) = def {
                match self.program.weights.get(name) {
                    None => self.report(None, format!("weight '{name}' is not declared")),
                    Some(w) if Type::new(w.dtype, w.shape.iter().copied()) != *ty => {
                        self.report(
                            None,
                            format!("weight '{name}' is {ty} here, but declared {}", Type::new(w.dtype, w.shape.iter().copied())),
                        );
                    }
                    Some(_) => {}
                }
            }
            if let Def::Literal(l) = def {
                let elements: usize = l.shape.iter().product();
                if elements != l.data.len() {
                    self.report(None, format!("a literal of shape {:?} has {} elements", l.shape, l.data.len()));
                }
            }
        }
        for s in unknown {
            self.report(None, format!("symbol '{s}' is not declared"));
        }
        let mut defined: HashSet<ValueId> = g.values().filter(|(_, _, d)| !matches!(d, Def::Node(..))).map(|(v, _, _)| v).collect();
        for (id, node) in g.nodes() {
            for a in &node.args {
                if !defined.contains(a) {
                    self.report(Some(id), format!("{}: %{} is used before it is defined", node.op.name(), a.index()));
                }
            }
            let types: Vec<Type> = node.args.iter().map(|a| g.ty(*a).clone()).collect();
            match node.op.infer(&types) {
                Err(why) => self.report(Some(id), format!("{}: {why}", node.op.name())),
                Ok(outs) if !outs.iter().eq(node.outs.iter().map(|o| g.ty(*o))) => {
                    let show = |t: &[Type]| t.iter().map(Type::to_string).collect::<Vec<_>>().join(", ");
                    let have: Vec<Type> = node.outs.iter().map(|o| g.ty(*o).clone()).collect();
                    self.report(Some(id), format!("{}: gives {}, but is declared {}", node.op.name(), show(&outs), show(&have)));
                }
                Ok(_) => {}
            }
            defined.extend(&node.outs);
        }
        for o in &g.outputs {
            if !defined.contains(&o.value) {
                self.report(None, format!("output '{}' is not defined", o.name));
            }
        }
        for s in &g.states {
            let readers: Vec<_> = g.nodes().filter(|(_, n)| n.args.contains(&s.past)).collect();
            let once = matches!(readers.as_slice(), [(_, n)] if n.args.iter().filter(|a| **a == s.past).count() == 1);
            let grows = |present: ValueId| {
                let (past, present) = (&g.ty(s.past).shape, &g.ty(present).shape);
                past.len() == present.len() && (0..past.len()).all(|i| (past[i] == present[i]) == (i != s.axis))
            };
            if !once || !g.present(s).is_some_and(grows) {
                self.report(None, format!("state '{}' must be read by exactly one append along axis {}", s.past_name, s.axis));
            }
        }
    }
}
