//! From a program to [`syntax`](super::syntax): finds the repeats.
//!
//! A candidate is a run of items whose names have the same component `v`, followed by runs of the same length with `v + 1`,
//! `v + 2`, ... It becomes a repeat as far as its runs say the same, but for that index in names and, for nodes, values that
//! come from the run before.

use super::syntax::*;
use crate::{Def, Graph, Node, Op, Program, Type, ValueId, weights::Recipe};
use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
};

pub(super) fn program(p: &Program) -> File {
    let mut used: BTreeMap<&str, &Type> = BTreeMap::new();
    for g in &p.graphs {
        let values = g.nodes().flat_map(|(_, n)| &n.args).copied().chain(g.outputs.iter().map(|o| o.value));
        for v in values {
            if let Def::Weight(name) = g.def(v) {
                used.entry(name).or_insert(g.ty(v));
            }
        }
    }
    // The recipe that most of the used weights have, and rather the plain one, which needs no line.
    let mut counts: Vec<(Recipe, usize)> = vec![];
    let recipes: BTreeMap<&str, Recipe> = p.weights.iter().map(|(name, w)| (name.as_str(), written(name, &w.recipe))).collect();
    for recipe in used.keys().filter_map(|name| recipes.get(name)).filter(|r| r.sources().iter().all(|s| *s == OWN)) {
        match counts.iter_mut().find(|(r, _)| r == recipe) {
            Some((_, n)) => *n += 1,
            None => counts.push((recipe.clone(), 1)),
        }
    }
    let plain = Recipe::Source(OWN.into());
    let default = counts.into_iter().max_by_key(|(r, n)| (*n, *r == plain)).map_or(plain, |(r, _)| r);

    let mut listed = vec![];
    for (name, w) in &p.weights {
        let ty = Type::new(w.dtype, w.shape.iter().copied());
        let recipe = recipes[name.as_str()].clone();
        if used.get(name.as_str()) != Some(&&ty) || recipe != default {
            listed.push(WeightText { at: At::default(), name: Name::new(name), ty, recipe });
        }
    }
    // Layer 2 before layer 10.
    listed.sort_by_cached_key(|w| w.name.0.split('.').map(|c| (index(c).unwrap_or(i64::MAX), c.to_string())).collect::<Vec<_>>());
    File {
        name: Name::new(&p.name),
        symbols: p.symbols.clone(),
        graphs: p.graphs.iter().map(graph).collect(),
        default,
        weights: fold_items(listed),
    }
}

/// A recipe with its sources' names as written, the weight's own as [`OWN`].
fn written(weight: &str, recipe: &Recipe) -> Recipe {
    map_sources(recipe, &mut |s| if s == weight { OWN.into() } else { Name::new(s).0 })
}

fn map_sources(recipe: &Recipe, f: &mut impl FnMut(&str) -> String) -> Recipe {
    let Ok(recipe) = recipe.map_sources(&mut |s| Ok::<_, Infallible>(f(s)));
    recipe
}

/// Runs that may repeat: `count` times `len` items, with the indices from `first`.
struct Candidate {
    first: i64,
    len: usize,
    count: usize,
}

/// The candidates that start with the first of `names`, outermost component first.
fn candidates<'a, N: Fn(usize) -> Option<&'a Name>>(names: N) -> impl Iterator<Item = Candidate> {
    let first = names(0).filter(|n| !n.is_quoted()).map_or("", |n| &n.0);
    let starts = first.match_indices('.').map(|(at, _)| at + 1);
    std::iter::once(0).chain(starts).filter_map(move |start| {
        let v = index(first[start..].split('.').next()?)?;
        let in_run = |at: usize, v: i64| {
            let rest = names(at).and_then(|n| n.0.strip_prefix(&first[..start])).unwrap_or("");
            rest.split('.').next().and_then(index) == Some(v)
        };
        let len = (0..).take_while(|at| in_run(*at, v)).count();
        let follows = |k: usize| (k * len..(k + 1) * len).all(|at| in_run(at, v + k as i64));
        let count = (1..).take_while(|k| follows(*k)).count() + 1;
        (count > 1).then_some(Candidate { first: v, len, count })
    })
}

/// Something listed line by line, whose name may carry an index.
trait Line: Clone + PartialEq {
    fn name(&self) -> &Name;
    /// What stands for `a` with index `first` and for `b` with the next.
    fn common(first: i64, a: &Self, b: &Self) -> Option<Self>;
}

impl Line for StateText {
    fn name(&self) -> &Name {
        &self.past
    }

    fn common(first: i64, a: &Self, b: &Self) -> Option<Self> {
        let (past, present) = (Name::common(first, &a.past, &b.past)?, Name::common(first, &a.present, &b.present)?);
        (a.ty == b.ty && a.axis == b.axis).then(|| Self { past, present, ..a.clone() })
    }
}

impl Line for WeightText {
    fn name(&self) -> &Name {
        &self.name
    }

    fn common(first: i64, a: &Self, b: &Self) -> Option<Self> {
        let name = Name::common(first, &a.name, &b.name)?;
        let sources = a.recipe.sources().into_iter().zip(b.recipe.sources());
        let common = sources.map(|(x, y)| Some(Name::common(first, &Name(x.into()), &Name(y.into()))?.0));
        let mut sources = common.collect::<Option<Vec<_>>>()?.into_iter();
        let blank = |r: &Recipe| map_sources(r, &mut |_| String::new());
        let same = a.ty == b.ty && blank(&a.recipe) == blank(&b.recipe);
        same.then(|| Self { name, recipe: map_sources(&a.recipe, &mut |_| sources.next().unwrap_or_default()), ..a.clone() })
    }
}

fn fold_items<T: Line>(items: Vec<T>) -> Vec<Item<T>> {
    let (mut out, mut at) = (vec![], 0);
    while at < items.len() {
        let rest = &items[at..];
        let folded = candidates(|i| rest.get(i).map(T::name)).find_map(|c| {
            // What two runs have in common must be what every two neighbours have in common.
            let common = |k: usize| -> Option<Vec<T>> {
                let (a, b) = (&rest[(k - 1) * c.len..], &rest[k * c.len..]);
                (0..c.len).map(|j| T::common(c.first + k as i64 - 1, &a[j], &b[j])).collect()
            };
            let body = common(1)?;
            let count = 1 + (1..c.count).take_while(|k| common(*k).as_ref() == Some(&body)).count();
            Some((c.first..c.first + count as i64, body))
        });
        match folded {
            Some((range, body)) => {
                at += body.len() * (range.end - range.start) as usize;
                out.push(Item::Repeat(range, body));
            }
            None => {
                out.push(Item::One(rest[0].clone()));
                at += 1;
            }
        }
    }
    out
}

/// A node of a repeat's body and its result.
type Local = (usize, usize);

/// What a value is, seen from a node in a run of nodes.
#[derive(PartialEq)]
enum Reference {
    Local(Local),
    /// A result of the run before.
    Previous(Local),
    Weight(Name, Type),
    State(Name),
    /// Defined before, an input or a literal.
    Outer(ValueId),
}

/// An operand in the body of a repeat.
#[derive(PartialEq)]
enum Slot {
    /// The first run has the value, the others what the run before them computed.
    Carried(ValueId, Local),
    Same(Reference),
}

struct Repeat {
    first: i64,
    len: usize,
    count: usize,
    /// Per node of the body.
    scopes: Vec<Name>,
    slots: Vec<Vec<Slot>>,
}

struct Folder<'a> {
    graph: &'a Graph,
    scopes: Vec<Name>,
    /// Nodes that use a value; [`OUTPUT`] if it is an output.
    users: HashMap<ValueId, Vec<usize>>,
    labels: HashMap<ValueId, u32>,
    next: u32,
}

const OUTPUT: usize = usize::MAX;

pub(super) fn graph(g: &Graph) -> GraphText {
    let mut users: HashMap<ValueId, Vec<usize>> = HashMap::new();
    for (id, node) in g.nodes() {
        node.args.iter().for_each(|a| users.entry(*a).or_default().push(id.index()));
    }
    g.outputs.iter().for_each(|o| users.entry(o.value).or_default().push(OUTPUT));
    let scope = |scope: &str| if scope.is_empty() { Name::default() } else { Name::new(scope) };
    let scopes = g.nodes().map(|(_, n)| scope(&n.scope)).collect();
    let mut folder = Folder { graph: g, scopes, users, labels: HashMap::new(), next: 0 };
    let body = folder.body();
    let at = At::default();
    let states = g.states.iter().map(|s| {
        let (past, present) = (Name::new(&s.past_name), Name::new(&s.present_name));
        StateText { at, past, present, ty: g.ty(s.past).clone(), axis: s.axis }
    });
    GraphText {
        at,
        name: Name::new(&g.name),
        inputs: g.inputs.iter().map(|p| (at, Name::new(&p.name), g.ty(p.value).clone())).collect(),
        outputs: g.outputs.iter().map(|p| (Name::new(&p.name), g.ty(p.value).clone())).collect(),
        states: fold_items(states.collect()),
        body,
        results: g.outputs.iter().map(|o| folder.operand(o.value)).collect(),
    }
}

impl<'a> Folder<'a> {
    fn body(&mut self) -> Vec<Statement> {
        let (mut out, mut at) = (vec![], 0);
        while at < self.graph.nodes.len() {
            match self.repeat_at(at) {
                Some(r) => {
                    out.push(Statement::Repeat(self.repeat(at, &r)));
                    at += r.len * r.count;
                }
                None => {
                    let node = self.node(at);
                    let args = node.args.iter().map(|a| self.operand(*a)).collect();
                    let outs = node.outs.iter().map(|o| self.label(*o)).collect();
                    out.push(Statement::Node(self.node_text(node, self.scopes[at].clone(), args, outs)));
                    at += 1;
                }
            }
        }
        out
    }

    fn node(&self, at: usize) -> &'a Node {
        &self.graph.nodes[at]
    }

    fn node_text(&self, node: &Node, scope: Name, args: Vec<Operand>, outs: Vec<u32>) -> NodeText {
        let types = node.outs.iter().map(|o| self.graph.ty(*o).clone()).collect();
        NodeText { at: At::default(), scope, outs, op: Op::clone(&node.op), args, types }
    }

    fn number(&mut self) -> u32 {
        self.next += 1;
        self.next - 1
    }

    fn label(&mut self, v: ValueId) -> u32 {
        let label = self.number();
        self.labels.insert(v, label);
        label
    }

    /// A value outside of repeats.
    fn operand(&self, v: ValueId) -> Operand {
        let g = self.graph;
        let kind = match g.def(v) {
            Def::Input(i) => OperandKind::Port(Name::new(&g.inputs[*i as usize].name)),
            Def::State(i) => OperandKind::Port(Name::new(&g.states[*i as usize].past_name)),
            Def::Weight(name) => OperandKind::Weight(Name::new(name), g.ty(v).clone()),
            Def::Literal(l) => OperandKind::Literal(l.clone()),
            // Every result was labelled when its node was printed; a graph that uses one earlier does not verify.
            Def::Node(..) => OperandKind::Result(self.labels.get(&v).copied().unwrap_or(u32::MAX)),
        };
        Operand { at: At::default(), kind }
    }

    /// The repeat that starts with node `at`.
    fn repeat_at(&self, at: usize) -> Option<Repeat> {
        candidates(|i| self.scopes.get(at + i)).find_map(|c| self.check(at, &c))
    }

    fn check(&self, at: usize, c: &Candidate) -> Option<Repeat> {
        let (scopes, slots) = self.common(at, c, 1)?;
        let alike = |k: usize| {
            let (next_scopes, next) = self.common(at, c, k)?;
            // From the third run on, carried values come from the run before on both sides.
            let same = |a: &Slot, b: &Slot| match (a, b) {
                (Slot::Carried(_, x), Slot::Same(Reference::Previous(y))) => x == y,
                _ => a == b,
            };
            let all = next_scopes == scopes && next.iter().flatten().zip(slots.iter().flatten()).all(|(b, a)| same(a, b));
            all.then_some(())
        };
        let mut count = 2 + (2..c.count).take_while(|k| alike(*k).is_some()).count();
        // What is used after the repeat must come from its last run.
        for k in 0..count {
            let run = at + k * c.len..at + (k + 1) * c.len;
            let mut users = run.clone().flat_map(|n| &self.node(n).outs).flat_map(|o| self.users.get(o)).flatten();
            if users.any(|u| *u >= run.end + c.len) {
                count = k + 1;
                break;
            }
        }
        (count > 1).then_some(Repeat { first: c.first, len: c.len, count, scopes, slots })
    }

    /// What runs `k - 1` and `k` have in common.
    fn common(&self, at: usize, c: &Candidate, k: usize) -> Option<(Vec<Name>, Vec<Vec<Slot>>)> {
        let first = c.first + k as i64 - 1;
        let (mut scopes, mut slots) = (vec![], vec![]);
        for j in 0..c.len {
            let (i0, i1) = (at + (k - 1) * c.len + j, at + k * c.len + j);
            let (a, b) = (self.node(i0), self.node(i1));
            let types = |n: &Node| n.outs.iter().map(|o| self.graph.ty(*o)).collect::<Vec<_>>();
            if a.op != b.op || a.args.len() != b.args.len() || types(a) != types(b) {
                return None;
            }
            scopes.push(Name::common(first, &self.scopes[i0], &self.scopes[i1])?);
            let args = a.args.iter().zip(&b.args).map(|(x, y)| {
                let x = self.reference(*x, at + (k - 1) * c.len, c.len, k == 1);
                self.slot(first, x, self.reference(*y, at + k * c.len, c.len, false))
            });
            slots.push(args.collect::<Option<_>>()?);
        }
        Some((scopes, slots))
    }

    fn reference(&self, v: ValueId, run: usize, len: usize, is_first: bool) -> Reference {
        match self.graph.def(v) {
            Def::Weight(name) => Reference::Weight(Name::new(name), self.graph.ty(v).clone()),
            Def::State(i) => Reference::State(Name::new(&self.graph.states[*i as usize].past_name)),
            Def::Node(n, r) if n.index() >= run => Reference::Local((n.index() - run, *r as usize)),
            Def::Node(n, r) if !is_first && n.index() >= run - len => Reference::Previous((n.index() + len - run, *r as usize)),
            Def::Node(..) | Def::Input(_) | Def::Literal(_) => Reference::Outer(v),
        }
    }

    fn slot(&self, first: i64, a: Reference, b: Reference) -> Option<Slot> {
        Some(match (a, b) {
            (Reference::Weight(x, t), Reference::Weight(y, u)) if t == u => Slot::Same(Reference::Weight(Name::common(first, &x, &y)?, t)),
            (Reference::State(x), Reference::State(y)) => Slot::Same(Reference::State(Name::common(first, &x, &y)?)),
            (Reference::Outer(v), Reference::Previous(local)) if matches!(self.graph.def(v), Def::Node(..) | Def::Input(_)) => {
                Slot::Carried(v, local)
            }
            (a, b) if a == b => Slot::Same(a),
            _ => return None,
        })
    }

    /// Prints the repeat at node `at`.
    fn repeat(&mut self, at: usize, r: &Repeat) -> RepeatText {
        let mut carried: Vec<(&Slot, u32, Operand)> = vec![];
        for slot in r.slots.iter().flatten() {
            if let Slot::Carried(init, _) = slot
                && !carried.iter().any(|(s, ..)| *s == slot)
            {
                let init = self.operand(*init);
                carried.push((slot, self.number(), init));
            }
        }
        // The body is numbered as its first run.
        let body: Vec<NodeText> = (0..r.len)
            .map(|j| {
                let node = self.node(at + j);
                let args = node.args.iter().zip(&r.slots[j]).map(|(a, slot)| {
                    let kind = match slot {
                        Slot::Carried(..) => {
                            let label = carried.iter().find(|(s, ..)| *s == slot).map_or(u32::MAX, |(_, label, _)| *label);
                            OperandKind::Result(label)
                        }
                        Slot::Same(Reference::Weight(name, ty)) => OperandKind::Weight(name.clone(), ty.clone()),
                        Slot::Same(Reference::State(name)) => OperandKind::Port(name.clone()),
                        Slot::Same(_) => return self.operand(*a),
                    };
                    Operand { at: At::default(), kind }
                });
                let args = args.collect();
                let outs = node.outs.iter().map(|o| self.label(*o)).collect();
                self.node_text(node, r.scopes[j].clone(), args, outs)
            })
            .collect();
        // Yielded: what the next run takes, then what else is used after the last.
        let last = at + (r.count - 1) * r.len;
        let mut yields: Vec<Local> =
            carried.iter().filter_map(|(s, ..)| if let Slot::Carried(_, l) = s { Some(*l) } else { None }).collect();
        for j in 0..r.len {
            for (o, v) in self.node(last + j).outs.iter().enumerate() {
                let used_after = self.users.get(v).is_some_and(|u| u.iter().any(|u| *u >= last + r.len));
                if used_after && !yields.contains(&(j, o)) {
                    yields.push((j, o));
                }
            }
        }
        let value = |run: usize, (j, o): Local| self.graph.nodes[run + j].outs[o];
        let yielded = yields.iter().map(|l| self.operand(value(at, *l))).collect();
        let finals: Vec<ValueId> = yields.iter().map(|l| value(last, *l)).collect();
        RepeatText {
            at: At::default(),
            range: r.first..r.first + r.count as i64,
            carried: carried.into_iter().map(|(_, label, init)| (label, init)).collect(),
            body,
            yields: yielded,
            results: finals.into_iter().map(|v| self.label(v)).collect(),
        }
    }
}
