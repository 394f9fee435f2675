//! Losses of pairs of towers, for scoring batches: entries over what the entry `score` gives.
//!
//! CLIP (Radford et al., 2021, figure 3), its distillation (open_clip `DistillClipLoss`), SigLIP (Zhai et al., 2023, equation 1).

use crate::{Error, Result};
use vlmc_artifact::{
    Task,
    program::{Binary, Reduce, Unary},
};
use vlmc_ir::{Builder, DType, Dim, Graph, Literal, Program, Symbol, Val};

/// Number of pictures and of texts: picture `i` belongs to text `i`.
const PAIRS: &str = "pairs";

/// Adds the entries `loss` and, for CLIP, `distillation`.
///
/// # Errors
/// The model has no pairs.
pub(crate) fn add(program: &mut Program, task: &Task) -> Result<()> {
    let Task::Contrast(rules) = task else {
        let message = "has no loss: only pairs of towers, such as CLIP and SigLIP, have one";
        return Err(Error::Model { model: program.name.clone(), message: message.into() });
    };
    if rules.sigmoid {
        program.graphs.push(graph("loss", |g| g.output("loss", sigmoid(g, logits(g, "logits_per_image"))))?);
    } else {
        program.graphs.push(graph("loss", |g| g.output("loss", cross_entropy(g, logits(g, "logits_per_image"))))?);
        program.graphs.push(graph("distillation", |g| {
            let (student, teacher) = (logits(g, "logits_per_image"), logits(g, "teacher_logits_per_image"));
            g.output("distillation_loss", distillation(g, student, teacher));
        })?);
    }
    program.symbols.push(Symbol { name: PAIRS.into(), min: 1, max: 65536 });
    Ok(())
}

fn graph(name: &str, build: impl for<'g> FnOnce(&'g Builder<'g>)) -> Result<Graph> {
    let g = Builder::new(name, None);
    build(&g);
    Ok(g.finish()?)
}

/// The input `f32[pairs, pairs]`: a row per picture, a column per text.
fn logits<'g>(g: &'g Builder<'g>, name: &str) -> Val<'g> {
    g.input(name, DType::F32, [PAIRS, PAIRS].map(Dim::symbol))
}

/// Which elements are of pairs that belong together: `bool[pairs, pairs]`.
fn diagonal<'g>(g: &'g Builder<'g>) -> Val<'g> {
    let index = g.iota(Dim::symbol(PAIRS));
    g.binary(Binary::Eq, g.unsqueeze(index, 1), g.unsqueeze(index, 0))
}

/// Logarithms of the softmax along `axis`.
fn log_softmax<'g>(g: &'g Builder<'g>, x: Val<'g>, axis: usize) -> Val<'g> {
    let centred = x - g.unsqueeze(g.reduce(Reduce::Max, x, &[axis]), axis);
    let sum = g.reduce(Reduce::Sum, g.unary(Unary::Exp, centred), &[axis]);
    centred - g.unsqueeze(g.unary(Unary::Log, sum), axis)
}

/// Minus the mean over rows (pictures against all texts) and over columns (texts against all pictures) of `sum(weight *
/// log_softmax(logits))`, and of these two the mean.
fn both_ways<'g>(g: &'g Builder<'g>, logits: Val<'g>, weight: impl Fn(usize) -> Val<'g>) -> Val<'g> {
    let [texts, pictures] = [1, 0].map(|axis| g.reduce(Reduce::Sum, weight(axis) * log_softmax(g, logits, axis), &[0, 1]));
    (texts + pictures) / g.cast(g.dim(Dim::symbol(PAIRS)), DType::F32) * -0.5
}

/// Cross-entropy of the right text for each picture and of the right picture for each text: `f32[]`.
fn cross_entropy<'g>(g: &'g Builder<'g>, logits: Val<'g>) -> Val<'g> {
    let right = g.cast(diagonal(g), DType::F32);
    both_ways(g, logits, |_| right)
}

/// Cross-entropy of the teacher's probabilities and the student's, both ways: `f32[]`.
fn distillation<'g>(g: &'g Builder<'g>, student: Val<'g>, teacher: Val<'g>) -> Val<'g> {
    both_ways(g, student, |axis| g.unary(Unary::Exp, log_softmax(g, teacher, axis)))
}

/// Minus the sum over all pairs of `log sigmoid(z * logit)`, `z` being 1 for those that belong together and -1 for the others, per
/// picture: `f32[]`. The logits have their scale and bias.
fn sigmoid<'g>(g: &'g Builder<'g>, logits: Val<'g>) -> Val<'g> {
    let scalar = |v: f64| g.literal(Literal::scalar(DType::F32, v));
    let x = g.select(diagonal(g), logits, g.unary(Unary::Neg, logits));
    // log sigmoid(x) = min(x, 0) - log(1 + exp(-|x|)), which never overflows.
    let tail = g.unary(Unary::Log, g.unary(Unary::Exp, g.unary(Unary::Neg, g.unary(Unary::Abs, x))) + 1.0);
    let sum = g.reduce(Reduce::Sum, g.binary(Binary::Min, x, scalar(0.0)) - tail, &[0, 1]);
    sum / g.cast(g.dim(Dim::symbol(PAIRS)), DType::F32) * -1.0
}
