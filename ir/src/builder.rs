//! Building graphs. Model code should read like the model's definition: values are `Copy` and have operators, weight paths
//! compose with `/`, and no call returns a `Result`: the first error is kept, with its scope and the line of model code
//! that made it, and `finish` returns it.

use crate::{
    DType, Dim, Literal, Op, Type,
    graph::{Def, Graph, Node, NodeId, Port, State, ValueId},
    ops::*,
    weights::{Recipe, WeightDef},
};
use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap, HashSet},
    fmt::Display,
    ops::{Add, Div, Mul, Sub},
    panic::Location,
    rc::Rc,
};
use vlmc_artifact::program::{Binary, Reduce, Unary};

/// What a builder asks about a checkpoint.
pub trait WeightSource {
    /// Whether the checkpoint has the tensor; `None` when only the structure of a model is built, without a checkpoint.
    fn contains(&self, name: &str) -> Option<bool>;

    /// Element type of tensor `name`, which the model declares to have `shape`.
    ///
    /// # Errors
    /// A message for the user if the tensor is missing (with the nearest names) or has another shape.
    fn resolve(&self, name: &str, shape: &[usize]) -> Result<DType, String>;
}

/// The weights that the graphs of one program have asked for.
pub struct Weights<'s> {
    source: &'s dyn WeightSource,
    table: RefCell<BTreeMap<String, WeightDef>>,
}

impl<'s> Weights<'s> {
    /// An empty table over a checkpoint.
    pub fn new(source: &'s dyn WeightSource) -> Self {
        Self { source, table: RefCell::default() }
    }

    /// See [`WeightSource::contains`].
    pub fn contains(&self, name: &str) -> Option<bool> {
        self.source.contains(name)
    }

    /// The table for [`crate::Program::weights`].
    pub fn into_table(self) -> BTreeMap<String, WeightDef> {
        self.table.into_inner()
    }
}

/// Why a graph could not be built.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{graph}{}{scope}: {message}", if .scope.is_empty() { "" } else { ": " })]
pub struct BuildError {
    /// Graph name.
    pub graph: String,
    /// Scope of the failing call.
    pub scope: String,
    /// What is wrong.
    pub message: String,
    /// Line of model code; only `{:?}` shows it, since users have other code.
    pub location: &'static Location<'static>,
}

/// A graph under construction.
pub struct Builder<'s> {
    weights: Option<&'s Weights<'s>>,
    inner: RefCell<Inner>,
}

#[derive(Default)]
struct Inner {
    graph: Graph,
    scope: Rc<str>,
    paths: Vec<Rc<str>>,
    weight_values: HashMap<String, ValueId>,
    /// By element type, shape and bits of the elements.
    literals: HashMap<(DType, Vec<usize>, Vec<u64>), ValueId>,
    error: Option<BuildError>,
}

/// A value of the graph under construction.
#[derive(Clone, Copy)]
pub struct Val<'g> {
    g: &'g Builder<'g>,
    id: ValueId,
}

/// A path into the checkpoint's tensor names: `w / "blocks" / 3 / "attn"`.
#[derive(Clone, Copy)]
pub struct W<'g> {
    g: &'g Builder<'g>,
    path: usize,
}

impl<'g, T: Display> Div<T> for W<'g> {
    type Output = W<'g>;
    fn div(self, part: T) -> W<'g> {
        let parent = self.path();
        self.g.path(if parent.is_empty() { part.to_string() } else { format!("{parent}.{part}") })
    }
}

impl W<'_> {
    /// The tensor name.
    pub fn path(self) -> Rc<str> {
        self.g.inner.borrow().paths[self.path].clone()
    }
}

/// Restores the scope when dropped.
pub struct Scope<'g> {
    g: &'g Builder<'g>,
    before: Rc<str>,
}

impl Drop for Scope<'_> {
    fn drop(&mut self) {
        self.g.inner.borrow_mut().scope = self.before.clone();
    }
}

impl<'g> Val<'g> {
    /// Its id in the graph.
    pub fn id(self) -> ValueId {
        self.id
    }

    /// Its type.
    pub fn ty(self) -> Type {
        self.g.inner.borrow().graph.ty(self.id).clone()
    }

    /// Dim of `axis`; 1 after an earlier error made the value a stand-in of lower rank.
    pub fn dim(self, axis: usize) -> Dim {
        self.ty().shape.get(axis).cloned().unwrap_or(1.into())
    }
}

impl<'s> Builder<'s> {
    /// A builder for graph `name`. Without `weights` (in decompositions and passes) only [`Self::weight_value`] makes weights.
    pub fn new(name: &str, weights: Option<&'s Weights<'s>>) -> Self {
        let graph = Graph { name: name.into(), ..Graph::default() };
        Self { weights, inner: RefCell::new(Inner { graph, scope: "".into(), ..Inner::default() }) }
    }

    /// The finished graph.
    ///
    /// # Errors
    /// The first error of any call.
    pub fn finish(self) -> Result<Graph, BuildError> {
        let inner = self.inner.into_inner();
        inner.error.map_or(Ok(inner.graph), Err)
    }

    fn value(&self, ty: Type, def: Def) -> ValueId {
        let values = &mut self.inner.borrow_mut().graph.values;
        values.push((ty, def));
        ValueId(values.len() as u32 - 1)
    }
}

// Model code borrows the builder for as long as its weights live, so that `Val` needs one lifetime only.
impl<'g> Builder<'g> {
    fn path(&'g self, path: String) -> W<'g> {
        let paths = &mut self.inner.borrow_mut().paths;
        paths.push(path.into());
        W { g: self, path: paths.len() - 1 }
    }

    /// The path `root` of the checkpoint's names.
    pub fn weights(&'g self, root: &str) -> W<'g> {
        self.path(root.into())
    }

    /// Nodes made while the guard lives belong to `scope`.
    #[must_use = "the scope ends when the guard is dropped"]
    pub fn scope(&'g self, scope: impl Display) -> Scope<'g> {
        let before = std::mem::replace(&mut self.inner.borrow_mut().scope, scope.to_string().into());
        Scope { g: self, before }
    }

    /// Declares an input.
    pub fn input<D: Into<Dim>>(&'g self, name: &str, dtype: DType, shape: impl IntoIterator<Item = D>) -> Val<'g> {
        let i = self.inner.borrow().graph.inputs.len() as u32;
        let value = self.value(Type::new(dtype, shape), Def::Input(i));
        self.inner.borrow_mut().graph.inputs.push(Port { name: name.into(), value });
        Val { g: self, id: value }
    }

    /// Declares a state that grows along `axis`; `append` must read it exactly once.
    pub fn state<D: Into<Dim>>(
        &'g self,
        past: &str,
        present: &str,
        dtype: DType,
        shape: impl IntoIterator<Item = D>,
        axis: usize,
    ) -> Val<'g> {
        let i = self.inner.borrow().graph.states.len() as u32;
        let value = self.value(Type::new(dtype, shape), Def::State(i));
        let state = State { past_name: past.into(), present_name: present.into(), past: value, axis };
        self.inner.borrow_mut().graph.states.push(state);
        Val { g: self, id: value }
    }

    /// Declares an output.
    pub fn output(&'g self, name: &str, v: Val<'g>) {
        self.inner.borrow_mut().graph.outputs.push(Port { name: name.into(), value: v.id });
    }

    /// A value known at compile time. Equal literals are one value.
    pub fn literal(&'g self, l: Literal) -> Val<'g> {
        let key = (l.dtype, l.shape.clone(), l.data.iter().map(|v| v.to_bits()).collect());
        if let Some(id) = self.inner.borrow().literals.get(&key) {
            return Val { g: self, id: *id };
        }
        let id = self.value(l.ty(), Def::Literal(l));
        self.inner.borrow_mut().literals.insert(key, id);
        Val { g: self, id }
    }

    /// An `f32` vector.
    pub fn floats(&'g self, data: impl IntoIterator<Item = f64>) -> Val<'g> {
        self.literal(Literal::vector(DType::F32, data.into_iter().collect()))
    }

    /// The value of weight `name`, which the program's table describes.
    pub fn weight_value(&'g self, name: &str, ty: Type) -> Val<'g> {
        if let Some(id) = self.inner.borrow().weight_values.get(name) {
            return Val { g: self, id: *id };
        }
        let id = self.value(ty, Def::Weight(name.into()));
        self.inner.borrow_mut().weight_values.insert(name.into(), id);
        Val { g: self, id }
    }

    /// The checkpoint tensor at `w`, which must have `shape`.
    #[track_caller]
    pub fn weight(&'g self, w: W<'g>, shape: &[usize]) -> Val<'g> {
        self.weight_as(w, shape, shape)
    }

    /// The checkpoint tensor at `w`, which must have shape `stored`, seen as `shape` (same number of rows).
    #[track_caller]
    pub fn weight_as(&'g self, w: W<'g>, stored: &[usize], shape: &[usize]) -> Val<'g> {
        match self.source(w, stored) {
            Ok(mut def) => {
                if stored != shape {
                    def = WeightDef { recipe: Recipe::Reshape(Box::new(def.recipe), shape.into()), shape: shape.into(), ..def };
                }
                self.define(&w.path(), def)
            }
            Err(message) => self.fail(message),
        }
    }

    /// The checkpoint tensor at `w`, which must have `shape`, in f32 whatever its type: for tables that take part in arithmetic
    /// (position embeddings, scalars) rather than in matrix products.
    #[track_caller]
    pub fn table(&'g self, w: W<'g>, shape: &[usize]) -> Val<'g> {
        match self.source(w, shape) {
            Ok(def) if def.dtype == DType::F32 => self.define(&w.path(), def),
            Ok(def) => self.define(&format!("{}.f32", w.path()), def.cast(DType::F32)),
            Err(message) => self.fail(message),
        }
    }

    /// The checkpoint matrix `[k, n]` at `w` as the weight `[n, k]` of a linear layer.
    #[track_caller]
    pub fn transposed(&'g self, w: W<'g>, [k, n]: [usize; 2]) -> Val<'g> {
        match self.source(w, &[k, n]) {
            Ok(def) => {
                let def = WeightDef { shape: vec![n, k], recipe: Recipe::Transpose(Box::new(def.recipe), k), ..def };
                self.define(&format!("{}.T", w.path()), def)
            }
            Err(message) => self.fail(message),
        }
    }

    /// The checkpoint tensors at `w / i / part` for `i` in `0..count`, each of `shape`, as one `[count, ...shape]` named
    /// `w / part`.
    #[track_caller]
    pub fn stacked(&'g self, w: W<'g>, part: &str, count: usize, shape: &[usize]) -> Val<'g> {
        let one: Vec<usize> = std::iter::once(1).chain(shape.iter().copied()).collect();
        let parts: Vec<WeightDef> = match (0..count).map(|i| self.source(w / i / part, shape)).collect() {
            Ok(parts) => parts,
            Err(message) => return self.fail(message),
        };
        let dtype = parts.first().map_or(DType::F32, |def| def.dtype);
        let recipe = |def: WeightDef| {
            let recipe = Recipe::Reshape(Box::new(def.recipe), one.clone());
            if def.dtype == dtype { recipe } else { Recipe::Cast(Box::new(recipe), dtype) }
        };
        let recipe = Recipe::Concat(parts.into_iter().map(recipe).collect());
        let shape: Vec<usize> = std::iter::once(count).chain(shape.iter().copied()).collect();
        self.define(&(w / part).path(), WeightDef { dtype, shape, recipe })
    }

    /// The checkpoint tensor at `w` as it is.
    fn source(&'g self, w: W<'g>, shape: &[usize]) -> Result<WeightDef, String> {
        let name = w.path();
        let weights = self.weights.ok_or_else(|| format!("no checkpoint to take '{name}' from"))?;
        match weights.source.resolve(&name, shape)? {
            dtype if dtype.is_float() => Ok(WeightDef { dtype, shape: shape.into(), recipe: Recipe::Source(name.to_string()) }),
            dtype => Err(format!("tensor '{name}' has dtype {dtype}, but a weight must be f32, f16 or bf16")),
        }
    }

    /// The weight `name` of the program's table.
    fn define(&'g self, name: &str, def: WeightDef) -> Val<'g> {
        let ty = Type::new(def.dtype, def.shape.iter().copied());
        if let Some(weights) = self.weights {
            weights.table.borrow_mut().insert(name.into(), def);
        }
        self.weight_value(name, ty)
    }

    /// Keeps the first error; the returned stand-in lets model code go on.
    #[track_caller]
    pub fn fail(&'g self, message: impl Into<String>) -> Val<'g> {
        let location = Location::caller();
        let mut inner = self.inner.borrow_mut();
        if inner.error.is_none() {
            inner.error =
                Some(BuildError { graph: inner.graph.name.clone(), scope: inner.scope.to_string(), message: message.into(), location });
        }
        drop(inner);
        self.literal(Literal::scalar(DType::F32, 0.0))
    }

    /// Applies any op; `N` results.
    #[track_caller]
    pub fn apply<const N: usize>(&'g self, op: impl Into<Op>, args: &[Val<'g>]) -> [Val<'g>; N] {
        let outs = self.apply_op(op.into(), args);
        let first = outs.first().copied();
        std::array::from_fn(|i| outs.get(i).copied().or(first).unwrap_or_else(|| self.fail("op without results")))
    }

    /// Applies any op.
    #[track_caller]
    pub fn apply_op(&'g self, op: Op, args: &[Val<'g>]) -> Vec<Val<'g>> {
        if self.inner.borrow().error.is_some() {
            // After the first error types mean nothing; do not report consequences.
            return vec![args.first().copied().unwrap_or_else(|| self.fail("")); 1];
        }
        let types: Vec<Type> = args.iter().map(|a| a.ty()).collect();
        let types = match op.infer(&types) {
            Ok(t) => t,
            Err(why) => {
                let shown: Vec<String> = types.iter().map(Type::to_string).collect();
                return vec![self.fail(format!("{}({}): {why}", op.name(), shown.join(", ")))];
            }
        };
        let node = NodeId(self.inner.borrow().graph.nodes.len() as u32);
        let outs: Vec<ValueId> = types.into_iter().enumerate().map(|(i, t)| self.value(t, Def::Node(node, i as u32))).collect();
        let mut inner = self.inner.borrow_mut();
        let scope = inner.scope.to_string();
        inner.graph.nodes.push(Node { op, args: args.iter().map(|a| a.id).collect(), outs: outs.clone(), scope });
        outs.into_iter().map(|id| Val { g: self, id }).collect()
    }

    #[track_caller]
    fn one(&'g self, op: impl Into<Op>, args: &[Val<'g>]) -> Val<'g> {
        self.apply_op(op.into(), args)[0]
    }

    // Elementwise.

    /// See [`Unary`].
    #[track_caller]
    pub fn unary(&'g self, f: Unary, x: Val<'g>) -> Val<'g> {
        self.one(Elementwise1 { f }, &[x])
    }

    /// See [`Binary`].
    #[track_caller]
    pub fn binary(&'g self, f: Binary, a: Val<'g>, b: Val<'g>) -> Val<'g> {
        self.one(Elementwise2 { f }, &[a, b])
    }

    /// `if_true` where `condition` holds, else `if_false`.
    #[track_caller]
    pub fn select(&'g self, condition: Val<'g>, if_true: Val<'g>, if_false: Val<'g>) -> Val<'g> {
        self.one(Select {}, &[condition, if_true, if_false])
    }

    /// Conversion; no node if the type is right already.
    #[track_caller]
    pub fn cast(&'g self, x: Val<'g>, dtype: DType) -> Val<'g> {
        if x.ty().dtype == dtype { x } else { self.one(Cast { dtype }, &[x]) }
    }

    // Shapes and indices.

    /// `i64[len]` = 0, 1, ...
    #[track_caller]
    pub fn iota(&'g self, len: impl Into<Dim>) -> Val<'g> {
        self.one(Iota { len: len.into() }, &[])
    }

    /// The value of a dim as `i64[]`.
    #[track_caller]
    pub fn dim(&'g self, dim: impl Into<Dim>) -> Val<'g> {
        self.one(DimValue { dim: dim.into() }, &[])
    }

    /// Same elements, another shape.
    #[track_caller]
    pub fn reshape<D: Into<Dim>>(&'g self, x: Val<'g>, shape: impl IntoIterator<Item = D>) -> Val<'g> {
        let shape: Vec<Dim> = shape.into_iter().map(Into::into).collect();
        if x.ty().shape == shape { x } else { self.one(Reshape { shape }, &[x]) }
    }

    /// Inserts an axis of length 1.
    #[track_caller]
    pub fn unsqueeze(&'g self, x: Val<'g>, axis: usize) -> Val<'g> {
        let mut shape = x.ty().shape;
        shape.insert(axis.min(shape.len()), 1.into());
        self.reshape(x, shape)
    }

    /// Axis `i` of the result is axis `perm[i]` of `x`.
    #[track_caller]
    pub fn transpose(&'g self, x: Val<'g>, perm: &[usize]) -> Val<'g> {
        self.one(Transpose { perm: perm.into() }, &[x])
    }

    /// NumPy broadcast to `shape`.
    #[track_caller]
    pub fn broadcast(&'g self, x: Val<'g>, shape: Vec<Dim>) -> Val<'g> {
        if x.ty().shape == shape { x } else { self.one(Broadcast { shape }, &[x]) }
    }

    /// Values joined along `axis`.
    #[track_caller]
    pub fn concat(&'g self, xs: &[Val<'g>], axis: usize) -> Val<'g> {
        self.one(Concat { axis }, xs)
    }

    /// `len` elements of `axis` from `start`.
    #[track_caller]
    pub fn slice(&'g self, x: Val<'g>, axis: usize, start: impl Into<Dim>, len: impl Into<Dim>) -> Val<'g> {
        self.one(Slice { axis, start: start.into(), len: len.into() }, &[x])
    }

    /// Elements of `axis` chosen by `index i64[...]`.
    #[track_caller]
    pub fn gather(&'g self, x: Val<'g>, index: Val<'g>, axis: usize) -> Val<'g> {
        self.one(Gather { axis }, &[x, index])
    }

    /// See [`Reduce`].
    #[track_caller]
    pub fn reduce(&'g self, f: Reduce, x: Val<'g>, axes: &[usize]) -> Val<'g> {
        self.one(ReduceOp { f, axes: axes.into() }, &[x])
    }

    /// Running sum, including the element itself.
    #[track_caller]
    pub fn cumsum(&'g self, x: Val<'g>, axis: usize) -> Val<'g> {
        self.one(CumSum { axis }, &[x])
    }

    // Neural network ops.

    /// Batched matrix product.
    #[track_caller]
    pub fn matmul(&'g self, a: Val<'g>, b: Val<'g>) -> Val<'g> {
        self.one(MatMul {}, &[a, b])
    }

    /// `x wᵀ` with the weight `[out_features, in]` at `w / "weight"`.
    #[track_caller]
    pub fn linear(&'g self, x: Val<'g>, w: W<'g>, out_features: usize) -> Val<'g> {
        let weight = self.linear_weight(x, w, out_features);
        self.one(Linear::default(), &[x, weight])
    }

    /// `x wᵀ + b` with weights at `w / "weight"` and `w / "bias"`.
    #[track_caller]
    pub fn linear_bias(&'g self, x: Val<'g>, w: W<'g>, out_features: usize) -> Val<'g> {
        let weight = self.linear_weight(x, w, out_features);
        let bias = self.weight(w / "bias", &[out_features]);
        self.one(Linear::default(), &[x, weight, bias])
    }

    #[track_caller]
    fn linear_weight(&'g self, x: Val<'g>, w: W<'g>, out_features: usize) -> Val<'g> {
        match x.ty().shape.last().and_then(Dim::as_const) {
            Some(k) => self.weight(w / "weight", &[out_features, k as usize]),
            None => self.fail(format!("linear: the last dim of {} must be a number", x.ty())),
        }
    }

    /// [`Linear`] with given weights.
    #[track_caller]
    pub fn linear_with(&'g self, x: Val<'g>, weight: Val<'g>, bias: Option<Val<'g>>) -> Val<'g> {
        self.one(Linear::default(), &[x, weight].into_iter().chain(bias).collect::<Vec<_>>())
    }

    /// Rows of the table at `w / "weight"`, `[entries, width]`, chosen by `ids`.
    #[track_caller]
    pub fn embedding(&'g self, ids: Val<'g>, w: W<'g>, entries: usize, width: usize) -> Val<'g> {
        let table = self.weight(w / "weight", &[entries, width]);
        self.one(Embedding {}, &[table, ids])
    }

    /// Layer normalisation over the last axis with `w / "weight"` and `w / "bias"`.
    #[track_caller]
    pub fn layer_norm(&'g self, x: Val<'g>, w: W<'g>, eps: f64) -> Val<'g> {
        let n = x.ty().shape.last().and_then(Dim::as_const).unwrap_or(1) as usize;
        let (weight, bias) = (self.weight(w / "weight", &[n]), self.weight(w / "bias", &[n]));
        self.one(LayerNorm { eps }, &[x, weight, bias])
    }

    /// Root-mean-square normalisation over the last axis with `w / "weight"`.
    #[track_caller]
    pub fn rms_norm(&'g self, x: Val<'g>, w: W<'g>, eps: f64) -> Val<'g> {
        let n = x.ty().shape.last().and_then(Dim::as_const).unwrap_or(1) as usize;
        let weight = self.weight(w / "weight", &[n]);
        self.one(RmsNorm { eps }, &[x, weight])
    }

    /// `[..., s, heads * d]` to `[..., heads, s, d]`.
    #[track_caller]
    pub fn split_heads(&'g self, x: Val<'g>, heads: usize) -> Val<'g> {
        self.one(SplitHeads { heads }, &[x])
    }

    /// `[..., heads, s, d]` to `[..., s, heads * d]`.
    #[track_caller]
    pub fn merge_heads(&'g self, x: Val<'g>) -> Val<'g> {
        self.one(MergeHeads {}, &[x])
    }

    /// See [`Rotary`].
    #[track_caller]
    pub fn rotary(&'g self, x: Val<'g>, (cos, sin): (Val<'g>, Val<'g>)) -> Val<'g> {
        self.one(Rotary {}, &[x, cos, sin])
    }

    /// See [`Attention`]; `mask` is the operand that the kind asks for.
    #[track_caller]
    pub fn attention(&'g self, q: Val<'g>, k: Val<'g>, v: Val<'g>, scale: f64, kind: Mask, mask: Option<Val<'g>>) -> Val<'g> {
        self.one(Attention { scale, mask: kind, bf16: false }, &[q, k, v].into_iter().chain(mask).collect::<Vec<_>>())
    }

    /// See [`GridPositions`]: row, column and segment of each of `rows` patches.
    #[track_caller]
    pub fn grid_positions(&'g self, grid: Val<'g>, rows: impl Into<Dim>, merge: usize) -> [Val<'g>; 3] {
        self.apply(GridPositions { rows: rows.into(), merge }, &[grid])
    }

    /// See [`Rotary2d`]: cos and sin.
    #[track_caller]
    pub fn rotary_2d(&'g self, row: Val<'g>, col: Val<'g>, head_dim: usize, theta: f64) -> (Val<'g>, Val<'g>) {
        let [cos, sin] = self.apply(Rotary2d { head_dim, theta }, &[row, col]);
        (cos, sin)
    }

    /// See [`Mrope`]: cos and sin.
    #[track_caller]
    pub fn mrope(
        &'g self,
        position_ids: Val<'g>,
        head_dim: usize,
        theta: f64,
        section: [usize; 3],
        interleaved: bool,
    ) -> (Val<'g>, Val<'g>) {
        let [cos, sin] = self.apply(Mrope { head_dim, theta, section, interleaved }, &[position_ids]);
        (cos, sin)
    }

    /// See [`WindowOrder`]: patch and window of each place, and place of each of `tokens`.
    #[track_caller]
    pub fn window_order(&'g self, grid: Val<'g>, tokens: impl Into<Dim>, merge: usize, side: usize) -> [Val<'g>; 3] {
        self.apply(WindowOrder { tokens: tokens.into(), merge, side }, &[grid])
    }

    /// See [`NtkRope`]: cos and sin.
    #[track_caller]
    pub fn ntk_rope(&'g self, op: NtkRope, position_ids: Val<'g>, prompt_length: Val<'g>) -> (Val<'g>, Val<'g>) {
        let [cos, sin] = self.apply(op, &[position_ids, prompt_length]);
        (cos, sin)
    }

    /// See [`LogN`].
    #[track_caller]
    pub fn log_n(&'g self, position_ids: Val<'g>, trained: usize) -> Val<'g> {
        self.one(LogN { trained }, &[position_ids])
    }

    /// See [`StretchedPositions`]: the table `[side², width]` over pictures of `rows` patches.
    #[track_caller]
    pub fn stretched_positions(&'g self, table: Val<'g>, grid: Val<'g>, rows: impl Into<Dim>, merge: usize, side: usize) -> Val<'g> {
        self.one(StretchedPositions { rows: rows.into(), merge, side }, &[table, grid])
    }

    /// See [`Rope`]: cos and sin.
    #[track_caller]
    pub fn rope(&'g self, position_ids: Val<'g>, head_dim: usize, theta: f64, scaling: RopeScaling) -> (Val<'g>, Val<'g>) {
        let [cos, sin] = self.apply(Rope { head_dim, theta, scaling }, &[position_ids]);
        (cos, sin)
    }

    /// See [`MergeFeatures`].
    #[track_caller]
    pub fn merge_features(&'g self, embeds: Val<'g>, here: Val<'g>, features: Val<'g>) -> Val<'g> {
        self.one(MergeFeatures {}, &[embeds, here, features])
    }

    /// See [`Conv2d`]: with the kernel `[out, in, side, side]` at `w / "weight"`, and the bias at `w / "bias"` if it has one.
    #[track_caller]
    pub fn conv2d(&'g self, x: Val<'g>, w: W<'g>, [out, side]: [usize; 2], stride: usize, padding: usize, bias: bool) -> Val<'g> {
        let Some(channels) = x.dim(1).as_const() else { return self.fail("conv2d: the number of channels must be known") };
        // Some targets run convolutions as arithmetic.
        let kernel = self.table(w / "weight", &[out, channels as usize, side, side]);
        let bias = bias.then(|| self.table(w / "bias", &[out]));
        self.one(Conv2d { stride, padding }, &[x, kernel].into_iter().chain(bias).collect::<Vec<_>>())
    }

    /// See [`BatchNorm`]: with `w / "weight"`, `w / "bias"`, `w / "running_mean"` and `w / "running_var"`.
    #[track_caller]
    pub fn batch_norm(&'g self, x: Val<'g>, w: W<'g>, eps: f64) -> Val<'g> {
        let n = x.dim(1).as_const().unwrap_or(1) as usize;
        let [weight, bias, mean, var] = ["weight", "bias", "running_mean", "running_var"].map(|name| self.table(w / name, &[n]));
        self.one(BatchNorm { eps }, &[x, weight, bias, mean, var])
    }

    /// See [`ResizeWeights`].
    #[track_caller]
    pub fn resize_weights(&'g self, size: Val<'g>, rows: impl Into<Dim>, from: usize, filter: Filter) -> Val<'g> {
        self.one(ResizeWeights { from, rows: rows.into(), filter }, &[size])
    }

    /// See [`TopK`].
    #[track_caller]
    pub fn top_k(&'g self, x: Val<'g>, k: usize) -> Val<'g> {
        self.one(TopK { k }, &[x])
    }

    /// See [`Moe`]; the weights of the experts are given as `[gate, up, down]`.
    #[track_caller]
    pub fn moe(&'g self, x: Val<'g>, experts: Val<'g>, weights: Val<'g>, [gate, up, down]: [Val<'g>; 3], act: Unary) -> Val<'g> {
        self.one(Moe { act, dynamic: false }, &[x, experts, weights, gate, up, down])
    }

    /// See [`Route`]: experts and their weights.
    #[track_caller]
    pub fn route(&'g self, route: Route, logits: Val<'g>, bias: Option<Val<'g>>) -> (Val<'g>, Val<'g>) {
        let [experts, weights] = self.apply(route, &[logits].into_iter().chain(bias).collect::<Vec<_>>());
        (experts, weights)
    }

    /// `new` appended to a state.
    #[track_caller]
    pub fn append(&'g self, past: Val<'g>, new: Val<'g>, axis: usize) -> Val<'g> {
        self.one(Append { axis, keep: DType::F32 }, &[past, new])
    }
}

macro_rules! operator {
    ($trait:ident, $method:ident, $f:ident) => {
        impl<'g> $trait for Val<'g> {
            type Output = Val<'g>;
            #[track_caller]
            fn $method(self, o: Val<'g>) -> Val<'g> {
                self.g.binary(Binary::$f, self, o)
            }
        }
        /// With a scalar of the value's own dtype.
        impl<'g> $trait<f64> for Val<'g> {
            type Output = Val<'g>;
            #[track_caller]
            fn $method(self, o: f64) -> Val<'g> {
                let o = self.g.literal(Literal::scalar(self.ty().dtype, o));
                self.g.binary(Binary::$f, self, o)
            }
        }
    };
}
operator!(Add, add, Add);
operator!(Sub, sub, Sub);
operator!(Mul, mul, Mul);
operator!(Div, div, Div);

/// A part of a graph and what stands for it. Where node `at` is, `build` makes new values of `takes`, which must be defined
/// before; they stand for `gives`, which must not be used before, and have their types. Nodes whose results are all replaced
/// are gone.
pub struct Patch {
    /// Where the new nodes stand.
    pub at: NodeId,
    /// Values that the new nodes need.
    pub takes: Vec<ValueId>,
    /// Values that the new ones replace.
    pub gives: Vec<ValueId>,
    /// Makes the new nodes.
    pub build: Replacement,
}

/// Makes nodes of the values that a patch takes; returns the values that it gives.
pub type Replacement = Box<dyn for<'g> Fn(&'g Builder<'g>, &[Val<'g>]) -> Vec<Val<'g>>>;

/// Copies a graph with patches in place of what they replace.
///
/// # Errors
/// What the patches' builder calls reported, or a patch that does not fit.
pub fn patch(graph: &Graph, patches: &[Patch]) -> Result<Graph, BuildError> {
    let b = Builder::new(&graph.name, None);
    copy(graph, &b, patches, &mut |_, _, _| None);
    b.finish()
}

/// Copies the nodes and states of a graph into `b`, to make a graph of another interface of it. `input` makes what stands for each
/// input that something uses, in order; returns what stands for the outputs, in order.
pub fn inline<'g>(graph: &Graph, b: &'g Builder<'g>, mut input: impl FnMut(&str, &Type) -> Val<'g>) -> Vec<Val<'g>> {
    let used: HashSet<ValueId> = graph.nodes().flat_map(|(_, n)| &n.args).copied().chain(graph.outputs.iter().map(|o| o.value)).collect();
    let inputs = graph.inputs.iter().filter(|p| used.contains(&p.value));
    let map = inputs.map(|p| (p.value, input(&p.name, graph.ty(p.value)))).collect();
    copy_nodes(graph, b, map, &[], &mut |_, _, _| None)
}

/// Copies a graph through `rewrite`, which may replace a node by others: it gets the node and its new operands and returns
/// the values that stand for its results, or `None` to keep the node.
///
/// # Errors
/// What the rewrite's builder calls reported.
pub fn rewrite(
    graph: &Graph,
    mut rewrite: impl for<'g> FnMut(&'g Builder<'g>, &Node, &[Val<'g>]) -> Option<Vec<Val<'g>>>,
) -> Result<Graph, BuildError> {
    let b = Builder::new(&graph.name, None);
    copy(graph, &b, &[], &mut rewrite);
    b.finish()
}

fn copy<'g>(
    graph: &Graph,
    b: &'g Builder<'g>,
    patches: &[Patch],
    rewrite: &mut impl FnMut(&'g Builder<'g>, &Node, &[Val<'g>]) -> Option<Vec<Val<'g>>>,
) {
    let input = |p: &Port| (p.value, b.input(&p.name, graph.ty(p.value).dtype, graph.ty(p.value).shape.iter()));
    let outputs = copy_nodes(graph, b, graph.inputs.iter().map(input).collect(), patches, rewrite);
    graph.outputs.iter().zip(outputs).for_each(|(o, v)| b.output(&o.name, v));
}

/// As [`copy`], with the inputs in `map`; returns the outputs.
fn copy_nodes<'g>(
    graph: &Graph,
    b: &'g Builder<'g>,
    mut map: HashMap<ValueId, Val<'g>>,
    patches: &[Patch],
    rewrite: &mut impl FnMut(&'g Builder<'g>, &Node, &[Val<'g>]) -> Option<Vec<Val<'g>>>,
) -> Vec<Val<'g>> {
    let replaced: HashSet<ValueId> = patches.iter().flat_map(|p| &p.gives).copied().collect();
    for s in &graph.states {
        let t = graph.ty(s.past);
        map.insert(s.past, b.state(&s.past_name, &s.present_name, t.dtype, t.shape.iter(), s.axis));
    }
    let resolve = |v: ValueId, map: &mut HashMap<ValueId, Val<'g>>| {
        *map.entry(v).or_insert_with(|| match graph.def(v) {
            Def::Weight(name) => b.weight_value(name, graph.ty(v).clone()),
            Def::Literal(l) => b.literal(l.clone()),
            Def::Input(_) | Def::State(_) | Def::Node(..) => b.fail(format!("value %{} is used before it is defined", v.0)),
        })
    };
    for (id, node) in graph.nodes() {
        let _scope = b.scope(&node.scope);
        for p in patches.iter().filter(|p| p.at == id) {
            let takes: Vec<Val<'g>> = p.takes.iter().map(|v| resolve(*v, &mut map)).collect();
            let made = (p.build)(b, &takes);
            let fits = made.iter().map(|v| v.ty()).eq(p.gives.iter().map(|v| graph.ty(*v).clone()));
            if !fits && b.inner.borrow().error.is_none() {
                b.fail("a patch gives other types than what it replaces");
            }
            map.extend(p.gives.iter().copied().zip(made));
        }
        if !node.outs.is_empty() && node.outs.iter().all(|o| replaced.contains(o)) {
            continue;
        }
        let args: Vec<Val<'g>> = node.args.iter().map(|a| resolve(*a, &mut map)).collect();
        let outs = rewrite(b, node, &args).unwrap_or_else(|| b.apply_op(node.op.clone(), &args));
        if outs.len() != node.outs.len() && b.inner.borrow().error.is_none() {
            b.fail(format!("{} has {} results, its replacement {}", node.op.name(), node.outs.len(), outs.len()));
        }
        map.extend(node.outs.iter().copied().zip(outs).filter(|(v, _)| !replaced.contains(v)));
    }
    graph.outputs.iter().map(|o| resolve(o.value, &mut map)).collect()
}
