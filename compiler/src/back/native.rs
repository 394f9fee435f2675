//! The `cpu` target: a program of kernel calls over planned memory, for vlmc's own runtime.

use super::{Layout, Stored};
use crate::{Error, Result};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use vlmc_artifact::{
    program::{self as out, Kernel, Place, Step},
    quant::plane_bytes,
};
use vlmc_ir::{DType, Def, Dim, Graph, Node, Op, Type, ValueId, Verified, ops::Mask};
use vlmc_passes::memory;

/// The compiled program, and the weights it reads, by name.
///
/// # Errors
/// [`Error::Backend`] if the program was not legalised for this target.
pub fn lower(program: &Verified) -> Result<(out::Program, Vec<Stored>)> {
    let mut weights = WeightTable::new(program);
    let functions = program.graphs.iter().map(|g| Lowering::new(g, &mut weights).run()).collect::<Result<_>>()?;
    Ok((out::Program { symbols: program.symbols.clone(), weights: weights.used, functions }, weights.stored))
}

/// Which layouts each weight is needed in. A table that is also a matrix (tied embedding) is stored once, as the matrix.
struct WeightTable<'a> {
    program: &'a Verified,
    matrices: BTreeSet<&'a str>,
    /// Those of the matrices that lie in planes.
    heads: BTreeSet<&'a str>,
    index: BTreeMap<(&'a str, Layout), u32>,
    used: Vec<out::Weight>,
    stored: Vec<Stored>,
}

impl<'a> WeightTable<'a> {
    fn new(program: &'a Verified) -> Self {
        let matrix = |g: &'a Graph, n: &Node| match (&n.op, n.args.get(1).map(|w| g.def(*w))) {
            (Op::Linear(_), Some(Def::Weight(name))) => Some(name.as_str()),
            _ => None,
        };
        let matrices = program.graphs.iter().flat_map(|g| g.nodes().filter_map(move |(_, n)| matrix(g, n))).collect();
        let heads = program.graphs.iter().filter(|g| !g.states.is_empty()).flat_map(heads);
        let in_planes = |name: &&str| {
            let def = program.weights.get(*name);
            def.is_some_and(|w| matches!((w.dtype, &w.shape[..]), (DType::Quant(scheme), [_, k]) if plane_bytes(scheme, *k).is_some()))
        };
        let heads = heads.filter(in_planes).collect();
        Self { program, matrices, heads, index: BTreeMap::new(), used: vec![], stored: vec![] }
    }

    fn index(&mut self, name: &'a str, layout: Layout) -> Result<u32> {
        if let Some(i) = self.index.get(&(name, layout)) {
            return Ok(*i);
        }
        let def = self.program.weights.get(name).ok_or_else(|| Error::Backend(format!("weight '{name}' is not declared")))?;
        // A weight in two layouts is stored under two names.
        let stored = if layout != Layout::Rows || !self.matrices.contains(name) { name.into() } else { format!("{name}.rows") };
        let runtime_layout = match layout {
            Layout::Panels => out::Layout::Panel16,
            Layout::Planes => out::Layout::Planes16,
            _ => out::Layout::Rows,
        };
        self.used.push(out::Weight { name: stored.clone(), dtype: def.dtype, shape: def.shape.clone(), layout: runtime_layout });
        self.stored.push(Stored { name: stored, weight: name.into(), layout });
        let i = self.used.len() as u32 - 1;
        self.index.insert((name, layout), i);
        Ok(i)
    }
}

/// Matrices by which a graph makes outputs: logits, of which often only the largest is asked for.
fn heads(g: &Graph) -> impl Iterator<Item = &str> {
    let made_by = |mut v: ValueId| loop {
        let Def::Node(n, _) = g.def(v) else { return None };
        match &g.node(*n).op {
            Op::Reshape(_) => v = g.node(*n).args[0],
            Op::Linear(o) if o.dynamic && o.act.is_none() => return g.node(*n).args.get(1),
            _ => return None,
        }
    };
    let matrices = g.outputs.iter().filter_map(move |o| made_by(o.value));
    matrices.filter_map(|w| if let Def::Weight(name) = g.def(*w) { Some(name.as_str()) } else { None })
}

struct Lowering<'a, 'w> {
    graph: &'a Graph,
    plan: memory::Plan,
    weights: &'w mut WeightTable<'a>,
    values: Vec<out::Value>,
    index: HashMap<(ValueId, Option<Layout>), u32>,
    steps: Vec<Step>,
}

impl<'a, 'w> Lowering<'a, 'w> {
    fn new(graph: &'a Graph, weights: &'w mut WeightTable<'a>) -> Self {
        let plan = memory::plan(graph, works_in_place);
        Self { graph, plan, weights, values: vec![], index: HashMap::new(), steps: vec![] }
    }

    fn run(mut self) -> Result<out::Function> {
        let g = self.graph;
        let port = |this: &mut Self, p: &vlmc_ir::Port| {
            Ok::<_, Error>(out::NamedValue { name: p.name.clone(), value: this.value(p.value, None)? })
        };
        let inputs = g.inputs.iter().map(|p| port(&mut self, p)).collect::<Result<_>>()?;
        for (_, node) in g.nodes() {
            self.node(node)?;
        }
        let outputs = g.outputs.iter().map(|p| port(&mut self, p)).collect::<Result<_>>()?;
        let states = g
            .states
            .iter()
            .map(|s| out::StateDecl { name: s.past_name.clone(), shape: g.ty(s.past).shape.clone(), axis: s.axis, dtype: g.kept(s) })
            .collect();
        Ok(out::Function { name: g.name.clone(), inputs, outputs, states, values: self.values, steps: self.steps })
    }

    /// Index of a value in the function; `layout` says how an op wants a weight.
    fn value(&mut self, v: ValueId, layout: Option<Layout>) -> Result<u32> {
        if let Some(i) = self.index.get(&(v, layout)) {
            return Ok(*i);
        }
        let place = self.place(v, layout)?;
        let Type { dtype, shape } = self.graph.ty(v).clone();
        self.values.push(out::Value { dtype, shape, place });
        let i = self.values.len() as u32 - 1;
        self.index.insert((v, layout), i);
        Ok(i)
    }

    fn place(&mut self, v: ValueId, layout: Option<Layout>) -> Result<Place> {
        let g = self.graph;
        Ok(match g.def(v) {
            Def::Input(i) => Place::Input(*i),
            Def::Weight(name) => Place::Weight(self.weights.index(name, layout.unwrap_or(Layout::Rows))?),
            Def::Literal(l) => Place::Literal(l.data.clone()),
            Def::State(i) => Place::State(*i),
            Def::Node(n, result) => {
                let node = g.node(*n);
                let past = node.op.appends().iter().find(|(_, present)| present == &(*result as usize));
                if let Some((past, _)) = past {
                    return self.place(node.args[*past], None);
                }
                match (&node.op, self.plan.slot(v)) {
                    (_, Some(slot)) => Place::Slot(slot),
                    // A reshape of what lies elsewhere lies there too.
                    (Op::Reshape(_), None) => self.place(node.args[0], None)?,
                    (op, None) => return Err(Error::Backend(format!("{}: {}: a result has no place", node.scope, op.name()))),
                }
            }
        })
    }

    fn node(&mut self, node: &'a Node) -> Result<()> {
        let Some(kernel) = kernel(&node.op).map_err(|why| Error::Backend(format!("{}: {}: {why}", node.scope, node.op.name())))? else {
            return Ok(());
        };
        // States are results only.
        let is_past = |i: usize| node.op.appends().iter().any(|(past, _)| *past == i);
        let operands = (0..node.args.len()).filter(|i| !is_past(*i));
        let args: Vec<u32> = operands.map(|i| self.value(node.args[i], self.layout(node, i))).collect::<Result<_>>()?;
        let outs: Vec<u32> = node.outs.iter().map(|o| self.value(*o, None)).collect::<Result<_>>()?;
        if let (Kernel::Gated { act }, Some(last)) = (&kernel, self.steps.last_mut())
            && let (Kernel::Linear { dynamic, act: None }, true) = (&last.kernel, last.outs == args)
        {
            last.kernel = Kernel::GatedLinear { dynamic: *dynamic, act: *act };
            last.outs.insert(0, outs[0]);
            return Ok(());
        }
        self.steps.push(Step { kernel, args, outs, scope: node.scope.clone() });
        Ok(())
    }

    fn layout(&self, node: &Node, operand: usize) -> Option<Layout> {
        let Def::Weight(name) = self.graph.def(node.args[operand]) else { return None };
        let is_head = self.weights.heads.contains(name.as_str());
        match (&node.op, operand) {
            (Op::Linear(_), 1) | (Op::Embedding(_), 0) if is_head => Some(Layout::Planes),
            (Op::Linear(_), 1) | (Op::Moe(_), 3..=5) => Some(Layout::Panels),
            (Op::Embedding(_), 0) if self.weights.matrices.contains(name.as_str()) => Some(Layout::Panels),
            _ => None,
        }
    }
}

/// The kernel of an op; `None` for a reshape, which moves nothing.
fn kernel(op: &Op) -> Result<Option<Kernel>, &'static str> {
    Ok(Some(match op {
        Op::Reshape(_) => return Ok(None),
        Op::Linear(o) => Kernel::Linear { dynamic: o.dynamic, act: o.act },
        Op::Gated(o) => Kernel::Gated { act: o.act },
        Op::Embedding(_) => Kernel::Embedding,
        Op::LayerNorm(o) => Kernel::LayerNorm { eps: o.eps },
        Op::RmsNorm(o) => Kernel::RmsNorm { eps: o.eps },
        Op::Rotary(_) => Kernel::Rotary,
        Op::AddLayerNorm(o) => Kernel::AddLayerNorm { eps: o.eps },
        Op::AddRmsNorm(o) => Kernel::AddRmsNorm { eps: o.eps },
        Op::Attention(o) => Kernel::Attention { scale: o.scale, mask: mask(o.mask), bf16: o.bf16 },
        Op::RotaryAttention(o) => Kernel::RotaryAttention { scale: o.scale, mask: mask(o.mask), bf16: o.bf16 },
        Op::PackedAttention(o) => {
            Kernel::PackedAttention { heads: o.heads, kv_heads: o.kv_heads, scale: o.scale, mask: mask(o.mask), bf16: o.bf16 }
        }
        Op::Append(_) => Kernel::Append,
        Op::Elementwise1(o) => Kernel::Unary { f: o.f },
        Op::Elementwise2(o) => Kernel::Binary { f: o.f },
        Op::Select(_) => Kernel::Select,
        Op::Cast(_) => Kernel::Cast,
        Op::Iota(_) => Kernel::Iota,
        Op::DimValue(o) => Kernel::DimValue { dim: o.dim.clone() },
        Op::ReduceOp(o) => Kernel::Reduce { f: o.f, axes: o.axes.clone() },
        Op::CumSum(o) => Kernel::CumSum { axis: o.axis },
        Op::MatMul(_) => Kernel::MatMul,
        Op::Transpose(o) => Kernel::Transpose { perm: o.perm.clone() },
        Op::Broadcast(_) => Kernel::Broadcast,
        Op::Concat(o) => Kernel::Concat { axis: o.axis },
        Op::Slice(o) => Kernel::Slice { axis: o.axis, start: o.start.clone() },
        Op::Gather(o) => Kernel::Gather { axis: o.axis },
        Op::TopK(o) => Kernel::TopK { k: o.k },
        Op::Moe(o) => Kernel::Moe { act: o.act, dynamic: o.dynamic },
        _ => return Err("has no kernel; it was not legalised"),
    }))
}

fn mask(mask: Mask) -> out::Mask {
    match mask {
        Mask::Full => out::Mask::Full,
        Mask::Causal => out::Mask::Causal,
        Mask::Segments => out::Mask::Segments,
        Mask::Given => out::Mask::Given,
    }
}

/// Operands that a kernel may overwrite with its first result, if their type is the result's.
fn works_in_place(op: &Op) -> &'static [usize] {
    match op {
        Op::Elementwise1(_) | Op::LayerNorm(_) | Op::RmsNorm(_) => &[0],
        Op::Elementwise2(_) | Op::AddLayerNorm(_) | Op::AddRmsNorm(_) => &[0, 1],
        _ => &[],
    }
}

/// At most so many bytes of a function's values are alive at once: of each product of symbols the most that there is at any step.
pub(crate) fn arena(f: &out::Function) -> Dim {
    let bytes: HashMap<u32, Dim> = f
        .values
        .iter()
        .filter_map(|v| match v.place {
            Place::Slot(i) => Some((i, v.shape.iter().fold(v.dtype.size().into(), |n: Dim, d| &n * d))),
            _ => None,
        })
        .collect();
    let (mut born, mut dying) = (vec![vec![]; f.steps.len() + 1], vec![vec![]; f.steps.len() + 1]);
    for (slot, life) in f.lives().into_iter().enumerate() {
        if let (Some(life), Some(bytes)) = (life, bytes.get(&(slot as u32))) {
            born[*life.start()].push(bytes);
            dying[*life.end()].push(bytes);
        }
    }
    let mut alive = Dim::from(0);
    let mut most: BTreeMap<Vec<Dim>, i64> = BTreeMap::new();
    for (born, dying) in born.iter().zip(&dying) {
        alive = born.iter().fold(alive, |sum, b| &sum + *b);
        for (coefficient, product) in alive.as_terms() {
            let most = most.entry(product).or_default();
            *most = coefficient.max(*most);
        }
        alive = dying.iter().fold(alive, |sum, b| &sum - *b);
    }
    most.into_iter().fold(Dim::from(0), |sum, (product, most)| &sum + product.iter().fold(most.into(), |n: Dim, d| &n * d))
}
