//! Expressions over a graph.

use super::{Users, weight_name};
use std::{
    collections::BTreeMap,
    ops::{Add, Mul},
};
use vlmc_artifact::program::Binary;
use vlmc_ir::{Graph, Node, NodeId, Op, Program, Type, ValueId, ops::Elementwise2, weights::WeightDef};

/// An expression: a value that is computed in a certain way. `+` and `*` make sums and products, in any order.
#[derive(Clone)]
pub struct Pattern {
    kind: Kind,
    name: Option<&'static str>,
    alone: bool,
    say_why: bool,
}

#[derive(Clone)]
enum Kind {
    Value,
    Weight,
    Op(OpPattern),
    Through { operand: fn(&Op) -> Option<usize>, from: Box<Pattern> },
}

#[derive(Clone)]
struct OpPattern {
    what: &'static str,
    is: fn(&Op) -> bool,
    operands: Vec<Pattern>,
    commutes: bool,
}

/// Values by the names that the pattern gives them.
type Found = BTreeMap<&'static str, ValueId>;

impl Pattern {
    fn of(kind: Kind, name: Option<&'static str>) -> Self {
        Self { kind, name, alone: false, say_why: false }
    }

    /// Any value. The same name must stand for the same value everywhere.
    pub fn value(name: &'static str) -> Self {
        Self::of(Kind::Value, Some(name))
    }

    /// A weight.
    pub fn weight(name: &'static str) -> Self {
        Self::of(Kind::Weight, Some(name))
    }

    /// What an op that `is` one makes of these operands, `what` being how to call it. Further operands are not looked at.
    pub fn op(what: &'static str, is: fn(&Op) -> bool, operands: impl Into<Vec<Pattern>>) -> Self {
        Self::of(Kind::Op(OpPattern { what, is, operands: operands.into(), commutes: false }), None)
    }

    /// `from`, after any number of ops that hand `operand` of theirs on.
    pub fn through(operand: fn(&Op) -> Option<usize>, from: Pattern) -> Self {
        Self::of(Kind::Through { operand, from: Box::new(from) }, None)
    }

    /// Under this name.
    #[must_use]
    pub fn named(self, name: &'static str) -> Self {
        Self { name: Some(name), ..self }
    }

    /// Used in this place only.
    #[must_use]
    pub fn alone(self) -> Self {
        Self { alone: true, ..self }
    }

    /// Another op in this place makes a near miss, which is told, rather than another expression.
    #[must_use]
    pub fn or_say_why(self) -> Self {
        Self { say_why: true, ..self }
    }

    fn commutative(what: &'static str, is: fn(&Op) -> bool, operands: [Pattern; 2]) -> Self {
        Self::of(Kind::Op(OpPattern { what, is, operands: operands.into(), commutes: true }), None)
    }

    /// The values of the expression that node `root` computes, and what speaks against it; `None` if it is another expression.
    pub(super) fn find(&self, graph: &Graph, users: &Users, root: NodeId) -> Option<(Found, Vec<String>)> {
        let mut search = Search { graph, users, found: Found::new(), misses: vec![] };
        let root = *graph.node(root).outs.first()?;
        // The root may be used by many.
        let pattern = Self { alone: false, ..self.clone() };
        if !search.matches(&pattern, root) {
            return None;
        }
        search.misses.sort();
        search.misses.dedup();
        Some((search.found, search.misses))
    }
}

impl Add for Pattern {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self::commutative("add", |op| *op == Op::from(Elementwise2 { f: Binary::Add }), [self, other])
    }
}

impl Mul for Pattern {
    type Output = Self;
    fn mul(self, other: Self) -> Self {
        Self::commutative("mul", |op| *op == Op::from(Elementwise2 { f: Binary::Mul }), [self, other])
    }
}

/// How often each value is used, outputs and states included.
pub(super) fn users(graph: &Graph) -> Users {
    let mut users = vec![0; graph.values().len()];
    let kept = graph.outputs.iter().map(|o| o.value).chain(graph.states.iter().filter_map(|s| graph.present(s)));
    graph.nodes().flat_map(|(_, n)| n.args.iter().copied()).chain(kept).for_each(|v| users[v.index()] += 1);
    users
}

#[derive(Clone)]
struct Search<'a> {
    graph: &'a Graph,
    users: &'a Users,
    found: Found,
    misses: Vec<String>,
}

impl<'a> Search<'a> {
    /// Whether `v` is the expression, but for the misses.
    fn matches(&mut self, p: &Pattern, v: ValueId) -> bool {
        let matched = match &p.kind {
            Kind::Value => true,
            Kind::Weight => {
                if weight_name(self.graph, v).is_none() {
                    self.misses.push(format!("{} is not a weight", p.name.unwrap_or("an operand")));
                }
                true
            }
            Kind::Through { operand, from } => {
                let mut at = v;
                while let Some(node) = self.producer(at)
                    && let Some(next) = operand(&node.op).and_then(|i| node.args.get(i))
                {
                    at = *next;
                }
                self.matches(from, at)
            }
            Kind::Op(op) => match self.producer(v).filter(|n| (op.is)(&n.op) && n.outs.first() == Some(&v)) {
                Some(node) => self.operands(op, &node.args),
                None if p.say_why => {
                    let is = self.producer(v).map_or("no result".into(), |n| n.op.name());
                    self.misses.push(format!("{} is {is}, not {}", p.name.unwrap_or("an operand"), op.what));
                    true
                }
                None => false,
            },
        };
        if !matched {
            return false;
        }
        if p.alone && self.users[v.index()] != 1 {
            self.misses.push(format!("{} is used elsewhere", p.name.unwrap_or("a part")));
        }
        if let Some(name) = p.name
            && *self.found.entry(name).or_insert(v) != v
        {
            self.misses.push(format!("{name} is not the same everywhere"));
        }
        true
    }

    fn operands(&mut self, op: &OpPattern, args: &[ValueId]) -> bool {
        if args.len() < op.operands.len() {
            return false;
        }
        let all = |args: &[ValueId]| {
            let mut trial = self.clone();
            op.operands.iter().zip(args).all(|(p, v)| trial.matches(p, *v)).then_some(trial)
        };
        let straight = all(args);
        let swapped = if let ([a, b], true) = (args, op.commutes) { all(&[*b, *a]) } else { None };
        match straight.into_iter().chain(swapped).min_by_key(|trial| trial.misses.len()) {
            Some(best) => {
                *self = best;
                true
            }
            None => false,
        }
    }

    fn producer(&self, v: ValueId) -> Option<&'a Node> {
        self.graph.producer(v).map(|n| self.graph.node(n))
    }
}

/// Where a pattern matches.
pub struct Match<'a> {
    /// The program.
    pub program: &'a Program,
    /// The graph.
    pub graph: &'a Graph,
    pub(super) users: &'a Users,
    /// Node of the whole expression.
    pub root: NodeId,
    pub(super) found: Found,
}

impl<'a> Match<'a> {
    /// The value that the pattern calls `name`.
    ///
    /// # Errors
    /// There is none.
    pub fn value(&self, name: &str) -> Result<ValueId, String> {
        self.found.get(name).copied().ok_or_else(|| format!("there is no {name}"))
    }

    /// The node that computes the value that the pattern calls `name`.
    ///
    /// # Errors
    /// There is none.
    pub fn node(&self, name: &str) -> Result<(NodeId, &'a Node), String> {
        let id = self.graph.producer(self.value(name)?).ok_or_else(|| format!("{name} is not computed"))?;
        Ok((id, self.graph.node(id)))
    }

    /// Type of a value.
    pub fn ty(&self, v: ValueId) -> &'a Type {
        self.graph.ty(v)
    }

    /// Name and definition of a weight.
    ///
    /// # Errors
    /// The value is something else.
    pub fn weight(&self, v: ValueId) -> Result<(&'a str, &'a WeightDef), String> {
        let name = weight_name(self.graph, v).ok_or("an operand is not a weight")?;
        Ok((name, self.program.weights.get(name).ok_or_else(|| format!("weight '{name}' is not declared"))?))
    }

    /// The result of the whole expression.
    pub fn result(&self) -> ValueId {
        self.graph.node(self.root).outs[0]
    }
}
