//! States made longer or shorter where they are: by graphs of one node on their own provider, so that on a GPU no value comes to the
//! host.

use super::{Device, tensor};
use ort::{
    Result,
    editor::{Graph, Model, Node, ONNX_DOMAIN, Opset},
    operator::Attribute,
    session::{IoBinding, Session},
    value::{DynTensor, Outlet, Shape, SymbolicDimensions, TensorElementType, ValueType},
};

/// Version of the operators.
const OPSET: u32 = 21;

#[derive(Clone, Copy, PartialEq)]
enum Change {
    /// Twice as long: the state after itself.
    Double,
    /// Its beginning.
    Keep,
}

/// What a graph is for: the change, the element type, the number of axes and the axis that changes.
type Key = (Change, TensorElementType, usize, usize);

/// The graphs that were needed so far.
pub(super) struct Resizer {
    sessions: Vec<(Key, Session)>,
}

impl Resizer {
    pub(super) fn new() -> Self {
        Self { sessions: vec![] }
    }

    /// A copy with twice the positions, the latter half of which mean nothing.
    pub(super) fn double(&mut self, device: &Device, state: &DynTensor, axis: usize) -> Result<DynTensor> {
        self.run(device, Change::Double, state, axis, |_| Ok(()))
    }

    /// A copy of the first `len` positions.
    pub(super) fn keep(&mut self, device: &Device, state: &DynTensor, axis: usize, len: usize) -> Result<DynTensor> {
        self.run(device, Change::Keep, state, axis, |binding| {
            for (name, value) in [("from", 0), ("to", len), ("axis", axis)] {
                binding.bind_input(name, &ort::value::Tensor::from_array(([1], vec![value as i64]))?)?;
            }
            Ok(())
        })
    }

    fn run(
        &mut self,
        device: &Device,
        change: Change,
        state: &DynTensor,
        axis: usize,
        bind: impl FnOnce(&mut IoBinding) -> Result<()>,
    ) -> Result<DynTensor> {
        let key = (change, *state.data_type(), state.shape().len(), axis);
        let at = match self.sessions.iter().position(|(k, _)| *k == key) {
            Some(at) => at,
            None => {
                self.sessions.push((key, session(device, key)?));
                self.sessions.len() - 1
            }
        };
        let session = &mut self.sessions[at].1;
        let mut binding = session.create_binding()?;
        binding.bind_input("state", state)?;
        bind(&mut binding)?;
        binding.bind_output_to_device("changed", &device.memory)?;
        let changed = session.run_binding(&binding)?.remove("changed");
        tensor(changed.ok_or_else(|| ort::Error::new("a graph of one node gave nothing"))?)
    }
}

fn session(device: &Device, (change, ty, rank, axis): Key) -> Result<Session> {
    let outlet = |name: &str, ty, shape: Shape| {
        let dimension_symbols = SymbolicDimensions::empty(shape.len());
        Outlet::new(name, ValueType::Tensor { ty, shape, dimension_symbols })
    };
    let any = || Shape::new(std::iter::repeat_n(-1, rank));
    let places: &[&str] = if change == Change::Keep { &["from", "to", "axis"] } else { &[] };
    let mut graph = Graph::new()?;
    let place = |name: &&str| outlet(name, TensorElementType::Int64, Shape::new([1]));
    graph.set_inputs(std::iter::once(outlet("state", ty, any())).chain(places.iter().map(place)))?;
    graph.set_outputs([outlet("changed", ty, any())])?;
    graph.add_node(match change {
        Change::Double => {
            Node::new("Concat", ONNX_DOMAIN, "double", ["state", "state"], ["changed"], [Attribute::new("axis", axis as i64)?])?
        }
        Change::Keep => Node::new("Slice", ONNX_DOMAIN, "keep", ["state", "from", "to", "axis"], ["changed"], [])?,
    })?;
    let mut model = Model::new([Opset::new(ONNX_DOMAIN, OPSET)?])?;
    model.set_graph(graph)?;
    model.into_session(&device.builder(None)?)
}
