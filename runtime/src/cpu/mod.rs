//! The engine of `cpu` artifacts: runs the compiled program step by step.

mod arena;
mod check;
mod memory;
mod observe;
mod step;
mod weights;
mod work;

use crate::{
    Engine, EngineOptions, Error, Observer, Result, Tensor,
    artifact_dir::{Artifact, read_limited},
    binding, engine,
};
use arena::{Arena, Lives, Places, Rest};
pub(crate) use memory::state_bytes;
use memory::{Frame, Literal, Shapes, State};
use observe::Watch;
use std::time::Instant;
use vlmc_artifact::{
    Bindings, Manifest, PROGRAM,
    program::{Function, Kernel, Place, Program, Step},
};
use vlmc_kernels::Kernels;
use weights::Weights;
pub use work::{Profiler, TimedRun, Work, work};

/// Longest program that is read.
const MAX_PROGRAM: u64 = 256 << 20;

/// Runs a `cpu` artifact.
pub struct CpuEngine {
    manifest: Manifest,
    kernels: Kernels,
    weights: Weights,
    functions: Vec<Loaded>,
    arena: Arena,
    observer: Option<Observer>,
    profiler: Option<Profiler>,
    only_largest: bool,
}

/// A function and what it keeps between runs.
struct Loaded {
    function: Function,
    /// Its entry in the manifest.
    entry: usize,
    /// Literals by value, converted once.
    literals: Vec<Option<Literal>>,
    lives: Lives,
    /// [`Frame::multiplied`] of each step.
    multiplied: Vec<Option<u32>>,
    symbols: Bindings,
    shapes: Shapes,
    /// Bytes of the parts of the arena.
    sizes: Vec<usize>,
    /// Where results lie, for the sizes of the last run and some more.
    places: Places,
    states: Vec<State>,
    /// Lengths of the states before a run.
    before: Vec<usize>,
    /// When the steps of a run began, if that is to be told.
    times: Option<Vec<Instant>>,
}

/// Reads and checks the program of an artifact.
///
/// # Errors
/// It could not be run safely.
pub(crate) fn program(artifact: &Artifact) -> Result<Program> {
    let path = artifact.require(PROGRAM)?;
    let json = read_limited(&path, MAX_PROGRAM)?;
    let program: Program = serde_json::from_slice(&json).map_err(|e| Error::file(&path, format!("is not a program: {e}")))?;
    let invalid = |why: String| Error::file(&path, format!("is not a valid program: {why}"));
    check::program(&program).map_err(invalid)?;
    check::layouts(&program).map_err(invalid)?;
    Ok(program)
}

/// Bytes of memory that a run of an entry works in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Working {
    /// All of it: results of steps, and what their kernels work with.
    pub arena: usize,
    /// What is in use at once, at the step where it is the most: no plan can take less.
    pub largest_live: usize,
    /// What kernels work with, at the step where it is the most.
    pub scratch: usize,
}

/// What a run of a checked function works in, with these values of the symbols and so many threads.
pub(crate) fn working(f: &Function, symbols: &Bindings, threads: usize) -> Result<Working, String> {
    let lives = Lives::new(f);
    let mut sizes = vec![];
    memory::sizes(f, &lives, Shapes::new(f).of(symbols)?, threads, &mut sizes);
    let places = Places::new(&lives, &sizes)?;
    Ok(Working { arena: places.bytes(), largest_live: places.largest_live(), scratch: places.scratch() })
}

impl CpuEngine {
    /// Loads the program and maps the weights.
    ///
    /// # Errors
    /// The program or the weights are not what the manifest says, or could not be run safely.
    pub fn open(artifact: &Artifact, options: &EngineOptions) -> Result<Self> {
        let program = program(artifact)?;
        let path = artifact.require(PROGRAM)?;
        let invalid = |why: String| Error::file(&path, format!("is not a valid program: {why}"));
        let mut weights = Weights::open(&artifact.require("weights.safetensors")?, &program.weights)?;
        let manifest = artifact.manifest().clone();
        let functions =
            program.functions.into_iter().map(|f| Loaded::new(f, &manifest)).collect::<Result<Vec<_>, String>>().map_err(invalid)?;
        if let Some(e) = manifest.entries.iter().enumerate().find(|(i, _)| !functions.iter().any(|f| f.entry == *i)) {
            return Err(invalid(format!("it has no function '{}'", e.1.name)));
        }
        let kernels = Kernels::new(engine::threads(options.threads));
        if options.large_pages {
            weights.enlarge(&kernels, &functions.iter().flat_map(|f| read_by_tokens(&f.function)).collect());
        }
        Ok(Self { manifest, kernels, weights, functions, arena: Arena::default(), observer: None, profiler: None, only_largest: false })
    }

    /// Tells `observer` of every step with weights from now on.
    pub fn observe(&mut self, observer: Observer) {
        self.observer = Some(observer);
    }

    /// Tells `profiler` how long every step takes from now on.
    pub fn profile(&mut self, profiler: Profiler) {
        self.profiler = Some(profiler);
    }
}

/// Numbers of the weights that a function with states reads whole for every token.
fn read_by_tokens(function: &Function) -> impl Iterator<Item = usize> + '_ {
    let linear = function
        .steps
        .iter()
        .filter(|s| !function.states.is_empty() && matches!(s.kernel, Kernel::Linear { .. } | Kernel::GatedLinear { .. }));
    linear.filter_map(|s| match function.values[*s.args.get(1)? as usize].place {
        Place::Weight(i) => Some(i as usize),
        _ => None,
    })
}

/// [`Frame::multiplied`] of each step.
fn multiplied(f: &Function) -> Vec<Option<u32>> {
    let lives = f.lives();
    let of = |(i, step): (usize, &Step)| {
        let (next, last) = (f.steps.get(i + 1)?, *step.outs.last()?);
        let (Kernel::Linear { dynamic: true, .. } | Kernel::GatedLinear { dynamic: true, .. }) = next.kernel else { return None };
        let Place::Slot(slot) = f.values[last as usize].place else { return None };
        let dies = lives[slot as usize].as_ref().is_some_and(|life| *life.end() == i + 1);
        (dies && next.args[0] == last && !next.args[1..].contains(&last)).then_some(next.args[1])
    };
    f.steps.iter().enumerate().map(of).collect()
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
            lives: Lives::new(&function),
            multiplied: multiplied(&function),
            symbols: Bindings::default(),
            shapes: Shapes::new(&function),
            sizes: vec![],
            places: Places::default(),
            states: function.states.iter().map(|s| State::new(s.dtype)).collect(),
            before: vec![],
            times: None,
            function,
        })
    }

    fn run(
        &mut self,
        kernels: &Kernels,
        weights: &Weights,
        arena: &mut Arena,
        (inputs, outputs): (&[&Tensor], &mut Vec<Tensor>),
        only_largest: bool,
        mut watch: Option<Watch<'_>>,
    ) -> Result<()> {
        let symbols = &self.symbols;
        let invalid = |why: String| Error::Input(format!("{}: {why}", self.function.name));
        let shapes = self.shapes.of(symbols).map_err(invalid)?;
        memory::sizes(&self.function, &self.lives, shapes, kernels.pool().threads(), &mut self.sizes);
        if !self.places.is_for(&self.sizes) {
            self.places = Places::new(&self.lives, &self.sizes).map_err(invalid)?;
        }
        let words = arena.fit(&self.places).map_err(invalid)?;
        // What a step sees, of which part of the arena.
        macro_rules! frame {
            ($arena:expr, $multiplied:expr) => {
                Frame {
                    function: &self.function,
                    shapes,
                    symbols,
                    inputs,
                    literals: &self.literals,
                    weights,
                    places: &self.places,
                    arena: $arena,
                    states: &mut self.states,
                    only_largest,
                    multiplied: $multiplied,
                }
            };
        }
        let mut now = || _ = self.times.as_mut().map(|t| t.push(Instant::now()));
        now();
        let mut rounded = None;
        for (i, step) in self.function.steps.iter().enumerate() {
            let before = watch.as_ref().map_or(Ok(None), |w| w.before(step, &frame!(Rest::all(words), None)))?;
            // Results that lie in the arena: one, or a sum and its norm.
            let part = |result: usize| match step.outs.get(result).map(|v| &self.function.values[*v as usize].place) {
                Some(Place::Slot(slot)) => self.places.slot(*slot as usize),
                _ => 0..0,
            };
            let parts = [part(0), part(1), self.places.scratch_of(i)];
            let (rest, [first, second, scratch]) = arena::split(words, parts).map_err(invalid)?;
            // An observer is told of all results, and reads them.
            let multiplied = self.multiplied[i].filter(|_| watch.is_none());
            let outs = [first, second];
            step::run(kernels, step, &mut frame!(rest, multiplied), outs, scratch, &mut rounded).map_err(|why| {
                let scope = if step.scope.is_empty() { String::new() } else { format!("{}: ", step.scope) };
                Error::Input(format!("{}: {scope}{why}", self.function.name))
            })?;
            if let Some(watch) = &mut watch {
                watch.after(step, &frame!(Rest::all(words), None), before)?;
            }
            now();
        }
        let frame = frame!(Rest::all(words), None);
        outputs.resize_with(self.function.outputs.len(), Tensor::default);
        self.function.outputs.iter().zip(outputs).try_for_each(|(o, to)| frame.copy(o.value as usize, to))
    }
}

impl Engine for CpuEngine {
    fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn run(&mut self, entry: &str, inputs: &[(&str, &Tensor)]) -> Result<Vec<Tensor>> {
        let mut outputs = vec![];
        self.run_into(entry, inputs, &mut outputs)?;
        Ok(outputs)
    }

    /// Takes no memory if this entry has run with the same sizes but for some more positions in its states, and `outputs` holds what
    /// came out then: decoding a token takes some from time to time, when caches and places have to grow.
    fn run_into(&mut self, entry: &str, inputs: &[(&str, &Tensor)], outputs: &mut Vec<Tensor>) -> Result<()> {
        let call = self.profiler.is_some().then(Instant::now);
        let loaded = self.functions.iter_mut().find(|f| f.function.name == entry);
        let loaded = loaded.ok_or_else(|| Error::Input(format!("the artifact has no entry '{entry}'")))?;
        let entry = &self.manifest.entries[loaded.entry];
        let shape = |i: usize| loaded.states.get(i).and_then(State::shape);
        let inputs = binding::bind(&self.manifest.symbols, entry, inputs, shape, &mut loaded.symbols)?;
        loaded.before.clear();
        loaded.before.extend(loaded.states.iter().map(State::len));
        let watch = self.observer.as_mut().map(|observer| Watch::new(observer, &self.weights, entry));
        loaded.times = call.map(|_| vec![]);
        // An observer is told results as they are.
        let only_largest = self.only_largest && watch.is_none();
        let result = loaded.run(&self.kernels, &self.weights, &mut self.arena, (&inputs, outputs), only_largest, watch);
        if result.is_err() {
            loaded.states.iter_mut().zip(&loaded.before).for_each(|(s, len)| s.truncate(*len));
        } else if let (Some(profiler), Some(call), Some(steps)) = (&mut self.profiler, call, loaded.times.take()) {
            let (entry, symbols) = (entry.name.clone(), loaded.symbols.clone());
            profiler(TimedRun { entry, symbols, only_largest, call: [call, Instant::now()], steps });
        }
        result
    }

    fn only_largest(&mut self, on: bool) {
        self.only_largest = on;
    }

    fn large_page_bytes(&self) -> usize {
        self.weights.large_bytes()
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A norm in slot 1, which the next step multiplies with value 3 in slot `multiplied`; `then` follows.
    fn function(multiplied: u32, dynamic: bool, then: &str, output: u32) -> Function {
        let value = |place: &str| format!(r#"{{"dtype": "f32", "shape": [4], "place": {place}}}"#);
        let places = [r#"{"input": 0}"#, r#"{"slot": 0}"#, r#"{"slot": 1}"#, r#"{"weight": 0}"#, r#"{"slot": 2}"#].map(value);
        let json = format!(
            r#"{{"name": "f", "inputs": [{{"name": "x", "value": 0}}], "outputs": [{{"name": "y", "value": {output}}}], "states": [],
            "values": [{}], "steps": [
                {{"kernel": "add_rms_norm", "eps": 1e-6, "args": [0, 0, 3], "outs": [1, 2], "scope": ""}},
                {{"kernel": "linear", "dynamic": {dynamic}, "args": [{multiplied}, 3], "outs": [4], "scope": ""}}{then}]}}"#,
            places.join(", "),
        );
        serde_json::from_str(&json).unwrap()
    }

    #[test]
    fn norms_that_are_only_multiplied_are_rounded() {
        assert_eq!(super::multiplied(&function(2, true, "", 4)), [Some(3), None]);
        let reader = r#", {"kernel": "binary", "f": "add", "args": [2, 4], "outs": [4], "scope": ""}"#;
        for other in [function(2, true, reader, 4), function(2, true, "", 2), function(1, true, "", 4), function(2, false, "", 4)] {
            assert_eq!(super::multiplied(&other)[0], None);
        }
    }
}
