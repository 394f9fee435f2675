//! Programs, graphs, nodes and values. Construction is [`crate::Builder`]'s job; a graph is immutable afterwards, and passes
//! build a new one.

use crate::{DType, Literal, Op, Symbol, Type, weights::WeightDef};
use petgraph::visit as pv;
use std::collections::BTreeMap;

/// Index of a value in its graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ValueId(pub(crate) u32);

/// Index of a node in its graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub(crate) u32);

impl ValueId {
    /// Position in [`Graph::values`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl NodeId {
    /// Position in [`Graph::nodes`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A model: graphs over shared weights.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Program {
    /// `model_type` of the checkpoint.
    pub name: String,
    /// Symbols of all graphs.
    pub symbols: Vec<Symbol>,
    /// Graphs, in the order a request runs them.
    pub graphs: Vec<Graph>,
    /// Weights by name.
    pub weights: BTreeMap<String, WeightDef>,
}

impl Program {
    /// Replaces every weight's definition; the values that stand for a weight follow its type.
    pub fn map_weights(&mut self, mut f: impl FnMut(&str, &WeightDef) -> WeightDef) {
        for (name, def) in &mut self.weights {
            *def = f(name, def);
        }
        for (ty, def) in self.graphs.iter_mut().flat_map(|g| &mut g.values) {
            if let Def::Weight(name) = def
                && let Some(w) = self.weights.get(name)
            {
                *ty = Type::new(w.dtype, w.shape.iter().copied());
            }
        }
    }
}

/// A graph: nodes in execution order over an arena of values.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Graph {
    /// Entry name.
    pub name: String,
    /// Inputs.
    pub inputs: Vec<Port>,
    /// Outputs.
    pub outputs: Vec<Port>,
    /// States (KV cache).
    pub states: Vec<State>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) values: Vec<(Type, Def)>,
}

/// A named input or output.
#[derive(Clone, Debug, PartialEq)]
pub struct Port {
    /// Name, as in the Hugging Face forward signature.
    pub name: String,
    /// The value.
    pub value: ValueId,
}

/// A tensor that is kept between runs. Exactly one node reads `past`, and appends to it ([`crate::ops::OpDef::APPENDS`]).
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// `past_key_values.0.key`
    pub past_name: String,
    /// `present.0.key`
    pub present_name: String,
    /// The value before the run.
    pub past: ValueId,
    /// Axis that grows.
    pub axis: usize,
}

/// What defines a value.
#[derive(Clone, Debug, PartialEq)]
pub enum Def {
    /// Input `i` of the graph.
    Input(u32),
    /// `past` of state `i`.
    State(u32),
    /// A weight of the program, by name.
    Weight(String),
    /// A value known at compile time.
    Literal(Literal),
    /// Result `1` of node `0`.
    Node(NodeId, u32),
}

/// An op applied to values.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// What is computed.
    pub op: Op,
    /// Operands.
    pub args: Vec<ValueId>,
    /// Results.
    pub outs: Vec<ValueId>,
    /// Where in the model it stands: `visual.blocks.0`. May be empty.
    pub scope: String,
}

impl Graph {
    /// Nodes in execution order.
    pub fn nodes(&self) -> impl ExactSizeIterator<Item = (NodeId, &Node)> {
        self.nodes.iter().enumerate().map(|(i, n)| (NodeId(i as u32), n))
    }

    /// A node.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    /// All values: type and definition, indexed by [`ValueId::index`].
    pub fn values(&self) -> impl ExactSizeIterator<Item = (ValueId, &Type, &Def)> {
        self.values.iter().enumerate().map(|(i, (t, d))| (ValueId(i as u32), t, d))
    }

    /// Type of a value.
    pub fn ty(&self, v: ValueId) -> &Type {
        &self.values[v.index()].0
    }

    /// Definition of a value.
    pub fn def(&self, v: ValueId) -> &Def {
        &self.values[v.index()].1
    }

    /// The node that defines a value, if one does.
    pub fn producer(&self, v: ValueId) -> Option<NodeId> {
        match self.def(v) {
            Def::Node(n, _) => Some(*n),
            _ => None,
        }
    }

    /// The value of a state after the run: the result of the node that appends to its `past`.
    pub fn present(&self, state: &State) -> Option<ValueId> {
        let node = self.nodes.iter().find(|n| n.args.contains(&state.past))?;
        let next = node.op.appends().iter().find(|(operand, _)| node.args.get(*operand) == Some(&state.past));
        next.and_then(|(_, result)| node.outs.get(*result)).copied()
    }

    /// The type that a state is kept in: what its `append` says.
    pub fn kept(&self, state: &State) -> DType {
        let append = self.nodes.iter().find(|n| n.args.contains(&state.past)).map(|n| &n.op);
        match append {
            Some(Op::Append(a)) if a.keep != DType::F32 => a.keep,
            _ => self.ty(state.past).dtype,
        }
    }

    /// Nodes whose results leave the graph: through outputs and states.
    pub fn roots(&self) -> impl Iterator<Item = NodeId> {
        let states = self.states.iter().filter_map(|s| self.present(s));
        self.outputs.iter().map(|o| o.value).chain(states).filter_map(|v| self.producer(v))
    }

    /// The graph with states of other types. What reads them must follow.
    pub fn with_states(&self, of: impl Fn(&State, &Type) -> Type) -> Graph {
        let mut graph = self.clone();
        for s in &self.states {
            graph.values[s.past.index()].0 = of(s, self.ty(s.past));
        }
        graph
    }

    /// Every use of a value replaced by the use of another one, of the same type and defined no later.
    pub fn substitute(&self, by: impl Fn(ValueId) -> ValueId) -> Graph {
        let mut graph = self.clone();
        let uses = graph.nodes.iter_mut().flat_map(|n| &mut n.args).chain(graph.outputs.iter_mut().map(|o| &mut o.value));
        uses.for_each(|v| *v = by(*v));
        graph
    }

    /// The graph of the nodes that `keep` names, whose operands it must keep too; values that nothing uses any more are gone.
    pub fn retain(&self, keep: impl Fn(NodeId) -> bool) -> Graph {
        let kept: Vec<&Node> = self.nodes().filter(|(id, _)| keep(*id)).map(|(_, n)| n).collect();
        let mut used = vec![false; self.values.len()];
        let ports = self.inputs.iter().chain(&self.outputs).map(|p| p.value).chain(self.states.iter().map(|s| s.past));
        for v in kept.iter().flat_map(|n| n.args.iter().chain(&n.outs)).copied().chain(ports) {
            used[v.index()] = true;
        }
        let mut map = vec![ValueId(0); self.values.len()];
        let mut values = vec![];
        for (i, value) in self.values.iter().enumerate().filter(|(i, _)| used[*i]) {
            map[i] = ValueId(values.len() as u32);
            values.push(value.clone());
        }
        let at = |v: &ValueId| map[v.index()];
        let port = |p: &Port| Port { name: p.name.clone(), value: at(&p.value) };
        for (n, node) in kept.iter().enumerate() {
            for o in &node.outs {
                if let Def::Node(id, _) = &mut values[at(o).index()].1 {
                    *id = NodeId(n as u32);
                }
            }
        }
        Graph {
            name: self.name.clone(),
            inputs: self.inputs.iter().map(port).collect(),
            outputs: self.outputs.iter().map(port).collect(),
            states: self.states.iter().map(|s| State { past: at(&s.past), ..s.clone() }).collect(),
            nodes: kept
                .iter()
                .map(|n| Node { args: n.args.iter().map(at).collect(), outs: n.outs.iter().map(at).collect(), ..(*n).clone() })
                .collect(),
            values,
        }
    }

    /// Producer to consumer, one edge per operand.
    fn edges(&self) -> impl Iterator<Item = Edge> {
        self.nodes().flat_map(move |(to, n)| {
            n.args.iter().enumerate().filter_map(move |(i, a)| Some(Edge { from: self.producer(*a)?, to, operand: i }))
        })
    }
}

/// An edge of the graph as petgraph sees it: from the producer of operand `operand` to its consumer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Edge {
    from: NodeId,
    to: NodeId,
    operand: usize,
}

// petgraph reads a graph through its visit traits: nodes are nodes, an edge goes from each operand's producer to its consumer.
impl pv::GraphBase for Graph {
    type NodeId = NodeId;
    type EdgeId = (NodeId, usize);
}

impl pv::GraphProp for Graph {
    type EdgeType = petgraph::Directed;
}

impl pv::Data for Graph {
    type NodeWeight = Node;
    type EdgeWeight = usize;
}

impl pv::NodeIndexable for Graph {
    fn node_bound(&self) -> usize {
        self.nodes.len()
    }
    fn to_index(&self, a: NodeId) -> usize {
        a.index()
    }
    fn from_index(&self, i: usize) -> NodeId {
        NodeId(i as u32)
    }
}

impl pv::Visitable for Graph {
    type Map = std::collections::HashSet<NodeId>;
    fn visit_map(&self) -> Self::Map {
        Self::Map::new()
    }
    fn reset_map(&self, map: &mut Self::Map) {
        map.clear();
    }
}

impl<'a> pv::IntoNodeIdentifiers for &'a Graph {
    type NodeIdentifiers = Box<dyn Iterator<Item = NodeId> + 'a>;
    fn node_identifiers(self) -> Self::NodeIdentifiers {
        Box::new((0..self.nodes.len() as u32).map(NodeId))
    }
}

/// A node as petgraph sees it.
impl<'a> pv::IntoNodeReferences for &'a Graph {
    type NodeRef = (NodeId, &'a Node);
    type NodeReferences = Box<dyn Iterator<Item = (NodeId, &'a Node)> + 'a>;
    fn node_references(self) -> Self::NodeReferences {
        Box::new(self.nodes())
    }
}

impl pv::EdgeRef for Edge {
    type NodeId = NodeId;
    type EdgeId = (NodeId, usize);
    type Weight = usize;
    fn source(&self) -> NodeId {
        self.from
    }
    fn target(&self) -> NodeId {
        self.to
    }
    fn weight(&self) -> &usize {
        &self.operand
    }
    fn id(&self) -> (NodeId, usize) {
        (self.to, self.operand)
    }
}

impl<'a> pv::IntoEdgeReferences for &'a Graph {
    type EdgeRef = Edge;
    type EdgeReferences = Box<dyn Iterator<Item = Edge> + 'a>;
    fn edge_references(self) -> Self::EdgeReferences {
        Box::new(self.edges())
    }
}

/// Neighbours are the producers of a node's operands: walks go from results to what they need.
impl<'a> pv::IntoNeighbors for &'a Graph {
    type Neighbors = Box<dyn Iterator<Item = NodeId> + 'a>;
    fn neighbors(self, n: NodeId) -> Self::Neighbors {
        Box::new(self.node(n).args.iter().filter_map(|a| self.producer(*a)))
    }
}
