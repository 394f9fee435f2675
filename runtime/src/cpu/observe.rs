//! What an observer is told of the steps of a run.

use super::{memory::Frame, weights::Weights};
use crate::{Observed, Observer, Result, Tensor};
use std::collections::HashMap;
use vlmc_artifact::{
    Entry,
    program::{Kernel, Place, Step},
};

/// A run that is watched.
pub(super) struct Watch<'a> {
    observer: &'a mut Observer,
    weights: &'a Weights,
    entry: &'a Entry,
    /// Slots that hold what was computed from weights alone, with their names.
    derived: HashMap<u32, Vec<String>>,
}

/// The operands of a step.
#[derive(Default)]
pub(super) struct Operands {
    weights: Vec<String>,
    others: Vec<Tensor>,
}

impl<'a> Watch<'a> {
    pub(super) fn new(observer: &'a mut Observer, weights: &'a Weights, entry: &'a Entry) -> Self {
        Self { observer, weights, entry, derived: HashMap::new() }
    }

    /// Operands of a step that is about to run, which may overwrite them; `None` if no weight is among them.
    pub(super) fn before(&self, step: &Step, frame: &Frame<'_>) -> Result<Option<Operands>> {
        let mut out = Operands::default();
        let mut others = vec![];
        for arg in &step.args {
            match &frame.function.values[*arg as usize].place {
                Place::Weight(i) => out.weights.push(self.weights.name(*i as usize).into()),
                Place::Slot(i) if self.derived.contains_key(i) => out.weights.extend_from_slice(&self.derived[i]),
                Place::Literal(_) => {}
                _ => others.push(*arg as usize),
            }
        }
        if out.weights.is_empty() {
            return Ok(None);
        }
        out.others = others.into_iter().map(|arg| frame.tensor(arg)).collect::<Result<_>>()?;
        Ok(Some(out))
    }

    /// The step has run.
    pub(super) fn after(&mut self, step: &Step, frame: &Frame<'_>, operands: Option<Operands>) -> Result<()> {
        for out in &step.outs {
            if let Place::Slot(slot) = frame.function.values[*out as usize].place {
                self.derived.remove(&slot);
            }
        }
        let (first, last) = (step.outs[0] as usize, step.outs[step.outs.len() - 1] as usize);
        let Place::Slot(slot) = frame.function.values[last].place else { return Ok(()) };
        match operands {
            Some(Operands { weights, others }) if others.is_empty() => {
                self.derived.insert(slot, weights);
                Ok(())
            }
            Some(Operands { weights, others }) => {
                // The computation with weights is the norm, and of the sum.
                let adds = matches!(step.kernel, Kernel::AddLayerNorm { .. } | Kernel::AddRmsNorm { .. });
                let operands = if adds { vec![frame.tensor(first)?] } else { others };
                let act = if let Kernel::Linear { act, .. } = step.kernel { act } else { None };
                (self.observer)(Observed { entry: self.entry.name.clone(), weights, operands, result: frame.tensor(last)?, act })
            }
            None => Ok(()),
        }
    }
}
