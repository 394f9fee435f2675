//! IR to ONNX, op by op.

use super::{MICROSOFT, block, ir_version, layout, proto, scales, stored_name};
use crate::{
    Error, Result,
    back::{Layout, Place},
    target::onnx::AXES_OPSET,
};
use proto::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto, TensorProto, TensorShapeProto,
    TypeProto, ValueInfoProto, attribute_proto::AttributeType, tensor_proto::DataLocation,
    tensor_shape_proto::dimension::Value as DimField,
};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use vlmc_artifact::{
    Bindings, DimFunction, Scheme,
    program::{Binary, Reduce, Unary},
};
use vlmc_ir::{DType, Def, Dim, Graph, Literal, Node, Op, State, Type, ValueId, Verified, ops::Mask};
use vlmc_passes::Target;

/// One model per graph, by the graph's name, for `target`. `place` tells where a stored weight is.
///
/// # Errors
/// [`Error::Backend`] if the program was not legalised for ONNX.
pub fn emit(target: &Target, program: &Verified, place: &dyn Fn(&str) -> Option<Place>) -> Result<Vec<(String, ModelProto)>> {
    let opset = target.opset.ok_or_else(|| Error::Backend(format!("target '{}' has no ONNX graphs", target.name)))?;
    program
        .graphs
        .iter()
        .map(|g| {
            let mut e = Emitter {
                target,
                opset,
                graph: g,
                place,
                out: GraphProto::default(),
                names: HashMap::new(),
                dims: BTreeMap::new(),
                masks: HashMap::new(),
                lengths: HashMap::new(),
                stored: BTreeSet::new(),
                least: program.symbols.iter().map(|s| (s.name.as_str(), s.min)).collect(),
            };
            e.run().map_err(|why| Error::Backend(format!("{}: {why}", g.name)))?;
            let domain = |name: &str, version| OperatorSetIdProto { domain: Some(name.into()), version: Some(version) };
            let own = e.out.node.iter().any(|n| n.domain() == MICROSOFT).then(|| domain(MICROSOFT, 1));
            let model = ModelProto {
                ir_version: Some(ir_version(opset)),
                producer_name: Some("vlmc".into()),
                producer_version: Some(env!("CARGO_PKG_VERSION").into()),
                opset_import: [domain("", opset)].into_iter().chain(own).collect(),
                graph: Some(e.out),
                ..ModelProto::default()
            };
            Ok((g.name.clone(), model))
        })
        .collect()
}

type Emitted<T = ()> = Result<T, String>;

struct Emitter<'a> {
    target: &'a Target,
    opset: i64,
    graph: &'a Graph,
    place: &'a dyn Fn(&str) -> Option<Place>,
    out: GraphProto,
    names: HashMap<ValueId, String>,
    /// Dims computed so far, as `i64[1]`.
    dims: BTreeMap<Dim, String>,
    /// Masks so far, by their `bool` tensors and number of axes, as what is added to scores.
    masks: HashMap<(ValueId, usize), String>,
    /// Lengths of rows so far, by their masks, as GroupQueryAttention wants them.
    lengths: HashMap<ValueId, [String; 2]>,
    stored: BTreeSet<String>,
    /// The least values of the symbols.
    least: Bindings,
}

fn data_type(d: DType) -> i32 {
    use proto::tensor_proto::DataType as T;
    let t = match d {
        DType::Bool => T::Bool,
        DType::U8 => T::Uint8,
        DType::I8 => T::Int8,
        DType::I32 => T::Int32,
        DType::I64 => T::Int64,
        DType::F16 => T::Float16,
        DType::BF16 => T::Bfloat16,
        DType::F32 => T::Float,
        // Packed codes.
        DType::Quant(_) => T::Uint8,
    };
    t as i32
}

fn value_info(name: &str, ty: &Type) -> ValueInfoProto {
    let dim = |d: &Dim| proto::tensor_shape_proto::Dimension {
        value: Some(d.as_const().map_or_else(|| DimField::DimParam(d.to_string()), DimField::DimValue)),
        ..Default::default()
    };
    let tensor = proto::type_proto::Tensor {
        elem_type: Some(data_type(ty.dtype)),
        shape: Some(TensorShapeProto { dim: ty.shape.iter().map(dim).collect() }),
    };
    let ty = TypeProto { value: Some(proto::type_proto::Value::TensorType(tensor)), ..Default::default() };
    ValueInfoProto { name: Some(name.into()), r#type: Some(ty), ..Default::default() }
}

fn int(name: &str, v: i64) -> AttributeProto {
    AttributeProto { name: Some(name.into()), i: Some(v), r#type: Some(AttributeType::Int as i32), ..Default::default() }
}

fn ints(name: &str, v: impl IntoIterator<Item = usize>) -> AttributeProto {
    let ints = v.into_iter().map(|v| v as i64).collect();
    AttributeProto { name: Some(name.into()), ints, r#type: Some(AttributeType::Ints as i32), ..Default::default() }
}

fn float(name: &str, v: f64) -> AttributeProto {
    AttributeProto { name: Some(name.into()), f: Some(v as f32), r#type: Some(AttributeType::Float as i32), ..Default::default() }
}

fn string(name: &str, v: &str) -> AttributeProto {
    AttributeProto {
        name: Some(name.into()),
        s: Some(v.as_bytes().to_vec()),
        r#type: Some(AttributeType::String as i32),
        ..Default::default()
    }
}

/// Attributes of MoE and QMoE for `softmax(logits) * down(silu(gate x) * up x)` with rows of gate and up in turn.
fn routed(k: usize) -> Vec<AttributeProto> {
    let activation = [string("activation_type", "swiglu"), float("activation_alpha", 1.0), float("activation_beta", 0.0)];
    let rest = [int("swiglu_fusion", 1), int("k", k as i64), int("normalize_routing_weights", 0)];
    activation.into_iter().chain(rest).collect()
}

/// A port that has this very dim, and which of its axes that is.
fn axis_of<'p>(g: &Graph, d: &Dim, mut ports: impl Iterator<Item = (&'p String, ValueId)>) -> Option<(String, usize)> {
    ports.find_map(|(name, v)| Some((name.clone(), g.ty(v).shape.iter().position(|x| x == d)?)))
}

/// A dim of an input that is the sum of `d` and another input's dim.
fn sum_with<'g>(g: &'g Graph, d: &Dim) -> Option<&'g Dim> {
    let dims = || g.inputs.iter().flat_map(|p| &g.ty(p.value).shape);
    dims().find(|x| *x != d && dims().any(|y| *y == *x - d))
}

/// Whether a client may bind one buffer, longer than needed, to past and present of a state: only GroupQueryAttention reads it, which
/// writes in place, and inputs tell how many positions there are.
pub fn in_place(g: &Graph, state: &State) -> bool {
    let mut readers = g.nodes().filter(|(_, n)| n.args.contains(&state.past)).peekable();
    readers.peek().is_some()
        && readers.all(|(_, n)| matches!(n.op, Op::GroupQueryAttention(_)))
        && sum_with(g, &g.ty(state.past).shape[state.axis]).is_some()
}

impl Emitter<'_> {
    fn run(&mut self) -> Emitted {
        let g = self.graph;
        self.out.name = Some(g.name.clone());
        for p in &g.inputs {
            self.names.insert(p.value, p.name.clone());
            self.out.input.push(value_info(&p.name, g.ty(p.value)));
        }
        for s in &g.states {
            self.names.insert(s.past, s.past_name.clone());
            self.out.input.push(value_info(&s.past_name, g.ty(s.past)));
        }
        // A result that leaves the graph bears the output's name; a second name for it, or for an input, is an Identity.
        let states = g.states.iter().filter_map(|s| Some((s.present_name.clone(), g.present(s)?)));
        let outputs: Vec<(String, ValueId)> = g.outputs.iter().map(|o| (o.name.clone(), o.value)).chain(states).collect();
        for (name, v) in &outputs {
            if matches!(g.def(*v), Def::Node(..)) {
                self.names.entry(*v).or_insert_with(|| name.clone());
            }
        }
        for (_, node) in g.nodes() {
            self.node(node).map_err(|why| format!("{}: {}: {why}", node.scope, node.op.name()))?;
        }
        for (name, v) in outputs {
            let from = self.value(v)?;
            if from != name {
                self.named("Identity", &[&from], &name, vec![]);
            }
            self.out.output.push(value_info(&name, g.ty(v)));
        }
        Ok(())
    }

    /// Name of a value that is an operand.
    fn value(&mut self, v: ValueId) -> Emitted<String> {
        self.operand(v, &Op::parse("select", &Default::default())?, 0)
    }

    fn operand(&mut self, v: ValueId, op: &Op, i: usize) -> Emitted<String> {
        if let Def::Weight(weight) = self.graph.def(v) {
            return self.weight(weight, self.graph.ty(v), op, i);
        }
        if let Some(name) = self.names.get(&v) {
            return Ok(name.clone());
        }
        match self.graph.def(v) {
            Def::Literal(l) => {
                let name = format!("literal_{}", v.index());
                self.literal(&name, l);
                self.names.insert(v, name.clone());
                Ok(name)
            }
            _ => Err(format!("%{} is used before it is defined", v.index())),
        }
    }

    fn weight(&mut self, weight: &str, ty: &Type, op: &Op, operand: usize) -> Emitted<String> {
        let layout = layout(self.target, op, operand, ty);
        let name = stored_name(weight, layout);
        if !self.stored.insert(name.clone()) {
            return Ok(name);
        }
        let mut dims: Vec<i64> = ty.shape.iter().map(|d| d.as_const().ok_or("a weight has a symbolic dim")).collect::<Result<_, _>>()?;
        if layout == Layout::Transposed {
            dims.reverse();
        }
        self.external(&name, &name, ty.dtype, dims)?;
        Ok(name)
    }

    /// An initializer that lies in a file of the artifact as `stored`.
    fn external(&mut self, name: &str, stored: &str, dtype: DType, dims: Vec<i64>) -> Emitted {
        let Place { file, offset, bytes } = (self.place)(stored).ok_or_else(|| format!("weight '{stored}' is not stored"))?;
        let entry = |key: &str, value: String| StringStringEntryProto { key: Some(key.into()), value: Some(value) };
        self.out.initializer.push(TensorProto {
            name: Some(name.into()),
            dims,
            data_type: Some(data_type(dtype)),
            data_location: Some(DataLocation::External as i32),
            external_data: vec![entry("location", file), entry("offset", offset.to_string()), entry("length", bytes.to_string())],
            ..Default::default()
        });
        Ok(())
    }

    /// Initializers of a quantized matrix `[n, k]`, or a stack of them: codes, scales, and zero points or nothing. Tables and stacks
    /// have the codes of a row as one axis, which are the same bytes.
    fn codes(&mut self, weight: &str, scheme: Scheme, shape: &[usize], block: usize, flat: bool) -> Emitted<[String; 3]> {
        let Some((k, rows)) = shape.split_last() else { return Err("a quantized weight has no axes".into()) };
        let blocks = k.div_ceil(block);
        let (bits, float) = (usize::from(scheme.bits), self.target.float);
        let dims = |row: &[usize]| [rows, row].concat();
        let mut part = |part: &str, name: String, dtype, dims: &[usize]| {
            let dims = dims.iter().map(|d| *d as i64).collect();
            let new = self.stored.insert(name.clone());
            if new { self.external(&name, &format!("{weight}.{part}"), dtype, dims) } else { Ok(()) }.map(|()| name)
        };
        let codes = if flat {
            part("codes", format!("{weight}.rows"), DType::U8, &dims(&[blocks * block * bits / 8]))?
        } else {
            part("codes", format!("{weight}.codes"), DType::U8, &dims(&[blocks, block * bits / 8]))?
        };
        let scales = part("scales", format!("{weight}.scales"), float, &dims(&[blocks]))?;
        let zeros = match scheme.zero_points {
            true => part("zeros", format!("{weight}.zeros"), DType::U8, &dims(&[(blocks * bits).div_ceil(8)]))?,
            false => String::new(),
        };
        Ok([codes, scales, zeros])
    }

    /// Name and shape of a quantized weight.
    fn matrix<const AXES: usize>(&self, weight: ValueId) -> Emitted<(String, [usize; AXES])> {
        let Def::Weight(name) = self.graph.def(weight) else { return Err("only weights are quantized".into()) };
        let extents: Option<Vec<usize>> =
            self.graph.ty(weight).shape.iter().map(|d| d.as_const().and_then(|d| usize::try_from(d).ok())).collect();
        let shape = extents.and_then(|e| e.try_into().ok());
        Ok((name.clone(), shape.ok_or_else(|| format!("a quantized weight must have {AXES} axes of known length here"))?))
    }

    /// Experts of quantized weights.
    fn experts(&mut self, node: &Node, k: usize, dynamic: bool, scheme: Scheme, output: &str) -> Emitted {
        let mut inputs = vec![self.operand(node.args[0], &node.op, 0)?, self.operand(node.args[1], &node.op, 1)?];
        let (mut zeros, mut columns) = (vec![], 0);
        for i in [2, 3] {
            let (name, shape) = self.matrix::<3>(node.args[i])?;
            columns = block(&node.op, i, scheme, self.graph.ty(node.args[i]));
            let [codes, scales, zero_points] = self.codes(&name, scheme, &shape, columns, true)?;
            inputs.extend([codes, scales, String::new()]);
            zeros.push(zero_points);
        }
        if scheme.zero_points {
            inputs.extend(vec![String::new(); 3]);
            inputs.extend(zeros);
        }
        // The last of them is a bias that is not there.
        let given = inputs.iter().rposition(|i| !i.is_empty()).map_or(0, |last| last + 1);
        let inputs: Vec<&str> = inputs.iter().take(given).map(String::as_str).collect();
        let own = [int("expert_weight_bits", scheme.bits.into()), int("block_size", columns as i64)];
        let level = int("accuracy_level", if dynamic { 4 } else { 1 });
        self.own("QMoE", &inputs, &[output], routed(k).into_iter().chain(own).chain([level]).collect());
        Ok(())
    }

    /// A linear layer or a table of quantized weights, in ONNX Runtime's own operators.
    fn quantized(&mut self, node: &Node, scheme: Scheme, output: &str) -> Emitted {
        if let Op::RoutedMoe(o) = &node.op {
            return self.experts(node, o.k, o.dynamic, scheme, output);
        }
        let table = matches!(node.op, Op::Embedding(_));
        let (weight, x) = if table { (node.args[0], node.args[1]) } else { (node.args[1], node.args[0]) };
        let (name, [n, k]) = self.matrix(weight)?;
        let Layout::Blocks(_, columns) = layout(self.target, &node.op, usize::from(!table), self.graph.ty(weight)) else {
            return self.dequantized(node, &name, scheme, [n, k], output);
        };
        let [codes, scales, zeros] = self.codes(&name, scheme, &[n, k], columns, table)?;
        let x = self.operand(x, &node.op, usize::from(table))?;
        let bits = int("bits", scheme.bits.into());
        let block = int("block_size", columns as i64);
        let (op, inputs, attributes) = match &node.op {
            Op::Linear(o) => {
                let bias = node.args.get(2).map_or(Ok(String::new()), |b| self.operand(*b, &node.op, 2))?;
                let level = int("accuracy_level", if o.dynamic { 4 } else { 1 });
                let sizes = [int("K", k as i64), int("N", n as i64)];
                let attributes = [bits, block, level].into_iter().chain(sizes).collect();
                ("MatMulNBits", vec![x, codes, scales, zeros, String::new(), bias], attributes)
            }
            _ => ("GatherBlockQuantized", vec![codes, x, scales, zeros], vec![bits, block, int("gather_axis", 0), int("quantize_axis", 1)]),
        };
        let given = inputs.iter().rposition(|i| !i.is_empty()).map_or(0, |last| last + 1);
        let inputs: Vec<&str> = inputs.iter().take(given).map(String::as_str).collect();
        self.own(op, &inputs, &[output], attributes);
        Ok(())
    }

    /// A linear layer of weights that are numbers again before the product.
    fn dequantized(&mut self, node: &Node, weight: &str, scheme: Scheme, [n, k]: [usize; 2], output: &str) -> Emitted {
        let (codes, steps) = (format!("{weight}.codes"), format!("{weight}.scales"));
        if self.stored.insert(codes.clone()) {
            let dims = |d: &[usize]| d.iter().map(|d| *d as i64).collect();
            self.external(&codes, &codes, DType::I8, dims(&[n, k]))?;
            if let (4, Some(t)) = (scheme.bits, self.out.initializer.last_mut()) {
                t.data_type = Some(proto::tensor_proto::DataType::Int4 as i32);
            }
            let groups = scheme.group.map(|g| k / usize::from(g));
            self.external(&steps, &steps, scales(self.target), dims(&[&[n], groups.as_slice()].concat()))?;
        }
        let attributes = match scheme.group {
            Some(g) => vec![int("axis", 1), int("block_size", g.into())],
            None => vec![int("axis", 0)],
        };
        let matrix = format!("{weight}.T");
        if self.stored.insert(matrix.clone()) {
            let mut rows = self.helper("DequantizeLinear", &[&codes, &steps], weight, attributes);
            if scales(self.target) != self.target.float {
                rows = self.helper("Cast", &[&rows], weight, vec![int("to", data_type(self.target.float).into())]);
            }
            self.named("Transpose", &[&rows], &matrix, vec![ints("perm", [1, 0])]);
        }
        let x = self.operand(node.args[0], &node.op, 0)?;
        let bias = node.args.get(2).map(|b| self.operand(*b, &node.op, 2)).transpose()?;
        self.product(&[&x, &matrix], bias.as_deref(), output);
        Ok(())
    }

    /// `x` in steps of `scale`, in 8 bits.
    fn fake_quantize(&mut self, x: &str, dtype: DType, scale: f64, output: &str) {
        let wide = if dtype == self.target.float { scales(self.target) } else { dtype };
        // Smaller ones of f16 are not exact; the layer's numbers are in fewer steps then.
        let scale = if wide == DType::F16 { scale.max(half::f16::MIN_POSITIVE.to_f64()) } else { scale };
        let (step, zero) = (format!("{output}/scale"), "zero_i8");
        self.literal(&step, &Literal::scalar(wide, scale));
        if self.stored.insert(zero.into()) {
            self.literal(zero, &Literal::scalar(DType::I8, 0.0));
        }
        let to = |dtype| vec![int("to", data_type(dtype).into())];
        let x = if wide == dtype { x.to_string() } else { self.helper("Cast", &[x], output, to(wide)) };
        let steps = self.helper("QuantizeLinear", &[&x, &step, zero], output, vec![]);
        if wide == dtype {
            return self.named("DequantizeLinear", &[&steps, &step, zero], output, vec![]);
        }
        let rounded = self.helper("DequantizeLinear", &[&steps, &step, zero], output, vec![]);
        self.named("Cast", &[&rounded], output, to(dtype));
    }

    /// A product, and what is added to it.
    fn product(&mut self, x: &[&str], bias: Option<&str>, output: &str) {
        match bias {
            Some(bias) => {
                let product = self.helper("MatMul", x, output, vec![]);
                self.named("Add", &[&product, bias], output, vec![]);
            }
            None => self.named("MatMul", x, output, vec![]),
        }
    }

    fn literal(&mut self, name: &str, l: &Literal) {
        let raw: Vec<u8> = match l.dtype {
            DType::I8 => l.data.iter().flat_map(|v| (*v as i8).to_le_bytes()).collect(),
            DType::I64 => l.data.iter().flat_map(|v| (*v as i64).to_le_bytes()).collect(),
            DType::Bool => l.data.iter().map(|v| u8::from(*v != 0.0)).collect(),
            DType::F16 => l.data.iter().flat_map(|v| half::f16::from_f64(*v).to_le_bytes()).collect(),
            DType::BF16 => l.data.iter().flat_map(|v| half::bf16::from_f64(*v).to_le_bytes()).collect(),
            _ => l.data.iter().flat_map(|v| (*v as f32).to_le_bytes()).collect(),
        };
        self.out.initializer.push(TensorProto {
            name: Some(name.into()),
            dims: l.shape.iter().map(|d| *d as i64).collect(),
            data_type: Some(data_type(l.dtype)),
            raw_data: Some(raw.into()),
            ..Default::default()
        });
    }

    /// An `i64` constant, made once per value and shape.
    fn constant(&mut self, shape: &[usize], data: &[i64]) -> String {
        let text: Vec<String> = data.iter().map(i64::to_string).collect();
        let kind = if shape.is_empty() { "scalar" } else { "ints" };
        let name = format!("{kind}_{}", text.join("_").replace('-', "m"));
        if self.stored.insert(name.clone()) {
            self.literal(&name, &Literal { dtype: DType::I64, shape: shape.into(), data: data.iter().map(|v| *v as f64).collect() });
        }
        name
    }

    fn named(&mut self, op: &str, inputs: &[&str], output: &str, attribute: Vec<AttributeProto>) {
        self.out.node.push(NodeProto {
            name: Some(format!("{output}/{op}")),
            op_type: Some(op.into()),
            input: inputs.iter().map(|s| (*s).to_string()).collect(),
            output: vec![output.into()],
            attribute,
            ..Default::default()
        });
    }

    /// A node of ONNX Runtime's own operators.
    fn own(&mut self, op: &str, inputs: &[&str], outputs: &[&str], attributes: Vec<AttributeProto>) {
        self.named(op, inputs, outputs[0], attributes);
        if let Some(node) = self.out.node.last_mut() {
            node.domain = Some(MICROSOFT.into());
            node.output = outputs.iter().map(|o| (*o).into()).collect();
        }
    }

    /// A node of its own result.
    fn helper(&mut self, op: &str, inputs: &[&str], hint: &str, attribute: Vec<AttributeProto>) -> String {
        let name = format!("{hint}/{}", self.out.node.len());
        self.named(op, inputs, &name, attribute);
        name
    }

    /// The value of a dim as `i64[1]`.
    fn dim(&mut self, d: &Dim) -> Emitted<String> {
        if let Some(v) = d.as_const() {
            return Ok(self.constant(&[1], &[v]));
        }
        if let Some(name) = self.dims.get(d) {
            return Ok(name.clone());
        }
        let g = self.graph;
        let port = axis_of(g, d, g.inputs.iter().map(|p| (&p.name, p.value)));
        // A client may give a state more room than it has positions, so that its axes are asked last: `past` is `past + seq` less
        // `seq`.
        let sum = if port.is_none() { sum_with(g, d) } else { None };
        let states = g.states.iter().map(|s| (&s.past_name, s.past));
        let name = match (sum, port.or_else(|| axis_of(g, d, states))) {
            (Some(sum), _) => {
                let (sum, rest) = (self.dim(sum)?, self.dim(&(sum - d))?);
                self.helper("Sub", &[&sum, &rest], &format!("dim {d}"), vec![])
            }
            (None, Some((port, axis))) => {
                let attributes = vec![int("start", axis as i64), int("end", axis as i64 + 1)];
                self.helper("Shape", &[&port], &format!("dim {d}"), attributes)
            }
            (None, None) => self.computed_dim(d)?,
        };
        self.dims.insert(d.clone(), name.clone());
        Ok(name)
    }

    fn computed_dim(&mut self, d: &Dim) -> Emitted<String> {
        let hint = format!("dim {d}");
        if let Some((1, symbol)) = d.as_scaled_symbol() {
            // An input that has a multiple of it.
            let g = self.graph;
            let ports = g.inputs.iter().map(|p| p.value).chain(g.states.iter().map(|s| s.past));
            let dims = ports.flat_map(|v| &g.ty(v).shape);
            let found = dims.filter_map(|x| x.as_scaled_symbol().filter(|(_, s)| *s == symbol).map(|(c, _)| (c, x.clone()))).next();
            let (factor, multiple) = found.ok_or_else(|| format!("no input tells the value of '{symbol}'"))?;
            let (multiple, factor) = (self.dim(&multiple)?, self.constant(&[1], &[factor]));
            return Ok(self.helper("Div", &[&multiple, &factor], &hint, vec![]));
        }
        if let Some((function, a, b)) = d.as_function() {
            let (a, b) = (self.dim(&a)?, self.dim(&b)?);
            return Ok(match function {
                // Dims and divisors are positive.
                DimFunction::FloorDiv => self.helper("Div", &[&a, &b], &hint, vec![]),
                DimFunction::CeilDiv => {
                    let one = self.constant(&[1], &[1]);
                    let sum = self.helper("Add", &[&a, &b], &hint, vec![]);
                    let sum = self.helper("Sub", &[&sum, &one], &hint, vec![]);
                    self.helper("Div", &[&sum, &b], &hint, vec![])
                }
                DimFunction::Min => self.helper("Min", &[&a, &b], &hint, vec![]),
                DimFunction::Max => self.helper("Max", &[&a, &b], &hint, vec![]),
            });
        }
        let mut sum: Option<String> = None;
        for (coefficient, factors) in d.as_terms() {
            let mut product: Option<String> = None;
            for f in factors {
                let s = self.dim(&f)?;
                product = Some(product.map_or(s.clone(), |p| self.helper("Mul", &[&p, &s], &hint, vec![])));
            }
            let c = self.constant(&[1], &[coefficient]);
            let term = match product {
                None => c,
                Some(p) if coefficient == 1 => p,
                Some(p) => self.helper("Mul", &[&p, &c], &hint, vec![]),
            };
            sum = Some(sum.map_or(term.clone(), |s| self.helper("Add", &[&s, &term], &hint, vec![])));
        }
        sum.ok_or_else(|| "a dim without terms".into())
    }

    fn scalar_dim(&mut self, d: &Dim, hint: &str) -> Emitted<String> {
        if let Some(v) = d.as_const() {
            return Ok(self.constant(&[], &[v]));
        }
        let (d, axes) = (self.dim(d)?, self.constant(&[1], &[0]));
        Ok(self.helper("Squeeze", &[&d, &axes], hint, vec![]))
    }

    /// A shape as `i64[rank]`.
    fn shape(&mut self, shape: &[Dim], hint: &str) -> Emitted<String> {
        if let Some(known) = shape.iter().map(Dim::as_const).collect::<Option<Vec<_>>>() {
            return Ok(self.constant(&[known.len()], &known));
        }
        let dims = shape.iter().map(|d| self.dim(d)).collect::<Emitted<Vec<_>>>()?;
        let dims: Vec<&str> = dims.iter().map(String::as_str).collect();
        Ok(self.helper("Concat", &dims, hint, vec![int("axis", 0)]))
    }

    fn node(&mut self, node: &Node) -> Emitted {
        let g = self.graph;
        let scope = if node.scope.is_empty() { &g.name } else { &node.scope };
        let mut result = |v: &ValueId| {
            let name = || format!("{scope}/{}_{}", node.op.name(), v.index());
            self.names.entry(*v).or_insert_with(name).clone()
        };
        let outs: Vec<String> = node.outs.iter().map(&mut result).collect();
        let out = outs.first().ok_or("an op without results")?.clone();
        if let Some(scheme) = node.args.iter().find_map(|a| g.ty(*a).dtype.scheme()) {
            return self.quantized(node, scheme, &out);
        }
        let names = node.args.iter().enumerate().map(|(i, a)| self.operand(*a, &node.op, i)).collect::<Emitted<Vec<_>>>()?;
        let x: Vec<&str> = names.iter().map(String::as_str).collect();
        let ty = |i: usize| g.ty(node.args[i]);
        match &node.op {
            Op::Elementwise1(o) => {
                let (op, attributes) = match o.f {
                    Unary::Neg => ("Neg", vec![]),
                    Unary::Abs => ("Abs", vec![]),
                    Unary::Exp => ("Exp", vec![]),
                    Unary::Log => ("Log", vec![]),
                    Unary::Sqrt => ("Sqrt", vec![]),
                    Unary::Sin => ("Sin", vec![]),
                    Unary::Cos => ("Cos", vec![]),
                    Unary::Tanh => ("Tanh", vec![]),
                    Unary::Erf => ("Erf", vec![]),
                    Unary::Sigmoid => ("Sigmoid", vec![]),
                    Unary::Floor => ("Floor", vec![]),
                    Unary::Round => ("Round", vec![]),
                    Unary::Not => ("Not", vec![]),
                    Unary::Gelu => ("Gelu", vec![string("approximate", "none")]),
                    Unary::GeluTanh => ("Gelu", vec![string("approximate", "tanh")]),
                    Unary::Silu | Unary::QuickGelu => {
                        let alpha = if o.f == Unary::Silu { 1.0 } else { 1.702 };
                        self.own("QuickGelu", &x, &[&out], vec![float("alpha", alpha)]);
                        return Ok(());
                    }
                };
                self.named(op, &x, &out, attributes);
            }
            Op::Elementwise2(o) => {
                let op = match o.f {
                    Binary::Add => "Add",
                    Binary::Sub => "Sub",
                    Binary::Mul => "Mul",
                    // ONNX truncates: what is left over goes first.
                    Binary::Div if ty(0).dtype == DType::I64 => {
                        let rest = self.helper("Mod", &x, &out, vec![]);
                        let whole = self.helper("Sub", &[x[0], &rest], &out, vec![]);
                        self.named("Div", &[&whole, x[1]], &out, vec![]);
                        return Ok(());
                    }
                    Binary::Div => "Div",
                    // The sign of the divisor, as here.
                    Binary::Mod => "Mod",
                    Binary::Pow => "Pow",
                    Binary::Min => "Min",
                    Binary::Max => "Max",
                    Binary::Eq => "Equal",
                    Binary::Lt => "Less",
                    Binary::Le => "LessOrEqual",
                    Binary::And => "And",
                    Binary::Or => "Or",
                };
                self.named(op, &x, &out, vec![]);
            }
            Op::Select(_) => self.named("Where", &x, &out, vec![]),
            Op::Cast(o) => self.named("Cast", &x, &out, vec![int("to", data_type(o.dtype).into())]),
            Op::Iota(o) => {
                let limit = self.scalar_dim(&o.len, &out)?;
                let (start, step) = (self.constant(&[], &[0]), self.constant(&[], &[1]));
                self.named("Range", &[&start, &limit, &step], &out, vec![]);
            }
            Op::DimValue(o) => {
                let v = self.scalar_dim(&o.dim, &out)?;
                self.named("Identity", &[&v], &out, vec![]);
            }
            Op::Reshape(o) => {
                let (shape, attributes) = self.reshape_to(&ty(0).shape, &o.shape, &out)?;
                self.named("Reshape", &[x[0], &shape], &out, attributes);
            }
            Op::Transpose(o) => self.named("Transpose", &x, &out, vec![ints("perm", o.perm.iter().copied())]),
            Op::Broadcast(o) => {
                let shape = self.shape(&o.shape, &out)?;
                self.named("Expand", &[x[0], &shape], &out, vec![]);
            }
            Op::Concat(o) => self.named("Concat", &x, &out, vec![int("axis", o.axis as i64)]),
            Op::Append(o) => self.named("Concat", &x, &out, vec![int("axis", o.axis as i64)]),
            Op::Slice(o) => {
                let (start, end) = (self.dim(&o.start)?, self.dim(&(&o.start + &o.len))?);
                let axes = self.constant(&[1], &[o.axis as i64]);
                self.named("Slice", &[x[0], &start, &end, &axes], &out, vec![]);
            }
            Op::TopK(o) => {
                let k = self.constant(&[1], &[o.k as i64]);
                self.named("TopK", &[x[0], &k], &out, vec![int("axis", -1)]);
                // The values come first; only the indices are wanted.
                if let Some(node) = self.out.node.last_mut() {
                    node.output.insert(0, format!("{out}/values"));
                }
            }
            Op::Conv2d(o) => {
                let attributes = vec![ints("strides", [o.stride; 2]), ints("pads", [o.padding; 4])];
                self.named("Conv", &x, &out, attributes);
            }
            Op::Gather(o) => self.named("Gather", &x, &out, vec![int("axis", o.axis as i64)]),
            Op::ReduceOp(o) => {
                let op = match o.f {
                    Reduce::Sum => "ReduceSum",
                    Reduce::Mean => "ReduceMean",
                    Reduce::Max => "ReduceMax",
                };
                if self.opset < AXES_OPSET && o.f != Reduce::Sum {
                    self.named(op, &x, &out, vec![int("keepdims", 0), ints("axes", o.axes.iter().copied())]);
                } else {
                    let axes: Vec<i64> = o.axes.iter().map(|a| *a as i64).collect();
                    let axes = self.constant(&[axes.len()], &axes);
                    self.named(op, &[x[0], &axes], &out, vec![int("keepdims", 0)]);
                }
            }
            Op::CumSum(o) => {
                let axis = self.constant(&[], &[o.axis as i64]);
                if self.target.own_operators || ty(0).dtype != DType::I64 {
                    self.named("CumSum", &[x[0], &axis], &out, vec![]);
                } else {
                    // TensorRT sums floats only. These are counts, exact in f32 up to 16 million.
                    let x = self.helper("Cast", &x, &out, vec![int("to", data_type(DType::F32).into())]);
                    let sums = self.helper("CumSum", &[&x, &axis], &out, vec![]);
                    self.named("Cast", &[&sums], &out, vec![int("to", data_type(DType::I64).into())]);
                }
            }
            Op::MatMul(_) => self.named("MatMul", &x, &out, vec![]),
            Op::Linear(_) if layout(self.target, &node.op, 1, ty(1)) == Layout::Transposed => {
                self.product(&x[..2], x.get(2).copied(), &out);
            }
            // The matrix lies in rows.
            Op::Linear(_) if self.target.own_operators => match x.get(2) {
                Some(bias) => {
                    let product = format!("{out}/FusedMatMul");
                    self.own("FusedMatMul", &x[..2], &[&product], vec![int("transB", 1)]);
                    self.named("Add", &[&product, bias], &out, vec![]);
                }
                None => self.own("FusedMatMul", &x[..2], &[&out], vec![int("transB", 1)]),
            },
            Op::Linear(_) => {
                let matrix = format!("{}.T", x[1]);
                if self.stored.insert(matrix.clone()) {
                    self.named("Transpose", &[x[1]], &matrix, vec![ints("perm", [1, 0])]);
                }
                self.product(&[x[0], &matrix], x.get(2).copied(), &out);
            }
            Op::FakeQuantize(o) => self.fake_quantize(x[0], ty(0).dtype, o.scale, &out),
            Op::Embedding(_) if ty(0).dtype != DType::F32 => {
                let rows = self.helper("Gather", &x, &out, vec![int("axis", 0)]);
                self.named("Cast", &[&rows], &out, vec![int("to", data_type(DType::F32).into())]);
            }
            Op::Embedding(_) => self.named("Gather", &x, &out, vec![int("axis", 0)]),
            Op::LayerNorm(o) => self.named("LayerNormalization", &x, &out, vec![int("axis", -1), float("epsilon", o.eps)]),
            Op::RmsNorm(o) => self.named("RMSNormalization", &x, &out, vec![int("axis", -1), float("epsilon", o.eps)]),
            Op::AddLayerNorm(o) => {
                let (sum, normed) = (&outs[0], outs.get(1).ok_or("has one result")?);
                self.own("SkipLayerNormalization", &x, &[normed, "", "", sum], vec![float("epsilon", o.eps)]);
            }
            Op::AddRmsNorm(o) => {
                let (sum, normed) = (&outs[0], outs.get(1).ok_or("has one result")?);
                self.own("SkipSimplifiedLayerNormalization", &x, &[normed, "", "", sum], vec![float("epsilon", o.eps)]);
            }
            Op::Rotary(_) => self.batched("RotaryEmbedding", &x, 4 - ty(0).rank(), &[0, 1, 2], &out, vec![]),
            Op::MergedRotary(o) => {
                self.batched("RotaryEmbedding", &x, 3 - ty(0).rank(), &[0, 1, 2], &out, vec![int("num_heads", o.heads as i64)]);
            }
            Op::MultiHeadAttention(o) => {
                let heads = [int("num_heads", o.heads as i64), float("scale", o.scale)];
                let mut inputs = x[..3].to_vec();
                let mask = node.args.get(3).zip(x.get(3)).map(|(value, name)| self.additive_mask(*value, name, ty(0).dtype, 4));
                if let Some(mask) = &mask {
                    inputs.extend(["", "", mask]);
                }
                self.batched("MultiHeadAttention", &inputs, 3 - ty(0).rank(), &[0, 1, 2], &out, heads.into());
            }
            Op::GroupQueryAttention(o) => {
                let [last, total] = self.lengths(node.args[5], x[5], o.mask, &ty(4).shape, &ty(0).shape[1])?;
                let mask = (o.mask == Mask::Given).then(|| self.additive_mask(node.args[5], x[5], ty(0).dtype, 4));
                let mut inputs = [&x[..5], &[&last, &total]].concat();
                if let Some(mask) = &mask {
                    inputs.extend(["", "", "", mask]);
                }
                let heads = [int("num_heads", o.heads as i64), int("kv_num_heads", o.kv_heads as i64), float("scale", o.scale)];
                let outs: Vec<&str> = outs.iter().map(String::as_str).collect();
                self.own("GroupQueryAttention", &inputs, &outs, heads.into());
            }
            Op::RoutedMoe(o) => self.own("MoE", &[x[0], x[1], x[2], "", x[3]], &[&out], routed(o.k)),
            Op::Attention(o) => {
                if matches!(o.mask, Mask::Causal | Mask::Segments) {
                    return Err("was not legalised".into());
                }
                let mut inputs = x.clone();
                let mask = node.args.get(3).zip(x.get(3)).map(|(value, name)| self.additive_mask(*value, name, ty(0).dtype, 0));
                if let Some(mask) = &mask {
                    inputs[3] = mask;
                }
                self.batched("Attention", &inputs, 4 - ty(0).rank(), &[0, 1, 2], &out, vec![float("scale", o.scale)]);
            }
            op => return Err(format!("'{}' was not legalised", op.name())),
        }
        Ok(())
    }

    /// A mask of at least `rank` axes as what is added to scores: 0 where a key is seen, else the lowest number, which unlike
    /// infinity leaves no NaN where nothing is seen. ONNX Runtime takes `bool` masks too, but tract adds them.
    fn additive_mask(&mut self, mask: ValueId, name: &str, dtype: DType, rank: usize) -> String {
        if let Some(name) = self.masks.get(&(mask, rank)) {
            return name.clone();
        }
        let ty = self.graph.ty(mask);
        let mut additive = name.to_string();
        if ty.dtype == DType::Bool {
            let lowest = match dtype {
                DType::F16 => half::f16::MIN.to_f64(),
                DType::BF16 => half::bf16::MIN.to_f64(),
                _ => f64::from(f32::MIN),
            };
            let [seen, hidden] = [("mask_seen", 0.0), ("mask_hidden", lowest)].map(|(name, v)| {
                if self.stored.insert(name.into()) {
                    self.literal(name, &Literal::scalar(dtype, v));
                }
                name
            });
            additive = self.helper("Where", &[name, seen, hidden], name, vec![]);
        }
        let missing: Vec<i64> = (0..rank.saturating_sub(ty.rank()) as i64).collect();
        if !missing.is_empty() {
            let axes = self.constant(&[missing.len()], &missing);
            additive = self.helper("Unsqueeze", &[&additive, &axes], name, vec![]);
        }
        self.masks.insert((mask, rank), additive.clone());
        additive
    }

    /// For each row of a batch the place of its last token, `i32[batch]`, and the places in all, `i32[]`. A mask of kind
    /// [`Mask::Causal`] tells how many tokens a row has, which stand before its padding; with another, rows are full.
    fn lengths(&mut self, mask: ValueId, name: &str, kind: Mask, past: &[Dim], new: &Dim) -> Emitted<[String; 2]> {
        if let Some(known) = self.lengths.get(&mask) {
            return Ok(known.clone());
        }
        let to_i32 = || vec![int("to", data_type(DType::I32).into())];
        let (all, one, first) = (&past[2] + new, self.constant(&[1], &[1]), self.constant(&[1], &[0]));
        let total = self.dim(&all)?;
        let last = if kind == Mask::Causal {
            let live = self.helper("Cast", &[name], name, vec![int("to", data_type(DType::Bool).into())]);
            let live = self.helper("Cast", &[&live], name, vec![int("to", data_type(DType::I64).into())]);
            let count = self.helper("ReduceSum", &[&live, &one], name, vec![int("keepdims", 0)]);
            self.helper("Sub", &[&count, &one], name, vec![])
        } else {
            let (last, batch) = (self.helper("Sub", &[&total, &one], name, vec![]), self.dim(&past[0])?);
            self.helper("Expand", &[&last, &batch], name, vec![])
        };
        let last = self.helper("Cast", &[&last], name, to_i32());
        let total = self.helper("Squeeze", &[&total, &first], name, vec![]);
        let lengths = [last, self.helper("Cast", &[&total], name, to_i32())];
        self.lengths.insert(mask, lengths.clone());
        Ok(lengths)
    }

    /// An op that wants `missing` more axes (0 or 1), a batch in front: operands in `with_batch` and the result get one of
    /// length 1.
    fn batched(&mut self, op: &str, x: &[&str], missing: usize, with_batch: &[usize], out: &str, attributes: Vec<AttributeProto>) {
        let own = op == "MultiHeadAttention";
        if missing == 0 {
            return if own { self.own(op, x, &[out], attributes) } else { self.named(op, x, out, attributes) };
        }
        let axes = self.constant(&[1], &[0]);
        let mut inputs: Vec<String> = x.iter().map(|s| (*s).to_string()).collect();
        for i in with_batch {
            inputs[*i] = self.helper("Unsqueeze", &[x[*i], &axes], out, vec![]);
        }
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let y = format!("{out}/{op}");
        if own {
            self.own(op, &inputs, &[&y], attributes)
        } else {
            self.named(op, &inputs, &y, attributes)
        };
        self.named("Squeeze", &[&y, &axes], out, vec![]);
    }

    /// The shape operand of a Reshape, and attributes: dims that stay where they are as 0, a single other symbolic one as -1, else
    /// computed.
    fn reshape_to(&mut self, from: &[Dim], to: &[Dim], hint: &str) -> Emitted<(String, Vec<AttributeProto>)> {
        let mut symbolic = vec![];
        let mut known: Vec<i64> = vec![];
        for (i, d) in to.iter().enumerate() {
            known.push(match d.as_const() {
                Some(v) => v,
                None if from.get(i) == Some(d) => 0,
                None => {
                    symbolic.push(d);
                    -1
                }
            });
        }
        if symbolic.len() > 1 {
            // A computed 0 is a length, where one could come.
            let empty = to.iter().any(|d| d.eval(&self.least) == Ok(0));
            return Ok((self.shape(to, hint)?, if empty { vec![int("allowzero", 1)] } else { vec![] }));
        }
        Ok((self.constant(&[known.len()], &known), vec![]))
    }
}
