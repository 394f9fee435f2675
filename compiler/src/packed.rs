//! Checkpoints that come quantized, as GPTQ and AWQ publish them: their codes are used as they are.
//!
//! A linear layer `X` of `k` inputs and `n` outputs has `X.qweight`, `X.qzeros`, `X.scales f16[groups, n]` and, of GPTQ,
//! `X.g_idx i32[k]`: the group of each input. Codes and zeros are packed into `i32`, lowest bits first:
//! - GPTQ (AutoGPTQ, `qlinear_cuda_old.py`): `qweight [k / c, n]` with `c` = 32 / bits inputs in a word, `qzeros [groups, n / c]`
//!   with outputs in a word, and zeros less 1 (but not in `gptq_v2`).
//! - AWQ (AutoAWQ, `WQLinear_GEMM`): `qweight [k, n / 8]` and `qzeros [groups, n / 8]`, outputs in a word in the order
//!   0, 2, 4, 6, 1, 3, 5, 7.
//!
//! For the rest of the compiler there is a tensor `X.weight f32[n, k]`, dequantized as it is read, and beside it
//! `X.weight.codes`, `.scales` and `.zeros` as [`vlmc_ir::weights::Recipe::Codes`] wants them. Where groups are not runs of
//! inputs (GPTQ's act-order), the codes' columns are sorted by group, and `X.weight.columns f32[k]` names the input of each.

use crate::{Error, Result, checkpoint::Weights};
use serde_json::Value;
use std::{
    collections::{BTreeMap, VecDeque},
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};
use vlmc_artifact::{DType, Scheme, quant::Codes};
use vlmc_ir::{
    Def, Op, Program, Type, ValueId, rewrite,
    weights::{Recipe, WeightDef},
};
use vlmc_passes::{PassError, Target, quantize::refusal};

/// Words of AWQ hold these outputs, lowest bits first.
const AWQ_ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
/// Tensors of codes that are kept in memory while rows of them are asked for.
const CACHED: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Gptq { zeros_less_1: bool },
    Awq,
}

/// A packed linear layer.
#[derive(Debug)]
pub(crate) struct Packed {
    name: String,
    format: Format,
    /// `[n, k]`
    shape: [usize; 2],
    /// `[n, groups]`
    scales_shape: [usize; 2],
    scheme: Scheme,
    /// Scales as `f32[n, groups]` and zeros.
    scales: Vec<f32>,
    zeros: Vec<u8>,
    /// Inputs in the order of their groups, if that is another.
    columns: Option<Vec<u32>>,
}

/// The packed layers of a checkpoint, by the names of their weights.
#[derive(Debug, Default)]
pub(crate) struct PackedLayers {
    layers: BTreeMap<String, Packed>,
    cache: Mutex<VecDeque<(String, Arc<Vec<u8>>)>>,
}

/// What a name stands for.
enum Part<'a> {
    Weight(&'a Packed),
    Codes(&'a Packed),
    Scales(&'a Packed),
    Zeros(&'a Packed),
    Columns(&'a Packed, &'a [u32]),
}

impl PackedLayers {
    /// Finds the packed layers by `quantization_config` of the model's configuration.
    ///
    /// # Errors
    /// A method or setting that is not supported, or tensors that do not fit it.
    pub(crate) fn find(config: &Value, weights: &Weights) -> Result<Self> {
        let Some(quantization) = config.get("quantization_config").filter(|q| q.is_object()) else { return Ok(Self::default()) };
        let unsupported = |field: &str, why: &str| {
            let value = quantization.get(field).unwrap_or(&Value::Null);
            Error::config(format!("quantization_config.{field}"), format!("is {value}: {why}"))
        };
        let text = |field: &str| quantization.get(field).and_then(Value::as_str);
        let format = match text("quant_method") {
            Some("gptq") => match text("checkpoint_format") {
                None | Some("gptq") => Format::Gptq { zeros_less_1: true },
                Some("gptq_v2") => Format::Gptq { zeros_less_1: false },
                _ => return Err(unsupported("checkpoint_format", "gptq and gptq_v2 are supported")),
            },
            Some("awq") if text("version").is_none_or(|v| v.eq_ignore_ascii_case("gemm")) => Format::Awq,
            Some("awq") => return Err(unsupported("version", "only gemm is supported")),
            _ => return Err(unsupported("quant_method", "gptq and awq are supported")),
        };
        let bits = match (quantization.get("bits").and_then(Value::as_u64), format) {
            (Some(4), _) => 4,
            (Some(8), Format::Gptq { .. }) => 8,
            _ => return Err(unsupported("bits", "4 is supported, and 8 with gptq")),
        };
        let group = match quantization.get("group_size").and_then(Value::as_i64) {
            Some(-1) => None,
            Some(g @ (16 | 32 | 64 | 128 | 256)) => Some(g as u16),
            _ => return Err(unsupported("group_size", "16, 32, 64, 128, 256 and -1 (whole rows) are supported")),
        };
        let mut layers = BTreeMap::new();
        for name in weights.names() {
            if let Some(layer) = name.strip_suffix(".qweight") {
                let scheme = Scheme { bits, group, zero_points: true };
                layers.insert(format!("{layer}.weight"), Packed::open(layer, format, scheme, weights)?);
            }
        }
        Ok(Self { layers, ..Self::default() })
    }

    /// The layer whose tensor this is, as published.
    pub(crate) fn owns(&self, tensor: &str) -> bool {
        let layer = tensor.rsplit_once('.').filter(|(_, part)| ["qweight", "qzeros", "scales", "g_idx"].contains(part));
        layer.is_some_and(|(layer, _)| self.layers.contains_key(&format!("{layer}.weight")))
    }

    /// The recipe of codes for one of packed weights of one scheme, and the tensor that names the inputs of its columns.
    fn codes_of(&self, recipe: &Recipe) -> Option<(Scheme, Recipe, Option<String>)> {
        match recipe {
            Recipe::Source(name) => {
                let p = self.layers.get(name)?;
                Some((p.scheme, Recipe::Codes(name.clone(), p.scheme), p.columns.as_ref().map(|_| format!("{name}.columns"))))
            }
            Recipe::Reshape(inner, shape) => match self.codes_of(inner)? {
                (scheme, inner, None) => Some((scheme, Recipe::Reshape(Box::new(inner), shape.clone()), None)),
                _ => None,
            },
            Recipe::Concat(parts) => {
                let parts: Vec<_> = parts.iter().map(|p| self.codes_of(p)).collect::<Option<_>>()?;
                let scheme = parts.first()?.0;
                let alike = parts.iter().all(|(s, _, sorted)| *s == scheme && sorted.is_none());
                alike.then(|| (scheme, Recipe::Concat(parts.into_iter().map(|(_, r, _)| r).collect()), None))
            }
            _ => None,
        }
    }

    fn part(&self, name: &str) -> Option<Part<'_>> {
        if let Some(p) = self.layers.get(name) {
            return Some(Part::Weight(p));
        }
        let (weight, part) = name.rsplit_once('.')?;
        let p = self.layers.get(weight)?;
        match part {
            "codes" => Some(Part::Codes(p)),
            "scales" => Some(Part::Scales(p)),
            "zeros" => Some(Part::Zeros(p)),
            "columns" => p.columns.as_deref().map(|c| Part::Columns(p, c)),
            _ => None,
        }
    }

    /// Element type and shape of a tensor that stands for a packed one.
    pub(crate) fn tensor(&self, name: &str) -> Option<(DType, &[usize])> {
        Some(match self.part(name)? {
            Part::Weight(p) => (DType::F32, &p.shape),
            Part::Codes(p) => (DType::U8, &p.shape),
            Part::Scales(p) => (DType::F32, &p.scales_shape),
            Part::Zeros(p) => (DType::U8, &p.scales_shape),
            Part::Columns(p, _) => (DType::F32, &p.shape[1..]),
        })
    }

    /// Bytes of rows of such a tensor; `None` if it is none.
    pub(crate) fn read_rows(&self, name: &str, rows: Range<usize>, weights: &Weights) -> Option<Result<Vec<u8>>> {
        let (part, count) = (self.part(name)?, self.tensor(name)?.1[0]);
        if rows.start > rows.end || rows.end > count {
            return Some(Err(Error::tensor(name, format!("has {count} rows; {rows:?} were asked for"))));
        }
        let floats = |v: &[f32]| v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        Some(Ok(match part {
            Part::Weight(p) => match self.codes(p, rows, weights) {
                Ok(codes) => floats(&p.unsorted(&codes.dequantize(p.shape[1], p.scheme))),
                Err(e) => return Some(Err(e)),
            },
            Part::Codes(p) => match self.codes(p, rows, weights) {
                Ok(codes) => codes.codes,
                Err(e) => return Some(Err(e)),
            },
            Part::Scales(p) => floats(&p.scales[p.of_rows(&rows)]),
            Part::Zeros(p) => p.zeros[p.of_rows(&rows)].to_vec(),
            Part::Columns(_, columns) => columns[rows].iter().flat_map(|c| (*c as f32).to_le_bytes()).collect(),
        }))
    }

    fn codes(&self, p: &Packed, rows: Range<usize>, weights: &Weights) -> Result<Codes> {
        let words = self.words(&format!("{}.qweight", p.name), weights)?;
        let codes = p.unpack(&words, rows.clone());
        Ok(Codes { codes, scales: p.scales[p.of_rows(&rows)].to_vec(), zeros: p.zeros[p.of_rows(&rows)].to_vec() })
    }

    /// A whole tensor, of which rows will be asked for again: its rows are the weight's columns.
    fn words(&self, name: &str, weights: &Weights) -> Result<Arc<Vec<u8>>> {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, words)) = cache.iter().find(|(n, _)| n == name) {
            return Ok(words.clone());
        }
        let words = Arc::new(weights.bytes(name)?);
        cache.push_back((name.into(), words.clone()));
        if cache.len() > CACHED {
            cache.pop_front();
        }
        Ok(words)
    }
}

/// The program with the codes of packed layers as they are, where `target` runs them; elsewhere they are dequantized.
///
/// # Errors
/// A rewrite made something ill-typed: a bug.
pub(crate) fn use_codes(mut program: Program, packed: &PackedLayers, target: &Target) -> Result<Program> {
    if packed.layers.is_empty() {
        return Ok(program);
    }
    let mut columns = BTreeMap::new();
    for (name, def) in program.weights.clone() {
        let Some((scheme, recipe, sorted)) = packed.codes_of(&def.recipe) else { continue };
        if refusal(target, &program, &name, scheme).is_some() || sorted.is_some() && !only_linear(&program, &name) {
            continue;
        }
        columns.extend(sorted.map(|columns| (name.clone(), columns)));
        program.weights.insert(name, WeightDef { dtype: DType::Quant(scheme), shape: def.shape, recipe });
    }
    for (name, source) in &columns {
        let k = program.weights[name].shape[1];
        let def = WeightDef { dtype: DType::F32, shape: vec![k], recipe: Recipe::Source(source.clone()) };
        program.weights.insert(source.clone(), def);
    }
    program.map_weights(|_, w| w.clone());
    program.graphs = program
        .graphs
        .iter()
        .map(|graph| {
            rewrite(graph, |g, node, args| {
                let (Op::Linear(_), Def::Weight(name)) = (&node.op, graph.def(*node.args.get(1)?)) else { return None };
                let source = columns.get(name)?;
                let k = program.weights.get(name)?.shape[1];
                let index = g.cast(g.weight_value(source, Type::new(DType::F32, [k])), DType::I64);
                let x = g.gather(args[0], index, args[0].ty().rank() - 1);
                Some(g.apply_op(node.op.clone(), &[&[x], &args[1..]].concat()))
            })
        })
        .collect::<Result<_, _>>()
        .map_err(PassError::from)?;
    Ok(program)
}

/// Whether a weight is read by linear layers only.
fn only_linear(program: &Program, name: &str) -> bool {
    program.graphs.iter().all(|g| {
        let reads = |v: &ValueId| matches!(g.def(*v), Def::Weight(n) if n == name);
        g.nodes().all(|(_, n)| matches!(n.op, Op::Linear(_)) || !n.args.iter().any(reads))
    })
}

impl Packed {
    fn open(layer: &str, format: Format, scheme: Scheme, weights: &Weights) -> Result<Self> {
        let tensor = |part: &str| format!("{layer}.{part}");
        let shape = |part: &str| match weights.shape(&tensor(part)) {
            Some([a, b]) => Ok([*a, *b]),
            Some(other) => Err(Error::tensor(tensor(part), format!("must be a matrix, is {other:?}"))),
            None => Err(Error::tensor(tensor(part), "is missing")),
        };
        let per_word = 32 / usize::from(scheme.bits);
        let ([groups, n], qweight, qzeros) = (shape("scales")?, shape("qweight")?, shape("qzeros")?);
        let k = if format == Format::Awq { qweight[0] } else { qweight[0].saturating_mul(per_word) };
        let wanted = if format == Format::Awq { [k, n / per_word] } else { [k / per_word, n] };
        let fits = n.is_multiple_of(per_word) && qweight == wanted && qzeros == [groups, n / per_word] && groups == scheme.groups(k);
        if !fits {
            let given = format!("qweight {qweight:?}, qzeros {qzeros:?} and scales {:?}", [groups, n]);
            return Err(Error::tensor(layer, format!("{given} do not fit one another at {scheme}")));
        }
        let words =
            |part: &str| weights.bytes(&tensor(part)).map(|b| b.as_chunks().0.iter().map(|w| i32::from_le_bytes(*w)).collect::<Vec<_>>());
        let (raw_scales, raw_zeros) = (weights.floats(&tensor("scales"))?.0, words("qzeros")?);
        if raw_zeros.len() != groups * (n / per_word) {
            return Err(Error::tensor(tensor("qzeros"), "must be of type i32"));
        }
        let mask = scheme.max_code();
        let mut out = Self {
            name: layer.into(),
            format,
            shape: [n, k],
            scales_shape: [n, groups],
            scheme,
            scales: Vec::with_capacity(n * groups),
            zeros: Vec::with_capacity(n * groups),
            columns: None,
        };
        for r in 0..n {
            for g in 0..groups {
                out.scales.push(raw_scales[g * n + r]);
                let (word, shift) = out.place(r);
                let zero = (raw_zeros[g * (n / per_word) + word] >> shift) as u8 & mask;
                out.zeros.push(if format == (Format::Gptq { zeros_less_1: true }) { zero.wrapping_add(1) & mask } else { zero });
            }
        }
        out.scheme.zero_points = out.zeros.iter().any(|z| *z != scheme.middle());
        if weights.shape(&tensor("g_idx")).is_some() {
            out.columns = columns(&words("g_idx")?, k, scheme).map_err(|why| Error::tensor(tensor("g_idx"), why))?;
        }
        Ok(out)
    }

    /// Where scales and zeros of rows lie.
    fn of_rows(&self, rows: &Range<usize>) -> Range<usize> {
        rows.start * self.scales_shape[1]..rows.end * self.scales_shape[1]
    }

    /// Word and shift of an output among packed outputs.
    fn place(&self, r: usize) -> (usize, usize) {
        let bits = usize::from(self.scheme.bits);
        let per_word = 32 / bits;
        let within = r % per_word;
        let slot = if self.format == Format::Awq { AWQ_ORDER.iter().position(|o| *o == within).unwrap_or(within) } else { within };
        (r / per_word, slot * bits)
    }

    /// Codes of rows, `[rows, k]`, columns sorted by group.
    fn unpack(&self, words: &[u8], rows: Range<usize>) -> Vec<u8> {
        let [n, k] = self.shape;
        let bits = usize::from(self.scheme.bits);
        let per_word = 32 / bits;
        let words = words.as_chunks::<4>().0;
        let mut out = vec![0; rows.len() * k];
        for c in 0..k {
            let input = self.columns.as_ref().map_or(c, |columns| columns[c] as usize);
            for r in rows.clone() {
                let (word, shift) = match self.format {
                    Format::Gptq { .. } => (input / per_word * n + r, input % per_word * bits),
                    Format::Awq => {
                        let (word, shift) = self.place(r);
                        (input * (n / per_word) + word, shift)
                    }
                };
                let word = words.get(word).map_or(0, |w| u32::from_le_bytes(*w));
                out[(r - rows.start) * k + c] = (word >> shift) as u8 & self.scheme.max_code();
            }
        }
        out
    }

    /// Rows with their columns in the order of the inputs.
    fn unsorted(&self, rows: &[f32]) -> Vec<f32> {
        let Some(columns) = &self.columns else { return rows.to_vec() };
        let mut out = vec![0.0; rows.len()];
        for (row, out) in rows.chunks_exact(columns.len()).zip(out.chunks_exact_mut(columns.len())) {
            row.iter().zip(columns).for_each(|(v, c)| out[*c as usize] = *v);
        }
        out
    }
}

/// Inputs sorted by group, if they are not already.
fn columns(groups: &[i32], k: usize, scheme: Scheme) -> Result<Option<Vec<u32>>, String> {
    if groups.len() != k {
        return Err(format!("must be i32[{k}]"));
    }
    let len = scheme.group_len(k);
    let mut columns: Vec<u32> = (0..k as u32).collect();
    columns.sort_by_key(|c| groups[*c as usize]);
    // Groups must be as long as the scheme's when sorted.
    match columns.iter().enumerate().find(|(at, c)| groups[**c as usize] != (at / len) as i32) {
        Some((_, c)) => Err(format!("input {c} is in group {}: groups must have {len} inputs each", groups[*c as usize])),
        None => Ok((!columns.is_sorted()).then_some(columns)),
    }
}
