//! The engine of `cpu` artifacts: runs the compiled program step by step.

mod check;
mod memory;
mod observe;
mod step;
mod weights;

use crate::{
    Engine, Error, Observer, Result, Tensor,
    artifact_dir::{Artifact, read_limited},
    binding,
};
use memory::{Frame, Literal, State};
use observe::Watch;
use std::num::NonZero;
use vlmc_artifact::{
    Entry, Manifest, PROGRAM,
    program::{Function, Place, Program},
};
use vlmc_kernels::Kernels;
use weights::Weights;

/// Longest program that is read.
const MAX_PROGRAM: u64 = 256 << 20;
/// Most bytes of working memory that a request may need.
const MAX_ARENA: i64 = 1 << 38;

/// Runs a `cpu` artifact.
pub struct CpuEngine {
    manifest: Manifest,
    kernels: Kernels,
    weights: Weights,
    functions: Vec<Loaded>,
    observer: Option<Observer>,
}

/// A function and what it keeps between runs.
struct Loaded {
    function: Function,
    /// Its entry in the manifest.
    entry: usize,
    /// Literals by value, converted once.
    literals: Vec<Option<Literal>>,
    /// Arena, one buffer per slot.
    slots: Vec<Vec<u64>>,
    states: Vec<State>,
}

impl CpuEngine {
    /// Loads the program and maps the weights; `threads` is the number of CPU threads, by default one per core that this
    /// process may use.
    ///
    /// # Errors
    /// The program or the weights are not what the manifest says, or could not be run safely.
    pub fn open(artifact: &Artifact, threads: Option<NonZero<usize>>) -> Result<Self> {
        let path = artifact.require(PROGRAM)?;
        let json = read_limited(&path, MAX_PROGRAM)?;
        let program: Program = serde_json::from_slice(&json).map_err(|e| Error::file(&path, format!("is not a program: {e}")))?;
        let invalid = |why: String| Error::file(&path, format!("is not a valid program: {why}"));
        check::program(&program).map_err(invalid)?;
        check::layouts(&program).map_err(invalid)?;
        let weights = Weights::open(&artifact.require("weights.safetensors")?, &program.weights)?;
        let manifest = artifact.manifest().clone();
        let functions =
            program.functions.into_iter().map(|f| Loaded::new(f, &manifest)).collect::<Result<Vec<_>, String>>().map_err(invalid)?;
        if let Some(e) = manifest.entries.iter().enumerate().find(|(i, _)| !functions.iter().any(|f| f.entry == *i)) {
            return Err(invalid(format!("it has no function '{}'", e.1.name)));
        }
        let threads = threads.or_else(|| std::thread::available_parallelism().ok()).map_or(1, NonZero::get);
        Ok(Self { manifest, kernels: Kernels::new(threads), weights, functions, observer: None })
    }

    /// Tells `observer` of every step with weights from now on.
    pub fn observe(&mut self, observer: Observer) {
        self.observer = Some(observer);
    }
}

impl Loaded {
    fn new(function: Function, manifest: &Manifest) -> Result<Self, String> {
        let entry = manifest.entries.iter().position(|e| e.name == function.name);
        let entry = entry.ok_or_else(|| format!("function '{}' is not in the manifest", function.name))?;
        let e = &manifest.entries[entry];
        let ports = |declared: &[vlmc_artifact::Port], named: &[vlmc_artifact::program::NamedValue]| {
            declared.len() == named.len()
                && declared.iter().zip(named).all(|(p, n)| {
                    let v = &function.values[n.value as usize];
                    p.name == n.name && p.dtype == v.dtype && p.shape == v.shape
                })
        };
        let states = e
            .states
            .iter()
            .map(|s| (&s.past, s.dtype, &s.shape, s.axis))
            .eq(function.states.iter().map(|s| (&s.name, s.dtype, &s.shape, s.axis)));
        if !ports(&e.inputs, &function.inputs) || !ports(&e.outputs, &function.outputs) || !states {
            return Err(format!("function '{}' has other inputs, outputs or states than the manifest says", function.name));
        }
        let literal = |v: &vlmc_artifact::program::Value| match &v.place {
            Place::Literal(data) => Some(Literal::new(v.dtype, data)),
            _ => None,
        };
        Ok(Self {
            entry,
            literals: function.values.iter().map(literal).collect(),
            slots: vec![vec![]; function.slots.len()],
            states: function.states.iter().map(|s| State::new(s.dtype)).collect(),
            function,
        })
    }

    fn run(
        &mut self,
        kernels: &Kernels,
        weights: &Weights,
        bound: binding::Bound<'_>,
        entry: &Entry,
        mut watch: Option<Watch<'_>>,
    ) -> Result<Vec<Tensor>> {
        let symbols = &bound.symbols;
        let shapes = self
            .function
            .values
            .iter()
            .map(|v| memory::extents(&v.shape, symbols))
            .collect::<Result<Vec<_>, String>>()
            .map_err(|why| Error::Input(format!("{}: {why}", entry.name)))?;
        self.reserve(&shapes, symbols).map_err(|why| Error::Input(format!("{}: {why}", entry.name)))?;
        for step in &self.function.steps {
            let mut frame = Frame {
                function: &self.function,
                shapes: &shapes,
                symbols,
                inputs: &bound.inputs,
                literals: &self.literals,
                weights,
                slots: &mut self.slots,
                states: &mut self.states,
            };
            let before = watch.as_ref().map_or(Ok(None), |w| w.before(step, &frame))?;
            step::run(kernels, step, &mut frame).map_err(|why| {
                let scope = if step.scope.is_empty() { String::new() } else { format!("{}: ", step.scope) };
                Error::Input(format!("{}: {scope}{why}", entry.name))
            })?;
            if let Some(watch) = &mut watch {
                watch.after(step, &frame, before)?;
            }
        }
        let frame = Frame {
            function: &self.function,
            shapes: &shapes,
            symbols,
            inputs: &bound.inputs,
            literals: &self.literals,
            weights,
            slots: &mut self.slots,
            states: &mut self.states,
        };
        self.function.outputs.iter().map(|o| frame.tensor(o.value as usize)).collect()
    }

    /// Makes the arena large enough.
    fn reserve(&mut self, shapes: &[Vec<usize>], symbols: &vlmc_artifact::Bindings) -> Result<(), String> {
        let mut total = 0i64;
        let mut sizes = vec![];
        for s in &self.function.slots {
            let bytes = s.eval(symbols).map_err(|e| e.to_string())?;
            total = total.checked_add(bytes).filter(|t| bytes >= 0 && *t <= MAX_ARENA).ok_or("the request needs too much memory")?;
            sizes.push(bytes as usize);
        }
        for (v, shape) in self.function.values.iter().zip(shapes) {
            if let Place::Slot(i) = v.place {
                let need = shape.iter().try_fold(v.dtype.size(), |n, d| n.checked_mul(*d));
                if need.is_none_or(|n| n > sizes[i as usize]) {
                    return Err(format!("slot {i} is too small for a value: the program is not valid"));
                }
            }
        }
        for (slot, bytes) in self.slots.iter_mut().zip(sizes) {
            let words = bytes.div_ceil(8);
            if slot.len() < words {
                let more = words - slot.len();
                slot.try_reserve_exact(more).map_err(|_| format!("there is no memory for {bytes} bytes"))?;
                slot.resize(words, 0);
            }
        }
        Ok(())
    }
}

impl Engine for CpuEngine {
    fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn run(&mut self, entry: &str, inputs: &[(&str, &Tensor)]) -> Result<Vec<Tensor>> {
        let loaded = self.functions.iter_mut().find(|f| f.function.name == entry);
        let loaded = loaded.ok_or_else(|| Error::Input(format!("the artifact has no entry '{entry}'")))?;
        let entry = &self.manifest.entries[loaded.entry];
        let shapes: Vec<_> = loaded.states.iter().map(State::shape).collect();
        let now: Vec<_> = shapes.iter().map(|s| s.as_ref().map(<[usize; 4]>::as_slice)).collect();
        let bound = binding::bind(&self.manifest.symbols, entry, inputs, &now)?;
        let before: Vec<usize> = loaded.states.iter().map(State::len).collect();
        let watch = self.observer.as_mut().map(|observer| Watch::new(observer, &self.weights, entry));
        let result = loaded.run(&self.kernels, &self.weights, bound, entry, watch);
        if result.is_err() {
            loaded.states.iter_mut().zip(before).for_each(|(s, len)| s.truncate(len));
        }
        result
    }

    fn past(&self) -> usize {
        let states = self.functions.iter().flat_map(|f| self.manifest.entries[f.entry].states.iter().zip(&f.states));
        states.filter(|(declared, _)| declared.follows_text()).map(|(_, s)| s.len()).next().unwrap_or(0)
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        if len > self.past() {
            return Err(Error::Input(format!("cannot keep {len} positions of {}", self.past())));
        }
        for f in &mut self.functions {
            for (declared, state) in self.manifest.entries[f.entry].states.iter().zip(&mut f.states) {
                if len == 0 || declared.follows_text() {
                    state.truncate(len);
                }
            }
        }
        Ok(())
    }
}
