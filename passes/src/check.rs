//! Passes against the reference interpreter: the program before against the program after, on sampled inputs.

use crate::{Contract, Pass, PassError, Target, Trace};
use half::f16;
use std::collections::BTreeMap;
use vlmc_ir::{
    Bindings, DType, Dim, Graph, Op, Program, Type, ValueId, Verified,
    interp::{self, Array, Env},
};

/// Bytes of weights as `f32` up to which programs are interpreted.
const MAX_WEIGHT_BYTES: u64 = 1 << 28;
/// Samples per graph.
const SAMPLES: u64 = 3;
/// Inputs that are drawn for a sample before it is given up.
const TRIES: u64 = 40;
/// What [`Contract::Close`] allows, relative to the largest element of an output.
const CLOSE: f32 = 1e-5;
/// What [`Contract::Narrow`] allows.
const NARROW: f32 = 2e-2;

/// Why a check failed.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// A pass stopped.
    #[error(transparent)]
    Pass(#[from] PassError),
    /// The interpreter is not made for so much.
    #[error(
        "the program has {bytes} bytes of weights as f32; passes are checked in the reference interpreter, which takes at most {MAX_WEIGHT_BYTES}"
    )]
    TooLarge {
        /// Bytes of all weights.
        bytes: u64,
    },
    /// A weight cannot be read.
    #[error("{0}")]
    Weights(String),
    /// No input that was drawn has a meaning.
    #[error("graph '{graph}' cannot be checked: none of {TRIES} inputs that were drawn has a meaning; of the last: {why}")]
    NoInputs {
        /// Graph name.
        graph: String,
        /// What the interpreter said.
        why: String,
    },
    /// A pass broke its contract.
    #[error("pass '{pass}' is wrong: graph '{graph}': output '{output}' {how}")]
    Broken {
        /// Pass name.
        pass: &'static str,
        /// Graph name.
        graph: String,
        /// The first output that differs.
        output: String,
        /// In which way.
        how: String,
    },
}

/// What was checked.
#[derive(Clone, Debug)]
pub struct Checked {
    /// What the pass did.
    pub trace: Trace,
    /// What the pass promises.
    pub contract: Contract,
    /// Runs that were compared, of all graphs.
    pub samples: usize,
    /// The largest difference, relative to the largest element of its output.
    pub difference: f32,
}

impl std::fmt::Display for Checked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { trace, contract, samples, difference } = self;
        write!(f, "checked {}: {contract}, {samples} runs, largest relative difference {difference:e}", trace.pass)
    }
}

/// Runs `passes` and holds each to its contract: every graph gives the same outputs and states before and after it, bit for bit
/// or up to 1e-5 of the largest element, for inputs and values of the symbols drawn with `seed`. `source` reads a checkpoint
/// tensor as `f32`.
///
/// # Errors
/// A pass that breaks its contract, or stops; a program that is too large or whose inputs cannot be drawn.
pub fn check(
    target: &Target,
    program: Verified,
    passes: &[Pass],
    seed: u64,
    source: &dyn Fn(&str) -> Result<Vec<f32>, String>,
) -> Result<Vec<Checked>, CheckError> {
    let bytes = 4 * program.weights.values().map(vlmc_ir::weights::WeightDef::elements).sum::<u64>();
    if bytes > MAX_WEIGHT_BYTES {
        return Err(CheckError::TooLarge { bytes });
    }
    let weights = |p: &Program| interp::weights(p, source).map_err(CheckError::Weights);
    let samples = draw(&program, &weights(&program)?, seed)?;
    let mut expected: Vec<Outputs> = samples.iter().map(|s| s.outputs.clone()).collect();
    let mut program = program;
    let mut checked = vec![];
    for pass in passes {
        let (next, trace) = pass.apply(target, program)?;
        program = next;
        let weights = weights(&program)?;
        let mut difference = 0.0f32;
        for (sample, expected) in samples.iter().zip(&mut expected) {
            let broken =
                |output: &str, how: String| CheckError::Broken { pass: pass.name, graph: sample.graph.clone(), output: output.into(), how };
            let graph = program.graphs.iter().find(|g| g.name == sample.graph).ok_or_else(|| broken("", "is gone".into()))?;
            let env = Env { symbols: &sample.symbols, inputs: &sample.inputs, weights: &weights };
            let got = interp::run(graph, &env).map_err(|e| broken("", format!("has no value: {e}")))?;
            for (name, before) in expected.iter() {
                let after = got.get(name).ok_or_else(|| broken(name, "is gone".into()))?;
                difference = difference.max(differ(before, after, pass.contract).map_err(|how| broken(name, how))?);
            }
            *expected = got;
        }
        checked.push(Checked { trace, contract: pass.contract, samples: samples.len(), difference });
    }
    Ok(checked)
}

type Outputs = BTreeMap<String, Array>;

/// A graph's inputs, and what it made of them before all passes.
struct Sample {
    graph: String,
    symbols: Bindings,
    inputs: BTreeMap<String, Array>,
    outputs: Outputs,
}

/// How far `after` is from `before`, relative to the largest element, or why that is too far.
fn differ(before: &Array, after: &Array, contract: Contract) -> Result<f32, String> {
    if (before.dtype(), before.shape()) != (after.dtype(), after.shape()) {
        return Err(format!("is {}{:?}, was {}{:?}", after.dtype(), after.shape(), before.dtype(), before.shape()));
    }
    let (Array::F32(a), Array::F32(b)) = (before, after) else {
        return if before == after { Ok(0.0) } else { Err("has other elements".into()) };
    };
    // Below its least normal number `f16` has fewer and fewer digits.
    let least = if contract == Contract::Narrow { f16::MIN_POSITIVE.to_f32() } else { f32::MIN_POSITIVE };
    let scale = a.iter().fold(least, |m, v| m.max(v.abs()));
    let mut worst = 0.0f32;
    for (i, (x, y)) in a.iter().zip(b).enumerate() {
        if x.to_bits() == y.to_bits() || x.is_nan() && y.is_nan() {
            continue;
        }
        let relative = (x - y).abs() / scale;
        let allowed = match contract {
            Contract::Exact => 0.0,
            Contract::Close => CLOSE,
            Contract::Narrow => NARROW,
        };
        // A NaN is further than anything.
        if relative.is_nan() || relative > allowed {
            let promise = if contract == Contract::Exact { "bit for bit".to_string() } else { format!("within {allowed:e}") };
            return Err(format!("differs: element {i} is {y}, was {x}, and the largest is {scale}; promised was the same {promise}"));
        }
        worst = worst.max(relative);
    }
    Ok(worst)
}

/// Inputs for every graph of which the interpreter makes something.
fn draw(program: &Program, weights: &BTreeMap<String, Array>, seed: u64) -> Result<Vec<Sample>, CheckError> {
    let mut samples = vec![];
    for graph in &program.graphs {
        for sample in 0..SAMPLES {
            let (mut drawn, mut why) = (None, String::new());
            for attempt in 0..TRIES {
                let mut rng = Rng(seed.wrapping_add(sample * TRIES + attempt).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
                match draw_one(program, graph, weights, &mut rng) {
                    Ok(s) => {
                        drawn = Some(s);
                        break;
                    }
                    Err(e) => why = e,
                }
            }
            samples.push(drawn.ok_or(CheckError::NoInputs { graph: graph.name.clone(), why })?);
        }
    }
    Ok(samples)
}

fn draw_one(program: &Program, graph: &Graph, weights: &BTreeMap<String, Array>, rng: &mut Rng) -> Result<Sample, String> {
    let value = |s: &vlmc_ir::Symbol, rng: &mut Rng| rng.among(s.min, s.max.min(s.min.max(1) + 4));
    let symbols: Bindings = program.symbols.iter().map(|s| (s.name.as_str(), value(s, rng))).collect();
    let extents = |t: &Type| {
        let extent = |d: &Dim| d.eval(&symbols).map_err(|e| e.to_string()).and_then(|v| usize::try_from(v).map_err(|e| e.to_string()));
        t.shape.iter().map(extent).collect::<Result<Vec<_>, _>>()
    };
    let bounds = Bounds { graph, symbols: &symbols };
    let mut inputs = BTreeMap::new();
    let ports = graph.inputs.iter().map(|p| (&p.name, p.value));
    for (name, v) in ports.chain(graph.states.iter().map(|s| (&s.past_name, s.past))) {
        let ty = graph.ty(v);
        let shape = extents(ty)?;
        let n: usize = shape.iter().product();
        let data: Vec<f64> = match ty.dtype {
            DType::I64 if name.ends_with("grid_thw") => grids(&shape, bounds.rows(v)),
            DType::I64 => {
                let below = bounds.below(v);
                (0..n).map(|_| rng.among(0, below - 1) as f64).collect()
            }
            DType::Bool => (0..n).map(|_| rng.among(0, 1) as f64).collect(),
            _ => (0..n).map(|_| rng.unit()).collect(),
        };
        let literal = vlmc_ir::Literal { dtype: ty.dtype, shape, data };
        inputs.insert(name.clone(), Array::try_from(&literal)?);
    }
    let outputs = interp::run(graph, &Env { symbols: &symbols, inputs: &inputs, weights }).map_err(|e| e.to_string())?;
    let finite = |a: &Array| if let Array::F32(a) = a { a.iter().all(|v| v.is_finite()) } else { true };
    match outputs.iter().find(|(_, a)| !finite(a)) {
        Some((name, _)) => Err(format!("output '{name}' is not finite")),
        None => Ok(Sample { graph: graph.name.clone(), symbols, inputs, outputs }),
    }
}

/// `[frames, height, width]` of pictures that have `rows` patches in all: the first of all but one frame of 2x2 patches.
fn grids(shape: &[usize], rows: i64) -> Vec<f64> {
    let pictures = shape.first().copied().unwrap_or(0) as i64;
    let small = [1, 2, 2];
    let last = [1, 2, (rows - 4 * (pictures - 1)).max(0) / 2];
    (0..pictures).flat_map(|i| if i + 1 == pictures { last } else { small }).map(|v| v as f64).collect()
}

/// What the values of integer inputs may be.
struct Bounds<'a> {
    graph: &'a Graph,
    symbols: &'a Bindings,
}

impl Bounds<'_> {
    /// What elements of an input must be below: the shortest axis that they are an index into, and 2 for all others, which are
    /// flags and positions.
    fn below(&self, v: ValueId) -> i64 {
        let lengths = self.graph.nodes().filter_map(|(_, n)| {
            let (table, axis) = match &n.op {
                Op::Gather(o) if n.args[1] == v => (n.args[0], o.axis),
                Op::Embedding(_) if n.args[1] == v => (n.args[0], 0),
                _ => return None,
            };
            self.graph.ty(table).shape.get(axis)?.eval(self.symbols).ok()
        });
        lengths.min().unwrap_or(2).max(1)
    }

    /// Rows of patches whose grids an input gives.
    fn rows(&self, v: ValueId) -> i64 {
        let rows = self.graph.nodes().find_map(|(_, n)| match &n.op {
            Op::GridPositions(o) if n.args.contains(&v) => o.rows.eval(self.symbols).ok(),
            _ => None,
        });
        rows.unwrap_or(4)
    }
}

/// Numbers without a pattern (Marsaglia's xorshift).
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// In `min..=max`.
    fn among(&mut self, min: i64, max: i64) -> i64 {
        min + (self.next() % (max - min + 1).max(1) as u64) as i64
    }

    /// In -1..1.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }
}
