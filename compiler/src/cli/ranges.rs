//! `vlmc ranges`.

use super::{checkpoint_dir, print, print_json, spinner};
use anyhow::Result;
use clap::Args;
use std::{fmt::Write, num::NonZero, path::PathBuf};
use vlmc::{
    calibrate,
    compile::Model,
    ranges::{Fidelity, LIMIT, Ranges},
    samples,
    verify::Request,
};
use vlmc_runtime::prepare::Preparer;

#[derive(Args)]
pub(super) struct RangesArgs {
    /// Checkpoint directory, Hugging Face id or alias
    model: String,
    /// Pictures and prompts to run on: a directory of files a.png and a.txt, or a list (.jsonl) of {"image": ..., "prompt": ...}
    /// [default: a synthetic one]
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// Most samples of --data
    #[arg(long, value_name = "N", requires = "data")]
    limit: Option<NonZero<usize>>,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn ranges(args: &RangesArgs) -> Result<()> {
    let model = Model::open(&checkpoint_dir(&args.model)?)?;
    let requests = match &args.data {
        Some(data) => calibrate::requests(&model, &samples::read(data, args.limit.map(NonZero::get))?)?,
        None => {
            let dir = model.checkpoint().dir();
            let preparer = Preparer::new(model.lower()?.task, model.processor()?, |name| Some(dir.join(name)).filter(|p| p.exists()))?;
            vec![Request { name: "synthetic".into(), tensors: preparer.synthetic()? }]
        }
    };
    let bar = spinner();
    let ranges = model.ranges(&requests, &|what| bar.set_message(what.to_string()));
    bar.finish_and_clear();
    let ranges = ranges?;
    if args.json { print_json(&ranges) } else { print(&text(&ranges)) }
}

fn text(r: &Ranges) -> String {
    let mut out = String::new();
    if r.islands.is_empty() && r.weights.is_empty() {
        let _ = writeln!(out, "All {} results fit f16: the largest number is {:.4e}, the limit {LIMIT:.4e}.", r.results, r.largest_in_f16);
    } else {
        let _ = writeln!(out, "{} of {} results stay in f32: they have numbers over {LIMIT:.4e}.\n", r.islands.len(), r.results);
        for i in &r.islands {
            let scope = if i.scope.is_empty() { &i.graph } else { &i.scope };
            let _ = writeln!(out, "  {scope:40} {:16} {:.4e}", i.op, i.largest);
        }
        for w in &r.weights {
            let _ = writeln!(out, "  {w:40} weight");
        }
        let _ = writeln!(out, "\nThe largest number of the others is {:.4e}.", r.largest_in_f16);
    }
    let fidelity = |f: Fidelity| f.error.map_or("infinite or undefined numbers".into(), |e| format!("relative error {e:.2e}"));
    let _ = writeln!(out, "Outputs in f16: {}; with what stays in f32: {}.", fidelity(r.plain), fidelity(r.with_islands));
    out
}
