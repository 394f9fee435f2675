//! Where the time goes: the steps of timed runs as tables, and as a trace.

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::{Value, json};
use std::{cell::RefCell, collections::HashMap, fmt, fs::File, io::BufWriter, path::Path, rc::Rc, time::Instant};
use vlmc_kernels::Isa;
use vlmc_runtime::{Profiler, TimedRun, Work, artifact::program::Program, work};

/// Runs that belong together.
pub(super) struct Phase {
    name: String,
    runs: Vec<TimedRun>,
}

/// Keeps the runs that an engine tells of.
#[derive(Default)]
pub(super) struct Recorder(Rc<RefCell<Vec<TimedRun>>>);

impl Recorder {
    pub(super) fn profiler(&self) -> Profiler {
        let runs = self.0.clone();
        Box::new(move |run| runs.borrow_mut().push(run))
    }

    /// The runs since the last phase.
    pub(super) fn phase(&self, name: String) -> Phase {
        Phase { name, runs: self.0.take() }
    }
}

/// Time by kernel, shape and type of weights.
#[derive(Serialize)]
pub(super) struct Table {
    phase: String,
    /// From the calls to the returns.
    ms: f64,
    /// Those that take longest first.
    steps: Vec<Row>,
}

/// Steps of one kernel, shape and type of weights.
#[derive(Serialize)]
struct Row {
    op: String,
    /// Rows and columns of the result, and the length of its sums; of attention queries, keys and width.
    m: usize,
    n: usize,
    k: usize,
    weight_type: Option<String>,
    calls: usize,
    ms: f64,
    /// Of all steps.
    share: f64,
    /// Weights and KV cache that were read per second.
    gb_s: f64,
    gop_s: f64,
}

pub(super) fn tables(program: &Program, phases: &[Phase]) -> Result<Vec<Table>> {
    phases.iter().map(|phase| table(program, phase)).collect()
}

fn table(program: &Program, phase: &Phase) -> Result<Table> {
    #[derive(Default)]
    struct Sum {
        calls: usize,
        seconds: f64,
        bytes: usize,
        operations: usize,
    }
    let mut sums: HashMap<(String, [usize; 3], Option<String>), Sum> = HashMap::new();
    let mut last: HashMap<&str, Vec<Work>> = HashMap::new();
    for run in phase.runs.iter().rev() {
        let works = work(program, &run.entry, &run.symbols, Isa::detect(), run.only_largest)?;
        // Each token sees one key more than the one before: they are one row, with the shape of the last.
        let named = last.entry(&run.entry).or_insert_with(|| works.clone());
        for ((w, named), times) in works.iter().zip(named).zip(run.steps.windows(2)) {
            let sum = sums.entry((w.op.clone(), named.shape, w.weight_type.map(|t| t.to_string()))).or_default();
            sum.calls += 1;
            sum.seconds += (times[1] - times[0]).as_secs_f64();
            sum.bytes += w.weight_bytes + w.state_bytes;
            sum.operations += w.operations;
        }
    }
    let all: f64 = sums.values().map(|s| s.seconds).sum();
    let rate = |n: usize, seconds: f64| if seconds > 0.0 { 1e-9 * n as f64 / seconds } else { 0.0 };
    let row = |((op, [m, n, k], weight_type), s): ((String, [usize; 3], Option<String>), Sum)| Row {
        op,
        m,
        n,
        k,
        weight_type,
        calls: s.calls,
        ms: 1e3 * s.seconds,
        share: if all > 0.0 { s.seconds / all } else { 0.0 },
        gb_s: rate(s.bytes, s.seconds),
        gop_s: rate(s.operations, s.seconds),
    };
    let mut steps: Vec<Row> = sums.into_iter().map(row).collect();
    steps.sort_by(|a, b| b.ms.total_cmp(&a.ms).then_with(|| (&a.op, a.m, a.n, a.k).cmp(&(&b.op, b.m, b.n, b.k))));
    let ms = phase.runs.iter().map(|r| 1e3 * (r.call[1] - r.call[0]).as_secs_f64()).sum();
    Ok(Table { phase: phase.name.clone(), ms, steps })
}

/// Rows of a table that are printed; JSON has all.
const SHOWN: usize = 20;

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {:.1} ms", self.phase, self.ms)?;
        writeln!(
            f,
            "  {:22} {:>22} {:10} {:>6} {:>10} {:>6} {:>7} {:>7}",
            "op", "m x n x k", "weights", "calls", "ms", "share", "GB/s", "GOP/s"
        )?;
        for r in self.steps.iter().take(SHOWN) {
            let shape = format!("{}x{}x{}", r.m, r.n, r.k);
            let weights = r.weight_type.as_deref().unwrap_or_default();
            let share = 100.0 * r.share;
            writeln!(
                f,
                "  {:22} {shape:>22} {weights:10} {:>6} {:>10.2} {share:>5.1}% {:>7.1} {:>7.0}",
                r.op, r.calls, r.ms, r.gb_s, r.gop_s
            )?;
        }
        if let Some(rest) = self.steps.get(SHOWN..).filter(|rest| !rest.is_empty()) {
            let (calls, ms): (usize, f64) = rest.iter().fold((0, 0.0), |(calls, ms), r| (calls + r.calls, ms + r.ms));
            writeln!(f, "  {:22} {:>22} {:10} {calls:>6} {ms:>10.2}", format!("{} more", rest.len()), "", "")?;
        }
        Ok(())
    }
}

/// Writes runs as JSON in the trace event format (Google, "Trace Event Format", 2016): a complete event for each run, and within it
/// one for each step, in microseconds.
pub(super) fn write_trace(path: &Path, program: &Program, phases: &[Phase]) -> Result<()> {
    let trace = trace(program, phases)?;
    let write = || {
        let mut file = BufWriter::new(File::create(path)?);
        serde_json::to_writer(&mut file, &trace)?;
        std::io::Write::flush(&mut file)
    };
    write().with_context(|| format!("--trace {}", path.display()))
}

fn trace(program: &Program, phases: &[Phase]) -> Result<Value> {
    let first = phases.iter().flat_map(|p| &p.runs).map(|r| r.call[0]).min();
    let micros = |at: Instant| first.map_or(0.0, |first| 1e6 * (at - first).as_secs_f64());
    let event = |name: String, category: &str, [from, to]: [Instant; 2], args: Value| json!({"name": name, "cat": category, "ph": "X", "pid": 1, "tid": 1, "ts": micros(from), "dur": micros(to) - micros(from), "args": args});
    let mut events = vec![
        json!({"name": "process_name", "ph": "M", "pid": 1, "tid": 1, "args": {"name": "vlmc"}}),
        json!({"name": "thread_name", "ph": "M", "pid": 1, "tid": 1, "args": {"name": "steps"}}),
    ];
    for (phase, run) in phases.iter().flat_map(|p| p.runs.iter().map(move |r| (p, r))) {
        let symbols: serde_json::Map<_, _> = run.symbols.iter().map(|(n, v)| (n.to_string(), json!(v))).collect();
        events.push(event(run.entry.clone(), &phase.name, run.call, symbols.into()));
        for (w, t) in work(program, &run.entry, &run.symbols, Isa::detect(), run.only_largest)?.iter().zip(run.steps.windows(2)) {
            let name = std::iter::once(&w.op).chain(&w.weights).map(String::as_str).collect::<Vec<_>>().join(" ");
            let [m, n, k] = w.shape;
            let args = json!({
                "scope": w.scope,
                "m": m,
                "n": n,
                "k": k,
                "weight_type": w.weight_type.map(|t| t.to_string()),
                "bytes": w.weight_bytes + w.state_bytes,
                "operations": w.operations,
            });
            events.push(event(name, &run.entry, [t[0], t[1]], args));
        }
    }
    Ok(json!({"traceEvents": events, "displayTimeUnit": "ms"}))
}
