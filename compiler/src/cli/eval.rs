//! `vlmc eval`.

use super::{EngineArgs, print, print_json};
use anyhow::Result;
use clap::Args;
use std::{num::NonZero, path::PathBuf};
use vlmc::{
    eval::{self, Evaluated},
    samples,
};
use vlmc_runtime::{Artifact, EngineOptions};

#[derive(Args)]
pub(super) struct EvalArgs {
    /// Artifact directory
    artifact: PathBuf,
    /// Artifact of the same model to compare with, for any target
    #[arg(long, value_name = "ARTIFACT")]
    reference: PathBuf,
    /// Pictures and prompts: a directory of files a.png and a.txt, or a list (.jsonl) of {"image": ..., "prompt": ..., "answer": ...}
    #[arg(long, value_name = "PATH")]
    data: PathBuf,
    /// Most samples
    #[arg(long, value_name = "N")]
    limit: Option<NonZero<usize>>,
    /// Most tokens of an answer
    #[arg(long, value_name = "N", default_value_t = NonZero::<usize>::MIN.saturating_add(63))]
    max_new_tokens: NonZero<usize>,
    #[command(flatten)]
    engine: EngineArgs,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn eval(args: &EvalArgs) -> Result<()> {
    let (artifact, reference) = (Artifact::open(&args.artifact)?, Artifact::open(&args.reference)?);
    let samples = samples::read(&args.data, args.limit.map(NonZero::get))?;
    let requests = eval::requests(&reference, &samples)?;
    let limit = args.max_new_tokens.get();
    let options = args.engine.options();
    // The reference may be for vlmc's own engine, which has no provider.
    let of_reference = EngineOptions { provider: options.provider.filter(|_| reference.manifest().target != "cpu"), ..options.clone() };
    let answers = Evaluated::open(&reference, &of_reference)?.answers(&requests, limit)?;
    let score = Evaluated::open(&artifact, &options)?.score(&samples, &requests, &answers, limit)?;
    if args.json {
        return print_json(&score);
    }
    let mut out = format!("{} samples: {} answers are the reference's\n", score.samples, score.same);
    if score.known > 0 {
        out += &format!("{} of {} are right\n", score.right, score.known);
    }
    out += &format!("KL divergence of a token's probabilities: {:.2e} mean, {:.2e} largest\n", score.mean_kl, score.max_kl);
    print(&out)
}
