//! From [`syntax`](super::syntax) to a program: repeats unrolled, names and numbers resolved, types checked. Values get their
//! order from [`Builder`].

use super::{Fail, syntax::*};
use crate::{
    Builder, Def, Graph, Program, Type, Val,
    weights::{Recipe, WeightDef},
};
use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry},
    fmt::Display,
};

type Result<T> = std::result::Result<T, Fail>;

/// Bytes of text that repeats may stand for, beyond what is written.
const MAX_REPEATED: usize = 1 << 24;
/// Terms of a shape's number of elements, about.
const MAX_TERMS: usize = 1 << 12;

/// An error at `at`.
fn at<T>(at: At, result: std::result::Result<T, String>) -> Result<T> {
    result.map_err(|message| Fail { at: at.start, message })
}

/// Refuses shapes whose polynomials could grow out of all bounds when they are multiplied.
pub(super) fn check_size(dims: &[impl Display]) -> std::result::Result<(), String> {
    let terms = |d: &dyn Display| 1 + d.to_string().matches(['+', '-']).count();
    let product = dims.iter().try_fold(1usize, |n, d| n.checked_mul(terms(d)));
    if product.is_some_and(|n| n <= MAX_TERMS) { Ok(()) } else { Err(format!("these dims have more than {MAX_TERMS} terms together")) }
}

pub(super) fn program(file: &File) -> Result<Program> {
    let mut budget = Budget(MAX_REPEATED);
    let mut program = Program { name: at(At::default(), file.name.resolve(None))?, symbols: file.symbols.clone(), ..Program::default() };
    for g in &file.graphs {
        let graph = graph(g, &mut budget)?;
        for (_, ty, def) in graph.values() {
            if let Def::Weight(name) = def
                && !program.weights.contains_key(name)
            {
                program.weights.insert(name.clone(), weight(At::default(), name, ty, &file.default, None)?);
            }
        }
        program.graphs.push(graph);
    }
    let mut listed: BTreeMap<String, WeightDef> = BTreeMap::new();
    each(
        &file.weights,
        &mut budget,
        |w| w.at,
        |w, i| {
            let name = at(w.at, w.name.resolve(i))?;
            let def = weight(w.at, &name, &w.ty, &w.recipe, i)?;
            let message = format!("weight '{name}' is listed twice");
            if listed.insert(name, def).is_some() { at(w.at, Err(message)) } else { Ok(()) }
        },
    )?;
    program.weights.extend(listed);
    Ok(program)
}

/// Counts down what repeats stand for.
struct Budget(usize);

impl Budget {
    fn spend(&mut self, item: At, times: i64) -> Result<()> {
        let left = usize::try_from(times).ok().and_then(|n| item.len.max(1).checked_mul(n)).and_then(|n| self.0.checked_sub(n));
        self.0 = at(item, left.ok_or_else(|| format!("repeats stand for more than {MAX_REPEATED} bytes of text")))?;
        Ok(())
    }
}

/// Calls `f` for every item, and those of repeats once per index.
fn each<T>(items: &[Item<T>], budget: &mut Budget, place: fn(&T) -> At, mut f: impl FnMut(&T, Option<i64>) -> Result<()>) -> Result<()> {
    for item in items {
        match item {
            Item::One(x) => f(x, None)?,
            Item::Repeat(range, xs) => {
                xs.iter().try_for_each(|x| budget.spend(place(x), range.end - range.start))?;
                for i in range.clone().filter(|_| !xs.is_empty()) {
                    xs.iter().try_for_each(|x| f(x, Some(i)))?;
                }
            }
        }
    }
    Ok(())
}

fn weight(place: At, name: &str, ty: &Type, recipe: &Recipe, i: Option<i64>) -> Result<WeightDef> {
    Ok(WeightDef { dtype: ty.dtype, shape: at(place, numbers(ty))?, recipe: at(place, resolve_sources(recipe, name, i))? })
}

/// Shape of a weight.
fn numbers(ty: &Type) -> std::result::Result<Vec<usize>, String> {
    let shape = ty.shape.iter().map(|d| d.as_const().and_then(|v| usize::try_from(v).ok())).collect::<Option<_>>();
    shape.ok_or_else(|| format!("the dims of a weight must be numbers, but this one is {ty}"))
}

fn resolve_sources(recipe: &Recipe, own: &str, i: Option<i64>) -> std::result::Result<Recipe, String> {
    recipe.map_sources(&mut |name| if name == OWN { Ok(own.into()) } else { Name(name.into()).resolve(i) })
}

fn graph(text: &GraphText, budget: &mut Budget) -> Result<Graph> {
    let builder = Builder::new(&at(text.at, text.name.resolve(None))?, None);
    Unfolder { b: &builder, ports: HashMap::new(), results: HashMap::new() }.run(text, budget)?;
    builder.finish().map_err(|e| Fail { at: text.at.start, message: e.to_string() })
}

struct Unfolder<'g> {
    b: &'g Builder<'g>,
    /// Inputs and states.
    ports: HashMap<String, Val<'g>>,
    results: HashMap<u32, Val<'g>>,
}

impl<'g> Unfolder<'g> {
    fn run(mut self, text: &GraphText, budget: &mut Budget) -> Result<()> {
        for (place, name, ty) in &text.inputs {
            let name = at(*place, name.resolve(None))?;
            let v = self.b.input(&name, ty.dtype, &ty.shape);
            self.port(*place, name, v)?;
        }
        each(
            &text.states,
            budget,
            |s| s.at,
            |s, i| {
                let (past, present) = (at(s.at, s.past.resolve(i))?, at(s.at, s.present.resolve(i))?);
                let v = self.b.state(&past, &present, s.ty.dtype, &s.ty.shape, s.axis);
                self.port(s.at, past, v)
            },
        )?;
        for s in &text.body {
            match s {
                Statement::Node(n) => self.node(n, None)?,
                Statement::Repeat(r) => self.repeat(r, budget)?,
            }
        }
        for ((name, ty), result) in text.outputs.iter().zip(&text.results) {
            let v = self.operand(result, None)?;
            let name = at(result.at, name.resolve(None))?;
            if v.ty() != *ty {
                return at(result.at, Err(format!("output '{name}' is declared {ty}, but this is {}", v.ty())));
            }
            self.b.output(&name, v);
        }
        Ok(())
    }

    fn port(&mut self, place: At, name: String, v: Val<'g>) -> Result<()> {
        match self.ports.entry(name) {
            Entry::Vacant(e) => _ = e.insert(v),
            Entry::Occupied(e) => return at(place, Err(format!("'{}' is declared twice", e.key()))),
        }
        Ok(())
    }

    fn define(&mut self, place: At, label: u32, v: Val<'g>) -> Result<()> {
        if self.results.insert(label, v).is_some() { at(place, Err(format!("%{label} is defined twice"))) } else { Ok(()) }
    }

    fn operand(&self, o: &Operand, i: Option<i64>) -> Result<Val<'g>> {
        match &o.kind {
            OperandKind::Result(label) => {
                at(o.at, self.results.get(label).copied().ok_or_else(|| format!("%{label} is not defined before it is used here")))
            }
            OperandKind::Port(name) => {
                let name = at(o.at, name.resolve(i))?;
                at(o.at, self.ports.get(&name).copied().ok_or_else(|| format!("there is no input or state '{name}'")))
            }
            OperandKind::Weight(name, ty) => {
                let name = at(o.at, name.resolve(i))?;
                at(o.at, numbers(ty))?;
                let v = self.b.weight_value(&name, ty.clone());
                let same = v.ty() == *ty;
                at(o.at, if same { Ok(v) } else { Err(format!("weight '{name}' is {ty} here, but {} before", v.ty())) })
            }
            OperandKind::Literal(l) => Ok(self.b.literal(l.clone())),
        }
    }

    fn node(&mut self, n: &NodeText, i: Option<i64>) -> Result<()> {
        let args = n.args.iter().map(|a| self.operand(a, i)).collect::<Result<Vec<_>>>()?;
        let types: Vec<Type> = args.iter().map(|a| a.ty()).collect();
        let show = |types: &[Type]| types.iter().map(Type::to_string).collect::<Vec<_>>().join(", ");
        let turn = i.map_or(String::new(), |i| format!(" (with i = {i})"));
        let call = || format!("{}({})", n.op.name(), show(&types));
        let outs = at(n.at, n.op.infer(&types).map_err(|why| format!("{}: {why}{turn}", call())))?;
        outs.iter().try_for_each(|t| at(n.at, check_size(&t.shape)))?;
        if outs != n.types {
            return at(n.at, Err(format!("{} gives {}, not {}{turn}", call(), show(&outs), show(&n.types))));
        }
        if outs.len() != n.outs.len() {
            return at(n.at, Err(format!("{} has {} results, {} are named", n.op.name(), outs.len(), n.outs.len())));
        }
        let scope = if n.scope.0.is_empty() { String::new() } else { at(n.at, n.scope.resolve(i))? };
        let _scope = self.b.scope(scope);
        let outs = self.b.apply_op(n.op.clone(), &args);
        n.outs.iter().zip(outs).try_for_each(|(label, v)| self.define(n.at, *label, v))
    }

    fn repeat(&mut self, r: &RepeatText, budget: &mut Budget) -> Result<()> {
        r.body.iter().try_for_each(|n| budget.spend(n.at, r.range.end - r.range.start))?;
        let mut carried = r.carried.iter().map(|(_, init)| self.operand(init, None)).collect::<Result<Vec<_>>>()?;
        let mut yields = vec![];
        // Without a body every turn is the same.
        let turns = if r.body.is_empty() { 1 } else { r.range.end - r.range.start };
        for i in r.range.start..r.range.start + turns {
            r.carried.iter().zip(&carried).try_for_each(|((label, _), v)| self.define(r.at, *label, *v))?;
            r.body.iter().try_for_each(|n| self.node(n, Some(i)))?;
            yields = r.yields.iter().map(|y| self.operand(y, Some(i))).collect::<Result<Vec<_>>>()?;
            carried = yields.clone();
            let inside = r.body.iter().flat_map(|n| &n.outs).chain(r.carried.iter().map(|(label, _)| label));
            inside.for_each(|label| _ = self.results.remove(label));
        }
        r.results.iter().zip(yields).try_for_each(|(label, v)| self.define(r.at, *label, v))
    }
}
