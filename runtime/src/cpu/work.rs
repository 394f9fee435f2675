//! What the steps of a program read and compute, told from sizes alone.

use super::{memory::Shapes, weights::stored};
use crate::{Error, Result};
use serde_json::Value;
use std::time::Instant;
use vlmc_artifact::{
    Bindings, DType,
    program::{Function, Kernel, Layout, Mask, PANEL, Place, Program, Step, Weight},
    quant::plane_bytes,
};
use vlmc_kernels::{Arithmetic, Isa};

/// What a step reads and computes.
#[derive(Clone, Debug, PartialEq)]
pub struct Work {
    /// The kernel and its function, as the program names them: `linear`, `binary add`.
    pub op: String,
    /// Where in the model it is.
    pub scope: String,
    /// Names of the weights among its operands.
    pub weights: Vec<String>,
    /// Type of the first of them.
    pub weight_type: Option<DType>,
    /// Rows and columns of the result, and how many products are summed for an element (1 where there are no products). Of
    /// attention: queries of all heads, keys, and the width of a head.
    pub shape: [usize; 3],
    /// Bytes of weights that are read, scales counted: of a table the rows in question, of experts those that may be chosen.
    pub weight_bytes: usize,
    /// Bytes of the KV cache that are read.
    pub state_bytes: usize,
    /// Multiplications and additions of products of matrices and of attention; others are not counted. Segments of attention are
    /// counted as one, because where they end is known only when the request is there.
    pub operations: usize,
    /// What these products are computed with.
    pub arithmetic: Arithmetic,
}

/// A run of an entry, timed.
#[derive(Clone, Debug)]
pub struct TimedRun {
    /// Name of the entry.
    pub entry: String,
    /// Values of the symbols.
    pub symbols: Bindings,
    /// Whether only the largest logit was wanted ([`crate::Engine::only_largest`]).
    pub only_largest: bool,
    /// From the call to the return.
    pub call: [Instant; 2],
    /// Step `i` ran from `steps[i]` to `steps[i + 1]`.
    pub steps: Vec<Instant>,
}

/// Is told of every run.
pub type Profiler = Box<dyn FnMut(TimedRun)>;

/// What each step of an entry does, with these values of the symbols and the kernels of `isa`, in a program that was checked
/// ([`crate::Artifact::program`]). If `only_largest` is wanted ([`crate::Engine::only_largest`]), the upper planes of a head are what is
/// read of it; the few lower ones, which depend on the numbers, are not counted.
///
/// # Errors
/// There is no such entry, or a symbol has no value.
pub fn work(program: &Program, entry: &str, symbols: &Bindings, isa: Isa, only_largest: bool) -> Result<Vec<Work>> {
    let f = program.functions.iter().find(|f| f.name == entry);
    let f = f.ok_or_else(|| Error::Input(format!("the artifact has no entry '{entry}'")))?;
    let fail = |why: String| Error::Input(format!("{entry}: {why}"));
    let mut shapes = Shapes::new(f);
    let shapes = shapes.of(symbols).map_err(fail)?;
    f.steps.iter().map(|step| Steps { program, f, shapes, isa, only_largest }.of(step).map_err(fail)).collect()
}

struct Steps<'a> {
    program: &'a Program,
    f: &'a Function,
    shapes: &'a [Vec<usize>],
    isa: Isa,
    only_largest: bool,
}

/// Shape and operations of attention of `queries`, `s` of each head, to `t` keys of width `d` and values of width `dv`.
fn attention_work(queries: usize, s: usize, t: usize, [d, dv]: [usize; 2], mask: Mask) -> ([usize; 3], usize) {
    let heads = queries.checked_div(s).unwrap_or(0);
    let pairs = match mask {
        // A query sees what was before it, and itself.
        Mask::Causal if s <= t => s.saturating_mul(t - s).saturating_add(s.saturating_mul(s + 1) / 2),
        _ => s.saturating_mul(t),
    };
    ([queries, t, d], product(&[2, heads, pairs, d.saturating_add(dv)]))
}

fn product(dims: &[usize]) -> usize {
    dims.iter().fold(1, |n, d| n.saturating_mul(*d))
}

impl Steps<'_> {
    fn of(&self, step: &Step) -> Result<Work, String> {
        let weights = || {
            step.args.iter().filter_map(|a| if let Place::Weight(w) = self.f.values[*a as usize].place { Some(w as usize) } else { None })
        };
        let out = &self.shapes[step.outs[0] as usize];
        let columns = out.last().copied().unwrap_or(1);
        let shape = |i: usize| self.shapes[step.args[i] as usize].as_slice();
        let rows = product(out).checked_div(columns).unwrap_or(0);
        // A product and a sum each.
        let twice = |dims: &[usize]| product(dims).saturating_mul(2);
        let (shape, operations) = match &step.kernel {
            Kernel::Linear { .. } | Kernel::GatedLinear { .. } => {
                let dims = [rows, shape(1)[0], shape(1)[1]];
                (dims, twice(&dims))
            }
            Kernel::MatMul => {
                let k = shape(0)[shape(0).len() - 1];
                ([rows, columns, k], twice(&[rows, columns, k]))
            }
            Kernel::Attention { mask, .. } => self.attention(step, *mask, step.args[1]),
            Kernel::RotaryAttention { mask, .. } => self.attention(step, *mask, step.outs[1]),
            Kernel::PackedAttention { heads, mask, .. } => {
                let (queries, s) = (rows.saturating_mul(*heads), shape(0)[shape(0).len() - 2]);
                attention_work(queries, s, s, [columns.checked_div(*heads).unwrap_or(0); 2], *mask)
            }
            Kernel::Moe { .. } => {
                let [tokens, chosen, m, h] = [shape(1)[0], shape(1)[1], shape(3)[1], shape(3)[2]];
                ([product(&[tokens, chosen]), m, h], twice(&[tokens, chosen, 3, m, h]))
            }
            _ => ([rows, columns, 1], 0),
        };
        Ok(Work {
            op: name(&step.kernel)?,
            scope: step.scope.clone(),
            weights: weights().map(|w| self.program.weights[w].name.clone()).collect(),
            weight_type: weights().next().map(|w| self.program.weights[w].dtype),
            shape,
            weight_bytes: weights().map(|w| self.weight_bytes(step, w)).try_fold(0usize, |n, b| Ok::<_, String>(n.saturating_add(b?)))?,
            state_bytes: self.state_bytes(step),
            operations,
            arithmetic: self.arithmetic(step),
        })
    }

    /// What a step's products are computed with. The rows of a mixture are taken to choose its experts evenly.
    fn arithmetic(&self, step: &Step) -> Arithmetic {
        let shape = |i: usize| self.shapes[step.args[i] as usize].as_slice();
        let linear = |weight: usize, dynamic: bool, rows: usize| {
            let dtype = self.f.values[step.args[weight] as usize].dtype;
            let scheme = if let DType::Quant(scheme) = dtype { Some(scheme) } else { None };
            self.isa.linear_arithmetic(scheme, dynamic, rows, shape(weight).last().copied().unwrap_or(0))
        };
        match step.kernel {
            Kernel::Linear { dynamic, .. } | Kernel::GatedLinear { dynamic, .. } => {
                linear(1, dynamic, product(&shape(0)[..shape(0).len() - 1]))
            }
            Kernel::Moe { dynamic, .. } => linear(3, dynamic, product(shape(1)).checked_div(shape(3)[0]).unwrap_or(0)),
            // Segments are taken to lie together.
            Kernel::Attention { mask: mask @ (Mask::Full | Mask::Causal | Mask::Segments), bf16, .. }
            | Kernel::RotaryAttention { mask: mask @ (Mask::Full | Mask::Causal | Mask::Segments), bf16, .. }
            | Kernel::PackedAttention { mask: mask @ (Mask::Full | Mask::Causal | Mask::Segments), bf16, .. } => {
                self.isa.attention_arithmetic(bf16, shape(0)[shape(0).len() - 2], mask == Mask::Causal)
            }
            _ => Arithmetic::F32,
        }
    }

    fn attention(&self, step: &Step, mask: Mask, keys: u32) -> ([usize; 3], usize) {
        let (q, k) = (&self.shapes[step.args[0] as usize], &self.shapes[keys as usize]);
        let out = &self.shapes[step.outs[0] as usize];
        let [s, t, d, dv] = [q[q.len() - 2], k[k.len() - 2], q[q.len() - 1], out[out.len() - 1]];
        attention_work(product(&q[..q.len() - 1]), s, t, [d, dv], mask)
    }

    /// Bytes that a step reads of a weight.
    fn weight_bytes(&self, step: &Step, weight: usize) -> Result<usize, String> {
        let w = &self.program.weights[weight];
        let (dtype, shape) = stored(w)?;
        let all = product(&shape).saturating_mul(dtype.size());
        let share = |used: usize, of: usize| (all as u128 * used.min(of) as u128).checked_div(of as u128).unwrap_or(0) as usize;
        let arg = |i: usize| self.shapes[step.args[i] as usize].as_slice();
        let is_first = matches!(self.f.values[step.args[0] as usize].place, Place::Weight(i) if i as usize == weight);
        Ok(match step.kernel {
            // A block of a prompt that needs no logits has no rows for the head.
            Kernel::Linear { .. } | Kernel::GatedLinear { .. } if product(arg(0)) == 0 => 0,
            Kernel::Linear { .. } if self.only_largest && w.layout == Layout::Planes16 && product(arg(0)) == w.shape[1] => {
                let planes = planes(w).ok_or("a head has no planes")?;
                shape[0].saturating_mul(planes[0])
            }
            Kernel::Embedding if is_first => {
                let filled_up = if w.layout == Layout::Rows { arg(0)[0] } else { arg(0)[0].next_multiple_of(PANEL) };
                share(product(arg(1)), filled_up)
            }
            Kernel::Gather { axis } if is_first => share(product(arg(1)), arg(0)[axis]),
            Kernel::Moe { .. } if shape.len() > 2 => share(product(arg(1)), shape[0]),
            _ => all,
        })
    }

    /// Bytes of the states that attention reads.
    fn state_bytes(&self, step: &Step) -> usize {
        if !matches!(step.kernel, Kernel::Attention { .. } | Kernel::RotaryAttention { .. }) {
            return 0;
        }
        let bytes = |v: &u32| {
            let Place::State(i) = self.f.values[*v as usize].place else { return 0 };
            let dtype = self.f.states[i as usize].dtype;
            let shape = &self.shapes[*v as usize];
            let width = shape.last().copied().unwrap_or(0);
            let scale = if dtype == DType::I8 { size_of::<f32>() } else { 0 };
            product(&shape[..shape.len().saturating_sub(1)]).saturating_mul(width.saturating_mul(dtype.size()).saturating_add(scale))
        };
        step.args.iter().chain(&step.outs).map(bytes).sum()
    }
}

/// Bytes of the upper and the lower plane of a panel.
fn planes(w: &Weight) -> Option<[usize; 2]> {
    plane_bytes(w.dtype.scheme()?, *w.shape.last()?)
}

fn name(kernel: &Kernel) -> Result<String, String> {
    let fields = serde_json::to_value(kernel).map_err(|e| e.to_string())?;
    let text = |field: &str| fields.get(field).and_then(Value::as_str);
    Ok(text("kernel").into_iter().chain(text("f")).collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vlmc_artifact::{
        Dim,
        program::{NamedValue, StateDecl, Value},
    };

    #[test]
    fn steps_are_counted_by_their_shapes() {
        let dims = |dims: &[i64]| dims.iter().map(|d| Dim::from(*d)).collect::<Vec<_>>();
        let value = |dtype, shape: Vec<Dim>, place| Value { dtype, shape, place };
        let (seq, all) = (Dim::symbol("seq"), &Dim::symbol("past") + Dim::symbol("seq"));
        let int4: DType = DType::Quant("int4g32".parse().unwrap());
        let state = |len: Dim| vec![Dim::from(1), Dim::from(2), len, Dim::from(64)];
        let heads = vec![Dim::from(1), Dim::from(4), seq.clone(), Dim::from(64)];
        let values = vec![
            value(DType::I64, vec![seq.clone()], Place::Input(0)),
            value(int4, dims(&[100, 64]), Place::Weight(0)),
            value(DType::F32, vec![seq.clone(), Dim::from(64)], Place::Slot(0)),
            value(int4, dims(&[40, 64]), Place::Weight(1)),
            value(DType::F32, vec![seq.clone(), Dim::from(40)], Place::Slot(1)),
            value(DType::F32, heads.clone(), Place::Slot(2)),
            value(DType::F32, state(all.clone()), Place::State(0)),
            value(DType::F32, state(all), Place::State(1)),
            value(DType::F32, heads, Place::Slot(3)),
            value(DType::F32, vec![seq.clone(), Dim::from(32)], Place::Slot(4)),
            value(DType::F32, vec![seq, Dim::from(16)], Place::Slot(5)),
        ];
        let step = |kernel, args: &[u32], out| Step { kernel, args: args.to_vec(), outs: vec![out], scope: "layer".into() };
        let decl = |name: &str, dtype| StateDecl { name: name.into(), shape: state(Dim::symbol("past")), axis: 2, dtype };
        let mut program = Program {
            symbols: vec![],
            weights: [100, 40].map(|n| Weight { name: format!("w{n}"), dtype: int4, shape: vec![n, 64], layout: Layout::Panel16 }).into(),
            functions: vec![Function {
                name: "decoder".into(),
                inputs: vec![NamedValue { name: "ids".into(), value: 0 }],
                outputs: vec![],
                states: vec![decl("k", DType::I8), decl("v", DType::BF16)],
                values,
                steps: vec![
                    step(Kernel::Embedding, &[1, 0], 2),
                    step(Kernel::Linear { dynamic: true, act: None }, &[2, 3], 4),
                    step(Kernel::Attention { scale: 1.0, mask: Mask::Causal, bf16: true }, &[5, 6, 7], 8),
                    step(Kernel::PackedAttention { heads: 2, kv_heads: 1, scale: 1.0, mask: Mask::Full, bf16: true }, &[9], 10),
                ],
            }],
        };
        // 64 columns in 4.5 bits.
        let row = 36;
        let on = |seq, past, isa| work(&program, "decoder", &[("seq", seq), ("past", past)].into_iter().collect(), isa, false).unwrap();
        let of = |seq, past| on(seq, past, Isa::Avx2);
        let [embedding, linear, attention, packed] = &of(3, 7)[..] else { panic!("four steps") };
        assert_eq!((packed.shape, packed.operations, packed.state_bytes), ([2 * 3, 3, 8], 2 * 2 * 3 * 3 * (8 + 8), 0));
        assert_eq!((embedding.op.as_str(), embedding.weight_bytes, embedding.operations), ("embedding", 3 * row, 0));
        assert_eq!((linear.shape, linear.weight_bytes, linear.operations), ([3, 40, 64], 48 * row, 2 * 3 * 40 * 64));
        assert_eq!(
            (linear.weights.as_slice(), linear.weight_type, linear.arithmetic),
            (&["w40".to_string()][..], Some(int4), Arithmetic::Int8)
        );
        // Queries see 8, 9 and 10 keys; a key is 64 bytes and a scale, a value 128 bytes, and there are two heads of them.
        assert_eq!((attention.shape, attention.operations), ([12, 10, 64], 2 * 4 * (8 + 9 + 10) * 128));
        assert_eq!((attention.weight_bytes, attention.state_bytes), (0, 2 * 10 * (64 + 4 + 128)));
        assert_eq!((of(0, 9)[1].weight_bytes, of(0, 9)[1].operations), (0, 0));
        assert_eq!(of(1, 9)[2].operations, 2 * 4 * 10 * 128);
        // Many rows go to tiles, in which groups are widened.
        let many = if cfg!(target_arch = "x86_64") { Arithmetic::Bf16 } else { Arithmetic::Int8 };
        assert_eq!([3, 300].map(|seq| on(seq, 7, Isa::Amx)[1].arithmetic), [Arithmetic::Int8, many]);
        let attention = [(Isa::Avx2, 300), (Isa::Amx, 300), (Isa::Amx, 1)].map(|(isa, seq)| on(seq, 7, isa)[2].arithmetic);
        assert_eq!(attention, [Arithmetic::F32, Arithmetic::Bf16, Arithmetic::F32]);
        // Of a head in planes, upper ones are read if only the largest logit of a row is wanted.
        program.weights[1].layout = Layout::Planes16;
        let head = |seq, only| {
            work(&program, "decoder", &[("seq", seq), ("past", 9)].into_iter().collect(), Isa::Avx2, only).unwrap()[1].weight_bytes
        };
        assert_eq!([head(1, false), head(1, true), head(2, true)], [48 * row, 48 * (row - 16), 48 * row]);
        let missing = work(&program, "vision", &Bindings::default(), Isa::Scalar, false).unwrap_err().to_string();
        assert!(missing.contains("no entry 'vision'"), "{missing}");
        assert!(work(&program, "decoder", &Bindings::default(), Isa::Scalar, false).is_err());
    }
}
